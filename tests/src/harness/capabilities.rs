//! Users and programs with some capabilities and no others.

use std::{ffi::CString, io, path::Path};

use anyhow::{Result, ensure};

pub const CAP_DAC_OVERRIDE: u32 = 1;
pub const CAP_IPC_LOCK: u32 = 14;

/// Before an exec: the program runs as this user, with these capabilities and no others.
pub fn become_user(user: u32, capabilities: &[u32]) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let done = |result: i64| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let mask = capabilities.iter().fold(0u32, |mask, bit| mask | 1 << bit);
    // struct __user_cap_header_struct and two of __user_cap_data_struct: effective, permitted, inheritable.
    let (header, data) = ([VERSION_3, 0], [mask, mask, mask, 0, 0, 0]);
    // SAFETY: system calls with numbers, and with arrays that live during the call.
    unsafe {
        done(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())?;
        done(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()))?;
        done(libc::syscall(libc::SYS_setresgid, user, user, user))?;
        done(libc::syscall(libc::SYS_setresuid, user, user, user))?;
        done(libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()))?;
        for bit in capabilities {
            done(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, *bit, 0, 0).into())?;
        }
    }
    Ok(())
}

/// Gives the program in the file at `path` these capabilities when it is executed, as setcap does; none: takes all
/// away.
pub fn set_file_capabilities(path: &Path, capabilities: &[u32]) -> Result<()> {
    let name = c"security.capability";
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let mask = capabilities.iter().fold(0u32, |mask, bit| mask | 1 << bit);
    // struct vfs_cap_data, revision 2 with its effective bit: permitted, inheritable, and the upper halves
    // (linux/capability.h).
    let data: Vec<u8> = [0x0200_0001, mask, 0, 0, 0].iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
    // SAFETY: strings and bytes that live during the call.
    let done = unsafe {
        match capabilities {
            [] => libc::removexattr(path.as_ptr(), name.as_ptr()),
            _ => libc::setxattr(path.as_ptr(), name.as_ptr(), data.as_ptr().cast(), data.len(), 0),
        }
    };
    ensure!(done == 0, "{}: capabilities: {}", path.to_string_lossy(), io::Error::last_os_error());
    Ok(())
}
