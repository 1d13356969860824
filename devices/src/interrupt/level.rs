//! A level on an IOAPIC pin, as INTx is: the eventfd `trigger` raises it, the guest's EOI lowers it and signals
//! `resample`. Whoever still has a reason then, signals `trigger` again.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use theseus_resources::fd_store::{Claims, FdStoreError};
use theseus_resources::{FdKind, FdStore, StoredFd};

use super::controller::{InterruptController, InterruptError};
use super::saved::{LevelLineHandles, LevelLineState};

/// See the module. While it is detached, `trigger` counts. A pin may be shared: KVM raises it for any of its lines.
/// Dropped, it is detached.
pub struct LevelLine {
    controller: Arc<dyn InterruptController>,
    pin: u32,
    trigger: StoredFd,
    resample: StoredFd,
    /// The guest is to get it.
    is_wanted: bool,
    is_quiesced: bool,
    /// As KVM has it.
    is_attached: bool,
}

impl LevelLine {
    /// Detached. `name` is the device's.
    pub fn new(
        name: &str,
        pin: u32,
        controller: Arc<dyn InterruptController>,
        fd_store: &FdStore,
    ) -> Result<Self, InterruptError> {
        let keep = |what| {
            let error = |e: rustix::io::Errno| InterruptError {
                what: format!("{name}: cannot make an eventfd (raise RLIMIT_NOFILE)"),
                source: e.into(),
            };
            let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(error)?;
            Ok(fd_store.keep(format!("{name} {what}"), FdKind::Interrupt, fd))
        };
        let (trigger, resample) = (keep("intx")?, keep("intx resample")?);
        Ok(Self { controller, pin, trigger, resample, is_wanted: false, is_quiesced: false, is_attached: false })
    }

    /// What raises the level.
    pub fn trigger(&self) -> BorrowedFd<'_> {
        self.trigger.as_fd()
    }

    /// What is signalled when the level was lowered, and once after each attach. VFIO takes it as its UNMASK eventfd.
    pub fn resample(&self) -> BorrowedFd<'_> {
        self.resample.as_fd()
    }

    /// Whether the guest is to get it from now on.
    pub fn set(&mut self, is_wanted: bool) -> Result<(), InterruptError> {
        self.is_wanted = is_wanted;
        self.settle()
    }

    /// Brings KVM in line; tries again what it has refused. Nothing is asked of KVM where it is.
    pub fn settle(&mut self) -> Result<(), InterruptError> {
        let is_on = self.is_wanted && !self.is_quiesced;
        match (is_on, self.is_attached) {
            (true, false) => {
                self.controller.attach(self.pin, self.trigger(), Some(self.resample()))?;
                self.is_attached = true;
                // A detach lowers the level. Where the guest had not seen it yet nobody would raise it again: KVM waits
                // for an EOI that does not come, and the device (VFIO masks its own INTx) for KVM. One too many is
                // legal: it coalesces (remote IRR).
                let _ = rustix::io::write(&self.resample, &1u64.to_ne_bytes());
            }
            (false, true) => {
                self.controller.detach(self.pin, self.trigger())?;
                self.is_attached = false;
            }
            _ => {}
        }
        Ok(())
    }

    /// Detaches it, with vCPUs stopped. Undone by [`LevelLine::resume`], after an error too.
    pub fn quiesce(&mut self) -> Result<(), InterruptError> {
        self.is_quiesced = true;
        self.settle()
    }

    /// Attaches it, which injects what has come meanwhile. In a new VMM: after LAPICs, IOAPIC and routes.
    pub fn resume(&mut self) -> Result<(), InterruptError> {
        self.is_quiesced = false;
        self.settle()
    }

    /// Pure. An event that waits is not in it, but in the eventfds, which go over.
    pub fn save(&self) -> (LevelLineState, LevelLineHandles) {
        let Self { controller: _, pin, trigger, resample, is_wanted, is_quiesced: _, is_attached: _ } = self;
        let handles = LevelLineHandles { trigger: trigger.slot(), resample: resample.slot() };
        (LevelLineState { pin: *pin, is_wanted: *is_wanted }, handles)
    }

    /// Comes up quiesced.
    pub fn restore(
        state: LevelLineState,
        handles: LevelLineHandles,
        controller: Arc<dyn InterruptController>,
        claims: &mut Claims,
    ) -> Result<Self, FdStoreError> {
        let (LevelLineState { pin, is_wanted }, LevelLineHandles { trigger, resample }) = (state, handles);
        let mut claim = |slot| claims.claim(slot, FdKind::Interrupt);
        let (trigger, resample) = (claim(trigger)?, claim(resample)?);
        Ok(Self { controller, pin, trigger, resample, is_wanted, is_quiesced: true, is_attached: false })
    }
}

impl Drop for LevelLine {
    fn drop(&mut self) {
        if let Err(error) = self.set(false) {
            log::error!("{}: {error}", self.trigger.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeController, count, signal};
    use super::*;

    fn line() -> (LevelLine, Arc<FakeController>, FdStore) {
        let (controller, fd_store) = (Arc::new(FakeController::default()), FdStore::new());
        let line = LevelLine::new("nic0", 17, controller.clone(), &fd_store).unwrap();
        (line, controller, fd_store)
    }

    #[test]
    fn the_level_is_raised_until_the_eoi_and_asked_for_again() {
        let (mut line, controller, _fd_store) = line();
        signal(line.trigger());
        assert_eq!(controller.level(17), None, "not the guest's yet");
        line.set(true).unwrap();
        assert_eq!(controller.level(17), Some(true), "what came before");
        assert_eq!(count(line.resample()), 1, "whoever raises it looks again");
        controller.eoi(17);
        assert_eq!((controller.level(17), count(line.resample())), (Some(false), 1));
        line.set(true).unwrap();
        assert_eq!((controller.calls(), count(line.resample())), (vec!["attach"], 0), "once");
    }

    #[test]
    fn a_level_that_fell_with_an_update_is_raised_again() {
        let (mut line, controller, fd_store) = line();
        line.set(true).unwrap();
        count(line.resample());
        signal(line.trigger());
        controller.take(17);
        line.quiesce().unwrap();
        assert_eq!(controller.level(17), None, "it falls with the last irqfd");
        let (state, handles) = line.save();
        assert_eq!((state.clone(), handles.clone()), line.save(), "save is pure");
        let (_fd_store, mut claims) = fd_store.handed_over().unwrap();
        let there = Arc::new(FakeController::default());
        let mut new = LevelLine::restore(state, handles, there.clone(), &mut claims).unwrap();
        claims.finish().unwrap();
        assert!(there.calls().is_empty(), "it waits");
        signal(line.trigger());
        new.resume().unwrap();
        assert_eq!((there.level(17), count(new.resample())), (Some(true), 1));
        drop(new);
        assert_eq!(there.calls(), ["attach", "detach"]);
        // The way back.
        line.resume().unwrap();
        assert_eq!((controller.level(17), count(line.resample())), (Some(false), 1), "the device is asked");
    }

    #[test]
    fn what_kvm_refuses_is_tried_again() {
        let (mut line, controller, _fd_store) = line();
        controller.refuse("attach", libc::ENOMEM);
        assert!(line.set(true).is_err());
        assert_eq!((controller.level(17), count(line.resample())), (None, 0));
        controller.refuse("detach", libc::ENOMEM);
        line.settle().unwrap();
        assert_eq!(controller.level(17), Some(false));
        assert!(line.quiesce().is_err(), "no update with an irqfd of the old VM");
        assert_eq!(controller.level(17), Some(false));
        controller.refuse("", 0);
        line.settle().unwrap();
        assert_eq!(controller.level(17), None);
        line.resume().unwrap();
        controller.calls();
        line.settle().unwrap();
        assert!(controller.calls().is_empty(), "all is done");
    }
}
