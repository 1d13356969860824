//! Configuration space by hand, and function-level resets without end: what a guest can do to hold whoever waits for the device.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
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

pub fn config_read(bdf: &str, offset: u64) -> io::Result<u16> {
    let mut word = [0; 2];
    config(bdf)?.read_exact_at(&mut word, offset)?;
    Ok(u16::from_le_bytes(word))
}

pub fn config_write(bdf: &str, offset: u64, value: u16) -> io::Result<()> {
    config(bdf)?.write_all_at(&value.to_le_bytes(), offset)
}

/// Ports 0xCF8 and 0xCFC (PCI Local Bus 3.0, 3.2.2.3.2), as the kernel lets one CPU at a time write by sysfs. All threads write the same address, so
/// none writes to what another has named.
#[derive(Clone, Copy)]
struct Register {
    address: u32,
    port: u16,
}

impl Register {
    fn new(bdf: &str, offset: u64) -> io::Result<Self> {
        let unknown = || io::Error::other(format!("{bdf}: not DOMAIN:BUS:SLOT.FUNCTION"));
        let (rest, function) = bdf.rsplit_once('.').ok_or_else(unknown)?;
        let mut parts = rest.rsplit(':').map(|part| u32::from_str_radix(part, 16).map_err(|_| unknown()));
        let (slot, bus) = (parts.next().ok_or_else(unknown)??, parts.next().ok_or_else(unknown)??);
        let function: u32 = function.parse().map_err(|_| unknown())?;
        let offset = offset as u32;
        Ok(Self {
            address: 1 << 31 | bus << 16 | slot << 11 | function << 8 | offset & 0xFC,
            port: 0xCFC + (offset & 2) as u16,
        })
    }

    fn write(self, value: u16) {
        // SAFETY: ports that ioperm has opened to this thread; they change no memory of this process.
        unsafe {
            std::arch::asm!("out dx, eax", in("dx") 0xCF8_u16, in("eax") self.address, options(nostack, preserves_flags));
            std::arch::asm!("out dx, ax", in("dx") self.port, in("ax") value, options(nostack, preserves_flags));
        }
    }
}

pub struct Resets {
    stop: Arc<AtomicBool>,
    counts: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<()>>,
}

impl Resets {
    pub fn start(bdf: &str, cpus: &[usize]) -> io::Result<Self> {
        take_driver_off(bdf)?;
        let at = capability(&config(bdf)?, EXPRESS)? + DEVICE_CONTROL;
        let value = config_read(bdf, at)? | RESET;
        let register = Register::new(bdf, at)?;
        let mut resets = Self { stop: Arc::default(), counts: Vec::new(), threads: Vec::new() };
        for &cpu in cpus {
            let (stop, count) = (Arc::clone(&resets.stop), Arc::<AtomicU64>::default());
            resets.counts.push(Arc::clone(&count));
            let thread = std::thread::Builder::new().name(format!("reset{cpu}")).spawn(move || {
                // SAFETY: a plain system call, for this thread only.
                let opened = unsafe { libc::ioperm(0xCF8, 8, 1) };
                if opened < 0 || pin_to(cpu).is_err() {
                    return eprintln!("agent: no resets from CPU {cpu}: {}", io::Error::last_os_error());
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

    pub fn counts(&self) -> Vec<u64> {
        self.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect()
    }

    pub fn stop(self) -> Vec<u64> {
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
    fn registers_by_port() {
        let register = Register::new("0000:00:03.0", 0xA8).unwrap();
        assert_eq!((register.address, register.port), (0x8000_18A8, 0xCFC));
        let register = Register::new("0000:02:1f.6", 0x46).unwrap();
        assert_eq!((register.address, register.port), (0x8002_FE44, 0xCFE));
        assert!(Register::new("x", 0).is_err());
    }
}
