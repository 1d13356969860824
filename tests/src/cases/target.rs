//! Whose file the target is, who may change it, by which name it is found, and what it may do once it runs.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    cases::{failures::End, note},
    harness::{
        capabilities::{CAP_DAC_OVERRIDE, CAP_IPC_LOCK, set_file_capabilities},
        hooks::{Hold, Switch},
        lab::{self, Nic},
        proc,
        report::Report,
        rig::{self, Rig},
        vm::Vm,
    },
};

/// Somebody who is not root.
const SOMEBODY: u32 = 4711;
/// What lets that one use the lab's devices and files.
const DEVICES: &[u32] = &[CAP_DAC_OVERRIDE];
/// Less than the guest's 256 MiB.
const TOO_LITTLE: u64 = 64 << 20;

/// A copy of `build` that belongs to `owner`.
fn copy(build: &str, path: &Path, owner: u32) -> Result<PathBuf> {
    fs::copy(lab::bin(build)?, path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    chown(path, Some(owner), Some(owner))?;
    Ok(path.into())
}

/// The target belongs to the user of the VMM, and somebody opens it to write another build into it, after all the
/// checks and right before the exec. What was checked is what runs, or nothing.
pub(super) fn rewritten() -> Result<()> {
    let vm = Vm::builder().cpus(2).user(SOMEBODY, DEVICES).boot()?;
    let target = copy("theseus-b", &vm.dir.join("own"), SOMEBODY)?;
    let other = fs::read(lab::bin("theseus-a")?)?;
    let sha256: String = Sha256::digest(fs::read(&target)?).iter().map(|byte| format!("{byte:02x}")).collect();
    let before = vm.ping()?;
    let unharmed = || -> Result<()> {
        let after = vm.ping()?;
        ensure!((before.pid, &before.build_id) == (after.pid, &after.build_id), "{before:?} -> {after:?}");
        vm.agent()?.ping()
    };
    for (phase, end) in [("prepare", End::Refused), ("become", End::RolledBack)] {
        for body in [json!({ "binary": target }), json!({ "binary": target, "sha256": sha256 })] {
            let mut hold = Hold::arm(&vm.dir, phase)?;
            let mut caller = vm.api.connect()?;
            caller.send("PUT", "vm.update", &body.to_string())?;
            hold.wait_held()?;
            let writer = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&target);
            let opened = writer.and_then(|mut file| file.write_all(&other));
            hold.release()?;
            let answer = caller.receive()?;
            drop(hold);
            ensure!(opened.is_err(), "{phase}: somebody could write into what was checked: {answer:?}");
            let told = end.reasons(&answer).with_context(|| format!("{phase}: {body}"))?;
            ensure!(told.contains("was opened for writing") && told.contains("own: "), "{phase}: {told}");
            note(format_args!("{phase}: {told}"));
            unharmed()?;
        }
    }
    let writer = OpenOptions::new().write(true).open(&target)?;
    let told = End::Refused.reasons(&vm.ask_update(&target)?)?;
    ensure!(told.contains("is open for writing"), "{told}");
    unharmed()?;
    drop(writer);
    vm.update_to(&target)?;
    // And back, from a file of the own user as well.
    fs::rename(&target, vm.dir.join("aside"))?;
    vm.update_to(&copy("theseus-a", &target, SOMEBODY)?)?;
    vm.agent()?.ping()
}

/// Root runs nobody else's file, nor one that others may write, nor one that would make the VMM somebody else.
pub(super) fn of_others() -> Result<()> {
    rig::shared(|rig| {
        let target = copy("theseus-b", &rig.vm.dir.join("of-others"), 0)?;
        for (owner, mode, word) in [
            (SOMEBODY, 0o755, "belongs to user 4711"),
            (0, 0o775, "writable by its group"),
            (0, 0o757, "writable by everybody"),
            (0, 0o4755, "is setuid"),
        ] {
            chown(&target, Some(owner), Some(owner))?;
            fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
            let told = End::Refused.reasons(&rig.vm.ask_update(&target)?).with_context(|| word.to_owned())?;
            ensure!(told.contains(word), "{word}: {told}");
            rig.agent()?.ping()?;
        }
        // It was somebody else's, who still has it open.
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
        let writer = OpenOptions::new().write(true).open(&target)?;
        let told = End::Refused.reasons(&rig.vm.ask_update(&target)?)?;
        ensure!(told.contains("of-others: is open for writing"), "{told}");
        drop(writer);
        fs::remove_file(&target)?;
        rig.vm.update()?;
        Ok(())
    })
}

/// The VMM was started by a symbolic link, which every package upgrade moves to another folder, while the folder before
/// is removed. An update without a file's name is to what the link leads to now: after an update, and after one that
/// was undone, too. Any other file has to be beside the link.
pub(super) fn own_name() -> Result<()> {
    let dir = std::env::temp_dir().join(format!("releases-{}", std::process::id()));
    let folder = dir.join("bin");
    fs::create_dir_all(&folder)?;
    let link = folder.join("theseus");
    let release = |number: u32, build: &str| -> Result<()> {
        let folder = dir.join(number.to_string());
        fs::create_dir_all(&folder)?;
        let new = dir.join("new");
        symlink(copy(build, &folder.join("theseus"), 0)?, &new)?;
        fs::rename(&new, &link)?;
        match number {
            1 => Ok(()),
            _ => Ok(fs::remove_dir_all(dir.join((number - 1).to_string()))?),
        }
    };
    release(1, "theseus-a")?;
    let vm = Vm::api_only_from(&link)?;
    let update = |body: Value, wanted: &str| -> Result<()> {
        let before = vm.ping()?;
        let answer = vm.api.put("vm.update", &body.to_string())?;
        ensure!(answer.status == 200, "{answer:?}");
        let report: Report = answer.json()?;
        ensure!(report.outcome == wanted, "{report:?}");
        ensure!((vm.ping()?.build_id != before.build_id) == (wanted == "updated"), "{report:?}");
        vm.settled_facts()?;
        Ok(())
    };
    let elsewhere = copy("theseus-b", &dir.join("theseus-b"), 0)?;
    let leads_out = folder.join("out");
    symlink(&elsewhere, &leads_out)?;
    let refused = || -> Result<()> {
        for target in [&elsewhere, &leads_out] {
            let told = End::Refused.reasons(&vm.ask_update(target)?)?;
            ensure!(told.contains("/bin, where this VMM was started from: copy it there"), "{told}");
        }
        Ok(())
    };
    refused()?;
    release(2, "theseus-b")?;
    update(json!({}), "updated")?;
    refused()?;
    release(3, "theseus-a")?;
    let fault = Switch::with(&vm.dir, "fault", "commit:error")?;
    update(json!({}), "rolled_back")?;
    drop(fault);
    update(json!({}), "updated")?;
    update(json!({ "binary": copy("theseus-b", &folder.join("beside"), 0)? }), "updated")?;
    refused()?;
    update(json!({ "binary": link }), "updated")?;
    fs::remove_dir_all(&dir)?;
    Ok(())
}

/// A VMM that may pin its guest by a capability of its file. A target without it is refused before the guest is
/// touched.
pub(super) fn with_fewer_rights() -> Result<()> {
    const RIGHTS: &[u32] = &[CAP_DAC_OVERRIDE, CAP_IPC_LOCK];
    let able = |build: &str| -> Result<PathBuf> {
        let path = copy(build, &std::env::temp_dir().join(format!("able-{build}")), 0)?;
        set_file_capabilities(&path, RIGHTS)?;
        Ok(path)
    };
    let (a, b) = (able("theseus-a")?, able("theseus-b")?);
    let builder = Vm::builder().cpus(2).binary(&a.display().to_string()).user(SOMEBODY, &[]);
    let rig = Rig::boot(builder, &[(Nic::IgbA, None)])?;
    proc::set_soft_limit(rig.vm.pid(), libc::RLIMIT_MEMLOCK, TOO_LITTLE)?;
    let refused = |target: &Path, words: &[&str]| -> Result<()> {
        let before = rig.vm.ping()?;
        let told = End::Refused.reasons(&rig.vm.ask_update(target)?)?;
        ensure!(words.iter().all(|word| told.contains(word)), "{words:?} in {told}");
        note(format_args!("told: {told}"));
        ensure!(rig.vm.ping()?.build_id == before.build_id && rig.vm.state()? == "Running", "{told}");
        rig.agent()?.ping()
    };
    let unable = lab::bin("theseus-b")?;
    let setcap = format!("setcap cap_ipc_lock=ep {}", unable.display());
    refused(&unable, &["to the new image, which will not have CAP_IPC_LOCK (this image has it", &setcap])?;
    rig.vm.update_to(&b)?;
    // The file that runs has lost them, and the process has them still: a way back needs no more.
    set_file_capabilities(&b, &[])?;
    let fault = Switch::with(&rig.vm.dir, "fault", "commit:error")?;
    End::RolledBack.reasons(&rig.vm.ask_update(&a)?)?;
    drop(fault);
    rig.agent()?.ping()?;
    rig.vm.update_to(&a)?;
    rig.agent()?.ping()?;
    fs::remove_file(a)?;
    Ok(fs::remove_file(b)?)
}
