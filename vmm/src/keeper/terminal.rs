//! The terminal of the keeper's job. A VMM makes it raw for its guest (`--serial tty`) and puts it back; one that is
//! ended by a signal cannot, and the keeper, which has ended nothing by itself, does.

use std::os::fd::BorrowedFd;

use theseus_devices::legacy::serial::SavedTermios;

/// Names the settings over an exec of the keeper, as JSON.
pub(super) const VARIABLE: &str = "THESEUS_TERMINAL";

/// Standard input as it was before there was a VMM; None where that is no terminal.
pub(super) struct Terminal(Option<SavedTermios>);

impl Terminal {
    pub(super) fn before_all() -> Self {
        Self(SavedTermios::of(stdin()))
    }

    /// As the keeper had it that became this program.
    pub(super) fn from_env() -> Self {
        let settings = std::env::var(VARIABLE).ok();
        Self(settings.and_then(|text| serde_json::from_str(&text).ok()))
    }

    pub(super) fn to_env(&self) -> Option<String> {
        self.0.as_ref().and_then(|settings| serde_json::to_string(settings).ok())
    }

    pub(super) fn put_back(&self) {
        if let Some(settings) = &self.0 {
            // One that has hung up needs none.
            let _ = settings.put_back(stdin());
        }
    }
}

fn stdin() -> BorrowedFd<'static> {
    // SAFETY: for one call each. Where it is closed, or something else has its number, that is no terminal.
    unsafe { BorrowedFd::borrow_raw(0) }
}
