//! What the two VMMs of an update say to each other.
//!
//! ```text
//!   old --Rehearsal [state]--> new            the guest runs
//!       <--More-- ... --Fds [fds]-->          until all are there that the state names
//!       <--Ready--
//!       --State [state]-->                    it stands still
//!       <--More-- ... --Fds [fds]-->          what was opened since
//!       <--Committed--                        or Failed, at any time before
//! ```
//!
//! Each `Fds` is asked for: descriptors under way count, for each user, against RLIMIT_NOFILE (net/core/scm.c,
//! too_many_unix_fds).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use theseus_resources::Channel;
use theseus_resources::channel::ChannelError;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToNew {
    Rehearsal,
    Fds,
    State,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToOld {
    More,
    Ready,
    Failed(String),
    Committed,
}

pub fn say(to: &Channel, word: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
    let text = serde_json::to_vec(word).map_err(|error| ChannelError::Os(error.into()))?;
    to.send(&text, fds)
}

pub fn hear<T: DeserializeOwned>(from: &Channel, within: Duration) -> Result<(T, Vec<OwnedFd>), ChannelError> {
    let (text, fds) = from.receive(within)?;
    let word = serde_json::from_slice(&text).map_err(|error| ChannelError::Os(error.into()))?;
    Ok((word, fds))
}
