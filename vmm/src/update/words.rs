//! What the two VMMs of an update say to each other.
//!
//! ```text
//!   old --Rehearsal [state, fds]--> new       the guest runs
//!       <--More-- ... --Fds [fds]-->          until all are there that the state names
//!       <--Ready--
//!       --Ahead [handover, fds]-->            if it knows this word: what goes over beside the machine
//!       <--More-- ... --Fds [fds]-->
//!       <--Ready--
//!       --Soon-->                             it stands still
//!       --State [state, fds]-->               those that were opened since
//!       <--More-- ... --Fds [fds]-->
//!       <--Committed--                        or Failed, at any time before
//! ```
//!
//! What does not fit into one message is asked for: descriptors under way count, for each user, against RLIMIT_NOFILE
//! (net/core/scm.c, too_many_unix_fds).

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToNew {
    Rehearsal,
    Fds,
    /// Known to who writes handovers of version [`super::saved::AHEAD`].
    Ahead,
    /// The state is nearly there: this is to wake the new VMM meanwhile.
    Soon,
    State,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToOld {
    More,
    Ready,
    Failed(String),
    Committed,
}
