//! What the fuzzer has kept goes through its target again, by the normal compiler, and so do changes of it, the same
//! ones each time: `THESEUS_FUZZ_CHANGES=100000` asks for more of them.

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use theseus_fuzz::{TARGETS, mutate};

fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// Of all, each file is told that fails.
fn replay(target: fn(&[u8]), files: Vec<(PathBuf, Vec<u8>)>) {
    assert!(!files.is_empty());
    let bad: Vec<_> = files.into_iter().filter(|(_, bytes)| catch_unwind(|| target(bytes)).is_err()).collect();
    assert!(bad.is_empty(), "{:?}", bad.into_iter().map(|(path, _)| path).collect::<Vec<_>>());
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn corpora_go_through_their_targets() {
    for (name, target) in TARGETS {
        replay(*target, files(&root().join("corpus").join(name)));
    }
}

#[test]
fn golden_states_go_through_their_target() {
    let golden = files(&root().join("../vmm/tests/golden"));
    let golden = golden.into_iter().filter(|(path, _)| path.extension().is_some_and(|end| end == "state"));
    replay(theseus_fuzz::saved_state::run, golden.collect());
}

/// xorshift64
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % end.max(1)
    }
}

/// What a fuzzer does to bytes, without its eye for what is new: some are set, doubled, left out or come from `other`.
fn changed(bytes: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut new = bytes.to_vec();
    for _ in 0..1 + random.below(6) {
        let (at, len) = (random.below(new.len()), 1 + random.below(12));
        let end = (at + len).min(new.len());
        match random.below(6) {
            0 => drop(new.drain(at..end)),
            1 => {
                let twice = new[at..end].to_vec();
                drop(new.splice(at..at, twice));
            }
            2 => {
                let from = random.below(other.len());
                let piece = &other[from..(from + 3 * len).min(other.len())];
                drop(new.splice(at..end, piece.iter().copied()));
            }
            3 => new.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
            _ => new.iter_mut().skip(at).take(1 + len / 6).for_each(|byte| *byte = random.below(256) as u8),
        }
    }
    new
}

fn changes() -> usize {
    std::env::var("THESEUS_FUZZ_CHANGES").ok().and_then(|text| text.parse().ok()).unwrap_or(200)
}

#[test]
fn so_do_changes_of_them() {
    for (name, target) in TARGETS.iter().filter(|(name, _)| *name != "saved_state") {
        let (files, mut random) = (files(&root().join("corpus").join(name)), Random(0x9E37_79B9_7F4A_7C15));
        for _ in 0..changes() {
            let [(path, bytes), (_, other)] = [0; 2].map(|_| &files[random.below(files.len())]);
            let new = changed(bytes, other, &mut random);
            let done = catch_unwind(|| target(&new));
            assert!(done.is_ok(), "{name}: a change of {}: {}", path.display(), new.escape_ascii());
        }
    }
}

/// In place, as the fuzzer's own.
fn in_place(data: &mut [u8], size: usize, max: usize) -> usize {
    let mut random =
        Random(data[..size].iter().fold(1_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte))) | 1);
    random.below(1);
    let new = changed(&data[..size], &[0xFF; 9], &mut random);
    let len = new.len().min(max);
    data[..len].copy_from_slice(&new[..len]);
    len
}

#[test]
fn so_do_changes_of_golden_states() {
    let golden = files(&root().join("../vmm/tests/golden"));
    for (path, bytes) in golden.iter().filter(|(path, _)| path.extension().is_some_and(|end| end == "state")) {
        let mut buffer = vec![0; bytes.len() + 4096];
        for seed in 0..(changes() / 4) as u32 {
            buffer[..bytes.len()].copy_from_slice(bytes);
            let (size, max) = (bytes.len(), buffer.len());
            let size = mutate::state(&mut buffer, size, max, seed, in_place);
            let done = catch_unwind(|| theseus_fuzz::saved_state::run(&buffer[..size]));
            assert!(done.is_ok(), "{}: change {seed}", path.display());
        }
    }
}

/// cargo-fuzz runs what the manifest names.
#[test]
fn every_target_has_a_body_and_every_body_a_target() {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let lines = manifest.lines().filter_map(|line| line.strip_prefix("path = \"targets/")?.strip_suffix(".rs\""));
    assert_eq!(lines.collect::<Vec<_>>(), TARGETS.iter().map(|(name, _)| *name).collect::<Vec<_>>());
}
