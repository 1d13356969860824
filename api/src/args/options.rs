//! `key=value,key=value`, and the forms of a value.

use std::path::PathBuf;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::{ArgError, Result, err};
use crate::types::foreign;

/// The parts between the commas that stand outside of brackets and quotes.
pub(super) fn split(s: &str) -> Result<Vec<&str>> {
    let (mut parts, mut start, mut depth, mut quoted) = (Vec::new(), 0, 0_usize, false);
    for (at, byte) in s.bytes().enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            b'[' if !quoted => depth += 1,
            b']' if !quoted => depth = depth.saturating_sub(1),
            b',' if !quoted && depth == 0 => {
                parts.push(&s[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&s[start..]);
    if parts.len() > 1 && parts.iter().any(|part| part.is_empty()) {
        return err(format!("{s:?} has a comma with nothing before or behind it: remove it"));
    }
    Ok(parts)
}

/// A value of the command line as the API would have it.
fn value(key: &str, word: &str) -> Value {
    let topology: Vec<u64> = word.split(':').filter_map(|n| n.parse().ok()).collect();
    match (word, topology.as_slice()) {
        ("on" | "true", _) => true.into(),
        ("off" | "false", _) => false.into(),
        ("[]", _) => Value::Array(Vec::new()),
        (_, [threads, cores, dies, packages]) if key == "topology" => serde_json::json!({
            "threads_per_core": threads, "cores_per_die": cores, "dies_per_package": dies, "packages": packages
        }),
        _ => {
            let hex = word.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
            hex.or_else(|| byte_size(word).ok()).map_or_else(|| word.into(), Value::from)
        }
    }
}

/// All parts as the API would have them; the first may be a word alone, which is then the value of the key `first`.
pub(super) fn object(s: &str, first: Option<&str>) -> Result<Value> {
    let mut map = Map::new();
    for (i, part) in split(s)?.into_iter().enumerate() {
        let (key, word) = match (part.split_once('='), first) {
            (Some(pair), _) => pair,
            (None, Some(first)) if i == 0 => (first, part),
            _ => return err(format!("{part:?} is not key=value")),
        };
        map.insert(key.to_owned(), value(key, word));
    }
    Ok(Value::Object(map))
}

/// `key=value,key=value` with every key known and there once.
pub(super) struct Options<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Options<'a> {
    /// `section`: where the API has these keys, such as `cpus`. One that Theseus does not have is passed over where its
    /// value says nothing.
    pub(super) fn parse(s: &'a str, section: &str, known: &[&str]) -> Result<Self> {
        let mut list: Vec<(&str, &str)> = Vec::new();
        for part in split(s)? {
            let keys = || known.join(", ");
            let Some((key, word)) = part.split_once('=') else {
                return err(format!("{part:?} is not key=value: the keys are {}", keys()));
            };
            if !known.contains(&key) {
                let mut notes = Vec::new();
                match foreign::instead(key) {
                    // Nobody types a default: one with a note is meant.
                    Some(_)
                        if foreign::says_nothing(&format!("{section}.{key}"), &value(key, word), &mut notes)
                            && notes.is_empty() =>
                    {
                        continue;
                    }
                    Some(instead) => return err(format!("{key} is not supported by this build: {instead}")),
                    None => return err(format!("{key:?} is not a key here: the keys are {}", keys())),
                }
            }
            if word.is_empty() {
                return err(format!("{key} is empty: give a value or leave it out"));
            }
            if list.iter().any(|(k, _)| *k == key) {
                return err(format!("{key} is there twice: give it once"));
            }
            list.push((key, word));
        }
        Ok(Self(list))
    }

    pub(super) fn take(&mut self, key: &str) -> Option<&'a str> {
        let at = self.0.iter().position(|(k, _)| *k == key)?;
        Some(self.0.swap_remove(at).1)
    }

    pub(super) fn number<T: FromStr>(&mut self, key: &str) -> Result<Option<T>> {
        match self.take(key).map(|v| (v, v.parse())) {
            None => Ok(None),
            Some((_, Ok(n))) => Ok(Some(n)),
            Some((v, Err(_))) => err(format!("{key} is {v:?}: give a number")),
        }
    }

    pub(super) fn switch(&mut self, key: &str) -> Result<Option<bool>> {
        match self.take(key) {
            None => Ok(None),
            Some("on" | "true") => Ok(Some(true)),
            Some("off" | "false") => Ok(Some(false)),
            Some(v) => err(format!("{key} is {v:?}: give on or off")),
        }
    }

    pub(super) fn size(&mut self, key: &str) -> Result<Option<u64>> {
        let size = self.take(key).map(byte_size).transpose();
        size.map_err(|e| ArgError(format!("{key}: {e}")))
    }
}

/// A number of bytes: digits, with K, M, G or T behind them, or Ki, Mi, Gi, Ti (or KiB, ...), small or capital: all
/// count in 1024s.
pub fn byte_size(s: &str) -> Result<u64> {
    let digits = s.len() - s.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = s.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" => Some(0),
        "k" | "ki" | "kib" => Some(10),
        "m" | "mi" | "mib" => Some(20),
        "g" | "gi" | "gib" => Some(30),
        "t" | "ti" | "tib" => Some(40),
        _ => None,
    };
    let bytes = number.parse::<u64>().ok().zip(shift).and_then(|(number, shift)| number.checked_mul(1 << shift));
    match bytes {
        Some(bytes) => Ok(bytes),
        None => err(format!("{s:?} is not a size: give bytes, or a number with K, M, G or T, such as 512M")),
    }
}

pub(super) fn path(key: &str, value: &str) -> Result<PathBuf> {
    if value.is_empty() { err(format!("{key} is empty: give a path")) } else { Ok(value.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let good = [
            ("0", 0),
            ("4096", 4096),
            ("4K", 4096),
            ("4k", 4096),
            ("4Ki", 4096),
            ("4KiB", 4096),
            ("512M", 512 << 20),
            ("512mi", 512 << 20),
            ("6g", 6 << 30),
            ("6Gi", 6 << 30),
            ("1T", 1 << 40),
            ("2ti", 2 << 40),
        ];
        for (s, bytes) in good {
            assert_eq!(byte_size(s), Ok(bytes), "{s}");
        }
        let bad =
            ["", "M", "-1", "+1", "1.5G", " 1", "1 G", "1MB", "1P", "1i", "16777216T", "99999999999999999999", "é"];
        for s in bad {
            assert!(byte_size(s).unwrap_err().to_string().contains("not a size"), "{s}");
        }
    }

    #[test]
    fn commas_in_brackets_and_quotes_do_not_split() {
        assert_eq!(split("a=[1,[2,3]],b=\"x,y\",c").unwrap(), ["a=[1,[2,3]]", "b=\"x,y\"", "c"]);
        assert_eq!(split("").unwrap(), [""]);
        for s in ["a=1,", ",a=1", "a=1,,b=2"] {
            assert!(split(s).unwrap_err().to_string().contains("comma with nothing"), "{s}");
        }
    }
}
