//! A register whose writes KVM turns into signals of an eventfd, without an exit: what a guest notifies a queue by.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::controller::InterruptError;

/// Where such a register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IoAddress {
    /// `KVM_IOEVENTFD_FLAG_PIO`
    Port(u16),
    /// A guest physical address.
    Mmio(u64),
}

/// KVM_IOEVENTFD, for a write of any value and size.
pub trait IoEvents: Send + Sync {
    /// From now on a write there signals `eventfd`, and does not exit.
    ///
    /// # Errors
    /// There is one already (EEXIST), or there are too many (ENOSPC): writes exit.
    fn attach(&self, at: IoAddress, eventfd: BorrowedFd<'_>) -> Result<(), InterruptError>;
    /// Undoes [`IoEvents::attach`] of the same address and eventfd: writes exit again.
    ///
    /// # Errors
    /// There is none such (ENOENT).
    fn detach(&self, at: IoAddress, eventfd: BorrowedFd<'_>) -> Result<(), InterruptError>;
}

/// See the module. Where KVM has refused it the writes exit, and whoever emulates the register calls
/// [`IoEvent::notify`]. Dropped, it is detached.
pub struct IoEvent<F: AsFd> {
    events: Arc<dyn IoEvents>,
    eventfd: F,
    /// Where the guest has the register now, if anywhere.
    wanted: Option<IoAddress>,
    is_quiesced: bool,
    attached: Option<IoAddress>,
}

impl<F: AsFd> IoEvent<F> {
    /// Nowhere yet. `eventfd` is what the device waits for.
    pub fn new(eventfd: F, events: Arc<dyn IoEvents>) -> Self {
        Self { events, eventfd, wanted: None, is_quiesced: false, attached: None }
    }

    /// What the device waits for: it counts the writes.
    pub fn eventfd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }

    /// The register is there from now on: the guest has moved its BAR, or has switched decoding on or off.
    pub fn place(&mut self, at: Option<IoAddress>) -> Result<(), InterruptError> {
        self.wanted = at;
        self.settle()
    }

    /// Brings KVM in line; tries again what it has refused. It is at one address at most.
    pub fn settle(&mut self) -> Result<(), InterruptError> {
        let wanted = self.wanted.filter(|_| !self.is_quiesced);
        if let Some(at) = self.attached.filter(|_| self.attached != wanted) {
            self.events.detach(at, self.eventfd())?;
            self.attached = None;
        }
        if let Some(at) = wanted.filter(|_| self.attached.is_none()) {
            self.events.attach(at, self.eventfd())?;
            self.attached = Some(at);
        }
        Ok(())
    }

    /// Detaches it, with vCPUs stopped. Undone by [`IoEvent::resume`], after an error too.
    pub fn quiesce(&mut self) -> Result<(), InterruptError> {
        self.is_quiesced = true;
        self.settle()
    }

    /// Attaches it again where the guest has the register, if anywhere.
    pub fn resume(&mut self) -> Result<(), InterruptError> {
        self.is_quiesced = false;
        self.settle()
    }

    /// A write to the register that KVM did not take.
    pub fn notify(&self) -> std::io::Result<()> {
        rustix::io::write(&self.eventfd, &1u64.to_ne_bytes())?;
        Ok(())
    }
}

impl<F: AsFd> Drop for IoEvent<F> {
    fn drop(&mut self) {
        if let Err(error) = self.place(None) {
            log::error!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeController, count};
    use super::*;

    fn event() -> (IoEvent<std::os::fd::OwnedFd>, Arc<FakeController>) {
        let (events, flags) = (Arc::new(FakeController::default()), rustix::event::EventfdFlags::NONBLOCK);
        (IoEvent::new(rustix::event::eventfd(0, flags).unwrap(), events.clone()), events)
    }

    const HERE: IoAddress = IoAddress::Mmio(0xC000_3000);
    const THERE: IoAddress = IoAddress::Mmio(0xC100_3000);

    #[test]
    fn it_is_where_the_guest_has_it() {
        let (mut event, events) = event();
        event.place(Some(HERE)).unwrap();
        assert!(events.guest_writes(HERE));
        assert_eq!(count(event.eventfd()), 1);
        event.place(Some(THERE)).unwrap();
        assert_eq!((events.guest_writes(HERE), events.guest_writes(THERE)), (false, true));
        event.quiesce().unwrap();
        assert!(!events.guest_writes(THERE));
        event.notify().unwrap();
        assert_eq!(count(event.eventfd()), 2, "by exit as well");
        event.place(Some(HERE)).unwrap();
        assert!(!events.guest_writes(HERE), "it waits");
        event.resume().unwrap();
        assert!(events.guest_writes(HERE));
        drop(event);
        assert!(!events.guest_writes(HERE));
    }

    #[test]
    fn what_kvm_refuses_is_tried_again() {
        let (mut event, events) = event();
        events.refuse("ioevent", libc::ENOSPC);
        assert!(event.place(Some(HERE)).is_err());
        events.refuse("no ioevent", libc::ENOMEM);
        event.settle().unwrap();
        assert!(events.guest_writes(HERE));
        assert!(event.place(Some(THERE)).is_err());
        assert_eq!((events.guest_writes(HERE), events.guest_writes(THERE)), (true, false), "at one place at most");
        events.refuse("", 0);
        events.calls();
        event.settle().unwrap();
        event.settle().unwrap();
        assert_eq!(events.calls(), ["no ioevent", "ioevent"]);
        assert!(events.guest_writes(THERE));
    }
}
