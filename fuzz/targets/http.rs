//! The target `http`: its body is in `src/http.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| theseus_fuzz::http::run(data));
