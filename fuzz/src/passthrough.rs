//! What a guest does to a passed-through function, over a file that stands for its device and a kernel that keeps its
//! rules: configuration space, BARs, the MSI-X table. The host refuses things meanwhile, and the device goes over to
//! other images, of its own state and of damaged ones.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use theseus_devices::interrupt::fake::signal;
use theseus_devices::pci::PciDevice;
use theseus_devices::vfio::fake::{Rig, rig};

use crate::input::Input;
use crate::saved_state::with_header;

/// The device has three pieces of BARs that are mapped; those that the host did not take away are left over.
const MAPPED_MAX: usize = 3;
const VECTORS: usize = 3;
/// Container, group, device, and an eventfd for each vector.
const DESCRIPTORS: usize = 3 + VECTORS;
/// Bytes.
const STATE_MAX: usize = 64 << 10;

/// A device, while its guest runs.
struct Subject {
    rig: Rig,
    /// It has come out of a state that somebody has changed.
    is_damaged: bool,
    /// It has come out of a state: requests to VFIO go to the file then, which refuses all.
    is_carried: bool,
}

/// What is left after a step.
enum Next {
    GoesOn(Subject),
    /// A damaged state was refused, and the device is gone.
    Refused,
    /// The input has ended.
    End(Subject),
}

impl Subject {
    /// All, some or nothing of what a host can refuse is refused from now on.
    fn refuse(&self, choice: u8) {
        let Rig { memslots, irqs, msi, .. } = &self.rig;
        memslots.refuse(choice & 1 != 0);
        irqs.refused.store(choice & 2 != 0, Ordering::Relaxed);
        let name = ["", "route", "attach", "detach"][usize::from(choice >> 2 & 3)];
        msi.refuse(name, Errno::NOMEM.raw_os_error());
        msi.refuse_data((choice & 0x10 != 0).then_some(0x41));
    }

    /// Somewhere in a BAR, in the windows, or anywhere.
    fn address(&mut self, input: &mut Input<'_>) -> Option<u64> {
        let choice = input.u8()?;
        match choice & 7 {
            0 => Some(u64::from(input.u32()?)),
            1 => input.u64(),
            bar => {
                let register = 0x10 + 4 * u16::from(bar % 4);
                let low = self.rig.read32(register);
                let high = if low & 7 == 4 { self.rig.read32(register + 4) } else { 0 };
                let base = u64::from(high) << 32 | u64::from(low & if low & 1 != 0 { !3 } else { !0xF });
                Some(base.wrapping_add(u64::from(input.u16()?) % 0x5000))
            }
        }
    }

    /// As the device does, while MSI-X is on.
    fn signal(&self, vector: usize) {
        let turn = self.rig.pci.msix_turn();
        let mut msix = turn.lock();
        if msix.enabled()
            && let Ok(eventfds) = msix.eventfds()
        {
            eventfds.get(vector).into_iter().for_each(|eventfd| signal(eventfd.as_fd()));
        }
    }

    /// To another image, by its state or, with `damage`, by one that was changed.
    fn carried(mut self, damage: Option<&[u8]>) -> Next {
        self.refuse(0);
        self.rig.pci.settle();
        self.rig.pci.msix_turn().lock().quiesce_irqfds().expect("nothing is refused");
        let mut state = self.rig.saved();
        assert!(state.len() <= STATE_MAX, "a state of {} bytes", state.len());
        for change in damage.unwrap_or_default().chunks_exact(3) {
            let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % state.len();
            state[at] = change[2];
        }
        with_header(&mut state);
        let mut new = match self.rig.carried(&state) {
            Ok(new) => new,
            Err(reason) => {
                assert!(damage.is_some(), "{reason}");
                return Next::Refused;
            }
        };
        if damage.is_some() {
            // What it says is open, as a changed register is as good as another; that it stays so is not.
            state = new.saved();
            new = new.carried(&state).expect("what was taken once is taken again");
        }
        assert!(new.saved() == state, "another state than it came with");
        let attached = new.pci.msix_turn().lock().resume_irqfds();
        let is_damaged = self.is_damaged || damage.is_some();
        assert!(is_damaged || attached.is_ok(), "nothing is refused");
        Next::GoesOn(Self { rig: new, is_damaged, is_carried: true })
    }

    /// Does the next thing. None at the end of the input.
    fn access(&mut self, choice: u8, input: &mut Input<'_>) -> Option<()> {
        let (len, odd) = ([1, 2, 4, 4][usize::from(choice >> 6)], 1 + usize::from(choice >> 5));
        let mut data = [0; 8];
        match choice & 0x1F {
            0..4 => self.rig.pci.config_read(register(input, len)?, &mut data[..len]),
            4..12 => self.rig.pci.config_write(register(input, len)?, input.take(len)?),
            12..15 => {
                let at = self.address(input)?;
                self.rig.wiring.space.mmio.read(at, &mut data[..odd]);
            }
            15..20 => {
                let at = self.address(input)?;
                let done = self.rig.wiring.space.mmio.write_unless(at, input.take(odd)?, &|| true);
                assert!(done, "nobody else is at it");
            }
            20 => {
                let at = 0x1000 + u64::from(input.u16()?) % 0x40;
                self.rig.wiring.space.pio.write(at, input.take(len)?);
                self.rig.wiring.space.pio.read(at, &mut data[..len]);
            }
            21..24 => self.signal(usize::from(input.u8()?) % VECTORS),
            24 | 25 => self.refuse(input.u8()?),
            _ => {
                let turn = self.rig.pci.msix_turn();
                let mut msix = turn.lock();
                let _ = (msix.quiesce_irqfds(), msix.resume_irqfds());
            }
        }
        Some(())
    }

    fn step(mut self, input: &mut Input<'_>) -> Next {
        let Some(choice) = input.u8() else { return Next::End(self) };
        match choice & 0x1F {
            27 => match input.u8().and_then(|count| input.take(3 * (1 + usize::from(count % 4)))) {
                Some(damage) => self.carried(Some(damage)),
                None => Next::End(self),
            },
            28.. => self.carried(None),
            _ => match self.access(choice, input) {
                Some(()) => Next::GoesOn(self),
                None => Next::End(self),
            },
        }
    }

    /// It does not grow, whatever was done.
    fn check(&self) {
        let Rig { msi, wiring, .. } = &self.rig;
        // What the fakes note of the past.
        let _ = (msi.calls(), msi.injected());
        if !self.is_damaged {
            let (slots, dma, fds) = (self.rig.slots().len(), self.rig.dma().len(), wiring.fd_store.manifest().len());
            assert!(slots <= MAPPED_MAX && dma <= MAPPED_MAX, "{slots} memslots, {dma} mappings");
            assert!(fds <= DESCRIPTORS && msi.taken() <= VECTORS, "{fds} descriptors, {} GSIs", msi.taken());
        }
    }

    /// The end of the device: nothing of it is left.
    fn release(mut self) {
        self.refuse(0);
        let Self { rig, is_damaged, is_carried } = &mut self;
        rig.pci.settle();
        rig.pci.release(&mut rig.windows);
        let dma = if *is_carried { Vec::new() } else { rig.dma() };
        let left = (rig.slots(), dma, rig.msi.taken(), rig.msi.attached());
        assert!(*is_damaged || left == (vec![], vec![], 0, 0), "{left:?} are left");
    }
}

/// In configuration space: a register that matters, or any. As the bus has them, within a dword.
fn register(input: &mut Input<'_>, len: usize) -> Option<u16> {
    const MATTER: [u16; 16] =
        [0x04, 0x06, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x24, 0x30, 0x34, 0x44, 0x46, 0x50, 0x52, 0x54, 0x58];
    let choice = input.u8()?;
    let at = if choice & 0x80 == 0 { MATTER[usize::from(choice & 0xF)] } else { input.u16()? & 0xFFF };
    Some(at / len as u16 * len as u16)
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut subject = Subject { rig: rig(), is_damaged: false, is_carried: false };
    loop {
        match subject.step(&mut input) {
            Next::GoesOn(next) => subject = next,
            Next::Refused => return,
            Next::End(last) => return last.release(),
        }
        subject.check();
    }
}
