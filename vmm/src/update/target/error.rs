//! Why a file is not what an update goes to.

use std::io;
use std::path::PathBuf;

use super::guard::Unguarded;
use super::handshake::DryRunError;
use crate::elf::ElfError;

/// In the words that a caller reads.
#[derive(Debug, thiserror::Error)]
#[error("binary {}: {reason}", path.display())]
pub struct Unfit {
    pub path: PathBuf,
    pub reason: Reason,
}

#[derive(Debug, thiserror::Error)]
pub enum Reason {
    #[error("cannot be opened: {0}")]
    NotOpened(io::Error),
    #[error("is not a regular file")]
    NotAFile,
    #[error("is at {}, not below {} (--update-dir)", real.display(), folder.display())]
    Elsewhere { real: PathBuf, folder: PathBuf },
    #[error("--update-dir {}: {source}", folder.display())]
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
    #[error("version {to} is older than the running {from}: say allow_downgrade")]
    Older { to: String, from: String },
    #[error("says that its version is '{to}', which is none ({source}): say allow_downgrade")]
    NoVersion { to: String, source: semver::Error },
    #[error("dry run: {0}")]
    DryRun(#[from] DryRunError),
    #[error(transparent)]
    Os(#[from] io::Error),
}
