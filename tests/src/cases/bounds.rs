//! Updates in hard surroundings: where a build may come from, how much may be pinned, a log that takes nothing.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use anyhow::{Context, Result, ensure};

use crate::{
    cases::failures::{End, unharmed},
    harness::{
        hooks::{Switch, make_fifo},
        lab::{self, Nic},
        proc,
        report::Report,
        rig::Rig,
        vm::Vm,
        wait_for,
    },
};

/// Enough for the guest's 256 MiB, and too little for them.
const ENOUGH: u64 = 1 << 30;
const TOO_LITTLE: u64 = 64 << 20;

/// A VMM with `--update-dir` and without CAP_IPC_LOCK: a build from elsewhere is refused, and so is an update whose
/// pinned memory would not be allowed to the new image. What is allowed goes on. Whoever started it ignored SIGCHLD.
pub fn of_the_vmm() -> Result<()> {
    let next = lab::bin("theseus-b")?;
    let folder = next.parent().context("the builds are in no folder")?;
    let mut rig =
        Rig::boot(Vm::builder().cpus(2).update_dir(folder).may_lock(ENOUGH).ignores_children(), &[(Nic::IgbA, None)])?;

    let elsewhere = rig.vm.dir.join("theseus-b");
    fs::copy(&next, &elsewhere)?;
    unharmed(&mut rig, End::Refused, &["(--update-dir)"], |rig| rig.vm.ask_update(&elsewhere))?;

    unharmed(&mut rig, End::Refused, &["RLIMIT_MEMLOCK is 65536 KiB, 262144 KiB are pinned"], |rig| {
        let target = rig.vm.other_build()?;
        let old = proc::set_soft_limit(rig.vm.pid(), libc::RLIMIT_MEMLOCK, TOO_LITTLE)?;
        let answer = rig.vm.ask_update(&target);
        proc::set_soft_limit(rig.vm.pid(), libc::RLIMIT_MEMLOCK, old)?;
        answer
    })
}

/// The log is a FIFO, which an image without a reader cannot even open, like a file whose server is gone. The guest
/// waits for it neither on the way to a new image nor on the way back; another update is refused until somebody reads
/// again, and then nothing is missing.
pub fn log_stands_still() -> Result<()> {
    let log = std::env::temp_dir().join("log-fifo");
    make_fifo(&log)?;
    let mut reader = read_end(&log)?;
    let mut rig = Rig::boot(Vm::builder().cpus(2).verbose().log_file(&log), &[(Nic::IgbA, None)])?;
    for outcome in ["rolled_back", "updated"] {
        drop(reader);
        let traffic = rig.traffic()?;
        traffic.moves_on(rig.agent()?, 50)?;
        let fault = (outcome == "rolled_back").then(|| Switch::with(&rig.vm.dir, "fault", "claim:error"));
        let before = rig.vm.ping()?;
        let report: Report = rig.vm.ask_update(&rig.vm.other_build()?)?.json()?;
        drop(fault.transpose()?);
        let after = rig.vm.ping()?;
        let changed = before.build_id != after.build_id;
        ensure!(report.outcome == outcome && changed == (outcome == "updated"), "{report:?}: {before:?} -> {after:?}");
        ensure!(before.pid == after.pid, "{before:?} -> {after:?}");
        if changed {
            rig.vm.note_update();
        }
        traffic.moves_on(rig.agent()?, 50)?;
        if !changed {
            // The log is open as it was: what nobody reads is dropped, and counted.
            ensure!(rig.vm.counter("/log/dropped_bytes")? > 0, "where did the log go?");
            traffic.finish_clean(rig.agent()?)?;
            reader = read_end(&log)?;
            continue;
        }

        let refused = rig.vm.ask_update(&rig.vm.other_build()?)?;
        ensure!(refused.status == 409 && refused.causes()?.join(" ").contains("the log takes nothing"), "{refused:?}");
        traffic.moves_on(rig.agent()?, 50)?;
        traffic.finish_clean(rig.agent()?)?;

        reader = read_end(&log)?;
        let mut text = Vec::new();
        wait_for("the line that has waited", || {
            // 0: not opened by the VMM yet; an error: nothing more for now.
            let _ = reader.read_to_end(&mut text);
            Ok(String::from_utf8_lossy(&text).contains("Updated from build").then_some(()))
        })?;
    }
    rig.update_under_traffic()?;
    fs::remove_file(&log)?;
    Ok(())
}

/// Does not wait for a writer.
fn read_end(fifo: &Path) -> Result<File> {
    Ok(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(fifo)?)
}
