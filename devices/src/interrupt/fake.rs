//! An interrupt controller that keeps KVM's rules about routes, irqfds and ioeventfds, with real eventfds.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use parking_lot::Mutex;

use super::*;

/// Routes, attached irqfds and what was injected.
#[derive(Default)]
pub struct FakeController(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    taken: Vec<u32>,
    routes: BTreeMap<u32, MsiMessage>,
    attached: BTreeMap<u32, i32>,
    injected: Vec<MsiMessage>,
    lines: BTreeMap<u32, Line>,
    events: BTreeMap<IoAddress, OwnedFd>,
    calls: Vec<&'static str>,
    /// What is refused, and how.
    refused: Option<(&'static str, i32)>,
    /// A message with this data is no route.
    invalid: Option<u32>,
}

struct Line {
    trigger: OwnedFd,
    resample: OwnedFd,
    level: bool,
}

impl Inner {
    fn call(&mut self, name: &'static str) -> Result<(), InterruptError> {
        self.calls.push(name);
        match self.refused {
            Some((refused, errno)) if refused == name => Err(error(name, errno)),
            _ => Ok(()),
        }
    }
}

fn error(name: &str, errno: i32) -> InterruptError {
    InterruptError { what: name.into(), source: std::io::Error::from_raw_os_error(errno) }
}

/// As a device does.
pub fn signal(eventfd: BorrowedFd<'_>) {
    rustix::io::write(eventfd, &1u64.to_ne_bytes()).unwrap();
}

/// What an eventfd has counted, which is zero then.
pub fn count(eventfd: BorrowedFd<'_>) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(eventfd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

impl FakeController {
    fn lock(&self) -> parking_lot::MutexGuard<'_, Inner> {
        self.0.lock()
    }

    /// The data of the messages that the guest got.
    pub fn injected(&self) -> Vec<u32> {
        std::mem::take(&mut self.lock().injected).iter().map(|message| message.data).collect()
    }

    /// How many messages have an irqfd. (Lines are not counted.)
    pub fn attached(&self) -> usize {
        self.lock().attached.len()
    }

    /// How many GSIs are somebody's.
    pub fn taken(&self) -> usize {
        self.lock().taken.len()
    }

    /// Refuses calls of this name with `errno` from now on, and none of another; `""`: none at all.
    pub fn refuse(&self, name: &'static str, errno: i32) {
        self.lock().refused = Some((name, errno));
    }

    /// A message with this data is no route from now on (EINVAL); None: every message is one.
    pub fn refuse_data(&self, data: Option<u32>) {
        self.lock().invalid = data;
    }

    /// What was asked since the last call, refused or not: routes, irqfds ("attach", "detach") and ioeventfds.
    pub fn calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.lock().calls)
    }

    /// Takes what came on an attached line, as the irqfd does at once. None: nothing is attached.
    pub fn take(&self, pin: u32) -> Option<bool> {
        let mut inner = self.lock();
        let line = inner.lines.get_mut(&pin)?;
        line.level |= count(line.trigger.as_fd()) > 0;
        Some(line.level)
    }

    /// The level of a pin now, as [`Self::take`].
    pub fn level(&self, pin: u32) -> Option<bool> {
        self.take(pin)
    }

    /// The guest's EOI: lowers the level and signals `resample` (irqfd_resampler_ack).
    pub fn eoi(&self, pin: u32) {
        let mut inner = self.lock();
        let line = inner.lines.get_mut(&pin).unwrap();
        line.level = false;
        signal(line.resample.as_fd());
    }

    /// Writes there: signals the ioeventfd. False: there is none.
    pub fn guest_writes(&self, at: IoAddress) -> bool {
        self.lock().events.get(&at).map(|eventfd| signal(eventfd.as_fd())).is_some()
    }
}

impl InterruptController for FakeController {
    fn allocate(&self, count: u32) -> Result<Vec<u32>, InterruptError> {
        let mut inner = self.lock();
        let free: Vec<_> = (24..).filter(|gsi| !inner.taken.contains(gsi)).take(count as usize).collect();
        inner.taken.extend(&free);
        Ok(free)
    }

    fn adopt(&self, gsis: &[u32]) -> Result<(), InterruptError> {
        let mut inner = self.lock();
        let twice = (1..gsis.len()).any(|n| gsis[..n].contains(&gsis[n]));
        if twice || gsis.iter().any(|gsi| inner.taken.contains(gsi)) {
            return Err(error("adopt", libc::EEXIST));
        }
        inner.taken.extend(gsis);
        Ok(())
    }

    fn note(&self, routes: &[(u32, Option<MsiMessage>)]) {
        let routed = routes.iter().filter_map(|(gsi, message)| Some((*gsi, (*message)?)));
        self.lock().routes.extend(routed);
    }

    fn free(&self, gsis: &[u32]) {
        let mut inner = self.lock();
        assert!(gsis.iter().all(|gsi| inner.taken.contains(gsi) && !inner.attached.contains_key(gsi)));
        inner.taken.retain(|gsi| !gsis.contains(gsi));
    }

    fn route(&self, routes: &[(u32, MsiMessage)]) -> Result<(), InterruptError> {
        let mut inner = self.lock();
        inner.call("route")?;
        if routes.iter().any(|(_, message)| Some(message.data) == inner.invalid) {
            return Err(error("route", libc::EINVAL));
        }
        inner.routes.extend(routes.iter().copied());
        Ok(())
    }

    fn attach(
        &self,
        gsi: u32,
        eventfd: BorrowedFd<'_>,
        resample: Option<BorrowedFd<'_>>,
    ) -> Result<(), InterruptError> {
        let mut inner = self.lock();
        inner.call("attach")?;
        if let Some(resample) = resample {
            let [trigger, resample] = [eventfd, resample].map(|fd| fd.try_clone_to_owned().unwrap());
            let line = Line { level: false, trigger, resample };
            assert!(inner.lines.insert(gsi, line).is_none(), "EBUSY");
            return Ok(());
        }
        assert!(inner.attached.insert(gsi, eventfd.as_raw_fd()).is_none(), "EBUSY");
        if route::is_readable(eventfd) {
            let message = inner.routes[&gsi];
            inner.injected.push(message);
        }
        Ok(())
    }

    fn detach(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), InterruptError> {
        let mut inner = self.lock();
        inner.call("detach")?;
        if inner.lines.remove(&gsi).is_none() {
            assert_eq!(inner.attached.remove(&gsi), Some(eventfd.as_raw_fd()));
        }
        count(eventfd);
        Ok(())
    }
}

impl IoEvents for FakeController {
    fn attach(&self, at: IoAddress, eventfd: BorrowedFd<'_>) -> Result<(), InterruptError> {
        let mut inner = self.lock();
        inner.call("ioevent")?;
        let eventfd = eventfd.try_clone_to_owned().unwrap();
        assert!(inner.events.insert(at, eventfd).is_none(), "EEXIST");
        Ok(())
    }

    fn detach(&self, at: IoAddress, _: BorrowedFd<'_>) -> Result<(), InterruptError> {
        let mut inner = self.lock();
        inner.call("no ioevent")?;
        assert!(inner.events.remove(&at).is_some(), "ENOENT");
        Ok(())
    }
}
