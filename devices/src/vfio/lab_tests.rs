//! Real devices: two `igb` bound to vfio-pci, as the lab provides them (`LAB_IGB_A_BDF`, `LAB_IGB_B_BDF`). Elsewhere there is
//! nothing to test, and this passes without a word; the lab's run is what counts.

use std::sync::{Arc, Mutex};

use rustix::mm::{MapFlags, ProtFlags};
use theseus_resources::Vault;
use theseus_resources::alloc::Windows;
use vfio_bindings::bindings::vfio::VFIO_DMA_UNMAP_FLAG_VADDR;

use super::pci::tests::{duplicate, wiring};
use super::*;
use crate::carried::Carried;
use crate::pci::PciDevice;

const SIZE: u64 = 16 << 20;
/// igb registers (82576 datasheet, 8.8): a cause for each MSI-X vector (GPIE), which are set (EICS), unmasked (EIMS), and
/// cleared when their message is sent (EIAC).
const GPIE: u64 = 0x1514;
const EICS: u64 = 0x1520;
const EIMS: u64 = 0x1524;
const EIAC: u64 = 0x152C;

fn map(memfd: &std::os::fd::OwnedFd) -> RamRange {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, never unmapped and never borrowed.
    let hva =
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), SIZE as usize, prot, MapFlags::SHARED, memfd, 0) }.unwrap();
    RamRange { gpa: 0, size: SIZE, hva: hva as u64 }
}

fn config(variable: &str, id: &str, container: &str) -> Option<DeviceConfig> {
    let bdf = std::env::var(variable).ok()?;
    let path = format!("/sys/bus/pci/devices/{bdf}").into();
    Some(DeviceConfig { path, id: id.to_owned(), container: Some(container.to_owned()) })
}

fn read32(device: &Mutex<VfioPci>, offset: u16) -> u32 {
    let mut data = [0; 4];
    device.lock().unwrap().config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(device: &Mutex<VfioPci>, offset: u16, data: &[u8]) {
    device.lock().unwrap().config_write(offset, data);
}

fn register(device: &VfioPci, offset: u64, value: u32) {
    let at = device.bar_vaddr(0, offset, 4).expect("BAR 0 is mapped");
    // SAFETY: mapped, aligned, and a register that may be written.
    unsafe { (at as *mut u32).write_volatile(value) };
}

fn capability(device: &Mutex<VfioPci>, id: u8) -> Option<u16> {
    let mut at = read32(device, 0x34) as u16 & 0xFF;
    while at != 0 {
        let head = read32(device, at);
        if head as u8 == id {
            return Some(at);
        }
        at = (head >> 8) as u16 & 0xFF;
    }
    None
}

#[test]
fn lab_two_igb_in_two_containers() {
    let (Some(a), Some(b)) = (config("LAB_IGB_A_BDF", "a", "one"), config("LAB_IGB_B_BDF", "b", "two")) else { return };
    let vault = Vault::new();
    let (parts, memslots, msi) = wiring(&vault);
    let mut windows = Windows::new(1 << 30, 39);
    let passthrough = Passthrough::new(vault.clone());
    let memfd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, SIZE).unwrap();
    // SAFETY: a shared mapping that stays.
    unsafe { passthrough.map_ram(&[map(&memfd)]) }.unwrap();

    let nic_a = passthrough.attach(&a, parts.clone(), &mut windows).unwrap();
    let nic_b = passthrough.attach(&b, parts.clone(), &mut windows).unwrap();
    assert_eq!(passthrough.group_fds().len(), 2);
    assert_eq!(passthrough.probe(), Vec::<String>::new());

    // Refusals, with their reasons.
    let other = DeviceConfig { container: Some("two".into()), ..a.clone() };
    let refused = passthrough.attach(&other, parts.clone(), &mut windows).err().unwrap();
    println!("{refused}");
    assert!(refused.to_string().contains("cannot be in 'two' too"));
    let refused = Passthrough::new(vault.clone()).attach(&a, parts.clone(), &mut windows).err().unwrap();
    println!("{refused}");
    assert!(refused.to_string().contains("is another VMM using it"));

    // The configuration space through the filter.
    println!("id {:#x}, command/status {:#x}", read32(&nic_a, 0), read32(&nic_a, 4));
    assert_eq!(read32(&nic_a, 0), 0x10C9_8086);
    assert_eq!(capability(&nic_a, 5), None, "no MSI");
    let msix = capability(&nic_a, 0x11).expect("MSI-X");
    for offset in (0x10..0x28).step_by(4) {
        println!("BAR register {offset:#x}: {:#x}", read32(&nic_a, offset));
    }
    let mut extended = 0x100;
    while extended != 0 {
        let head = read32(&nic_a, extended);
        println!("extended capability {:#x} at {extended:#x}", head & 0xFFFF);
        assert!(![0x0E, 0x10].contains(&(head & 0xFFFF)), "ARI and SR-IOV are the host's");
        extended = (head >> 20) as u16;
    }

    // BARs, and peer-to-peer mappings in the container.
    for nic in [&nic_a, &nic_b] {
        write(nic, 4, &[7, 0]);
    }
    assert!(memslots.count() > 0);
    for container in passthrough.containers() {
        println!("container {}: {:x?}", container.name(), container.maps());
    }

    // MSI-X: the device raises vector 0 by itself, masked, then unmasked.
    let table_bar = read32(&nic_a, msix + 4) as u16 & 7;
    let (low, high) = (read32(&nic_a, 0x10 + 4 * table_bar), read32(&nic_a, 0x14 + 4 * table_bar));
    assert_eq!(low & 6, 4, "igb has them in a 64-bit BAR");
    let table = u64::from(high) << 32 | u64::from(low & !0xF);
    write(&nic_a, msix + 2, &0xC000u16.to_le_bytes());
    parts.mmio.write(table, &0xFEE0_1000u64.to_le_bytes());
    parts.mmio.write(table + 8, &0x41u32.to_le_bytes());
    write(&nic_a, msix + 2, &0x8000u16.to_le_bytes());
    let pending = |mmio: &crate::bus::Bus| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let mut data = [0; 8];
        mmio.read(table + u64::from(read32(&nic_a, msix + 8) & !7), &mut data);
        u64::from_le_bytes(data)
    };
    assert_eq!(pending(&parts.mmio), 0);
    {
        let device = nic_a.lock().unwrap();
        register(&device, GPIE, 0x10);
        register(&device, EIAC, 1);
        register(&device, EIMS, 1);
        register(&device, EICS, 1);
    }
    assert_eq!(pending(&parts.mmio), 1, "masked");
    assert_eq!(msi.injected(), [0u32; 0]);
    parts.mmio.write(table + 12, &[0; 4]);
    assert_eq!((msi.attached(), msi.injected()), (1, vec![0x41]));
    assert_eq!(pending(&parts.mmio), 0, "delivered");

    // Refused update: all is mapped back, also when the second container has a range that somebody has invalidated.
    drop(passthrough.invalidate().unwrap());
    let two = passthrough.containers()[1].clone();
    ioctl::unmap_dma(std::os::fd::AsFd::as_fd(two.fd()), VFIO_DMA_UNMAP_FLAG_VADDR, 0, SIZE).unwrap();
    let refused = passthrough.invalidate().err().unwrap();
    println!("{refused}");
    assert_eq!(refused.container, "two");
    drop(passthrough.invalidate().expect("the next one works"));

    // The update: irqfds off, save, invalidate, an interrupt meanwhile, and new objects around the same files.
    nic_a.lock().unwrap().quiesce_irqfds().unwrap();
    let saved =
        (passthrough.save().unwrap(), nic_a.lock().unwrap().save().unwrap(), nic_b.lock().unwrap().save().unwrap());
    let before: Vec<u32> = (0..64).map(|n| read32(&nic_a, n * 4)).collect();
    std::mem::forget(passthrough.invalidate().unwrap());
    msi.injected();
    register(&nic_a.lock().unwrap(), EIMS, 1);
    register(&nic_a.lock().unwrap(), EICS, 1);
    let mut records = vault.manifest();
    duplicate(&mut records);
    drop((nic_a, nic_b, passthrough));
    // SAFETY: the duplicates were made for this and have no other owner.
    let (vault, mut claims) = unsafe { Vault::adopt(records) }.unwrap();
    let (parts, _memslots, msi) = wiring(&vault);
    let mut windows = Windows::new(1 << 30, 39);
    let passthrough = Passthrough::restore(saved.0, (vault, &mut claims)).unwrap();
    let mut restore = |state| {
        let (claims, windows, wiring) = (&mut claims, &mut windows, parts.clone());
        let parts = VfioPciParts { claims, passthrough: &passthrough, windows, wiring };
        Arc::new(Mutex::new(VfioPci::restore(state, parts).unwrap()))
    };
    let nics = [restore(saved.1), restore(saved.2)];
    claims.finish().unwrap();
    let find = |id: &str, region, offset, size| {
        let nics = nics.iter().map(|nic| nic.lock().unwrap());
        nics.into_iter().find(|nic| nic.id() == id)?.bar_vaddr(region, offset, size)
    };
    // SAFETY: another mapping of the same memfd.
    unsafe { passthrough.remap(&[map(&memfd)], find) }.unwrap();
    nics[0].lock().unwrap().attach_irqfds().unwrap();
    assert_eq!(msi.injected(), [0x41], "the interrupt that came in between");
    let after: Vec<u32> = (0..64).map(|n| read32(&nics[0], n * 4)).collect();
    assert_eq!(before, after);
    let locked = std::fs::read_to_string("/proc/self/status").unwrap();
    println!("{}", locked.lines().find(|line| line.starts_with("VmLck")).unwrap());
    // The addresses are the new ones, and valid: they can be invalidated again, and updated again by a half-done remap.
    drop(passthrough.invalidate().unwrap());
    // SAFETY: another mapping of the same memfd; all ranges are valid now.
    unsafe { passthrough.remap(&[map(&memfd)], find) }.unwrap();

    for nic in &nics {
        nic.lock().unwrap().release(&mut windows);
    }
    passthrough.release();
    drop(nics);
    passthrough.prune();
    assert_eq!(passthrough.containers().len(), 0);
    let again = passthrough.attach(&a, parts, &mut windows);
    println!("attached again: {}", again.is_ok());
    again.unwrap();
}

#[test]
fn lab_other_devices_share_the_default_container() {
    let configs = [config("LAB_E1000E_BDF", "nic", ""), config("LAB_NVME_BDF", "disk", "")];
    let configs: Vec<_> = configs.into_iter().flatten().map(|c| DeviceConfig { container: None, ..c }).collect();
    let vault = Vault::new();
    let (parts, memslots, msi) = wiring(&vault);
    let mut windows = Windows::new(1 << 30, 39);
    let passthrough = Passthrough::new(vault);
    for config in &configs {
        let device = passthrough.attach(config, parts.clone(), &mut windows).unwrap();
        assert_eq!(passthrough.containers().len(), 1);
        let msix = capability(&device, 0x11).expect("MSI-X");
        println!("{}: id {:#x}, MSI-X {:#x}", config.id, read32(&device, 0), read32(&device, msix));
        write(&device, 4, &[7, 0]);
        println!("{} memslots, DMA maps {:x?}", memslots.count(), passthrough.containers()[0].maps());
        write(&device, msix + 2, &0x8000u16.to_le_bytes());
        assert_eq!(msi.attached(), 0, "all vectors are masked");
        drop(passthrough.invalidate().unwrap());
        device.lock().unwrap().release(&mut windows);
        assert_eq!((memslots.count(), passthrough.containers()[0].maps().len()), (0, 0));
    }
}
