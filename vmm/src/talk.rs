//! Words over a channel, between a keeper and its VMMs or two VMMs of an update. In JSON: both sides may be of
//! different builds.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use theseus_resources::Channel;
use theseus_resources::channel::ChannelError;

pub(crate) fn send(to: &Channel, word: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
    let text = serde_json::to_vec(word).map_err(|error| ChannelError::Os(error.into()))?;
    to.send(&text, fds)
}

/// The next word, and what came with it.
pub(crate) fn receive<T: DeserializeOwned>(
    from: &Channel,
    within: Duration,
) -> Result<(T, Vec<OwnedFd>), ChannelError> {
    let (text, fds) = from.receive(within)?;
    let word = serde_json::from_slice(&text).map_err(|error| ChannelError::Os(error.into()))?;
    Ok((word, fds))
}
