//! Saved states of every released format can be read, and damaged ones are refused with a reason, never a panic.
//!
//! Beside each golden state lies a text with what it says, as the build that has frozen it read it. Where the text of
//! this build is meant to differ (a field more, say), `THESEUS_BLESS=1 cargo test -p theseus-vmm --test saved_state`
//! writes it anew: look at what has changed.

use std::fmt::Write;
use std::path::PathBuf;

use rmpv::Value;
use theseus_resources::fd_store::SLOT_TYPE;
use theseus_resources::state::Format;
use theseus_resources::{StateReader, StateWriter};

fn golden() -> Vec<(PathBuf, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "state"));
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn golden_states_are_read() {
    let files = golden();
    assert!(!files.is_empty());
    for (path, bytes) in files {
        theseus_vmm::check_state(&bytes).unwrap_or_else(|reason| panic!("{}: {reason}", path.display()));
    }
}

/// What a state says, section by section.
fn text(bytes: &[u8]) -> String {
    let mut text = String::new();
    let bytes = theseus_vmm::reread_state(bytes).unwrap();
    for section in StateReader::new(&bytes).unwrap().sections() {
        writeln!(text, "{}: {} {}", section.name, section.kind, section.version).unwrap();
        print(&mut text, 1, &rmp_serde::from_slice(&section.data).unwrap());
    }
    text
}

/// A value that has others below it, a line for each of them.
fn print(text: &mut String, depth: usize, value: &Value) {
    let indent = "  ".repeat(depth);
    let below: Vec<(String, &Value)> = match value {
        Value::Map(map) => map.iter().map(|(key, value)| (format!("{}:", inline(key)), value)).collect(),
        Value::Array(values) => values.iter().map(|value| ("-".to_owned(), value)).collect(),
        _ => panic!("no value with others below it: {value}"),
    };
    for (name, value) in below {
        let (line, bytes) = (inline(value), numbers(value));
        if bytes.len() > 16 {
            writeln!(text, "{indent}{name} {} numbers", bytes.len()).unwrap();
            dump(text, &indent, &bytes);
        } else if indent.len() + name.len() + line.len() < 120 {
            writeln!(text, "{indent}{name} {line}").unwrap();
        } else if matches!(value, Value::Map(_) | Value::Array(_)) {
            writeln!(text, "{indent}{name}").unwrap();
            print(text, depth + 1, value);
        } else {
            writeln!(text, "{indent}{name} {line}").unwrap();
        }
    }
}

fn inline(value: &Value) -> String {
    match value {
        Value::Map(map) => {
            let fields: Vec<_> = map.iter().map(|(key, value)| format!("{}: {}", inline(key), inline(value))).collect();
            format!("{{{}}}", fields.join(", "))
        }
        Value::Array(values) => format!("[{}]", values.iter().map(inline).collect::<Vec<_>>().join(", ")),
        Value::Binary(bytes) => format!("x{}", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()),
        Value::Ext(SLOT_TYPE, bytes) => format!("slot {}", u32::from_le_bytes(bytes[..].try_into().unwrap())),
        Value::String(text) => text.as_str().unwrap().to_owned(),
        other => other.to_string(),
    }
}

/// Of bytes, or of an array of numbers alone.
fn numbers(value: &Value) -> Vec<String> {
    match value {
        Value::Binary(bytes) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        Value::Array(values) if values.iter().all(Value::is_number) => values.iter().map(inline).collect(),
        _ => Vec::new(),
    }
}

/// Lines with their offset; those that are as the one before are left out.
fn dump(text: &mut String, indent: &str, numbers: &[String]) {
    let mut before: Option<&[String]> = None;
    for (line, at) in numbers.chunks(16).zip((0..).step_by(16)) {
        if before != Some(line) {
            writeln!(text, "{indent}  {at:04x}  {}", line.join(" ")).unwrap();
        }
        before = Some(line);
    }
}

#[test]
fn golden_states_mean_what_they_meant() {
    for (path, bytes) in golden() {
        let (text, path) = (text(&bytes), path.with_extension("values"));
        if std::env::var_os("THESEUS_BLESS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let frozen = std::fs::read_to_string(&path).unwrap_or_default();
        let other = (1..).zip(text.lines().zip(frozen.lines())).find(|(_, (now, then))| now != then);
        assert_eq!(
            (other, text.lines().count()),
            (None, frozen.lines().count()),
            "{}, line, now, then",
            path.display()
        );
        assert_eq!(self::text(&theseus_vmm::reread_state(&bytes).unwrap()), text);
    }
}

/// The state of a machine apart from its handles is what another host could make use of.
#[test]
fn only_handles_name_descriptors() {
    for (path, bytes) in golden() {
        let reader = StateReader::new(&bytes).unwrap();
        let with: Vec<_> = reader.sections().filter(|section| has_slot(&section.decode().unwrap())).collect();
        let is_handles = |name: &str| name.ends_with(".handles") || name == "handover";
        for section in &with {
            assert!(is_handles(&section.name), "{}: section '{}' names a descriptor", path.display(), section.name);
        }
        let names: Vec<_> = with.iter().map(|section| &*section.name).collect();
        assert!(names.contains(&"ram.handles") && names.contains(&"vfio.handles") && names.len() >= 6, "{names:?}");
    }
}

fn has_slot(value: &Value) -> bool {
    match value {
        Value::Ext(SLOT_TYPE, _) => true,
        Value::Array(values) => values.iter().any(has_slot),
        Value::Map(map) => map.iter().any(|(_, value)| has_slot(value)),
        _ => false,
    }
}

#[test]
fn truncated_and_flipped_states_are_refused() {
    for (_, bytes) in golden() {
        for cut in (0..bytes.len()).step_by(bytes.len() / 200 + 1) {
            assert!(theseus_vmm::check_state(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for at in (0..bytes.len()).step_by(bytes.len() / 200 + 1) {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(theseus_vmm::check_state(&bad).is_err(), "flip at {at}");
        }
    }
}

/// Behind the checksum: the bytes of the body are changed and the checksum is made right, so that the decoders see
/// them. What they say is open, as a changed register value is as good as another; that they come back is not.
#[test]
fn no_body_makes_a_decoder_panic() {
    let (mut refused, mut tried) = (0, 0);
    for (_, bytes) in golden() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize
        };
        for _ in 0..3000 {
            let mut bad = bytes.clone();
            for _ in 0..1 + random() % 8 {
                let at = 24 + random() % (bad.len() - 24);
                match random() % 3 {
                    0 => bad[at] = random() as u8,
                    1 => bad[at] ^= 1 << (random() % 8),
                    _ => {
                        let to = 24 + random() % (bad.len() - 24);
                        let count = (random() % 64).min(bad.len() - at.max(to));
                        bad.copy_within(at..at + count, to);
                    }
                }
            }
            let checksum = theseus_resources::state::checksum(&bad[24..]);
            bad[12..16].copy_from_slice(&checksum.to_le_bytes());
            tried += 1;
            refused += usize::from(theseus_vmm::check_state(&bad).is_err());
        }
    }
    assert!(refused > tried / 20, "only {refused} of {tried} were refused: do the changes reach the decoders?");
}

/// A state as a build one version on would write it: `change` gets each section's name and its fields, which it may
/// change.
fn of_a_later_build(bytes: &[u8], mut change: impl FnMut(&str, &mut Vec<(Value, Value)>)) -> StateWriter {
    let reader = StateReader::new(bytes).unwrap();
    let mut writer = StateWriter::new("a later build");
    for section in reader.sections() {
        let mut fields: Value = rmp_serde::from_slice(&section.data).unwrap();
        let Value::Map(map) = &mut fields else { panic!("section '{}' is no map", section.name) };
        change(&section.name, map);
        let kind = section.kind.to_string().leak();
        writer.add(&section.name, &Format::new(kind, section.version + 1), &fields).unwrap();
    }
    writer
}

fn check(writer: &StateWriter) -> Result<(), String> {
    theseus_vmm::check_state(&writer.finish().unwrap()).map_err(|error| error.to_string())
}

/// Puts a new field into this struct and every one below it. Returns how many there were.
fn grow(fields: &mut Vec<(Value, Value)>) -> usize {
    let below = fields.iter_mut().map(|(_, value)| grow_value(value)).sum::<usize>();
    fields.insert(0, ("of_a_later_version".into(), Value::Array(vec![Value::from(7)])));
    below + 1
}

fn grow_value(value: &mut Value) -> usize {
    match value {
        Value::Array(values) => values.iter_mut().map(grow_value).sum(),
        Value::Map(map) => match &map[..] {
            // One of an enum's variants, with its content.
            [(key, _)] if key.as_str().is_some_and(|name| name.starts_with(char::is_uppercase)) => {
                grow_value(&mut map[0].1)
            }
            [(key, _), ..] if key.as_str().is_some() => grow(map),
            // A map by numbers, or an empty one.
            _ => map.iter_mut().map(|(_, value)| grow_value(value)).sum(),
        },
        _ => 0,
    }
}

#[test]
fn a_new_field_in_every_section_and_struct_is_skipped() {
    for (path, bytes) in golden() {
        let mut structs = 0;
        let later = of_a_later_build(&bytes, |_, fields| structs += grow(fields));
        check(&later).unwrap_or_else(|reason| panic!("{}: {reason}", path.display()));
        assert!(structs > 100, "only {structs}: is the inside of the sections reached?");
    }
}

/// A field that a later build has dropped is its default where it has one, or else a refusal that names section and
/// field.
#[test]
fn a_removed_field_is_its_default_or_is_named() {
    for (_, bytes) in golden() {
        let without = |section: &str, field: &str| {
            check(&of_a_later_build(&bytes, |name, fields| {
                let before = fields.len();
                fields.retain(|(key, _)| name != section || key.as_str() != Some(field));
                assert!(name != section || fields.len() + 1 == before, "section '{name}' has no field '{field}'");
            }))
        };
        without("handover", "supervisor").unwrap();
        let reason = without("machine", "running").unwrap_err();
        assert!(reason.contains("'machine'") && reason.contains("running"), "{reason}");
    }
}

/// What it says cannot be left out unread: the guest would lose it.
#[test]
fn a_new_section_is_refused_by_name() {
    for (_, bytes) in golden() {
        let mut later = of_a_later_build(&bytes, |_, _| {});
        check(&later).unwrap();
        later
            .add("virtio-net0", &Format::new("virtio-net", 1), &Value::Map(vec![("queues".into(), Value::from(2))]))
            .unwrap();
        let reason = check(&later).unwrap_err();
        assert!(reason.contains("virtio-net0"), "{reason}");
    }
}

#[test]
fn two_versions_on_is_refused_by_name() {
    for (_, bytes) in golden() {
        let later = of_a_later_build(&bytes, |_, _| {}).finish().unwrap();
        let reason = check(&of_a_later_build(&later, |_, _| {})).unwrap_err();
        assert!(reason.contains("version 3"), "{reason}");
    }
}
