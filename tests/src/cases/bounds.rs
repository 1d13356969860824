//! Updates that the VMM's surroundings forbid: where a build may come from, and how much may be pinned.

use std::fs;

use anyhow::{Context, Result};

use crate::{
    cases::failures::{End, unharmed},
    harness::{
        lab::{self, Nic},
        proc,
        rig::Rig,
        vm::Vm,
    },
};

/// Enough for the guest's 512 MiB, and too little for them.
const ENOUGH: u64 = 1 << 30;
const TOO_LITTLE: u64 = 64 << 20;

/// A VMM with `--update-dir` and without CAP_IPC_LOCK: a build from elsewhere is refused, and so is an update whose pinned memory would not
/// be allowed to the new image. What is allowed goes on.
pub fn of_the_vmm() -> Result<()> {
    let next = lab::bin("theseus-b")?;
    let folder = next.parent().context("the builds are in no folder")?;
    let mut rig = Rig::boot(Vm::builder().cpus(2).update_dir(folder).may_lock(ENOUGH), &[(Nic::IgbA, None)])?;

    let elsewhere = rig.vm.dir.join("theseus-b");
    fs::copy(&next, &elsewhere)?;
    unharmed(&mut rig, End::Refused, &["(--update-dir)"], |rig| rig.vm.ask_update(&elsewhere))?;

    unharmed(&mut rig, End::Refused, &["RLIMIT_MEMLOCK is 65536 KiB, 524288 KiB are pinned"], |rig| {
        let target = rig.vm.other_build()?;
        let old = proc::set_soft_limit(rig.vm.pid(), libc::RLIMIT_MEMLOCK, TOO_LITTLE)?;
        let answer = rig.vm.ask_update(&target);
        proc::set_soft_limit(rig.vm.pid(), libc::RLIMIT_MEMLOCK, old)?;
        answer
    })
}
