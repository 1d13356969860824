//! The control surface of Theseus: REST types, command line option strings, the server and the client.
//!
//! The crate knows nothing of the VMM: the server hands every [`Request`] to a [`server::Backend`] and sends back its
//! [`Reply`].

pub mod access;
pub mod args;
pub mod client;
mod request;
pub mod server;
pub mod types;

pub use request::{ApiError, Body, Reply, Request};

/// All endpoints live below this path.
pub const API_PREFIX: &str = "/api/v1/";
