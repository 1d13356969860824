//! Listeners that write down what they are told, and refuse what they are made to.

use super::*;
use crate::{FdKind, FdStore};

type Log = Arc<Mutex<Vec<String>>>;

struct Fake {
    name: &'static str,
    rank: Rank,
    log: Log,
    /// What it refuses: `+` or `-` and the address.
    refused: Mutex<Vec<String>>,
}

impl Fake {
    fn told(&self, what: char, block: &RamBlock) -> Result<(), Refusal> {
        let told = format!("{what}{:x}", block.gpa);
        let refused = self.refused.lock().contains(&told);
        self.log.lock().push(format!("{} {}{told}", self.name, if refused { "not " } else { "" }));
        if refused { Err(format!("{}: no room for {:#x}: make some", self.name, block.gpa).into()) } else { Ok(()) }
    }

    fn refuses(&self, what: &[&str]) {
        *self.refused.lock() = what.iter().map(|what| what.to_string()).collect();
    }
}

impl MemoryListener for Fake {
    fn describe(&self) -> String {
        self.name.into()
    }

    fn rank(&self) -> Rank {
        self.rank
    }

    unsafe fn add(&self, block: &RamBlock) -> Result<(), Refusal> {
        self.told('+', block)
    }

    fn remove(&self, block: &RamBlock) -> Result<(), Refusal> {
        self.told('-', block)
    }
}

struct Rig {
    listeners: MemoryListeners,
    log: Log,
    file: StoredFd,
}

fn rig() -> Rig {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = FdStore::new().keep("ram", FdKind::GuestMemory, fd);
    Rig { listeners: MemoryListeners::new(), log: Log::default(), file }
}

impl Rig {
    fn listener(&self, name: &'static str, rank: Rank) -> Arc<Fake> {
        Arc::new(Fake { name, rank, log: self.log.clone(), refused: Mutex::default() })
    }

    /// In another order than they are told in.
    fn three(&self) -> [Arc<Fake>; 3] {
        let three = [("b", Rank::Dma), ("kvm", Rank::Guest), ("a", Rank::Errors)];
        let mut three = three.map(|(name, rank)| self.listener(name, rank));
        three.iter().for_each(|listener| self.listeners.subscribe(listener.clone()).unwrap());
        three.reverse();
        three
    }

    fn block(&self, gpa: u64, size: u64) -> RamBlock {
        RamBlock { gpa, size, hva: gpa.wrapping_add(0x7000_0000), file: self.file.clone(), offset: 0 }
    }

    fn add(&self, gpa: u64) -> Result<(), MemoryError> {
        // SAFETY: nobody here touches it.
        unsafe { self.listeners.add(self.block(gpa, 0x1000)) }
    }

    fn said(&self) -> String {
        std::mem::take(&mut *self.log.lock()).join(", ")
    }

    fn has(&self) -> Vec<u64> {
        self.listeners.blocks().iter().map(|block| block.gpa).collect()
    }
}

#[test]
fn they_are_told_by_rank_and_in_reverse() {
    let rig = rig();
    let _three = rig.three();
    rig.add(0x1000).unwrap();
    assert_eq!(rig.said(), "a +1000, kvm +1000, b +1000");
    assert_eq!(rig.listeners.remove(0x1000).unwrap().hva, 0x7000_1000);
    assert_eq!(rig.said(), "b -1000, kvm -1000, a -1000");
    assert!(matches!(rig.listeners.remove(0x1000), Err(MemoryError::Absent(0x1000))));
}

#[test]
fn where_one_refuses_who_was_told_before_is_told_the_contrary() {
    let rig = rig();
    let [a, kvm, b] = rig.three();
    rig.add(0x1000).unwrap();
    rig.said();
    b.refuses(&["+2000"]);
    assert_eq!(rig.add(0x2000).unwrap_err().to_string(), "b: no room for 0x2000: make some");
    assert_eq!(rig.said(), "a +2000, kvm +2000, b not +2000, kvm -2000, a -2000");
    kvm.refuses(&["+2000"]);
    assert!(rig.add(0x2000).is_err());
    assert_eq!(rig.said(), "a +2000, kvm not +2000, a -2000");
    assert_eq!(rig.has(), [0x1000]);
    a.refuses(&["-1000"]);
    assert!(rig.listeners.remove(0x1000).is_err());
    assert_eq!(rig.said(), "b -1000, kvm -1000, a not -1000, kvm +1000, b +1000");
    assert_eq!(rig.has(), [0x1000]);
    [&a, &b, &kvm].iter().for_each(|listener| listener.refuses(&[]));
    rig.add(0x2000).unwrap();
    rig.listeners.remove(0x1000).unwrap();
    assert_eq!(rig.has(), [0x2000]);
}

#[test]
fn who_comes_late_is_told_of_all_or_of_nothing() {
    let rig = rig();
    [0x1000, 0x2000].iter().for_each(|gpa| rig.add(*gpa).unwrap());
    let late = rig.listener("late", Rank::Dma);
    late.refuses(&["+2000"]);
    let error = rig.listeners.subscribe(late.clone()).unwrap_err();
    assert!(matches!(error, MemoryError::Refused { listener, .. } if listener == "late"));
    assert_eq!(rig.said(), "late +1000, late not +2000, late -1000");
    rig.add(0x3000).unwrap();
    assert_eq!(rig.said(), "", "it is none");
    late.refuses(&[]);
    rig.listeners.subscribe(late.clone()).unwrap();
    assert_eq!(rig.said(), "late +1000, late +2000, late +3000");
    // One that has gone over has it all.
    rig.listeners.unsubscribe(&*late);
    rig.listeners.subscribe_told(late);
    assert_eq!(rig.said(), "");
    rig.add(0x4000).unwrap();
    assert_eq!(rig.said(), "late +4000");
}

/// Its memory would be unmapped under it otherwise.
#[test]
fn what_could_not_be_undone_is_not_forgotten() {
    let rig = rig();
    let [a, kvm, b] = rig.three();
    b.refuses(&["+1000"]);
    kvm.refuses(&["-1000"]);
    let error = rig.add(0x1000).unwrap_err().to_string();
    assert_eq!(error, "b: no room for 0x1000: make some; kvm could not be put back");
    b.refuses(&[]);
    assert!(matches!(rig.add(0x1000), Err(MemoryError::Overlap { .. })), "kvm has it still");
    assert!(!rig.listeners.settle());
    rig.said();
    kvm.refuses(&[]);
    rig.add(0x1000).unwrap();
    assert_eq!(rig.said(), "kvm -1000, a +1000, kvm +1000, b +1000");
    // The other way: one that has let go does not take it again.
    a.refuses(&["-1000"]);
    b.refuses(&["+1000"]);
    assert!(rig.listeners.remove(0x1000).is_err());
    rig.said();
    assert!(!rig.listeners.settle());
    b.refuses(&[]);
    assert!(rig.listeners.settle());
    assert_eq!(rig.said(), "b not +1000, b +1000");
    b.refuses(&["+1000"]);
    assert!(rig.listeners.remove(0x1000).is_err());
    a.refuses(&[]);
    rig.said();
    rig.listeners.remove(0x1000).unwrap();
    assert_eq!(rig.said(), "b not +1000, kvm -1000, a -1000", "b has none of it");
    assert!(rig.listeners.settle(), "what is gone is owed to nobody");
}

#[test]
fn a_block_has_a_place_of_its_own() {
    let rig = rig();
    rig.add(0x2000).unwrap();
    for (gpa, size) in [(0x1000, 0x1001), (0x2FFF, 1), (0, u64::MAX), (0x5000, 0), (u64::MAX, 2)] {
        // SAFETY: nobody here touches it.
        let refused = unsafe { rig.listeners.add(rig.block(gpa, size)) };
        assert!(matches!(refused, Err(MemoryError::Overlap { .. })), "{gpa:#x}");
    }
    rig.add(0x1000).unwrap();
    rig.add(0x3000).unwrap();
}

#[test]
fn ram_is_found_by_guest_address() {
    let block = RamBlock { hva: 0x7000_0000, ..rig().block(0x1000, 0x3000) };
    assert_eq!(block.hva_of(0x2000, 0x2000), Some(0x7000_1000));
    assert_eq!(block.hva_of(0x2000, 0x2001), None);
    assert_eq!(block.hva_of(0, 0x1000), None);
    assert_eq!(block.hva_of(0x1000, u64::MAX), None);
}
