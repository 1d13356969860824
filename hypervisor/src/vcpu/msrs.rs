//! Which MSRs a vCPU has, and moving them in bulk.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::{Error, Result};

const MSR_IA32_TSC: u32 = 0x10;
pub(super) const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Hyper-V's: our guests are told of KVM, and the first write would switch that emulation on (kvm_hv_set_msr_common).
const HYPERV: std::ops::Range<u32> = 0x4000_0000..0x4000_1000;
/// KVM takes at most this many at once (KVM_MAX_MSR_ENTRIES in the bindings).
const CHUNK: usize = 200;

/// MSR_KVM_WALL_CLOCK and its successor: a write makes KVM fill in guest memory, once; the guest may use it for
/// something else by now.
const WALL_CLOCKS: [u32; 2] = [0x11, 0x4b56_4d00];
const IA32_DEBUGCTL: u32 = 0x1d9;

/// AMD's VM_CR, OSVW_ID_LENGTH, OSVW_STATUS and DE_CFG, where a guest finds what it has written (svm_set_msr,
/// kvm_set_msr_common).
const AMD: [u32; 4] = [0xc001_0114, 0xc001_0140, 0xc001_0141, 0xc001_1029];

/// What KVM_GET_MSR_INDEX_LIST leaves out: MTRRs and machine check banks (kernel-facts.md), DEBUGCTL, and AMD's.
fn unlisted() -> impl Iterator<Item = u32> {
    let mtrrs = [0x250, 0x258, 0x259, 0x2ff].into_iter().chain(0x200..0x210).chain(0x268..0x270);
    let mce = [0x179, 0x17a, 0x17b].into_iter().chain(0x400..0x480);
    mtrrs.chain(mce).chain([IA32_DEBUGCTL]).chain(AMD)
}

/// Whether `values`, in ascending order of their index, have it with the same value.
pub(super) fn is_among(entry: &kvm_msr_entry, values: &[kvm_msr_entry]) -> bool {
    let at = values.binary_search_by_key(&entry.index, |value| value.index);
    at.is_ok_and(|at| values[at].data == entry.data)
}

/// The MSRs that answer, and take their own value back, on this vCPU. The TSC is left out: its offset is what goes
/// over. The deadline timer is left out: it comes later than the others.
pub(super) fn discover(fd: &VcpuFd, listed: &[u32]) -> Vec<u32> {
    let mut candidates: Vec<u32> = listed.iter().copied().chain(unlisted()).collect();
    candidates.sort_unstable();
    candidates.dedup();
    let left_out = |index: &u32| {
        [MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE].contains(index) || WALL_CLOCKS.contains(index) || HYPERV.contains(index)
    };
    candidates.retain(|index| !left_out(index));
    let values = read_skipping(fd, &candidates);
    values.iter().filter(|entry| write_once(fd, std::slice::from_ref(entry)) == 1).map(|entry| entry.index).collect()
}

/// KVM_GET_MSRS stops at the first MSR it cannot read: step over that one and go on.
fn read_skipping(fd: &VcpuFd, indices: &[u32]) -> Vec<kvm_msr_entry> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(CHUNK)];
        let read = read_once(fd, chunk);
        let got = read.len();
        found.extend(read);
        let step = if got < chunk.len() { got + 1 } else { got };
        rest = &rest[step.min(rest.len())..];
    }
    found
}

fn entries(indices: &[u32]) -> Vec<kvm_msr_entry> {
    indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect()
}

fn read_once(fd: &VcpuFd, indices: &[u32]) -> Vec<kvm_msr_entry> {
    let Ok(mut msrs) = Msrs::from_entries(&entries(indices)) else { return Vec::new() };
    let count = fd.get_msrs(&mut msrs).unwrap_or(0);
    msrs.as_slice().iter().take(count).copied().collect()
}

fn write_once(fd: &VcpuFd, values: &[kvm_msr_entry]) -> usize {
    Msrs::from_entries(values).map_or(0, |msrs| fd.set_msrs(&msrs).unwrap_or(0))
}

/// Reads all of `indices`; one that has gone away is an error. And the deadline timer's, if there is one.
pub(super) fn read(fd: &VcpuFd, vcpu: u32, indices: &[u32]) -> Result<(Vec<kvm_msr_entry>, Option<u64>)> {
    // In one call where they fit: each of them costs the pause of an update some microseconds.
    let mut values = read_skipping(fd, &[indices, &[MSR_IA32_TSC_DEADLINE]].concat());
    let deadline = values.pop_if(|last| last.index == MSR_IA32_TSC_DEADLINE).map(|deadline| deadline.data);
    if values.len() == indices.len() {
        return Ok((values, deadline));
    }
    let missing = indices.iter().find(|index| !values.iter().any(|value| value.index == **index)).copied();
    Err(Error::Call {
        what: format!("vCPU {vcpu}: MSR {:#x} can no longer be read", missing.unwrap_or_default()),
        source: std::io::ErrorKind::NotFound.into(),
    })
}

/// Writes all of `values` but the wall clocks, which states of earlier builds have. KVM_SET_MSRS stops at the first
/// that it refuses, which is the error.
pub(super) fn write(fd: &VcpuFd, vcpu: u32, values: &[kvm_msr_entry]) -> Result<()> {
    let values: Vec<_> = values.iter().filter(|entry| !WALL_CLOCKS.contains(&entry.index)).copied().collect();
    for chunk in values.chunks(CHUNK) {
        if let Some(refused) = chunk.get(write_once(fd, chunk)) {
            return Err(Error::Msr { vcpu, index: refused.index, data: refused.data });
        }
    }
    Ok(())
}
