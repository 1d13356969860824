//! The target `arguments`: its body is in `src/arguments.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| theseus_fuzz::arguments::run(data));
