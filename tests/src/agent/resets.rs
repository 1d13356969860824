//! Configuration space by hand, and function-level resets without end: what a guest can do to hold whoever waits for
//! the device.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use crate::agent::{
    machine::pin_to,
    vectors::{capability, take_driver_off},
};

/// PCI Express 6.0, 7.5.3.4: Device Control, in the capability with this ID, and its bit Initiate Function Level Reset.
const EXPRESS: u8 = 0x10;
const DEVICE_CONTROL: u64 = 8;
const RESET: u16 = 1 << 15;

fn config(bdf: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(format!("/sys/bus/pci/devices/{bdf}/config"))
}

pub(super) fn config_read(bdf: &str, offset: u64) -> io::Result<u16> {
    let mut word = [0; 2];
    config(bdf)?.read_exact_at(&mut word, offset)?;
    Ok(u16::from_le_bytes(word))
}

pub(super) fn config_write(bdf: &str, offset: u64, value: u16) -> io::Result<()> {
    config(bdf)?.write_all_at(&value.to_le_bytes(), offset)
}

/// A register of configuration space in the ECAM, mapped: by sysfs the kernel lets one CPU at a time write, and ports
/// are closed to user mode after an update in the lab, whose QEMU takes a busy TSS for none (helper_check_io wants type
/// 9, and KVM gives 11).
struct Register {
    page: *mut u8,
    offset: usize,
}

/// Size of a function's configuration space in the ECAM, in bytes (PCI Express 6.0, 7.2.2).
const FUNCTION: u64 = 4096;

// SAFETY: device memory, which any thread may write to.
unsafe impl Send for Register {}
// SAFETY: as above.
unsafe impl Sync for Register {}

impl Register {
    /// Requirements iomem=relaxed.
    fn map(bdf: &str, offset: u64) -> io::Result<Self> {
        // PCI Firmware 3.3, 4.1.2: the base address of the first allocation.
        let table = std::fs::read("/sys/firmware/acpi/tables/MCFG")?;
        let base = table.get(44..52).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        let at = base.ok_or_else(|| io::Error::other("no ECAM in the MCFG"))? + place(bdf)?;
        let memory = OpenOptions::new().read(true).write(true).custom_flags(libc::O_SYNC).open("/dev/mem")?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                FUNCTION as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_raw_fd(),
                at as libc::off_t,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { page: page.cast(), offset: offset as usize })
    }

    fn write(&self, value: u16) {
        // SAFETY: inside the mapping, aligned as a register is.
        unsafe { self.page.add(self.offset).cast::<u16>().write_volatile(value) };
    }
}

impl Drop for Register {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`; whoever writes has a reference to this.
        unsafe { libc::munmap(self.page.cast(), FUNCTION as usize) };
    }
}

/// Where a function's configuration space lies in the ECAM.
fn place(bdf: &str) -> io::Result<u64> {
    let unknown = || io::Error::other(format!("{bdf}: not DOMAIN:BUS:SLOT.FUNCTION"));
    let (rest, function) = bdf.rsplit_once('.').ok_or_else(unknown)?;
    let mut parts = rest.rsplit(':').map(|part| u64::from_str_radix(part, 16).map_err(|_| unknown()));
    let (slot, bus) = (parts.next().ok_or_else(unknown)??, parts.next().ok_or_else(unknown)??);
    let function: u64 = function.parse().map_err(|_| unknown())?;
    Ok(bus << 20 | slot << 15 | function << 12)
}

pub(super) struct Resets {
    stop: Arc<AtomicBool>,
    counts: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<()>>,
}

impl Resets {
    pub(super) fn start(bdf: &str, cpus: &[usize]) -> io::Result<Self> {
        take_driver_off(bdf)?;
        let at = capability(&config(bdf)?, EXPRESS)? + DEVICE_CONTROL;
        let value = config_read(bdf, at)? | RESET;
        let register = Arc::new(Register::map(bdf, at)?);
        let mut resets = Self { stop: Arc::default(), counts: Vec::new(), threads: Vec::new() };
        for &cpu in cpus {
            let (stop, count) = (Arc::clone(&resets.stop), Arc::<AtomicU64>::default());
            let register = Arc::clone(&register);
            resets.counts.push(Arc::clone(&count));
            let thread = std::thread::Builder::new().name(format!("reset{cpu}")).spawn(move || {
                if let Err(error) = pin_to(cpu) {
                    return eprintln!("agent: no resets from CPU {cpu}: {error}");
                }
                while !stop.load(Ordering::Relaxed) {
                    register.write(value);
                    count.fetch_add(1, Ordering::Relaxed);
                }
            })?;
            resets.threads.push(thread);
        }
        Ok(resets)
    }

    pub(super) fn counts(&self) -> Vec<u64> {
        self.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect()
    }

    pub(super) fn stop(self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let Self { counts, threads, .. } = self;
        for thread in threads {
            let _ = thread.join();
        }
        counts.iter().map(|c| c.load(Ordering::Relaxed)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_in_the_ecam() {
        assert_eq!(place("0000:00:03.0").unwrap(), 0x1_8000);
        assert_eq!(place("0000:02:1f.6").unwrap(), 0x2F_E000);
        assert!(place("x").is_err());
    }
}
