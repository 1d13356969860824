//! What is added to the guest's memory, and the domains that are told of it.

use super::super::dma::DmaMap;
use super::super::dma::fake::{block, container};
use super::*;

#[test]
fn memory_that_is_added_reaches_the_domains_in_use() {
    let fd_store = FdStore::new();
    let (domain, _) = container(&fd_store, DEFAULT_CONTAINER, false);
    let passthrough = Passthrough::with(&fd_store, domain.clone());
    let count = domain.maps().len();
    // SAFETY: here and below, this kernel maps nothing.
    let add = |memory: &MemoryListeners, gpa| unsafe { memory.add(block(&fd_store, gpa)) };
    add(&passthrough.memory, 0x30_0000).unwrap();
    assert_eq!(domain.maps().len(), count + 1);
    let group = passthrough.group(7);
    passthrough.prune();
    add(&passthrough.memory, 0x40_0000).unwrap();
    assert_eq!(domain.maps().len(), count + 2, "a device has it");
    drop(group);
    passthrough.prune();
    assert!(passthrough.domains().is_empty());
    add(&passthrough.memory, 0x50_0000).unwrap();
    assert_eq!(domain.maps().len(), count + 2, "it is closed, or about to be");
}

#[test]
fn a_domain_that_has_gone_over_is_told_of_what_is_new_alone() {
    let fd_store = FdStore::new();
    let (domain, _) = container(&fd_store, DEFAULT_CONTAINER, false);
    let old = Passthrough::with(&fd_store, domain.clone());
    let handles = old.save();
    // Their addresses are nobody's yet.
    let maps: Vec<_> = domain.maps().into_iter().map(|map| DmaMap { vaddr: 0, ..map }).collect();
    let (fd_store, mut claims) = fd_store.handed_over().unwrap();
    let memory = Arc::new(MemoryListeners::new());
    for map in &maps {
        // SAFETY: nobody touches it.
        unsafe { memory.add(block(&fd_store, map.iova)) }.unwrap();
    }
    let passthrough = Passthrough::restore(handles, fd_store.clone(), memory.clone(), &mut claims).unwrap();
    assert_eq!(passthrough.domains()[0].maps(), maps, "the kernel was asked for nothing");
    // Its fd is a memfd, which can map nothing: so it was asked now.
    // SAFETY: as above.
    let error = unsafe { memory.add(block(&fd_store, 0x30_0000)) }.unwrap_err().to_string();
    assert!(error.starts_with("container 'default': cannot map 0x300000+0x1000 for DMA"), "{error}");
    assert_eq!((memory.blocks().len(), passthrough.domains()[0].maps()), (maps.len(), maps));
    drop(passthrough);
    // SAFETY: as above.
    unsafe { memory.add(block(&fd_store, 0x30_0000)) }.expect("its domains are no more");
}
