//! Where the lab put things, from its environment variables.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

/// A network device that is bound to vfio-pci, with a peer of L1's at the other end of its wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Nic {
    IgbA,
    IgbB,
    E1000e,
}

impl Nic {
    pub const ALL: [Self; 3] = [Self::IgbA, Self::IgbB, Self::E1000e];

    fn key(self) -> &'static str {
        match self {
            Self::IgbA => "LAB_IGB_A",
            Self::IgbB => "LAB_IGB_B",
            Self::E1000e => "LAB_E1000E",
        }
    }

    /// Number of its subnet, and of its place in this list.
    pub fn index(self) -> u8 {
        self as u8
    }

    fn var(self, suffix: &str) -> Option<String> {
        env::var(format!("{}_{suffix}", self.key())).ok().filter(|v| !v.is_empty())
    }

    pub fn bdf(self) -> Result<String> {
        self.var("BDF").with_context(|| {
            format!("{}_BDF is not set: run this in the lab (./dev lab), or give --hardware", self.key())
        })
    }

    /// Name of L1's interface at the other end.
    pub fn peer(self) -> Result<String> {
        self.var("PEER")
            .with_context(|| format!("{}_PEER is not set: name the interface wired to the device", self.key()))
    }

    /// The device's MAC; unknown for real hardware, where it is the guest's only NIC.
    pub fn mac(self) -> Option<String> {
        self.var("MAC").map(|m| m.to_lowercase())
    }
}

/// PCI address of the NVMe controller that is bound to vfio-pci.
pub fn nvme() -> Result<String> {
    env::var("LAB_NVME_BDF").context("LAB_NVME_BDF is not set: run this in the lab (./dev lab)")
}

fn required(name: &str) -> Result<PathBuf> {
    let value = env::var(name)
        .with_context(|| format!("{name} is not set: l1-tests runs in the lab's L1 (./dev test, ./dev lab)"))?;
    Ok(value.into())
}

/// A file of the folder with the binaries under test.
pub fn bin(name: &str) -> Result<PathBuf> {
    Ok(required("LAB_BIN")?.join(name))
}

pub fn kernel() -> Result<PathBuf> {
    required("LAB_KERNEL")
}

/// The same kernel as the ELF file with a PVH note that it was packed from.
pub fn pvh_kernel() -> Result<PathBuf> {
    Ok(kernel()?.with_file_name("vmlinux"))
}

pub fn initramfs() -> Result<PathBuf> {
    required("LAB_INITRAMFS")
}

/// Where logs and results stay after L1 is gone.
pub fn results() -> Result<PathBuf> {
    required("LAB_RESULTS")
}

/// Where labs that share the tests mark what they have taken.
pub fn claims() -> Option<PathBuf> {
    env::var_os("LAB_CLAIMS").map(PathBuf::from)
}

/// Which of these labs this is.
pub fn number() -> String {
    env::var("LAB_NUMBER").unwrap_or_default()
}

/// The L1 and L2 kernel, as the lab names it.
pub fn kernel_version() -> String {
    env::var("LAB_KERNEL_VERSION").unwrap_or_else(|_| "?".into())
}

/// What every VMM of the tests gets for `--seccomp`, if not the default.
pub fn seccomp() -> Vec<String> {
    let mode = env::var("LAB_SECCOMP").ok().filter(|mode| !mode.is_empty());
    mode.map_or_else(Vec::new, |mode| vec!["--seccomp".into(), mode])
}

/// Makes `bdf` the device of [`Nic::IgbA`] and the only one there is (`--hardware`). `peer`: the interface wired to it.
pub fn use_hardware(bdf: &str, peer: Option<&str>) -> Result<()> {
    let full = if bdf.matches(':').count() == 1 { format!("0000:{bdf}") } else { bdf.to_string() };
    let device = PathBuf::from("/sys/bus/pci/devices").join(&full);
    let driver = device.join("driver").read_link().ok();
    ensure!(
        driver.as_deref().and_then(Path::file_name).is_some_and(|name| name == "vfio-pci"),
        "--hardware {bdf}: {} is not bound to vfio-pci: is that its address, and was it bound (driver_override)?",
        device.display()
    );
    // SAFETY: called before any thread is started.
    unsafe {
        for nic in Nic::ALL {
            for suffix in ["BDF", "MAC", "PEER", "PEER_MAC"] {
                env::remove_var(format!("{}_{suffix}", nic.key()));
            }
        }
        env::set_var(format!("{}_BDF", Nic::IgbA.key()), full);
        if let Some(peer) = peer {
            env::set_var(format!("{}_PEER", Nic::IgbA.key()), peer);
        }
    }
    Ok(())
}
