//! The target `passthrough`: its body is in `src/passthrough.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| theseus_fuzz::passthrough::run(data));
