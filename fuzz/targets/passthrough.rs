#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| theseus_fuzz::passthrough::run(data));
