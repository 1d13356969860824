//! The target `registers`: its body is in `src/registers.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| theseus_fuzz::registers::run(data));
