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

use serde::{Deserialize, Serialize};

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
