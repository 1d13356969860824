//! Updates that must not happen: the guest goes on in the old image, the caller is told why, and the next update works.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::{
    cases::note,
    harness::{
        hooks::{Hold, Switch},
        http::Answer,
        lab::{self, Nic},
        proc,
        report::{Report, update_body},
        rig::{self, Rig},
        vfio::InvalidRange,
        vm::Vm,
    },
};

/// How an update did not take place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum End {
    /// 409 and the reasons: the guest was not touched.
    Refused,
    /// 200 and a report with the reasons: the guest was stopped and goes on.
    RolledBack,
}

impl End {
    pub(super) fn reasons(self, answer: &Answer) -> Result<String> {
        if self == Self::Refused {
            ensure!(answer.status == 409, "a refusal is answered 409: {answer:?}");
            return Ok(answer.causes()?.join(": "));
        }
        let report: serde_json::Value = answer.json()?;
        ensure!(answer.status == 200 && report["outcome"] == "rolled_back", "{answer:?}");
        let stopped = report["phases"].as_array().into_iter().flatten().any(|phase| phase["name"] == "freeze");
        ensure!(
            stopped == report["pause_us"].as_u64().is_some_and(|us| us > 0),
            "was the guest stopped, and for how long? {answer:?}"
        );
        Ok(report["reasons"].to_string())
    }
}

/// Runs `attempt` under traffic. It must end as `end` with reasons that hold one of `words`; the guest must not notice;
/// the next update must work.
pub(super) fn unharmed(
    rig: &mut Rig,
    end: End,
    words: &[&str],
    attempt: impl FnOnce(&Rig) -> Result<Answer>,
) -> Result<()> {
    let traffic = rig.traffic()?;
    traffic.moves_on(rig.agent()?, 50)?;
    let before = rig.vm.ping()?;
    let answer = attempt(rig)?;
    let causes = end.reasons(&answer)?;
    ensure!(
        words.iter().any(|w| causes.to_lowercase().contains(&w.to_lowercase())),
        "no cause names one of {words:?}: {causes}"
    );
    note(format_args!("told: {causes}"));
    let after = rig.vm.ping()?;
    ensure!((before.pid, &before.build_id) == (after.pid, &after.build_id), "{before:?} -> {after:?}");
    ensure!(rig.vm.state()? == "Running", "{}", rig.vm.info()?);
    traffic.moves_on(rig.agent()?, 50)?;
    rig.vm.update().context("the update after the failed one")?;
    traffic.moves_on(rig.agent()?, 50)?;
    traffic.finish_clean(rig.agent()?)?;
    Ok(())
}

/// A copy of the next build that a test may spoil.
fn copy_of_next(rig: &Rig, name: &str) -> Result<PathBuf> {
    let path = rig.vm.dir.join(name);
    fs::copy(rig.vm.other_build()?, &path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

pub(super) fn target_missing() -> Result<()> {
    rig::shared(|rig| {
        unharmed(rig, End::Refused, &["/nowhere/theseus"], |rig| rig.vm.ask_update(Path::new("/nowhere/theseus")))
    })
}

pub(super) fn not_executable() -> Result<()> {
    rig::shared(|rig| {
        let target = copy_of_next(rig, "plain-file")?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o644))?;
        unharmed(rig, End::Refused, &["execut", "permission"], |rig| rig.vm.ask_update(&target))
    })
}

/// Other programs: one that fails, one that succeeds whatever it is asked, and a script.
pub(super) fn not_theseus() -> Result<()> {
    rig::shared(|rig| {
        let script = rig.vm.dir.join("script");
        fs::write(&script, "#!/bin/sh\necho '{}'\n")?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let agent = lab::bin("agent")?;
        for target in [agent.as_path(), Path::new("/bin/true"), &script] {
            let name = target.display().to_string();
            unharmed(rig, End::Refused, &["not a build of theseus", "not an elf"], |rig| rig.vm.ask_update(target))
                .with_context(|| name.clone())?;
        }
        Ok(())
    })
}

pub(super) fn wrong_sha256() -> Result<()> {
    rig::shared(|rig| {
        unharmed(rig, End::Refused, &["sha256", "sha-256"], |rig| {
            let body = serde_json::json!({ "binary": rig.vm.other_build()?, "sha256": "0".repeat(64) });
            rig.vm.api.put("vm.update", &body.to_string())
        })?;
        // The right one is accepted.
        let target = rig.vm.other_build()?;
        let hash: String = Sha256::digest(fs::read(&target)?).iter().map(|b| format!("{b:02x}")).collect();
        let body = serde_json::json!({ "binary": target, "sha256": hash });
        let answer = rig.vm.api.put("vm.update", &body.to_string())?;
        ensure!(answer.status == 200, "{answer:?}");
        rig.vm.note_update();
        Ok(())
    })
}

pub(super) fn older_state_version() -> Result<()> {
    rig::shared(|rig| {
        let hook = Switch::on(&rig.vm.dir, "state-version")?;
        unharmed(rig, End::Refused, &["version", "format"], move |rig| {
            let answer = rig.vm.ask_update(&rig.vm.other_build()?);
            drop(hook);
            answer
        })
    })
}

/// The target passes every check, then exec fails: somebody has opened it for writing meanwhile (ETXTBSY).
pub(super) fn exec_fails() -> Result<()> {
    rig::shared(|rig| {
        let target = copy_of_next(rig, "busy-file")?;
        unharmed(rig, End::RolledBack, &["exec", "busy"], |rig| {
            let mut hold = Hold::arm(&rig.vm.dir, "become")?;
            let mut caller = rig.vm.api.connect()?;
            caller.send("PUT", "vm.update", &update_body(&target))?;
            hold.wait_held()?;
            let writer = OpenOptions::new().write(true).open(&target)?;
            hold.release()?;
            let answer = caller.receive();
            drop(writer);
            answer
        })
    })
}

/// What goes over ahead of the machine does not arrive, or the update ends when the guest still runs and its interrupts
/// wait already: it runs on, with its interrupts. A target that does not know of what goes ahead gets all at once.
pub(super) fn ahead() -> Result<()> {
    rig::shared(|rig| {
        let faults = [
            ("ahead:error", "error (test)"),
            ("ahead:panic", "panic"),
            ("ahead:kill", "died"),
            ("freeze:error", "error (test)"),
            ("freeze:panic", "panic"),
        ];
        for (fault, word) in faults {
            unharmed(rig, End::RolledBack, &[word], |rig| {
                let _fault = Switch::with(&rig.vm.dir, "fault", fault)?;
                rig.vm.ask_update(&rig.vm.other_build()?)
            })
            .context(fault)?;
        }
        let whole = Switch::on(&rig.vm.dir, "whole-handover")?;
        rig.update_under_traffic()?;
        drop(whole);
        rig.update_under_traffic()
    })
}

/// A lower version is refused, unless it is asked for by name.
pub(super) fn downgrade() -> Result<()> {
    rig::shared(|rig| {
        let older = |rig: &Rig| -> Result<PathBuf> {
            let target = copy_of_next(rig, "older")?;
            let mut bytes = fs::read(&target)?;
            // The version that its ELF note says, and one as long that is lower.
            let note = [b"Theseus\0", env!("CARGO_PKG_VERSION").as_bytes()].concat();
            let at = bytes.windows(note.len()).position(|window| window == note).context("no note of our version")?;
            let version = &mut bytes[at + 8..at + note.len()];
            version.iter_mut().filter(|digit| digit.is_ascii_digit()).for_each(|digit| *digit = b'0');
            fs::write(&target, bytes)?;
            Ok(target)
        };
        unharmed(rig, End::Refused, &["is older than the running"], |rig| rig.vm.ask_update(&older(rig)?))?;
        fs::remove_file(rig.vm.dir.join("older"))?;
        let target = older(rig)?;
        let body = serde_json::json!({ "binary": target, "allow_downgrade": true });
        let answer = rig.vm.api.put("vm.update", &body.to_string())?;
        let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
        ensure!(report.outcome == "updated", "{report:?}");
        rig.vm.note_update();
        Ok(())
    })
}

/// The keeper becomes the file that was running again, though its name is gone: an update that fails after the exec.
pub(super) fn old_binary_deleted() -> Result<()> {
    rig::shared(|rig| {
        for fault in ["vcpus:error", "remap:panic"] {
            let running = copy_of_next(rig, "deleted")?;
            rig.vm.update_to(&running)?;
            rig.vm.note_update();
            fs::remove_file(&running)?;
            unharmed(
                rig,
                End::RolledBack,
                &[&format!("phase {}", fault.split(':').next().unwrap_or_default())],
                |rig| {
                    let _fault = Switch::with(&rig.vm.dir, "fault", fault)?;
                    rig.vm.ask_update(&rig.vm.other_build()?)
                },
            )
            .context(fault)?;
        }
        Ok(())
    })
}

/// The kernel refuses to invalidate the second container, because one of its ranges is invalid already; the first is
/// put back.
pub(super) fn second_container() -> Result<()> {
    let nics = [(Nic::IgbA, None), (Nic::IgbB, Some("second"))];
    let mut rig = Rig::boot(Vm::builder().cpus(2), &nics)?;
    rig.vm.update()?;
    for (container, said) in
        [(1, "container 'second': cannot invalidate"), (0, "container 'default': cannot invalidate")]
    {
        unharmed(&mut rig, End::RolledBack, &[said], |rig| {
            let range = InvalidRange::new(rig.vm.vmm()?, container)?;
            let answer = rig.vm.ask_update(&rig.vm.other_build()?);
            ensure!(range.is_valid_again(), "the range is still invalid: no later update could succeed");
            answer
        })
        .with_context(|| format!("container {container}"))?;
    }
    Ok(())
}

/// Every reason at once: of the file, and of the limits of the process.
pub(super) fn preflight() -> Result<()> {
    rig::shared(|rig| {
        let set_limit = |soft| proc::set_soft_limit(rig.vm.pid(), libc::RLIMIT_NOFILE, soft);
        let before = rig.vm.ping()?;
        let old = set_limit(80)?;
        let body = serde_json::json!({ "binary": lab::bin("agent")?, "sha256": "0".repeat(64), "dry_run": true });
        let answer = rig.vm.api.put("vm.update", &body.to_string())?;
        let right = serde_json::json!({ "binary": rig.vm.other_build()? });
        let refused = rig.vm.api.put("vm.update", &right.to_string())?;
        set_limit(old)?;
        let causes = End::Refused.reasons(&answer)?;
        for part in ["RLIMIT_NOFILE is 80", "SHA-256", "not a build of Theseus"] {
            ensure!(causes.contains(part), "no word of {part}: {causes}");
        }
        note(format_args!("told: {causes}"));
        ensure!(End::Refused.reasons(&refused)?.contains("RLIMIT_NOFILE"), "{refused:?}");
        ensure!(rig.vm.ping()?.build_id == before.build_id, "updated all the same");
        rig.vm.update()?;
        Ok(())
    })
}

/// A dry run says that it would work, or why not, and changes nothing.
pub(super) fn dry_run() -> Result<()> {
    rig::shared(|rig| {
        let ask = |rig: &Rig, binary: &Path| {
            rig.vm.api.put("vm.update", &serde_json::json!({ "binary": binary, "dry_run": true }).to_string())
        };
        // Once before: the C library keeps the stack of a thread that has ended.
        ask(rig, &rig.vm.other_build()?)?;
        let (before, facts) = (rig.vm.ping()?, rig.vm.settled_facts()?);
        let answer = ask(rig, &rig.vm.other_build()?)?;
        ensure!(answer.status == 200, "{answer:?}");
        let report: serde_json::Value = answer.json()?;
        ensure!(report["outcome"] == "ready" && report["pause_us"].is_null(), "{report}");
        let phases: Vec<_> = report["phases"].as_array().into_iter().flatten().map(|phase| &phase["name"]).collect();
        ensure!(phases == ["prepare"], "{report}");
        let answer = ask(rig, Path::new("/nowhere/theseus"))?;
        ensure!(answer.status == 409, "{answer:?}");
        ensure!(rig.vm.ping()?.build_id == before.build_id, "a dry run has updated");
        let growth = rig.vm.settled_facts()?.growth_since(&facts, proc::Facts::FLAT_KIB);
        ensure!(growth.is_empty(), "a dry run leaves {growth}");
        rig.vm.update()?;
        Ok(())
    })
}
