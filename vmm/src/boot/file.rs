//! Opening what a caller names as kernel or initramfs, whatever is there.

use std::fs::{File, Metadata};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::BootError;

/// None if it is no regular file, and then it was not opened: a FIFO would wait for its other end, a tape would be
/// rewound.
pub(super) fn open(path: &Path) -> Result<Option<(File, Metadata)>, BootError> {
    let error = |source| BootError::Open { path: path.into(), source };
    if !std::fs::metadata(path).map_err(error)?.is_file() {
        return Ok(None);
    }
    // What is there may be another file by now.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(error)?;
    let metadata = file.metadata().map_err(error)?;
    Ok(metadata.is_file().then_some((file, metadata)))
}
