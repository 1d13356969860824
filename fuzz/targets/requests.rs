//! The target `requests`: its body is in `src/requests.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| theseus_fuzz::requests::run(data));
