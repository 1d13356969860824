//! The unit file under a real systemd: a user of its own, no capability, and all that the unit confines.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{
    cases::note,
    harness::{
        PATIENCE,
        agent::Agent,
        builder::CMDLINE,
        hooks::{self, Hold},
        http::Api,
        lab::{self, Nic},
        logs, proc,
        report::{Ping, Report, update_body},
        systemd::{Systemd, readable},
        wait_for,
    },
    proto::Request,
};

const UNIT: &str = include_str!("../../../docs/theseus@.service");
const NAME: &str = "theseus@one.service";
/// One that every Debian has (base-passwd).
const NAMED: &str = "backup";
const USER: u32 = 34;
const FOLDER: &str = "/run/service-of-test";
const RUN: &str = "/run/theseus/one";

/// The unit as it is, with the places and a user of this lab.
fn unit() -> Result<String> {
    let mut unit = UNIT.to_owned();
    for (from, to) in [
        ("/etc/theseus/", format!("{FOLDER}/")),
        ("/usr/bin/theseus ", format!("{} ", lab::bin("theseus-a")?.display())),
        ("/usr/bin/ch-remote", lab::bin("ch-remote")?.display().to_string()),
        ("User=theseus-%i", format!("User={NAMED}\nEnvironment={}={FOLDER}/hooks", hooks::ENV)),
        ("Type=notify", format!("Type=notify\nStandardError=append:{FOLDER}/log")),
    ] {
        ensure!(unit.contains(from), "the unit has no {from}");
        unit = unit.replace(from, &to);
    }
    Ok(unit)
}

/// What udev does for that user.
fn give(paths: &[PathBuf]) -> Result<()> {
    paths.iter().try_for_each(|path| Ok(chown(path, Some(USER), Some(USER))?))
}

struct Service {
    systemd: Systemd,
    api: Api,
}

impl Service {
    fn ping(&self) -> Result<Ping> {
        self.api.get("vmm.ping")?.json()
    }

    fn main_pid(&self) -> Result<u32> {
        Ok(self.systemd.property(NAME, "MainPID")?.parse()?)
    }

    fn agent(&self) -> Result<Agent> {
        let agent = Agent::connect(&Path::new(RUN).join("serial"), &logs::create("console")?)?;
        agent.wait_ready(PATIENCE)?;
        Ok(agent)
    }

    /// By `systemctl stop`, which presses the power button. What has become of it in the end.
    fn stop(&self, agent: Agent) -> Result<String> {
        agent.call::<()>(&Request::PowerButtonOpen)?;
        let mut stop = self.systemd.begin(&["stop", NAME])?;
        agent.call_within::<()>(&Request::PowerButtonWait, PATIENCE)?;
        agent.call::<()>(&Request::PowerOff { after_ms: 0 })?;
        ensure!(stop.wait()?.success(), "systemctl stop");
        self.systemd.property(NAME, "Result")
    }

    fn comes_to(&self, property: &str, value: &str) -> Result<()> {
        wait_for(&format!("{property} to be {value}"), || {
            Ok((self.systemd.property(NAME, property)? == value).then_some(()))
        })
    }
}

/// Start, update, a way back with another PID, an end by the power button, a reset that starts it again.
pub(super) fn unit_of_systemd() -> Result<()> {
    let bdf = Nic::IgbA.bdf()?;
    proc::wait_group_free(&bdf)?;
    let folder = Path::new(FOLDER);
    readable(folder, &[("kernel", lab::kernel()?), ("initramfs", lab::initramfs()?)])?;
    fs::create_dir_all(folder.join("hooks"))?;
    let device = format!("/sys/bus/pci/devices/{bdf}");
    let group = fs::read_link(format!("{device}/iommu_group"))?;
    let group = Path::new("/dev/vfio").join(group.file_name().context("no group")?);
    give(&[folder.join("hooks"), "/dev/kvm".into(), "/dev/vfio/vfio".into(), group])?;
    let arguments = format!(
        "ARGS=\"--kernel {FOLDER}/kernel --initramfs {FOLDER}/initramfs --cmdline '{CMDLINE}' --memory size=256M \
         --device path={device} --serial socket={RUN}/serial --on-reset exit \
         --landlock --landlock-rules path={FOLDER},access=rw {}\"\n",
        lab::seccomp().join(" ")
    );
    fs::write(folder.join("one.args"), arguments)?;
    let systemd = Systemd::start(&[("theseus@.service", &unit()?)])?;
    let service = Service { systemd, api: Api { path: Path::new(RUN).join("api.sock") } };
    let log = || logs::tail(&folder.join("log"));
    service.systemd.control(&["start", NAME]).with_context(log)?;
    ensure!(service.systemd.property(NAME, "ActiveState")? == "active", "not active");
    let agent = service.agent()?;
    let (pid, first) = (service.main_pid()?, service.ping()?);
    ensure!(first.pid == pid, "systemd knows {pid}, the API says {}", first.pid);

    let updated = service.api.put("vm.update", &update_body(&lab::bin("theseus-b")?))?;
    let report: Report = updated.json().with_context(|| format!("{updated:?}"))?;
    let (second, vmm) = (service.ping()?, report.vmm_pid);
    ensure!(report.outcome == "updated" && second.build_id != first.build_id, "{updated:?}");
    for pid in [pid, vmm] {
        let status = service.systemd.status_of(pid)?;
        let of = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        ensure!(of("Uid:").split_whitespace().all(|uid| uid == USER.to_string()), "{status}");
        ensure!(of("CapPrm:") == "0000000000000000" && of("CapBnd:") == "0000000000000000", "{status}");
        ensure!(of("NoNewPrivs:") == "1" && of("Seccomp:") == "2", "{status}");
    }
    ensure!(second.pid == pid && service.main_pid()? == pid, "the PID has changed");
    agent.ping()?;

    let mut hold = Hold::arm(folder, "remap")?;
    give(&["held", "release", "hold"].map(|name| folder.join("hooks").join(name)))?;
    let mut caller = service.api.connect()?;
    let body = serde_json::json!({ "binary": lab::bin("theseus-a")?, "deadline_ms": 120_000 });
    caller.send("PUT", "vm.update", &body.to_string())?;
    hold.wait_held()?;
    service.systemd.kill(pid)?;
    let answer = caller.receive()?;
    drop(hold);
    let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
    ensure!(report.outcome == "rolled_back" && report.pid == vmm, "{report:?}");
    service.comes_to("MainPID", &report.pid.to_string())?;
    ensure!(service.systemd.property(NAME, "ActiveState")? == "active", "systemd has given it up");
    ensure!(service.systemd.property(NAME, "NRestarts")? == "0", "it was started again");
    agent.ping()?;
    note(format_args!("PID {pid}, after a way back {}", report.pid));

    // To systemd the service has failed with its first process, however it ends.
    ensure!(service.stop(agent)? == "signal", "nobody was killed?");

    service.systemd.control(&["start", NAME])?;
    let agent = service.agent()?;
    agent.call::<()>(&Request::Reboot { after_ms: 0 })?;
    service.comes_to("NRestarts", "1")?;
    drop(agent);
    service.comes_to("ActiveState", "active")?;
    ensure!(service.stop(service.agent()?)? == "success", "not an orderly end");
    ensure!(service.systemd.property(NAME, "ActiveState")? == "inactive", "not inactive");
    drop(service);
    for path in ["/dev/kvm", "/dev/vfio/vfio"] {
        chown(path, Some(0), Some(0))?;
    }
    Ok(fs::remove_dir_all(folder)?)
}
