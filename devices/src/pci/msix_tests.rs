//! MSI-X against an interrupt controller that keeps KVM's rules about irqfds, with real eventfds.

use super::*;
use crate::interrupt::fake::FakeController;

fn program(msix: &mut Msix, vector: u64, data: u32, masked: bool) {
    msix.table_write(vector * 16, &0xFEE0_1000u64.to_le_bytes());
    msix.table_write(vector * 16 + 8, &data.to_le_bytes());
    msix.table_write(vector * 16 + 12, &u32::from(masked).to_le_bytes());
}

fn signal(msix: &mut Msix, vector: usize) {
    rustix::io::write(msix.eventfds().unwrap()[vector], &1u64.to_ne_bytes()).unwrap();
}

fn pba(msix: &Msix) -> u64 {
    let mut data = [0; 8];
    msix.pba_read(0, &mut data);
    u64::from_le_bytes(data)
}

fn enabled() -> (Msix, Arc<FakeController>, FdStore) {
    let (msi, fd_store) = (Arc::new(FakeController::default()), FdStore::new());
    let mut msix = Msix::new("nic0", 3, msi.clone(), fd_store.clone());
    program(&mut msix, 0, 0x40, false);
    program(&mut msix, 1, 0x41, false);
    assert!(msi.calls().is_empty() && fd_store.manifest().is_empty(), "nothing before MSI-X is on");
    assert_eq!(msix.eventfds().unwrap().len(), 3);
    msix.set_control(MSIX_ENABLE);
    (msix, msi, fd_store)
}

#[test]
fn enabling_routes_all_in_one_call_then_attaches_the_unmasked() {
    let (_msix, msi, fd_store) = enabled();
    assert_eq!(msi.calls(), ["route", "attach", "attach"]);
    assert_eq!(fd_store.manifest().len(), 3);
}

#[test]
fn a_masked_vector_is_pending_and_fires_at_unmask() {
    let (mut msix, msi, _vault) = enabled();
    program(&mut msix, 1, 0x41, true);
    signal(&mut msix, 1);
    signal(&mut msix, 1);
    assert_eq!((pba(&msix), msi.injected()), (0b10, vec![]));
    msi.calls();
    program(&mut msix, 1, 0x41, false);
    assert_eq!((pba(&msix), msi.injected()), (0, vec![0x41]));
    assert_eq!(msi.calls(), ["attach"], "no new route for the same message");
    program(&mut msix, 1, 0x41, true);
    assert_eq!(pba(&msix), 0, "delivered, so no longer pending");
}

#[test]
fn a_message_changed_while_masked_is_the_one_delivered() {
    let (mut msix, msi, _vault) = enabled();
    program(&mut msix, 0, 0x40, true);
    signal(&mut msix, 0);
    msix.table_write(8, &0x77u32.to_le_bytes());
    msix.table_write(12, &[0; 4]);
    assert_eq!(msi.injected(), [0x77]);
}

#[test]
fn the_function_mask_masks_all() {
    let (mut msix, msi, _vault) = enabled();
    msix.set_control(MSIX_ENABLE | MSIX_FUNCTION_MASK);
    assert_eq!(msi.attached(), 0);
    signal(&mut msix, 0);
    signal(&mut msix, 2);
    assert_eq!(pba(&msix), 0b101);
    msix.set_control(MSIX_ENABLE);
    assert_eq!((msi.injected(), msi.attached(), pba(&msix)), (vec![0x40], 2, 0b100));
}

#[test]
fn disabling_forgets_what_is_pending() {
    let (mut msix, msi, _vault) = enabled();
    signal(&mut msix, 2);
    msix.set_control(0);
    assert_eq!((msi.attached(), pba(&msix), msi.taken()), (0, 0, 3));
    msix.release();
    assert_eq!(msi.taken(), 0);
}

#[test]
fn a_refused_update_loses_nothing() {
    let (mut msix, msi, _vault) = enabled();
    msix.quiesce_irqfds().unwrap();
    assert_eq!(msi.attached(), 0);
    signal(&mut msix, 1);
    msix.resume_irqfds().unwrap();
    assert_eq!((msi.injected(), msi.attached()), (vec![0x41], 2));
}

/// The same in a new image.
fn carried(msix: &mut Msix, fd_store: &FdStore) -> (Msix, Arc<FakeController>) {
    let saved = msix.save();
    assert_eq!(saved, msix.save(), "save is pure");
    let (fd_store, mut claims) = fd_store.handed_over().unwrap();
    let msi = Arc::new(FakeController::default());
    let new = Msix::restore("nic0", saved, msi.clone(), fd_store, &mut claims).unwrap();
    claims.finish().unwrap();
    (new, msi)
}

#[test]
fn an_event_in_the_pause_is_injected_in_the_new_image() {
    let (mut msix, _, fd_store) = enabled();
    program(&mut msix, 2, 0x42, true);
    msix.quiesce_irqfds().unwrap();
    let (mut new, msi) = carried(&mut msix, &fd_store);
    assert_eq!(msix.save().0.pending, [0; 0]);
    signal(&mut msix, 2);
    assert_eq!((msix.save().0.pending, msix.save().1), (vec![2], new.save().1), "the guest's, and no handle");
    let state = msix.save();
    signal(&mut msix, 0);
    assert_eq!((msix.save(), pba(&new)), (state, 0b100), "not masked, so on its way: the eventfd says it");
    assert!(msi.calls().is_empty(), "routes are staged, irqfds wait");
    new.resume_irqfds().unwrap();
    assert_eq!((msi.injected(), msi.calls()), (vec![0x40], vec!["attach", "attach"]));
    new.signal_all();
    assert_eq!(pba(&new), 0b100);
}

#[test]
fn odd_accesses_do_no_harm() {
    let (mut msix, _, _vault) = enabled();
    msix.table_write(47, &[0xFF; 8]);
    msix.table_write(u64::MAX, &[0xFF; 8]);
    msix.table_write(12, &[0xFF; 4]);
    let mut data = [0; 8];
    msix.table_read(12, &mut data[..4]);
    assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0], "only the mask bit is there");
    msix.table_read(u64::MAX - 3, &mut data);
    assert_eq!(data, [0; 8]);
    msix.pba_read(u64::MAX - 3, &mut data);
    assert_eq!(data, [0; 8]);
}

/// Each call to KVM fails once: nothing is taken for done, nothing injected to where it should no longer go, and
/// nothing is lost.
#[test]
fn what_the_host_refuses_is_tried_again() {
    let (mut msix, msi, _vault) = enabled();
    // A new message for an attached vector.
    msi.refuse("route", libc::ENOMEM);
    program(&mut msix, 0, 0x50, false);
    signal(&mut msix, 0);
    assert_eq!((msi.injected(), pba(&msix)), (vec![], 1), "it waits");
    msi.refuse("attach", libc::ENOMEM);
    assert!(msix.settle().is_err());
    assert_eq!((msi.injected(), pba(&msix)), (vec![], 1));
    msi.refuse("", 0);
    msix.settle().unwrap();
    assert_eq!((msi.injected(), msi.attached(), pba(&msix)), (vec![0x50], 2, 0));
    msi.calls();
    msix.settle().unwrap();
    assert!(msi.calls().is_empty(), "all is done");
    // A mask: the irqfd stays what it is.
    msi.refuse("detach", libc::ENOMEM);
    program(&mut msix, 0, 0x50, true);
    assert_eq!(msi.attached(), 2);
    assert!(msix.quiesce_irqfds().is_err(), "no update with an irqfd of the old VM");
    msi.refuse("", 0);
    msix.resume_irqfds().unwrap();
    assert_eq!(msi.attached(), 1, "masked, at last");
    program(&mut msix, 0, 0x50, false);
    assert_eq!(msi.attached(), 2);
}

#[test]
fn a_success_elsewhere_does_not_hide_a_failure() {
    let (mut msix, msi, _vault) = enabled();
    program(&mut msix, 0, 0x40, true);
    msi.refuse("attach", libc::ENOMEM);
    program(&mut msix, 0, 0x40, false);
    msi.refuse("", 0);
    program(&mut msix, 1, 0x51, false);
    assert_eq!(msi.attached(), 1);
    msix.settle().unwrap();
    assert_eq!(msi.attached(), 2);
}

#[test]
fn a_message_that_cannot_be_is_the_guest_s_own_fault() {
    let (mut msix, msi, _vault) = enabled();
    msi.refuse("route", libc::EINVAL);
    program(&mut msix, 0, 0x66, false);
    msi.refuse("", 0);
    msi.calls();
    msix.settle().unwrap();
    msix.quiesce_irqfds().unwrap();
    msi.refuse("route", libc::EINVAL);
    msix.resume_irqfds().unwrap();
    assert_eq!(msi.attached(), 1, "no update is refused for it, nor is the old message sent");
    msi.refuse("", 0);
    program(&mut msix, 0, 0x67, false);
    assert_eq!(msi.attached(), 2);
}

/// A save between the failure and the next try: the table is what the guest wants, and the new image makes it true.
#[test]
fn what_is_refused_still_goes_over() {
    let (mut msix, msi, fd_store) = enabled();
    msi.refuse("route", libc::ENOMEM);
    program(&mut msix, 0, 0x50, false);
    signal(&mut msix, 0);
    msix.quiesce_irqfds().unwrap();
    let (new, msi) = carried(&mut msix, &fd_store);
    let mut new = new;
    assert_eq!(pba(&new), 0, "it is on its way");
    new.resume_irqfds().unwrap();
    assert_eq!((msi.injected(), msi.attached()), (vec![0x50], 2));
}
