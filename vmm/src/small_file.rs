//! A small file that somebody names, whatever is there.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Without the file's name.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SmallFileError {
    #[error("cannot be opened: {0}")]
    Open(io::Error),
    #[error("is not a regular file")]
    NotAFile,
    #[error("is longer than {most} bytes")]
    TooLong { most: u64 },
    #[error("cannot be read: {0}")]
    Read(io::Error),
    #[error("is not text")]
    NotText,
}

/// A text of `most` bytes at most. What is no regular file is not opened: a FIFO would wait for its other end.
pub(crate) fn read(path: &Path, most: u64) -> Result<String, SmallFileError> {
    if !std::fs::metadata(path).map_err(SmallFileError::Open)?.is_file() {
        return Err(SmallFileError::NotAFile);
    }
    // What is there may be another file by now.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(SmallFileError::Open)?;
    if !file.metadata().map_err(SmallFileError::Read)?.is_file() {
        return Err(SmallFileError::NotAFile);
    }
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(SmallFileError::Read)?;
    if bytes.len() as u64 > most {
        return Err(SmallFileError::TooLong { most });
    }
    String::from_utf8(bytes).map_err(|_| SmallFileError::NotText)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_small_text_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let told = |path: &Path| read(path, 4).unwrap_err().to_string();
        assert!(told(&path).contains("No such file"));
        std::fs::write(&path, "four").unwrap();
        assert_eq!(read(&path, 4).unwrap(), "four");
        std::fs::write(&path, "fives").unwrap();
        assert!(told(&path).contains("longer than 4 bytes"));
        std::fs::write(&path, [0xFF]).unwrap();
        assert!(told(&path).contains("not text"));
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        for path in [&fifo, dir.path(), Path::new("/dev/null")] {
            assert!(told(path).contains("not a regular file"), "{}", path.display());
        }
    }
}
