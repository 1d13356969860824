//! Any bytes as a saved state; the checksum is made right first, or nothing would get past it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    if bytes.len() >= 24 {
        let length = (bytes.len() - 24) as u64;
        let checksum = theseus_resources::state::checksum(&bytes[24..]);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        bytes[16..24].copy_from_slice(&length.to_le_bytes());
    }
    let _ = theseus_vmm::check_state(&bytes);
});
