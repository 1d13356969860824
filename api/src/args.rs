//! The option strings of the command line, such as `size=512M,hugepages=on`.
//!
//! Every function takes what stands behind the option and can serve as a value parser. Nothing is guessed: an unknown
//! or repeated key, or a value that does not fit, is an error that names the key and what to give instead.

use std::path::PathBuf;
use std::str::FromStr;

use crate::types::{CpusConfig, DeviceConfig, MemoryConfig, SerialConfig, SerialMode};

/// What is wrong with an option string.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ArgError(String);

type Result<T> = std::result::Result<T, ArgError>;

fn err<T>(message: String) -> Result<T> {
    Err(ArgError(message))
}

/// Where the API is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiSocket {
    Path(PathBuf),
    /// An inherited listening socket.
    Fd(i32),
}

/// `PATH`, `path=PATH` or `fd=N`.
pub fn api_socket(s: &str) -> Result<ApiSocket> {
    if let Some(fd) = s.strip_prefix("fd=") {
        return match fd.parse() {
            Ok(fd) if fd > 2 => Ok(ApiSocket::Fd(fd)),
            _ => err(format!("fd is {fd:?}: give the number of an inherited file descriptor, above 2")),
        };
    }
    path("path", s.strip_prefix("path=").unwrap_or(s)).map(ApiSocket::Path)
}

/// `boot=N[,max=N]`, or `N` alone.
pub fn cpus(s: &str) -> Result<CpusConfig> {
    if let Ok(boot_vcpus) = s.parse() {
        return Ok(CpusConfig { boot_vcpus, max_vcpus: None });
    }
    let mut options = Options::parse(s, &["boot", "max"])?;
    let Some(boot_vcpus) = options.number("boot")? else {
        return err("boot is missing: give boot=N, the number of vCPUs".into());
    };
    Ok(CpusConfig { boot_vcpus, max_vcpus: options.number("max")? })
}

/// `size=SIZE[,shared=on][,hugepages=on][,hugepage_size=SIZE][,thp=on][,prefault=on]`
pub fn memory(s: &str) -> Result<MemoryConfig> {
    let mut options = Options::parse(s, &["size", "shared", "hugepages", "hugepage_size", "thp", "prefault"])?;
    let defaults = MemoryConfig::default();
    let size =
        |key, value: Option<&str>| value.map(|v| byte_size(v).map_err(|e| ArgError(format!("{key}: {e}")))).transpose();
    Ok(MemoryConfig {
        size: size("size", options.take("size"))?.unwrap_or(defaults.size),
        shared: options.switch("shared")?.unwrap_or(defaults.shared),
        hugepages: options.switch("hugepages")?.unwrap_or(defaults.hugepages),
        hugepage_size: size("hugepage_size", options.take("hugepage_size"))?,
        thp: options.switch("thp")?.unwrap_or(defaults.thp),
        prefault: options.switch("prefault")?.unwrap_or(defaults.prefault),
    })
}

/// `off`, `null`, `tty`, `pty`, `file=PATH` or `socket=PATH`.
pub fn serial(s: &str) -> Result<SerialConfig> {
    let plain = |mode| Ok(SerialConfig { mode, ..Default::default() });
    match s.split_once('=') {
        None if s == "off" => plain(SerialMode::Off),
        None if s == "null" => plain(SerialMode::Null),
        None if s == "tty" => plain(SerialMode::Tty),
        None if s == "pty" => plain(SerialMode::Pty),
        Some(("file", p)) => Ok(SerialConfig { mode: SerialMode::File, file: Some(path("file", p)?), socket: None }),
        Some(("socket", p)) => {
            Ok(SerialConfig { mode: SerialMode::Socket, file: None, socket: Some(path("socket", p)?) })
        }
        _ => {
            err(format!("{s:?} is not a place for the serial port: give off, null, tty, pty, file=PATH or socket=PATH"))
        }
    }
}

/// `path=/sys/bus/pci/devices/DDDD:BB:DD.F[,id=NAME][,container=NAME]`
pub fn device(s: &str) -> Result<DeviceConfig> {
    let mut options = Options::parse(s, &["path", "id", "container"])?;
    let Some(sysfs) = options.take("path") else {
        return err("path is missing: give path=/sys/bus/pci/devices/DDDD:BB:DD.F".into());
    };
    Ok(DeviceConfig {
        path: path("path", sysfs)?,
        id: options.take("id").map(Into::into),
        container: options.take("container").map(Into::into),
    })
}

/// A number of bytes: digits, with K, M or G behind them for KiB, MiB or GiB.
pub fn byte_size(s: &str) -> Result<u64> {
    let (digits, shift) = match s.as_bytes().last() {
        Some(b'K') => (&s[..s.len() - 1], 10),
        Some(b'M') => (&s[..s.len() - 1], 20),
        Some(b'G') => (&s[..s.len() - 1], 30),
        _ => (s, 0),
    };
    // u64's own parser would take a sign.
    let number = if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse::<u64>().ok() } else { None };
    match number.and_then(|n| n.checked_mul(1 << shift)) {
        Some(bytes) => Ok(bytes),
        None => err(format!("{s:?} is not a size: give bytes, or a number with K, M or G, such as 512M")),
    }
}

fn path(key: &str, value: &str) -> Result<PathBuf> {
    if value.is_empty() { err(format!("{key} is empty: give a path")) } else { Ok(value.into()) }
}

/// `key=value,key=value` with every key known and there once.
struct Options<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Options<'a> {
    fn parse(s: &'a str, known: &[&str]) -> Result<Self> {
        let mut list: Vec<(&str, &str)> = Vec::new();
        for part in s.split(',') {
            let keys = || known.join(", ");
            let Some((key, value)) = part.split_once('=') else {
                return err(format!("{part:?} is not key=value: the keys are {}", keys()));
            };
            if !known.contains(&key) {
                return err(format!("{key:?} is not a key here: the keys are {}", keys()));
            }
            if value.is_empty() {
                return err(format!("{key} is empty: give a value or leave it out"));
            }
            if list.iter().any(|(k, _)| *k == key) {
                return err(format!("{key} is there twice: give it once"));
            }
            list.push((key, value));
        }
        Ok(Self(list))
    }

    fn take(&mut self, key: &str) -> Option<&'a str> {
        let at = self.0.iter().position(|(k, _)| *k == key)?;
        Some(self.0.swap_remove(at).1)
    }

    fn number<T: FromStr>(&mut self, key: &str) -> Result<Option<T>> {
        match self.take(key).map(|v| (v, v.parse())) {
            None => Ok(None),
            Some((_, Ok(n))) => Ok(Some(n)),
            Some((v, Err(_))) => err(format!("{key} is {v:?}: give a number")),
        }
    }

    fn switch(&mut self, key: &str) -> Result<Option<bool>> {
        match self.take(key) {
            None => Ok(None),
            Some("on" | "true") => Ok(Some(true)),
            Some("off" | "false") => Ok(Some(false)),
            Some(v) => err(format!("{key} is {v:?}: give on or off")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (s, bytes) in [("0", 0), ("4096", 4096), ("4K", 4096), ("512M", 512 << 20), ("6G", 6 << 30)] {
            assert_eq!(byte_size(s), Ok(bytes));
        }
        for s in ["", "M", "1T", "1m", "-1", "+1", "1.5G", " 1", "18446744073709551615K", "99999999999999999999", "é"]
        {
            assert!(byte_size(s).unwrap_err().to_string().contains("not a size"), "{s}");
        }
    }

    #[test]
    fn good_strings() {
        assert_eq!(cpus("4"), Ok(CpusConfig { boot_vcpus: 4, max_vcpus: None }));
        assert_eq!(cpus("boot=2,max=4"), Ok(CpusConfig { boot_vcpus: 2, max_vcpus: Some(4) }));
        let m = memory("size=1G,hugepages=on,hugepage_size=2M,thp=on,shared=on,prefault=off").unwrap();
        let expected = MemoryConfig {
            size: 1 << 30,
            shared: true,
            hugepages: true,
            hugepage_size: Some(2 << 20),
            thp: true,
            prefault: false,
        };
        assert_eq!(m, expected);
        assert!(!memory("size=1G,shared=off").unwrap().shared);
        assert_eq!(serial("off").unwrap().mode, SerialMode::Off);
        assert_eq!(serial("file=/a=b,c").unwrap().file, Some("/a=b,c".into()));
        assert_eq!(serial("socket=/x").unwrap().mode, SerialMode::Socket);
        let d = device("path=/sys/bus/pci/devices/0000:01:00.0,id=nic,container=two").unwrap();
        assert_eq!((d.bdf(), d.id.as_deref(), d.container()), (Some("0000:01:00.0"), Some("nic"), "two"));
        assert_eq!(api_socket("/run/t"), Ok(ApiSocket::Path("/run/t".into())));
        assert_eq!(api_socket("path=/run/t"), Ok(ApiSocket::Path("/run/t".into())));
        assert_eq!(api_socket("fd=7"), Ok(ApiSocket::Fd(7)));
    }

    #[test]
    fn bad_strings_name_the_key() {
        fn text<T>(r: Result<T>) -> String {
            r.err().map(|e| e.to_string()).unwrap_or_default()
        }
        let table = [
            (text(cpus("")), "not key=value"),
            (text(cpus("max=2")), "boot is missing"),
            (text(cpus("boot=x")), "boot is \"x\""),
            (text(cpus("boot=1,topology=1:1:1:1")), "\"topology\" is not a key here: the keys are boot, max"),
            (text(memory("512M")), "not key=value"),
            (text(memory("size=lots")), "size: \"lots\" is not a size"),
            (text(memory("size=1G,size=1G")), "size is there twice"),
            (text(memory("size=1G,thp=yes")), "thp is \"yes\": give on or off"),
            (text(memory("size=1G,")), "not key=value"),
            (text(serial("file=")), "file is empty"),
            (text(serial("serial")), "give off, null"),
            (text(serial("tty=1")), "give off, null"),
            (text(device("id=a")), "path is missing"),
            (text(device("path=")), "path is empty"),
            (text(device("path=/x,iommu=on")), "\"iommu\" is not a key"),
            (text(api_socket("")), "path is empty"),
            (text(api_socket("fd=1")), "above 2"),
        ];
        for (message, expected) in table {
            assert!(message.contains(expected), "{message:?} lacks {expected:?}");
        }
    }
}
