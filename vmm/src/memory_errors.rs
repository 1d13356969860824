//! Uncorrectable errors of the host's memory (BUS_MCEERR in sigaction(2)): the guest is told by a machine check, the
//! world by an event, and the VMM lives.
//!
//! ```text
//!   a vCPU needs the page    KVM_RUN returns -> handler -> `required` on that thread -> machine check, action required
//!   the VMM needs the page   handler: an empty page takes its place in this mapping, until an update -> as below
//!   nobody needs it yet      handler on main (PR_MCE_KILL_EARLY) -> control thread -> machine check to vCPU 0,
//!                            action optional
//! ```
//!
//! The handler makes system calls and touches atomics, no more. A SIGBUS of another kind is the crash that it was, with
//! its address said.

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use parking_lot::Mutex;
use theseus_resources::mapping;
use theseus_resources::memory_listener::{MemoryListener, RamBlock, Rank, Refusal};
use vmm_sys_util::eventfd::EventFd;

const BUS_MCEERR_AR: libc::c_int = 4;
const BUS_MCEERR_AO: libc::c_int = 5;
const PAGE: u64 = 4096;

/// A page that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    pub gpa: u64,
    /// A vCPU needed it: it has been told already.
    pub by_vcpu: bool,
}

/// (guest address, address here, size) of the guest's RAM, for the handler; size 0: unused.
static RANGES: [Range; 64] = [const { [const { AtomicU64::new(0) }; 3] }; 64];
type Range = [AtomicU64; 3];
/// What the handler has seen, until the control thread looks: guest address, bit 0 set, bit 1: by a vCPU.
static SEEN: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
/// The control thread's eventfd.
static WAKE: AtomicI32 = AtomicI32::new(-1);

thread_local! {
    static IN_GUEST: Cell<bool> = const { Cell::new(false) };
    /// The page that the guest on this thread needs.
    static REQUIRED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Once per image, on the main thread, before any guest memory is mapped. What is returned is readable when there is
/// something to [`take`].
pub(crate) fn install() -> std::io::Result<EventFd> {
    let wake = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
    WAKE.store(wake.as_raw_fd(), Ordering::SeqCst);
    // SAFETY: all zeroes is a sigaction; the handler is async-signal-safe, and stays.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        if libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // To be told before anybody needs the page; EINVAL where the kernel handles no such errors.
        libc::prctl(libc::PR_MCE_KILL, libc::PR_MCE_KILL_SET, libc::PR_MCE_KILL_EARLY, 0, 0);
    }
    Ok(wake)
}

/// By this the handler knows the guest's RAM, as long as it lives.
pub(crate) struct Watch {
    table: &'static [Range],
    used: Mutex<Vec<&'static Range>>,
}

/// Who writes to [`RANGES`]; the handler only reads.
static WRITING: Mutex<()> = Mutex::new(());

#[derive(Debug, thiserror::Error)]
#[error("memory errors: no room to watch guest RAM {0:#x}: it has {1} ranges already: add fewer and larger ones")]
struct Full(u64, usize);

impl Watch {
    /// For the one guest that there is.
    pub(crate) fn new() -> Self {
        Self { table: &RANGES, used: Mutex::default() }
    }
}

impl MemoryListener for Watch {
    fn describe(&self) -> String {
        "memory errors".into()
    }

    fn rank(&self) -> Rank {
        Rank::Errors
    }

    unsafe fn add(&self, block: &RamBlock) -> Result<(), Refusal> {
        let _writing = WRITING.lock();
        let free = self.table.iter().find(|[_, _, size]| size.load(Ordering::SeqCst) == 0);
        let range = free.ok_or(Full(block.gpa, self.table.len()))?;
        // The size at last: until then it is unused.
        for (to, value) in range.iter().zip([block.gpa, block.hva, block.size]) {
            to.store(value, Ordering::SeqCst);
        }
        self.used.lock().push(range);
        Ok(())
    }

    fn remove(&self, block: &RamBlock) -> Result<(), Refusal> {
        self.used.lock().retain(|[gpa, _, size]| {
            let is_other = gpa.load(Ordering::SeqCst) != block.gpa;
            if !is_other {
                size.store(0, Ordering::SeqCst);
            }
            is_other
        });
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.used.get_mut().iter().for_each(|[_, _, size]| size.store(0, Ordering::SeqCst));
    }
}

fn gpa_of(address: u64) -> Option<u64> {
    RANGES.iter().find_map(|range| {
        let [gpa, hva, size] = range.each_ref().map(|value| value.load(Ordering::SeqCst));
        let offset = address.checked_sub(hva).filter(|offset| *offset < size)?;
        Some(gpa + offset)
    })
}

/// Runs the guest on this thread: a page that is missed meanwhile is missed by the guest.
pub(crate) fn in_guest<T>(run: impl FnOnce() -> T) -> T {
    IN_GUEST.set(true);
    let result = run();
    IN_GUEST.set(false);
    result
}

/// The guest physical address of the page that the guest on this thread needed and will never get.
pub(crate) fn required() -> Option<u64> {
    REQUIRED.take()
}

/// What the handler has seen since the last call.
pub(crate) fn take() -> Vec<Lost> {
    let seen = SEEN.iter().map(|slot| slot.swap(0, Ordering::SeqCst)).filter(|word| *word != 0);
    seen.map(|word| Lost { gpa: word & !(PAGE - 1), by_vcpu: word & 2 != 0 }).collect()
}

fn note(gpa: u64, by_vcpu: bool) {
    let word = gpa & !(PAGE - 1) | 1 | u64::from(by_vcpu) << 1;
    for slot in &SEEN {
        match slot.compare_exchange(0, word, Ordering::SeqCst, Ordering::SeqCst) {
            // The guest may need it over and over.
            Ok(_) => break,
            Err(found) if found == word => break,
            // More than there is room for at once: the guest is told when it needs the page.
            Err(_) => {}
        }
    }
    // SAFETY: a count of one into an eventfd that is never closed while there are guests; EBADF is harmless.
    unsafe { libc::write(WAKE.load(Ordering::SeqCst), 1u64.to_ne_bytes().as_ptr().cast(), 8) };
}

/// An empty page, as long as this mapping lives, where the lost one was. The guest is told of that.
fn replace(address: u64, len: u64) -> bool {
    let start = address & !(len - 1);
    // SAFETY: within the mapping of guest RAM, which is a multiple of its pages long, and no Rust object.
    unsafe { mapping::replace(start, len as usize) }.is_ok()
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: this thread's errno, put back below for whom this has interrupted.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel gives a siginfo_t to a handler with SA_SIGINFO; si_addr is there for any SIGBUS.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    let gpa = gpa_of(address);
    let handled = match (code, gpa) {
        (BUS_MCEERR_AR, Some(gpa)) if IN_GUEST.get() => {
            REQUIRED.set(Some(gpa));
            note(gpa, true);
            true
        }
        (BUS_MCEERR_AR, Some(gpa)) => {
            note(gpa, false);
            // SAFETY: as above; there for these codes.
            let bits = unsafe { address_bits(info) };
            replace(address, 1 << bits.clamp(12, 30))
        }
        (BUS_MCEERR_AO, Some(gpa)) => {
            note(gpa, false);
            true
        }
        // Not the guest's: whoever needs it will be told.
        (BUS_MCEERR_AO, None) => true,
        _ => false,
    };
    if !handled {
        die(signal, code, address, gpa);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// si_addr_lsb: the lowest valid bit of the address, behind si_addr (include/uapi/asm-generic/siginfo.h).
///
/// # Safety
/// `info` is of a SIGBUS of BUS_MCEERR.
unsafe fn address_bits(info: *const libc::siginfo_t) -> u32 {
    const OFFSET: usize = 24;
    // SAFETY: within the siginfo_t, of 128 bytes, and aligned.
    let bits = unsafe { info.cast::<u8>().add(OFFSET).cast::<i16>().read() };
    u32::from(bits.unsigned_abs())
}

/// As without a handler, but with a word in the log.
fn die(signal: libc::c_int, code: libc::c_int, address: u64, gpa: Option<u64>) {
    let mut text = [0; 160];
    let mut rest = &mut text[..];
    let whose =
        if gpa.is_some() { "of guest memory: is the host, or a cgroup, out of (huge) pages?" } else { "of the VMM" };
    let written = std::io::Write::write_fmt(
        &mut rest,
        format_args!("theseus: SIGBUS, code {code}, at {address:#x} (guest {:#x}) {whose}\n", gpa.unwrap_or(u64::MAX)),
    );
    let unused = rest.len();
    let len = if written.is_ok() { text.len() - unused } else { text.len() };
    crate::logging::last_words(&text[..len]);
    // SAFETY: system calls only. Blocked while this handler runs, it comes when this returns; or the access comes
    // again.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use theseus_resources::{FdStore, GuestRam, MemoryListeners, Pages};
    use vm_memory::{Bytes, GuestAddress};

    /// As the kernel would, to this thread.
    fn strike(code: libc::c_int, address: u64) {
        let mut info = [0u64; 16];
        let bytes = [libc::SIGBUS, 0, code, 0, address as i32, (address >> 32) as i32, 12];
        for (at, word) in bytes.into_iter().enumerate() {
            info[at / 2] |= u64::from(word as u32) << (32 * (at % 2));
        }
        // SAFETY: a siginfo_t of 128 bytes; a process may send itself any (kernel/signal.c, do_rt_tgsigqueueinfo).
        let sent = unsafe {
            libc::syscall(libc::SYS_rt_tgsigqueueinfo, libc::getpid(), libc::gettid(), libc::SIGBUS, info.as_ptr())
        };
        assert_eq!(sent, 0);
    }

    /// One test: there is one handler.
    #[test]
    fn a_lost_page_is_told_and_replaced_where_the_vmm_needs_it() {
        let wake = install().unwrap();
        let ram = GuestRam::new(&FdStore::new(), 128 << 20, Pages::Small).unwrap();
        let listeners = MemoryListeners::new();
        listeners.subscribe(std::sync::Arc::new(Watch::new())).unwrap();
        let block = ram.blocks().next().unwrap();
        // SAFETY: it is dropped last.
        unsafe { listeners.add(block.clone()) }.unwrap();
        let hva = ram.ranges()[0].hva;
        let at = GuestAddress(0x40_0000);
        ram.memory().write_obj(7u64, at).unwrap();

        in_guest(|| strike(BUS_MCEERR_AR, hva + 0x40_0123));
        assert_eq!((required(), required()), (Some(0x40_0123), None));
        assert_eq!(take(), [Lost { gpa: 0x40_0000, by_vcpu: true }]);
        assert_eq!(wake.read().unwrap(), 1);
        assert_eq!(ram.memory().read_obj::<u64>(at).unwrap(), 7, "the guest's own, whatever it holds");

        strike(BUS_MCEERR_AO, hva + 0x50_0000);
        strike(BUS_MCEERR_AO, 0x1000);
        strike(BUS_MCEERR_AR, hva + 0x40_0008);
        assert_eq!(required(), None);
        let lost = [0x50_0000, 0x40_0000].map(|gpa| Lost { gpa, by_vcpu: false });
        assert_eq!(take(), lost);
        assert_eq!(ram.memory().read_obj::<u64>(at).unwrap(), 0, "an empty page is in its place");
        ram.memory().write_obj(8u64, at).unwrap();

        for page in 0..1000 {
            strike(BUS_MCEERR_AO, hva + page * PAGE);
        }
        assert_eq!(take().len(), SEEN.len());
        // As memory that is added while the guest runs.
        let second = RamBlock { gpa: 5 << 30, hva: hva + (5 << 30), ..block };
        // SAFETY: nobody touches it.
        unsafe { listeners.add(second.clone()) }.unwrap();
        assert_eq!((gpa_of(second.hva + 7), gpa_of(hva + 7)), (Some((5 << 30) + 7), Some(7)));
        listeners.remove(second.gpa).unwrap();
        assert_eq!((gpa_of(second.hva + 7), gpa_of(hva + 7)), (None, Some(7)));
        drop(listeners);
        assert_eq!(gpa_of(hva), None);
    }

    #[test]
    fn what_cannot_be_watched_is_refused() {
        static TABLE: [Range; 1] = [const { [const { AtomicU64::new(0) }; 3] }; 1];
        let ram = GuestRam::new(&FdStore::new(), 128 << 20, Pages::Small).unwrap();
        let watch = Watch { table: &TABLE, used: Mutex::default() };
        let first = ram.blocks().next().unwrap();
        let second = RamBlock { gpa: 5 << 30, ..first.clone() };
        // SAFETY: of this and all below, the RAM is dropped last.
        let add = |block| unsafe { watch.add(block) }.map_err(|error| error.to_string());
        add(&first).unwrap();
        let full = add(&second).unwrap_err();
        assert!(full.contains("no room to watch guest RAM 0x140000000: it has 1 ranges already"), "{full}");
        watch.remove(&second).unwrap();
        watch.remove(&first).unwrap();
        add(&second).unwrap();
        drop(watch);
        assert_eq!(TABLE[0][2].load(Ordering::SeqCst), 0, "nobody has it any more");
    }
}
