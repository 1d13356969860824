//! The bodies of the fuzz targets: what is done with the bytes that a fuzzer makes up, and what has to hold then. The
//! targets (`targets/`) only call them, and so does the test that replays `corpus/`.

#![allow(missing_docs, reason = "nothing outside of this package uses it")]

pub mod arguments;
mod devices;
pub mod http;
mod input;
pub mod mutate;
pub mod passthrough;
pub mod registers;
pub mod requests;
pub mod saved_state;

type Target = fn(&[u8]);

/// By name, as cargo-fuzz has them.
pub const TARGETS: &[(&str, Target)] = &[
    ("registers", registers::run),
    ("passthrough", passthrough::run),
    ("requests", requests::run),
    ("http", http::run),
    ("arguments", arguments::run),
    ("saved_state", saved_state::run),
];
