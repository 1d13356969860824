//! Loads an initramfs as high as the kernel allows, where the kernel's own unpacking cannot reach it.

use std::ops::Range;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::BootError;

const PAGE: u64 = 0x1000;

/// Where an initramfs lies; below 4 GiB, because that is how far 32-bit fields of both protocols and Linux' early
/// mapping go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initramfs {
    pub addr: u32,
    pub size: u32,
}

/// Loads `path` at the top of `room`, page aligned.
pub(super) fn load(mem: &GuestMemoryMmap, path: &Path, room: Range<u64>) -> Result<Initramfs, BootError> {
    let error = |reason: String| BootError::Initramfs { path: path.into(), reason };
    let Some((mut file, metadata)) = super::file::open(path)? else {
        return Err(BootError::NotAFile { path: path.into() });
    };
    let size = metadata.len();
    if size == 0 {
        return Err(error("is empty; give a cpio archive, or leave it out".into()));
    }

    let addr = place(size, &room).ok_or_else(|| {
        let free = room.end.saturating_sub(room.start);
        error(format!("has {size} bytes, {free} are free beside the kernel; give the guest more memory or shrink it"))
    })?;
    let (Ok(addr32), Ok(size32)) = (u32::try_from(addr), u32::try_from(size)) else {
        return Err(error("does not fit below 4 GiB; shrink it".into()));
    };
    mem.read_exact_volatile_from(GuestAddress(addr), &mut file, size32 as usize)
        .map_err(|error| BootError::Read { path: path.into(), source: std::io::Error::other(error) })?;
    Ok(Initramfs { addr: addr32, size: size32 })
}

fn place(size: u64, room: &Range<u64>) -> Option<u64> {
    let addr = room.end.checked_sub(size)? & !(PAGE - 1);
    (addr >= room.start).then_some(addr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placed_high_and_page_aligned() {
        assert_eq!(place(1, &(0x1000..0x10000)), Some(0xF000));
        assert_eq!(place(0x1001, &(0x1000..0x10000)), Some(0xE000));
        assert_eq!(place(0xF000, &(0x1000..0x10000)), Some(0x1000));
        assert_eq!(place(0xF001, &(0x1000..0x10000)), None);
        assert_eq!(place(u64::MAX, &(0x1000..0x10000)), None);
        assert_eq!(place(1, &Range { start: 0x10000, end: 0x1000 }), None, "no room at all");
    }
}
