//! How the running file was named by who started it, which is where the next build is looked for.
//!
//! The name and not the file: a package upgrade replaces the file, or moves a symbolic link to another folder.

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub(super) const EXE: &str = "/proc/self/exe";

/// The name by which this process was started, absolute; to be asked at the start. None where it was started by a
/// descriptor and no argument tells, either.
pub(crate) fn started_from() -> Option<PathBuf> {
    // SAFETY: takes a number only.
    let executed = unsafe { libc::getauxval(libc::AT_EXECFN) } as *const libc::c_char;
    let executed = if executed.is_null() {
        c""
    } else {
        // SAFETY: a string that the kernel has put beside arguments and environment, where it stays (getauxval(3)).
        unsafe { CStr::from_ptr(executed) }
    };
    // The argument is for where an older build has started this one, by a descriptor, and does not say its name.
    name_of(Path::new(OsStr::from_bytes(executed.to_bytes())))
        .or_else(|| name_of(Path::new(&std::env::args_os().next()?)))
}

/// `name`, if it leads to the file that runs. That of execveat is "/dev/fd/N" (fs/exec.c, alloc_bprm), which means
/// nothing later.
fn name_of(name: &Path) -> Option<PathBuf> {
    let id = |path: &Path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let by_fd = name.starts_with("/dev/fd") || name.starts_with("/proc");
    // One word is what a shell has looked up in PATH.
    let is_path = name.as_os_str().as_bytes().contains(&b'/');
    let same = is_path && !by_fd && id(name)? == id(Path::new(EXE))?;
    if same { std::path::absolute(name).ok() } else { None }
}

/// What is now called as the running file was; where that name is not known, what is now in the file's place.
pub(crate) fn default_path(started_from: Option<&Path>) -> io::Result<PathBuf> {
    if let Some(name) = started_from {
        return Ok(name.into());
    }
    let path = std::fs::read_link(EXE)?;
    Ok(match path.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(original) => original.into(),
        None => path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_kept_as_it_was_given() {
        let exe = std::fs::read_link(EXE).unwrap();
        let name = started_from().unwrap();
        assert_eq!(name.canonicalize().unwrap(), exe);
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("theseus");
        std::os::unix::fs::symlink(&exe, &link).unwrap();
        assert_eq!(name_of(&link), Some(link.clone()));
        assert_eq!(default_path(Some(&link)).unwrap(), link);
        let fd = std::fs::File::open(&exe).unwrap();
        use std::os::fd::AsRawFd;
        for wrong in [format!("/dev/fd/{}", fd.as_raw_fd()), EXE.into(), "/bin/sh".into(), "theseus".into(), "".into()]
        {
            assert_eq!(name_of(Path::new(&wrong)), None, "{wrong}");
        }
        assert_eq!(default_path(None).unwrap(), exe);
    }
}
