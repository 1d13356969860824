//! MSI-X without a driver (it is taken off the device): what a benchmark needs to have as many live vectors as it
//! wants.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Error},
    os::{fd::AsRawFd, unix::fs::FileExt},
};

/// PCI Local Bus 3.0, 6.7: the capability list's head, and the ID of MSI-X.
const CAPABILITIES: u64 = 0x34;
const MSIX: u8 = 0x11;
const ENABLE: u16 = 1 << 15;
const ENTRY: usize = 16;
/// A message that nobody would ever send: the device is left alone.
const ADDRESS: u32 = 0xfee0_0000;
const DATA: u32 = 0x30;

/// Enables MSI-X on the device at `bdf` with every vector unmasked. How many they are.
pub(super) fn on(bdf: &str) -> io::Result<u32> {
    let dir = take_driver_off(bdf)?;
    fs::write(format!("{dir}/enable"), "1")?;
    let config = OpenOptions::new().read(true).write(true).open(format!("{dir}/config"))?;
    let at = capability(&config, MSIX)?;
    let control = u16::from_le_bytes(read(&config, at + 2)?);
    let table = u32::from_le_bytes(read(&config, at + 4)?);
    let count = usize::from(control & 0x7ff) + 1;
    let (bar, offset) = (table & 7, (table & !7) as usize);
    let region = OpenOptions::new().read(true).write(true).open(format!("{dir}/resource{bar}"))?;
    let len = (offset + count * ENTRY).next_multiple_of(4096);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            region.as_raw_fd(),
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    for vector in 0..count {
        for (word, value) in [(0, ADDRESS), (1, 0), (2, DATA), (3, 0)] {
            // SAFETY: inside the mapping, aligned; a device register, hence volatile.
            unsafe { base.cast::<u8>().add(offset + vector * ENTRY).cast::<u32>().add(word).write_volatile(value) };
        }
    }
    config.write_all_at(&(control | ENABLE).to_le_bytes(), at + 2)?;
    // SAFETY: mapped above, not used any more.
    unsafe { libc::munmap(base, len) };
    Ok(count as u32)
}

/// The device's folder.
pub(super) fn take_driver_off(bdf: &str) -> io::Result<String> {
    let dir = format!("/sys/bus/pci/devices/{bdf}");
    if fs::exists(format!("{dir}/driver"))? {
        fs::write(format!("{dir}/driver/unbind"), bdf)?;
    }
    Ok(dir)
}

fn read<const N: usize>(config: &File, at: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    config.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

/// Where the capability `wanted` is.
pub(super) fn capability(config: &File, wanted: u8) -> io::Result<u64> {
    let [mut at] = read(config, CAPABILITIES)?;
    for _ in 0..48 {
        if at < 0x40 {
            break;
        }
        let [id, next] = read(config, at.into())?;
        if id == wanted {
            return Ok(at.into());
        }
        at = next & !3;
    }
    Err(Error::other(format!("no capability {wanted:#x}")))
}
