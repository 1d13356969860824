//! What the images may do that an update execs. The kernel computes the capabilities of a process anew at every exec:
//! from its own sets, from those of the file, from no_new_privs and the mount (capabilities(7)), so those of the
//! running image say nothing of them.
//!
//! Nothing of that is predicted here. Each image is run beforehand, as the exec would run it: the target for its
//! rehearsal, the old binary for its version; the kernel is then asked what it had been given.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;
use rustix::process::{Resource, getrlimit};
use rustix::thread::CapabilitySet;

use crate::available_memory::field;
use crate::vcpus::placement::{Placement, Rights};

/// The inode of the initial user namespace (include/linux/proc_ns.h, PROC_USER_INIT_INO): a capability in another one
/// is none towards VFIO and the scheduler, which ask capable().
const INITIAL_USER_NAMESPACE: &str = "user:[4026531837]";

/// A program that the update leads to.
#[derive(Clone, Debug)]
pub(super) struct Image {
    /// "the new image", "the old binary on a way back".
    pub called: &'static str,
    pub path: PathBuf,
    pub capabilities: CapabilitySet,
    /// Whether capabilities of the file do not count where it is.
    pub nosuid: bool,
}

impl Image {
    pub(super) fn new(called: &'static str, path: &Path, file: impl AsFd, capabilities: CapabilitySet) -> Self {
        let flags = rustix::fs::fstatvfs(file).map(|stat| stat.f_flag);
        let nosuid = flags.is_ok_and(|flags| flags.contains(StatVfsMountFlags::NOSUID));
        let elsewhere =
            std::fs::read_link("/proc/self/ns/user").is_ok_and(|link| link != Path::new(INITIAL_USER_NAMESPACE));
        let capabilities = if elsewhere { CapabilitySet::empty() } else { capabilities };
        Self { called, path: path.into(), capabilities, nosuid }
    }

    /// How it could be given the capability `name`.
    fn remedy(&self, name: &str) -> String {
        let unit = format!("AmbientCapabilities={}", name.to_uppercase());
        let path = self.path.display();
        match self.nosuid {
            false => format!("setcap {name}=ep {path}, {unit} in its unit"),
            true => format!("{unit} in its unit ({path} is mounted nosuid: setcap is of no use there)"),
        }
    }
}

/// What is asked of them.
#[derive(Clone, Debug)]
pub(super) struct Wants<'a> {
    /// Bytes that are pinned for DMA now, and will be charged to the new image.
    pub locked: u64,
    /// RLIMIT_MEMLOCK
    pub memlock: Option<u64>,
    /// Of each vCPU's thread.
    pub placements: &'a [Placement],
    /// By limits alone.
    pub scheduling: Rights,
    /// What this image has.
    pub running: CapabilitySet,
}

impl<'a> Wants<'a> {
    pub(super) fn of_this_process(placements: &'a [Placement]) -> io::Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let locked = field(&status, "VmLck:").and_then(|kib| kib.parse::<u64>().ok());
        Ok(Self {
            locked: locked.ok_or_else(|| io::Error::other("no VmLck"))?.saturating_mul(1024),
            memlock: getrlimit(Resource::Memlock).current,
            placements,
            scheduling: Rights::of_this_process(false),
            running: rustix::thread::capabilities(None)?.effective,
        })
    }

    /// Every reason against an update that leads to these images; a lack that both have is told of the first.
    pub(super) fn reasons(&self, images: &[Image]) -> Vec<String> {
        let without = |capability| images.iter().find(|image| !image.capabilities.contains(capability));
        let mut reasons = Vec::new();
        // vfio_iommu_type1 charges what is pinned to the new address space (vfio_change_dma_owner).
        if let Some(image) = without(CapabilitySet::IPC_LOCK)
            && let Some(limit) = self.memlock.filter(|limit| *limit < self.locked)
        {
            reasons.push(format!(
                "RLIMIT_MEMLOCK is {} KiB, {} KiB are pinned for DMA and would be charged to {}, {}: raise it \
                 (prlimit --memlock, \
                 LimitMEMLOCK=) or {}",
                limit >> 10,
                self.locked >> 10,
                image.called,
                self.which("CAP_IPC_LOCK", CapabilitySet::IPC_LOCK),
                image.remedy("cap_ipc_lock"),
            ));
        }
        for (index, placement) in self.placements.iter().enumerate() {
            let all = Rights { sys_nice: true, ..self.scheduling };
            let lack = all.lack_for(placement).or_else(|| {
                let image = without(CapabilitySet::SYS_NICE)?;
                let lack = self.scheduling.lack_for(placement)?;
                let which = self.which("CAP_SYS_NICE", CapabilitySet::SYS_NICE);
                Some(format!("{lack} to {}, {which}: {}", image.called, image.remedy("cap_sys_nice")))
            });
            reasons.extend(lack.map(|lack| format!("the thread of vCPU {index} has {lack}")));
        }
        reasons
    }

    fn which(&self, name: &str, capability: CapabilitySet) -> String {
        match self.running.contains(capability) {
            true => format!("which will not have {name} (this image has it, but exec computes them anew)"),
            false => format!("which will not have {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(called: &'static str, capabilities: CapabilitySet) -> Image {
        Image { called, path: "/opt/theseus".into(), capabilities, nosuid: false }
    }

    #[test]
    fn each_image_is_judged_by_what_it_will_have() {
        let (none, lock, nice) = (CapabilitySet::empty(), CapabilitySet::IPC_LOCK, CapabilitySet::SYS_NICE);
        let fifo = [Placement { policy: libc::SCHED_FIFO, priority: 1, ..Default::default() }];
        let limits = Rights { sys_nice: false, rtprio: 0, nice: 0 };
        let wants =
            Wants { locked: 2 << 30, memlock: Some(1 << 30), placements: &[], scheduling: limits, running: lock };
        let high = Wants { memlock: Some(2 << 30), placements: &fifo, ..wants.clone() };
        let of = |wants: &Wants<'_>, new, old| wants.reasons(&[image("new", new), image("old", old)]).join("; ");
        // (what is wanted, of the new image, of the old one, what is said)
        let table: [(&Wants<'_>, _, _, &[&str]); 10] = [
            (&wants, lock, lock, &[]),
            (
                &wants,
                none,
                lock,
                &["RLIMIT_MEMLOCK is 1048576 KiB, 2097152 KiB are pinned", "to new, which", "this image has it"],
            ),
            (
                &wants,
                nice,
                none,
                &["to new, which", "setcap cap_ipc_lock=ep /opt/theseus", "AmbientCapabilities=CAP_IPC_LOCK"],
            ),
            (&wants, lock, none, &["to old, which", "LimitMEMLOCK="]),
            (
                &high,
                none,
                none,
                &[
                    "vCPU 0 has realtime priority 1",
                    "to new, which will not have CAP_SYS_NICE:",
                    "setcap cap_sys_nice=ep",
                ],
            ),
            (&high, nice, lock, &["to old, which will not have CAP_SYS_NICE"]),
            (&high, nice, nice, &[]),
            (&Wants { memlock: None, ..wants.clone() }, none, none, &[]),
            (&Wants { memlock: Some(2 << 30), ..wants.clone() }, none, none, &[]),
            (&Wants { memlock: Some(0), locked: 0, ..wants.clone() }, none, none, &[]),
        ];
        for (wants, new, old, words) in table {
            let text = of(wants, new, old);
            assert_eq!(words.is_empty(), text.is_empty(), "{new:?} {old:?}: {text}");
            assert!(words.iter().all(|word| text.contains(word)), "{new:?} {old:?}: {words:?} in {text}");
        }
        let deadline = [Placement { policy: libc::SCHED_DEADLINE, ..Default::default() }];
        assert!(of(&Wants { placements: &deadline, ..high.clone() }, nice, nice).contains("SCHED_DEADLINE"));
        let nosuid = Image { nosuid: true, ..image("new", none) };
        let text = wants.reasons(&[nosuid]).join("; ");
        assert!(text.contains("nosuid") && !text.contains("setcap cap"), "{text}");
    }

    #[test]
    fn this_process_has_wants() {
        Wants::of_this_process(&[]).unwrap();
    }
}
