//! Why a file is not what an update goes to.

use std::io;
use std::path::PathBuf;

use super::guard::Unguarded;
use super::handshake::DryRunError;
use super::signature::Unsigned;
use crate::elf::ElfError;

/// In the words that a caller reads.
#[derive(Debug, thiserror::Error)]
#[error("binary {}: {reason}", path.display())]
pub(crate) struct Unfit {
    pub path: PathBuf,
    pub reason: Reason,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Reason {
    #[error("cannot be opened: {0}")]
    NotOpened(io::Error),
    #[error("is not a regular file")]
    NotAFile,
    #[error("is at {}, not below {} (--update-dir)", real.display(), folder.display())]
    Elsewhere { real: PathBuf, folder: PathBuf },
    #[error(
        "is at {}, not below {}, where this VMM was started from: copy it there, or start the VMM with --update-dir",
        real.display(), folder.display()
    )]
    NotBeside { real: PathBuf, folder: PathBuf },
    #[error("may only be below {} (--update-dir, or where the VMM was started from): {source}", folder.display())]
    NoFolder { folder: PathBuf, source: io::Error },
    #[error(transparent)]
    Unguarded(#[from] Unguarded),
    #[error("is not executable: chmod +x")]
    NotExecutable,
    #[error("may not be executed: {0}: by this user, or is its file system mounted noexec?")]
    MayNotExecute(io::Error),
    #[error(transparent)]
    Elf(#[from] ElfError),
    #[error("is not a build of Theseus")]
    Foreign,
    #[error("its SHA-256 is {found}, not {wanted}")]
    Sum { found: String, wanted: String },
    #[error("cannot be read: {0}")]
    NotRead(io::Error),
    #[error(transparent)]
    Unsigned(#[from] Unsigned),
    #[error("version {to} is older than the running {from}: {remedy}")]
    Older { to: String, from: String, remedy: &'static str },
    #[error("says that its version is '{to}', which is none ({source}): {remedy}")]
    NoVersion { to: String, source: semver::Error, remedy: &'static str },
    #[error("dry run: {0}")]
    DryRun(#[from] DryRunError),
    #[error(transparent)]
    Os(#[from] io::Error),
}

/// What an older build takes, where the VMM allows one at all, and where not.
pub(super) fn back(allowed: bool) -> &'static str {
    match allowed {
        true => "say allow_downgrade",
        false => "as it was started with --update-key, this VMM goes back only with --allow-downgrade as well",
    }
}
