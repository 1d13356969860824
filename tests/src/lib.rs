//! The end-to-end tests of Theseus: the agent that runs in the guest (L2), and the tests that run in L1 beside the VMM.
//!
//! Modules used on both sides of the serial line come first; `agent` is the guest's side, the others are L1's.

#![allow(missing_docs, reason = "nothing outside of this package uses it")]

/// How long what is sure to come may take. This finds a hang, and nothing else: how fast a machine is, and what else it
/// does, must not decide whether a test passes.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_secs(600);

pub mod clock;
pub mod counters;
pub mod net;
pub mod proto;
pub mod seq;
pub mod stream;

pub mod agent;

pub mod bench;
pub mod cases;
pub mod demo;
pub mod floor;
pub mod harness;
pub mod native;
pub mod soak;
pub mod stillness;
