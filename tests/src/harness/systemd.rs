//! A systemd that runs as the first process of namespaces of its own, with no units but those that a test gives it: any
//! other would do to this machine what it does to one that boots.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use crate::harness::{logs, proc, wait_for};

const CGROUP: &str = "/sys/fs/cgroup/systemd-of-test";
const UNITS: &str = "/run/units-of-test";

/// What units depend on by default (systemd.service(5), systemd.unit(5)).
const TARGETS: [&str; 7] = ["default", "sysinit", "basic", "shutdown", "umount", "final", "multi-user"];

/// Ends with all that it runs.
pub struct Systemd {
    unshare: Child,
}

impl Systemd {
    /// `units`: names and texts.
    pub fn start(units: &[(&str, &str)]) -> Result<Self> {
        ensure!(Path::new("/sys/fs/cgroup/cgroup.procs").exists(), "/sys/fs/cgroup is not cgroup2");
        fs::create_dir_all(UNITS)?;
        for target in TARGETS {
            let text = format!("[Unit]\nDescription={target}\nDefaultDependencies=no\n");
            fs::write(Path::new(UNITS).join(format!("{target}.target")), text)?;
        }
        for (name, text) in units {
            fs::write(Path::new(UNITS).join(name), text)?;
        }
        fs::create_dir_all(CGROUP).context(CGROUP)?;
        let log = logs::create("systemd")?;
        let log = || fs::File::options().append(true).open(&log);
        let inside = "mount --make-rprivate / && umount /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && \
                      exec /lib/systemd/systemd --system --show-status=0";
        let outside = format!(
            "echo $$ >{CGROUP}/cgroup.procs && exec unshare --mount --pid --fork --cgroup --mount-proc --kill-child \
             /bin/sh -c '{inside}'"
        );
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(outside);
        command.env("container", "lab").env("SYSTEMD_UNIT_PATH", UNITS);
        command.env("SYSTEMD_LOG_TARGET", "console").env("SYSTEMD_LOG_LEVEL", "info");
        command.stdin(Stdio::null()).stdout(log()?).stderr(log()?);
        let mut systemd = Self { unshare: command.spawn()? };
        wait_for("systemd", || {
            let ended = systemd.unshare.try_wait()?;
            ensure!(ended.is_none(), "it has ended: {ended:?}");
            Ok(systemd.control(&["is-system-running"]).is_ok().then_some(()))
        })?;
        Ok(systemd)
    }

    /// As the namespaces' processes see it, whose number is another outside.
    fn command(&self, program: &str, words: &[&str]) -> Result<Command> {
        let first = proc::children(self.unshare.id())?.first().copied().context("systemd has ended")?;
        let mut command = Command::new("nsenter");
        command.args(["-t", &first.to_string(), "-m", "-p", "-C", program]).args(words);
        Ok(command)
    }

    fn output(&self, program: &str, words: &[&str]) -> Result<String> {
        let output = self.command(program, words)?.stdin(Stdio::null()).output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let (said, wrong) = (text(&output.stdout), text(&output.stderr));
        if !output.status.success() {
            bail!("{program} {words:?}: {}: {said} {wrong}", output.status);
        }
        Ok(said)
    }

    /// systemctl(1)
    pub fn control(&self, words: &[&str]) -> Result<String> {
        self.output("systemctl", words)
    }

    /// The same, without waiting for its end.
    pub fn begin(&self, words: &[&str]) -> Result<Child> {
        Ok(self.command("systemctl", words)?.stdin(Stdio::null()).spawn()?)
    }

    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        self.control(&["show", "--value", "-p", name, unit])
    }

    /// `pid`: as systemd and its services know it.
    pub fn kill(&self, pid: u32) -> Result<()> {
        self.output("/bin/sh", &["-c", &format!("kill -9 {pid}")]).map(drop)
    }

    pub fn status_of(&self, pid: u32) -> Result<String> {
        self.output("cat", &[&format!("/proc/{pid}/status")])
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        // Of cgroups, the innermost first: they go once they are empty.
        let _ = wait_for("the cgroups of systemd", || {
            let gone =
                Command::new("find").args([CGROUP, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";"]).output();
            Ok((gone.is_err() || !Path::new(CGROUP).exists()).then_some(()))
        });
        let _ = fs::remove_dir_all(UNITS);
    }
}

/// A folder that others than root may read, and files in it.
pub fn readable(folder: &Path, files: &[(&str, PathBuf)]) -> Result<()> {
    fs::create_dir_all(folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    for (name, from) in files {
        let to = folder.join(name);
        fs::copy(from, &to).with_context(|| format!("{} to {}", from.display(), to.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}
