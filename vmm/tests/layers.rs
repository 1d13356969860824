//! Imports run one way: a module imports only from those that stand before it here, a crate only from the crates before
//! it. So a lower part can be read, tested and changed without a higher one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// (crate, its modules), each from the lowest to the highest.
const LAYERS: [(&str, &[&str]); 7] = [
    (
        "resources",
        &[
            "rate",
            "survivor",
            "threads",
            "socket",
            "channel",
            "mapping",
            "hugepages",
            "layout",
            "alloc",
            "fd_store",
            "memory_listener",
            "ram",
            "state",
        ],
    ),
    ("api", &["types", "args", "access", "reply", "endpoint", "server", "client"]),
    ("hypervisor", &["error", "system", "clock", "irqchip", "raw", "routing", "vfio", "vm", "vcpu"]),
    (
        "devices",
        &[
            "bus",
            "migratable",
            "rate_limited_log",
            "interrupt",
            "turn",
            "spec",
            "pci",
            "device",
            "legacy",
            "host_bridge",
            "counting",
            "vfio",
            "catalogue",
            "set",
        ],
    ),
    (
        "vmm",
        &[
            "elf",
            "small_file",
            "seams",
            "panics",
            "heap",
            "spin",
            "available_memory",
            "notify",
            "logging",
            "signals",
            "talk",
            "timeline",
            "sandbox",
            "test_hooks",
            "boot",
            "build_info",
            "memory_errors",
            "vcpus",
            "keeper",
            "ending",
            "events",
            "update_key",
            "supervisor",
            "main_thread",
            "machine",
            "update",
            "control",
            "cli",
        ],
    ),
    (
        "tests",
        &[
            "clock",
            "seq",
            "net",
            "counters",
            "stillness",
            "proto",
            "stream",
            "agent",
            "harness",
            "floor",
            "bench",
            "demo",
            "native",
            "cases",
            "soak",
        ],
    ),
    (
        "fuzz",
        &["input", "devices", "registers", "requests", "http", "arguments", "saved_state", "mutate", "passthrough"],
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") && !path.to_str().unwrap().ends_with("tests.rs") {
            found.push(path);
        }
    }
}

/// Without comments, and without the tests at the end.
fn code(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The first names of all paths that begin with `crate::`.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for path in code.split("crate::").skip(1) {
        let mut depth = 0;
        let mut name = String::new();
        for letter in path.chars() {
            match letter {
                '{' => depth += 1,
                '}' | ',' | ':' | ';' | '(' | ')' | ' ' | '\n' if depth <= 1 => {
                    found.extend((!name.is_empty()).then(|| std::mem::take(&mut name)));
                    // After a name comes its inside: only a comma at the top begins another.
                    if depth == 0 || letter == '}' {
                        break;
                    }
                }
                letter if depth <= 1 && (letter.is_alphanumeric() || letter == '_') => name.push(letter),
                _ => {}
            }
            depth -= usize::from(letter == '}' && depth > 0);
        }
    }
    found
}

#[test]
fn modules_import_from_lower_ones() {
    for (krate, layers) in LAYERS {
        let src = root().join(krate).join("src");
        let mut files = Vec::new();
        sources(&src, &mut files);
        for file in files {
            let within = file.strip_prefix(&src).unwrap();
            let module = within.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
            if ["lib", "main", "bin"].contains(&module.as_str()) {
                continue;
            }
            let level = |name: &str| layers.iter().position(|layer| *layer == name);
            let own = level(&module).unwrap_or_else(|| panic!("{krate}: {module} has no place in LAYERS"));
            for name in imports(&code(&fs::read_to_string(&file).unwrap())) {
                let is_lower = level(&name).is_none_or(|other| other <= own);
                assert!(is_lower, "{krate}/src/{}: imports from {name}, which is above it", within.display());
            }
        }
    }
}

#[test]
fn crates_import_from_lower_ones() {
    for (own, (krate, _)) in LAYERS.iter().enumerate() {
        let manifest = fs::read_to_string(root().join(krate).join("Cargo.toml")).unwrap();
        let (_, uses) = manifest.split_once("\n[dependencies]\n").unwrap();
        let uses = uses.split("\n[").next().unwrap_or_default();
        for name in uses.lines().filter_map(|line| line.strip_prefix("theseus-")) {
            let name = name.split(['.', ' ', '=']).next().unwrap_or_default();
            let other = LAYERS.iter().position(|(other, _)| *other == name).unwrap();
            assert!(other < own, "{krate} depends on {name}, which is above it");
        }
    }
}

/// One that is not is compiled, updated and trusted for nothing.
#[test]
fn dependencies_are_used() {
    for (krate, _) in LAYERS {
        let folder = root().join(krate);
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        let mut files = Vec::new();
        for part in ["src", "tests", "targets"].map(|part| folder.join(part)).iter().filter(|part| part.exists()) {
            sources(part, &mut files);
        }
        let text: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
        let tables = manifest.split("\n[").filter(|table| table.contains("dependencies]"));
        for name in tables.flat_map(str::lines).skip(1).filter_map(|line| line.split(['.', ' ', '=']).next()) {
            let used = name.replace('-', "_");
            assert!(name.is_empty() || name.contains(']') || text.contains(&used), "{krate}: {name} is not used");
        }
    }
}

#[test]
fn names_are_found() {
    let text = "use crate::a::b;\nuse crate::{c::{d, e}, f};\n// crate::g\nlet x = crate::h::i(crate::j());\n";
    let found: Vec<_> = imports(&code(&format!("{text}#[cfg(test)]\nmod tests {{ crate::k }}"))).into_iter().collect();
    assert_eq!(found, ["a", "c", "f", "h", "j"]);
}
