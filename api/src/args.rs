//! The option strings of the command line, such as `size=512M,hugepages=on`.
//!
//! Every function takes what stands behind the option and can serve as a value parser. Nothing is guessed: an unknown
//! or repeated key, or a value that does not fit, is an error that names the key and what to give instead.

mod foreign;
mod options;

use std::path::PathBuf;

pub use foreign::ForeignOptions;
pub use options::byte_size;
use options::{Options, path};

use crate::types::{
    CpuAffinity, CpusConfig, DeviceConfig, HOST_CPUS_MAX, LandlockConfig, MAX_VCPUS, MemoryConfig, SOCKET_PATH_MAX,
    SerialConfig, SerialMode,
};

/// What is wrong with an option string.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ArgError(String);

impl ArgError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

type Result<T> = std::result::Result<T, ArgError>;

fn err<T>(message: String) -> Result<T> {
    Err(ArgError(message))
}

/// Where the API is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiSocket {
    /// A socket that is made there.
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

/// [`api_socket`], for what is certainly a socket.
pub fn socket(s: &str) -> Result<ApiSocket> {
    let socket = api_socket(s)?;
    match &socket {
        ApiSocket::Path(path) if path.as_os_str().len() > SOCKET_PATH_MAX => err(format!(
            "the path has {} bytes, and that of a unix socket at most {SOCKET_PATH_MAX}: give a shorter one",
            path.as_os_str().len()
        )),
        _ => Ok(socket),
    }
}

/// `boot=N[,max=N][,affinity=[VCPU@[CPU,CPU-CPU,...],...]]`, or `N` alone.
pub fn cpus(s: &str) -> Result<CpusConfig> {
    if let Ok(boot_vcpus) = s.parse() {
        return Ok(CpusConfig { boot_vcpus, ..Default::default() });
    }
    let mut options = Options::parse(s, "cpus", &["boot", "max", "affinity"])?;
    let Some(boot_vcpus) = options.number("boot")? else {
        return err("boot is missing: give boot=N, the number of vCPUs".into());
    };
    let affinity = options.take("affinity").map(affinity).transpose()?;
    Ok(CpusConfig { boot_vcpus, max_vcpus: options.number("max")?, affinity })
}

fn affinity(s: &str) -> Result<Vec<CpuAffinity>> {
    let wrong = || ArgError(format!("affinity is {s:?}: give affinity=[VCPU@[CPU,CPU-CPU,...],...]"));
    let inside = |list: &str| list.strip_prefix('[').and_then(|list| list.strip_suffix(']')).map(str::to_owned);
    let list = inside(s).ok_or_else(wrong)?;
    if list.is_empty() {
        return Ok(Vec::new());
    }
    let one = |part: &str| {
        let (vcpu, cpus) = part.split_once('@')?;
        let mut host_cpus = Vec::new();
        for range in inside(cpus)?.split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let number = |word: &str| word.parse::<u32>().ok().filter(|cpu| *cpu < HOST_CPUS_MAX);
            let range = number(first)?..=number(last)?;
            let is_forward = !range.is_empty();
            host_cpus.extend(range);
            // A few letters name thousands.
            if !is_forward || host_cpus.len() > HOST_CPUS_MAX as usize {
                return None;
            }
        }
        Some(CpuAffinity { vcpu: vcpu.parse().ok()?, host_cpus })
    };
    let parts = options::split(&list)?;
    if parts.len() > MAX_VCPUS as usize {
        return err(format!("affinity names {} vCPUs: a guest has {MAX_VCPUS} at most, name each once", parts.len()));
    }
    parts.into_iter().map(|part| one(part).ok_or_else(wrong)).collect()
}

/// `size=SIZE[,shared=on][,hugepages=on][,hugepage_size=SIZE][,thp=on][,prefault=on]`
pub fn memory(s: &str) -> Result<MemoryConfig> {
    let mut options =
        Options::parse(s, "memory", &["size", "shared", "hugepages", "hugepage_size", "thp", "prefault"])?;
    let defaults = MemoryConfig::default();
    Ok(MemoryConfig {
        size: options.size("size")?.unwrap_or(defaults.size),
        shared: options.switch("shared")?.unwrap_or(defaults.shared),
        hugepages: options.switch("hugepages")?.unwrap_or(defaults.hugepages),
        hugepage_size: options.size("hugepage_size")?,
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

/// `path=/sys/bus/pci/devices/DDDD:BB:DD.F[,id=NAME][,container=NAME]`; the path can also be another one of sysfs, or
/// `BB:DD.F` alone, see [`DeviceConfig::bdf`].
pub fn device(s: &str) -> Result<DeviceConfig> {
    let mut options = Options::parse(s, "devices", &["path", "id", "container"])?;
    let Some(sysfs) = options.take("path") else {
        return err("path is missing: give path=/sys/bus/pci/devices/DDDD:BB:DD.F, or path=BB:DD.F".into());
    };
    Ok(DeviceConfig {
        path: path("path", sysfs)?,
        id: options.take("id").map(Into::into),
        container: options.take("container").map(Into::into),
    })
}

/// `path=PATH,access=r|w|rw`
pub fn landlock_rule(s: &str) -> Result<LandlockConfig> {
    let mut options = Options::parse(s, "landlock_rules", &["path", "access"])?;
    let (Some(of), Some(access)) = (options.take("path"), options.take("access")) else {
        return err(format!("{s:?} lacks a part: give path=PATH,access=r, or w, or rw"));
    };
    let rule = LandlockConfig { path: path("path", of)?, access: access.to_owned() };
    match rule.accesses() {
        Some(_) => Ok(rule),
        None => err(format!("access is {access:?}: give r, w or rw")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_strings() {
        assert_eq!(cpus("4"), Ok(CpusConfig { boot_vcpus: 4, ..Default::default() }));
        let placed = cpus("boot=2,affinity=[0@[1,4-6],1@[3]]").unwrap().affinity.unwrap();
        let placed: Vec<_> = placed.into_iter().map(|one| (one.vcpu, one.host_cpus)).collect();
        assert_eq!(placed, [(0, vec![1, 4, 5, 6]), (1, vec![3])]);
        assert_eq!(cpus("boot=2,max=4"), Ok(CpusConfig { boot_vcpus: 2, max_vcpus: Some(4), affinity: None }));
        // What says nothing, of keys that are not there.
        assert_eq!(
            cpus("boot=2,max=4,topology=1:4:1:1,kvm_hyperv=off,max_phys_bits=46,affinity=[]").unwrap().boot_vcpus,
            2
        );
        assert_eq!(memory("size=1Gi,hotplug_method=acpi,hotplug_size=0,mergeable=off").unwrap().size, 1 << 30);
        assert_eq!(device("path=01:00.0,iommu=off,pci_segment=0").unwrap().bdf().as_deref(), Some("0000:01:00.0"));
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
        assert_eq!((d.bdf().as_deref(), d.id.as_deref(), d.container()), (Some("0000:01:00.0"), Some("nic"), "two"));
        assert_eq!(api_socket("/run/t"), Ok(ApiSocket::Path("/run/t".into())));
        assert_eq!(api_socket("path=/run/t"), Ok(ApiSocket::Path("/run/t".into())));
        assert_eq!(api_socket("fd=7"), Ok(ApiSocket::Fd(7)));
        let rule = landlock_rule("path=/a=b,access=rw").unwrap();
        assert_eq!((rule.path.to_str(), rule.accesses()), (Some("/a=b"), Some((true, true))));
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
            (text(cpus("boot=1,colour=red")), "\"colour\" is not a key here: the keys are boot, max, affinity"),
            (text(cpus("boot=1,topology=2:1:1:1")), "topology is not supported by this build: leave it out"),
            (text(cpus("boot=1,affinity=[0@1,2]")), "give affinity=[VCPU@[CPU,CPU-CPU,...],...]"),
            (text(cpus("boot=1,affinity=[0@[5-3]]")), "give affinity=[VCPU@[CPU,CPU-CPU,...],...]"),
            (text(cpus(&format!("boot=1,affinity=[0@[{}]]", ["0-8191"; 2].join(",")))), "give affinity="),
            (text(cpus(&format!("boot=1,affinity=[{}]", ["0@[0-8191]"; 65].join(",")))), "names 65 vCPUs"),
            (text(cpus("boot=1,nested=on")), "nested is not supported"),
            (text(memory("size=1G,hotplug_size=1G")), "hotplug_size is not supported"),
            (text(memory("512M")), "not key=value"),
            (text(memory("size=lots")), "size: \"lots\" is not a size"),
            (text(memory("size=1G,size=1G")), "size is there twice"),
            (text(memory("size=1G,thp=yes")), "thp is \"yes\": give on or off"),
            (text(memory("size=1G,")), "comma with nothing before or behind it: remove it"),
            (text(serial("file=")), "file is empty"),
            (text(serial("serial")), "give off, null"),
            (text(serial("tty=1")), "give off, null"),
            (text(device("id=a")), "path is missing"),
            (text(device("path=")), "path is empty"),
            (text(device("path=/x,iommu=on")), "iommu is not supported by this build: leave it out"),
            (text(landlock_rule("path=/a")), "access=r, or w, or rw"),
            (text(landlock_rule("path=/a,access=x")), "access is \"x\": give r, w or rw"),
            (text(api_socket("")), "path is empty"),
            (text(api_socket("fd=1")), "above 2"),
            (text(socket(&format!("/{}", "x".repeat(107)))), "has 108 bytes, and that of a unix socket at most 107"),
        ];
        for (message, expected) in table {
            assert!(message.contains(expected), "{message:?} lacks {expected:?}");
        }
    }
}
