//! The target `saved_state`: its body is in `src/saved_state.rs`.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use theseus_fuzz::{mutate, saved_state};

fuzz_target!(|data: &[u8]| saved_state::run(data));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate::state(data, size, max_size, seed, fuzzer_mutate)
});
