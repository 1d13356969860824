//! Changes to a saved state that keep it one: behind the checksum, and inside of its sections, which a change of any
//! byte would mostly make unreadable.

use std::borrow::Cow;

use rmpv::Value;
use serde::{Deserialize, Serialize};

use crate::saved_state::{HEADER, with_header};

/// The mutator of the fuzzer: changes so many bytes of a buffer that has room for some more, and says how many there
/// are then.
type Bytes = fn(&mut [u8], usize, usize) -> usize;

/// What a section may grow by at once.
const ROOM: usize = 64;
/// Values at the ends of their types.
const EDGES: [u64; 14] =
    [0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 32, 1 << 63, u64::MAX];

#[derive(Clone, Serialize, Deserialize)]
struct Section<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    version: u16,
    #[serde(borrow, with = "serde_bytes")]
    data: Cow<'a, [u8]>,
}

#[derive(Serialize, Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    build_id: Cow<'a, str>,
    #[serde(borrow)]
    sections: Vec<Section<'a>>,
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % end.max(1)
    }
}

/// Changes the state in `data[..size]`, and says how long it is then; no more than `max`.
pub fn state(data: &mut [u8], size: usize, max: usize, seed: u32, bytes: Bytes) -> usize {
    let mut random = Random(u64::from(seed) << 1 | 1);
    random.below(1);
    match changed(&data[..size], &mut random, bytes).filter(|new| new.len() <= max && random.below(16) > 0) {
        Some(new) => {
            data[..new.len()].copy_from_slice(&new);
            new.len()
        }
        None => bytes(data, size, max),
    }
}

fn changed(state: &[u8], random: &mut Random, bytes: Bytes) -> Option<Vec<u8>> {
    let (header, body) = state.split_at_checked(HEADER)?;
    let mut body: Body<'_> = rmp_serde::from_slice(body).ok()?;
    for _ in 0..1 + random.below(3) {
        change(&mut body.sections, random, bytes)?;
    }
    let mut new = header.to_vec();
    rmp_serde::encode::write_named(&mut new, &body).ok()?;
    with_header(&mut new);
    Some(new)
}

fn change(sections: &mut Vec<Section<'_>>, random: &mut Random, bytes: Bytes) -> Option<()> {
    let at = random.below(sections.len());
    let other = random.below(sections.len());
    let section = sections.get_mut(at)?;
    match random.below(32) {
        0 => drop(sections.remove(at)),
        1 => {
            let twin = Section { name: format!("{}{other}", section.name).into(), ..section.clone() };
            sections.push(twin);
        }
        2 => section.version = section.version.wrapping_add([1, 2, u16::MAX][random.below(3)]),
        3 => {
            let data = section.data.clone();
            sections[other].data = data;
        }
        4..12 => section.data = mutated(&section.data, bytes).into(),
        _ => {
            let mut value = rmpv::decode::read_value(&mut &section.data[..]).ok()?;
            for _ in 0..1 + random.below(4) {
                change_value(&mut value, random, bytes);
            }
            let mut data = Vec::new();
            rmpv::encode::write_value(&mut data, &value).ok()?;
            section.data = data.into();
        }
    }
    Some(())
}

fn mutated(data: &[u8], bytes: Bytes) -> Vec<u8> {
    let mut new = data.to_vec();
    new.resize(data.len() + ROOM, 0);
    let len = new.len();
    let size = bytes(&mut new, data.len(), len);
    new.truncate(size);
    new
}

/// Changes something in it, mostly far inside.
fn change_value(value: &mut Value, random: &mut Random, bytes: Bytes) {
    match value {
        Value::Array(list) if !list.is_empty() && random.below(8) > 0 => {
            let at = random.below(list.len());
            change_value(&mut list[at], random, bytes);
        }
        Value::Map(map) if !map.is_empty() && random.below(8) > 0 => {
            let at = random.below(map.len());
            change_value(&mut map[at].1, random, bytes);
        }
        Value::Array(list) => match list.first().cloned().filter(|_| random.below(2) > 0) {
            Some(first) => list.extend(vec![first; 1 + random.below(3)]),
            None => drop(list.pop()),
        },
        Value::Map(map) => drop(map.pop()),
        Value::Boolean(on) => *on = !*on,
        Value::Integer(number) => {
            let old = number.as_u64().unwrap_or_default();
            let new = match random.below(4) {
                0 => old.wrapping_add(1),
                1 => old.wrapping_sub(1),
                2 => old ^ 1 << random.below(64),
                _ => EDGES[random.below(EDGES.len())],
            };
            *value = Value::from(new);
        }
        Value::Binary(data) => *data = mutated(data, bytes),
        Value::Ext(_, data) => *data = mutated(data, bytes),
        Value::String(text) => {
            let new = mutated(text.as_bytes(), bytes);
            *value = String::from_utf8_lossy(&new).into_owned().into();
        }
        _ => *value = Value::from(random.below(2)),
    }
}
