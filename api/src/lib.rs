//! The control surface of Theseus: REST types, command line option strings, the server and the client.
//!
//! The crate knows nothing of the VMM: the server hands every [`Request`] to a [`server::Backend`] and sends back its
//! [`Reply`].

pub mod access;
pub mod args;
pub mod client;
pub mod endpoint;
mod reply;
pub mod server;
pub mod types;

pub use endpoint::Request;
pub use reply::{ApiError, Body, Reply};

/// All endpoints live below this path.
pub const API_PREFIX: &str = "/api/v1/";
