//! An exploit's view of what confines a VMM: itself, or a child of its main thread, tries what it must not be able to
//! do (`vmm/src/test_hooks/probe.rs`), over updates and roll backs.

use std::{
    fs,
    os::unix::{
        fs::{FileExt, MetadataExt, PermissionsExt},
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    cases::{MANY, note},
    harness::{
        capabilities::CAP_DAC_OVERRIDE,
        fences, lab, proc,
        vm::{Setting, Vm},
    },
    native::guest,
};

/// Folders of a VMM that is confined, and what is outside of them.
struct Places {
    root: PathBuf,
}

impl Places {
    fn new() -> Result<Self> {
        let root = std::env::temp_dir().join(format!("confined-{}", std::process::id()));
        for folder in ["guest", "builds", "log", "outside"] {
            fs::create_dir_all(root.join(folder))?;
        }
        guest::write(&root.join("guest/kernel"), 128 << 20)?;
        fs::copy(root.join("guest/kernel"), root.join("outside/kernel"))?;
        for build in ["theseus-a", "theseus-b"] {
            fs::copy(lab::bin(build)?, root.join("builds").join(build))?;
            fs::copy(lab::bin(build)?, root.join("outside").join(build))?;
        }
        Ok(Self { root })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// A VMM with `--landlock` opens nothing outside of its rules, from its start on and in every later image; and all that
/// it has to open it can: builds, kernels, its log. There is one layer, however many images there were.
pub(super) fn by_landlock() -> Result<()> {
    let places = Places::new()?;
    let [kernel, log] = ["guest/kernel", "log/log"].map(|name| places.text(name));
    let options = ["--kernel", &kernel, "--memory", "size=128M", "--log-file", &log, "--update-dir"];
    let args: Vec<_> = options.into_iter().map(str::to_owned).chain([places.text("builds")]).collect();
    let setting = Setting { confined: true, ..Setting::default() };
    let mut vm = Vm::spawn("theseus-a", &args, &setting)?.booted()?;
    ensure!(vm.info()?["config"]["landlock_enable"] == true, "{}", vm.info()?);

    let outside = ["outside/kernel", "outside"].map(|name| places.text(name));
    let denied = ["/", "/etc/passwd", "/dev", "/usr/bin", &outside[0], &outside[1]].map(|path| format!("read {path}"));
    let denied =
        denied.into_iter().chain([&outside[0], "/proc/sys/kernel/core_pattern"].map(|path| format!("write {path}")));
    let allowed = [format!("read {kernel}"), format!("write {log}"), "read /proc/self/status".into()];
    let questions: Vec<_> = ["layers".into()].into_iter().chain(denied).chain(allowed.clone()).collect();
    let check = |vm: &Vm, when: &str| -> Result<()> {
        for (question, answer) in
            questions.iter().zip(fences::probed(vm, &places.path("builds/theseus-a"), &questions)?)
        {
            let wanted = match question.as_str() {
                "layers" => "1",
                _ if allowed.contains(question) => "ok",
                _ => "13",
            };
            ensure!(answer == wanted, "{when}: {question}: {answer}, not {wanted}");
        }
        Ok(())
    };
    check(&vm, "at the start")?;
    for update in 1..=MANY / 2 {
        for build in ["builds/theseus-b", "builds/theseus-a"] {
            vm.update_to(&places.path(build))?;
        }
        if update % 5 == 0 {
            check(&vm, &format!("after {update} updates there and back"))?;
        }
    }
    // A log that was rotated is made anew by the next image.
    fs::rename(&log, places.path("log/log.1"))?;
    vm.update_to(&places.path("builds/theseus-b"))?;
    vm.note_update();
    ensure!(Path::new(&log).exists(), "no new log");
    // The way back is to a file that has no name any more.
    fs::remove_file(places.path("builds/theseus-b"))?;
    for fault in ["prewarm:error", "remap:kill", "claim:abort"] {
        vm.roll_back(fault, &places.path("builds/theseus-a"))?;
    }
    check(&vm, "after roll backs")?;
    vm.update_to(&places.path("builds/theseus-a"))?;
    vm.note_update();

    let answer = vm.ask_update(&places.path("outside/theseus-b"))?;
    ensure!(answer.status == 409 && answer.causes()?.join(" ").contains("--landlock-rules"), "{answer:?}");
    // Its kernel may be another file by the next boot.
    let new = places.path("guest/new");
    fs::copy(&kernel, &new)?;
    fs::rename(&new, &kernel)?;
    vm.api.order("vm.reboot")?;
    vm.api.order("vm.delete")?;
    let config = |kernel: &str| json!({ "memory": { "size": 128u64 << 20 }, "payload": { "kernel": kernel } });
    let answer = vm.api.put("vm.create", &config(&outside[0]).to_string())?;
    ensure!(answer.ok(), "{answer:?}");
    let answer = vm.api.put("vm.boot", "")?;
    let causes = answer.causes()?.join(" ");
    let said = causes.contains("Permission denied") && causes.contains("--landlock-rules");
    ensure!(answer.status == 500 && said, "{answer:?}");
    vm.api.order("vm.delete")?;
    let mut asks = config(&kernel);
    asks["landlock_enable"] = json!(true);
    asks["landlock_rules"] = json!([{ "path": outside[1], "access": "r" }]);
    let answer = vm.api.put("vm.create", &asks.to_string())?;
    ensure!(answer.status == 400 && answer.causes()?.join(" ").contains(&outside[1]), "{answer:?}");
    asks["landlock_rules"] = json!(null);
    let answer = vm.api.put("vm.create", &asks.to_string())?;
    ensure!(answer.ok(), "{answer:?}");
    vm.api.order("vm.boot")?;
    vm.update_to(&lab::bin("theseus-b")?).err().context("a build outside of --update-dir")?;
    check(&vm, "at last")?;
    note(format_args!("{} images, one layer", MANY + 6));

    let vm = Vm::api_only()?;
    asks["landlock_enable"] = json!(true);
    let answer = vm.api.put("vm.create", &asks.to_string())?;
    ensure!(answer.status == 400 && answer.causes()?.join(" ").contains("start it with --landlock"), "{answer:?}");
    Ok(())
}

/// The filters of the main thread of process `pid`.
fn filters(pid: u32) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    fences::filters_in(&status)
}

/// With `--ceiling` every call of its list is refused to a child of the main thread, in whichever image, and keeper and
/// main thread have that one filter, however many images there were.
pub(super) fn by_ceiling() -> Result<()> {
    let kernel = std::env::temp_dir().join(format!("ceiling-{}", std::process::id()));
    guest::write(&kernel, 128 << 20)?;
    let options = ["--kernel", &kernel.display().to_string(), "--memory", "size=128M"].map(str::to_owned);
    for (ceiling, wanted) in [(true, 1), (false, 0)] {
        let args: Vec<_> = options.iter().cloned().chain(ceiling.then(|| "--ceiling".into())).collect();
        // A container may have given one to the harness itself.
        let wanted = wanted + filters(std::process::id())?;
        let mut vm = Vm::spawn("theseus-a", &args, &Setting::default())?.booted()?;
        let check = |vm: &Vm, when: &str| -> Result<()> {
            vm.settled_facts()?;
            let passed = fences::probed(vm, &vm.other_build()?, &["ceiling".into()])?.join(" ");
            ensure!(passed.is_empty() == ceiling, "{when}: not refused: {passed}");
            for (who, pid) in [("keeper", vm.pid()), ("VMM", vm.vmm()?)] {
                ensure!(filters(pid)? == wanted, "{when}: the {who} has {} filters, not {wanted}", filters(pid)?);
            }
            Ok(())
        };
        check(&vm, "at the start")?;
        for _ in 0..MANY {
            vm.update()?;
        }
        check(&vm, &format!("after {MANY} updates"))?;
        for fault in ["prewarm:error", "remap:kill"] {
            vm.roll_back(fault, &vm.other_build()?)?;
        }
        check(&vm, "after roll backs")?;
    }
    Ok(fs::remove_file(kernel)?)
}

const SOMEBODY: u32 = 4711;
/// In guest memory, where its code is not.
const SECRET_AT: u64 = 0x60_0000;

/// What only this VMM has of the guest is in no core, nobody of its own user looks into it, and of an update nothing is
/// left open; or, where it was asked for, that user may.
pub(super) fn no_dumps() -> Result<()> {
    let kernel = std::env::temp_dir().join(format!("dumps-{}", std::process::id()));
    guest::write(&kernel, 128 << 20)?;
    let options = ["--kernel", &kernel.display().to_string(), "--memory", "size=128M"].map(str::to_owned);
    let cores = Cores::new()?;
    for dumps in [false, true] {
        let args: Vec<_> = options.iter().cloned().chain(dumps.then(|| "--core-dumps".into())).collect();
        let setting = Setting {
            user: Some((SOMEBODY, &[CAP_DAC_OVERRIDE])),
            limit: Some((libc::RLIMIT_CORE, libc::RLIM_INFINITY)),
            ..Setting::default()
        };
        let mut vm = Vm::spawn("theseus-a", &args, &setting)?.booted()?;
        let check = |vm: &Vm, when: &str| -> Result<()> {
            vm.settled_facts()?;
            let vmm = vm.vmm()?;
            // Of who may not be dumped they are root's (proc(5)).
            let owner = |pid: u32| Ok::<_, std::io::Error>(fs::metadata(format!("/proc/{pid}/mem"))?.uid());
            let wanted = if dumps { SOMEBODY } else { 0 };
            let found = owner(vmm)?;
            ensure!(found == wanted, "{when}: the VMM's memory is user {found}'s, not {wanted}'s");
            ensure!(owner(vm.pid())? == 0, "{when}: the keeper can be looked into");
            let memfds = proc::fds_to(vmm, "/memfd:")?.len();
            ensure!(memfds == proc::fds_to(vmm, "/memfd:guest")?.len(), "{when}: {memfds} memfds are open");
            for flags in guest_mappings(vmm)? {
                ensure!(flags.split(' ').any(|flag| flag == "dd"), "{when}: a mapping of guest RAM has {flags}");
            }
            Ok(())
        };
        check(&vm, "at the start")?;
        for _ in 0..3 {
            vm.update()?;
            check(&vm, "after an update")?;
        }
        vm.roll_back("remap:kill", &vm.other_build()?)?;
        check(&vm, "after a roll back")?;
        cores.of_its_end(vm, dumps)?;
    }
    Ok(fs::remove_file(kernel)?)
}

/// Where this machine's kernel leaves cores meanwhile.
struct Cores {
    folder: PathBuf,
    usual: String,
}

impl Cores {
    const PATTERN: &str = "/proc/sys/kernel/core_pattern";

    fn new() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("cores-{}", std::process::id()));
        let this = Self { usual: fs::read_to_string(Self::PATTERN)?, folder };
        fs::create_dir(&this.folder)?;
        fs::set_permissions(&this.folder, fs::Permissions::from_mode(0o777))?;
        fs::write(Self::PATTERN, this.folder.join("%p").display().to_string()).context(Self::PATTERN)?;
        Ok(this)
    }

    /// Of a VMM that dies, and of its keeper, which dies as it does: there is one of the VMM if it was asked for, and
    /// it has all but what is the guest's.
    fn of_its_end(&self, mut vm: Vm, asked_for: bool) -> Result<()> {
        let (keeper, vmm) = (vm.pid(), vm.vmm()?);
        let ram = proc::open_fd_to(vmm, "/memfd:guest-ram", fs::File::options().write(true))?;
        // As it is nowhere in this program, which the VMM's might resemble.
        let secret: Vec<u8> = (0..64).map(|n: u8| n.wrapping_mul(n) ^ 0xA5).collect();
        ram.write_all_at(&secret, SECRET_AT)?;
        proc::signal(vmm, libc::SIGABRT)?;
        let status = vm.wait_exit()?;
        ensure!(status.signal() == Some(libc::SIGABRT), "{status}");
        let path = |pid: u32| self.folder.join(pid.to_string());
        ensure!(!path(keeper).exists(), "there is a core of the keeper");
        ensure!(path(vmm).exists() == asked_for, "is there a core of the VMM? Asked for: {asked_for}");
        if asked_for {
            let core = fs::read(path(vmm))?;
            ensure!(core.starts_with(b"\x7fELF"), "a core of {} bytes is none", core.len());
            ensure!(!core.windows(secret.len()).any(|part| part == secret), "the guest's memory is in the core");
            note(format_args!("a core of {} KiB", core.len() >> 10));
        }
        Ok(())
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATTERN, &self.usual);
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// VmFlags of each mapping of guest RAM (proc(5)).
fn guest_mappings(pid: u32) -> Result<Vec<String>> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut of_guest, mut found) = (false, Vec::new());
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        match line.strip_prefix("VmFlags:") {
            Some(flags) if of_guest => found.push(flags.trim().to_owned()),
            None if !first.ends_with(':') => of_guest = line.contains("/memfd:guest"),
            _ => {}
        }
    }
    ensure!(!found.is_empty(), "no mapping of guest RAM");
    Ok(found)
}
