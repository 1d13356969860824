//! Builds that must be signed (`--update-key`). A target that leaves a trace when it runs shows that none does before
//! its signature was found good.

use std::{
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use minisign::KeyPair;
use serde_json::json;

use crate::{
    cases::{failures::End, note},
    harness::{
        hooks::{Switch, make_fifo},
        signing,
        signing::{beside, comment, sign},
        vm::Vm,
        wait_for,
    },
    native::{Counter, guest, probes},
};

/// Newer than the running build, and older.
const NEWER: &str = "99.0.0";
const OLDER: &str = "0.0.1";

fn executable(path: &Path) -> Result<()> {
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// A program that says it is Theseus of that version, and makes the file `trace` when it is run.
fn tracer(path: &Path, version: &str, trace: &Path) -> Result<()> {
    const ADDRESS: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    let mut notes = Vec::new();
    let mut description = version.as_bytes().to_vec();
    description.resize(32, 0);
    for (kind, name, description) in [(3_u32, &b"GNU\0"[..], &[0xAB; 20][..]), (1, b"Theseus\0", &description)] {
        for word in [name.len() as u32, description.len() as u32, kind] {
            notes.extend(word.to_le_bytes());
        }
        notes.extend([name, description].concat());
    }
    // mov eax, SYS_creat; lea rdi, [rip + 19]; mov esi, 0600; syscall; mov eax, SYS_exit; mov edi, 7; syscall
    let mut code = vec![0xB8, 85, 0, 0, 0, 0x48, 0x8D, 0x3D, 19, 0, 0, 0, 0xBE, 0x80, 1, 0, 0, 0x0F, 0x05];
    code.extend([0xB8, 60, 0, 0, 0, 0xBF, 7, 0, 0, 0, 0x0F, 0x05]);
    code.extend([trace.as_os_str().as_bytes(), b"\0"].concat());
    let (entry, end) = (HEADERS + notes.len() as u64, HEADERS + (notes.len() + code.len()) as u64);

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // ET_EXEC for x86-64; version, entry, program headers; flags, sizes, two of them, no sections (elf(5)).
    file.extend([2_u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    file.extend(1_u32.to_le_bytes());
    file.extend([ADDRESS + entry, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 2, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    // PT_LOAD, to be read and executed; PT_NOTE, to be read.
    for (kind, flags, at, size, align) in [(1_u32, 5_u32, 0, end, 4096), (4, 4, HEADERS, notes.len() as u64, 4)] {
        file.extend([kind, flags].iter().flat_map(|word| word.to_le_bytes()));
        file.extend([at, ADDRESS + at, ADDRESS + at, size, size, align].iter().flat_map(|word| word.to_le_bytes()));
    }
    fs::write(path, [file, notes, code].concat())?;
    executable(path)
}

/// A VMM with a guest, and what it is asked to update to.
struct Subject {
    vm: Vm,
    counter: Counter,
    target: PathBuf,
    trace: PathBuf,
}

impl Subject {
    fn goes_on(&self) -> Result<()> {
        let before = self.counter.second();
        wait_for("the guest to go on", || Ok((self.counter.second() > before).then_some(())))
    }

    /// Refused, with `word` among the reasons; nothing of the target was run, unless it `runs`.
    fn refused(&self, target: &Path, word: &str, runs: bool) -> Result<()> {
        let before = self.vm.ping()?;
        // Even so.
        let body = json!({ "binary": target, "allow_downgrade": true });
        let told = End::Refused.reasons(&self.vm.api.put("vm.update", &body.to_string())?)?;
        ensure!(told.contains(word), "no '{word}' in {told}");
        ensure!(self.trace.exists() == runs, "was it run? {told}");
        if runs {
            fs::remove_file(&self.trace)?;
        } else {
            note(format_args!("{told}"));
        }
        ensure!(self.vm.ping()?.build_id == before.build_id, "{before:?}");
        self.goes_on()
    }
}

/// Every signature that will not do, and two that will: the guest goes over, and both images ask for one.
pub(super) fn builds() -> Result<()> {
    let dir = std::env::temp_dir().join(format!("signed-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let dir = dir.canonicalize()?;
    let [ours, next, other] = [0; 3].map(|_| KeyPair::generate_unencrypted_keypair());
    let (ours, next, other) = (ours?, next?, other?);
    let public = |name: &str, pair: &KeyPair| signing::public(&dir.join(name), pair);
    let (first, second) = (public("ours.pub", &ours)?, public("next.pub", &next)?);
    let kernel = dir.join("kernel");
    guest::write_image(&kernel, &probes::clock())?;
    let guest = ["--kernel", &kernel.display().to_string(), "--memory", "size=128M"].map(str::to_owned);
    let keys = ["--update-key", &first, "--update-key", &second].map(str::to_owned);
    let start = |more: &[&[String]]| -> Result<Subject> {
        let args: Vec<&str> = [&guest[..]].iter().chain(more).flat_map(|args| *args).map(String::as_str).collect();
        let vm = Vm::with_args(&args)?.booted()?;
        let counter = Counter::of(vm.vmm()?)?;
        let subject = Subject { vm, counter, target: dir.join("target"), trace: dir.join("trace") };
        subject.goes_on()?;
        Ok(subject)
    };
    let subject = start(&[&keys])?;
    // It was read at the start.
    public("ours.pub", &other)?;
    fs::remove_file(&second)?;

    let (target, signature) = (&subject.target, beside(&subject.target));
    tracer(target, NEWER, &subject.trace)?;
    let kernel_signed = sign(&ours, &kernel, &comment(NEWER))?;
    let good = sign(&ours, target, &comment(NEWER))?;
    let cut = good.len() - 30;
    for (text, word) in [
        (None, "target.minisig: cannot be opened: No such file"),
        (Some(sign(&other, target, &comment(NEWER))?), "is of another key"),
        (Some(kernel_signed), "does not fit"),
        (Some(good.replace(NEWER, "99.0.1")), "does not fit"),
        (Some(good[..cut].to_owned()), "not all of one"),
        (Some(String::new()), "not all of one"),
        (Some(sign(&ours, target, "timestamp:1\tfile:theseus")?), "has the trusted comment"),
        (Some(sign(&ours, target, &comment("99.0.1"))?), "is of version 99.0.1, and the file says that it is 99.0.0"),
    ] {
        text.map_or(Ok(()), |text| fs::write(&signature, text))?;
        subject.refused(target, word, false)?;
    }
    fs::remove_file(&signature)?;
    make_fifo(&signature)?;
    subject.refused(target, "target.minisig: is not a regular file", false)?;
    fs::remove_file(&signature)?;
    // A good one of a file that was changed since.
    fs::write(&signature, &good)?;
    let bytes = fs::read(target)?;
    fs::write(target, [&bytes[..], b"\0"].concat())?;
    subject.refused(target, "does not fit", false)?;
    fs::write(target, bytes)?;
    // The trace is one: with the right signature it is left, and so it is by whoever asks for none.
    subject.refused(target, "no verdict", true)?;
    fs::remove_file(&signature)?;
    start(&[])?.refused(target, "no verdict", true)?;

    // An old one, which was signed once.
    tracer(target, OLDER, &subject.trace)?;
    fs::write(&signature, sign(&ours, target, &comment(OLDER))?)?;
    subject.refused(target, "is older than the running", false)?;
    let (first, second) = (public("ours.pub", &ours)?, public("next.pub", &next)?);
    start(&[&keys, &["--allow-downgrade".to_owned()]])?.refused(target, "no verdict", true)?;
    for name in [&first, &second] {
        fs::remove_file(name)?;
    }

    // There and back: each image asks for a signature, of any of the keys.
    tracer(target, NEWER, &subject.trace)?;
    fs::remove_file(&signature)?;
    let (a, b) = (signing::build(&dir, "a", &next)?, signing::build(&dir, "b", &ours)?);
    for (round, binary) in [&b, &a, &b].into_iter().enumerate() {
        subject.vm.update_to(binary).with_context(|| format!("update {round}"))?;
        subject.goes_on()?;
        subject.refused(target, "target.minisig: cannot be opened", false)?;
    }
    // The way back is to the file that runs, signed or not.
    fs::remove_file(beside(&b))?;
    let fault = Switch::with(&subject.vm.dir, "fault", "commit:error")?;
    End::RolledBack.reasons(&subject.vm.ask_update(&a)?)?;
    drop(fault);
    subject.goes_on()?;
    subject.refused(target, "target.minisig: cannot be opened", false)?;
    subject.refused(&b, "theseus-b.minisig: cannot be opened", false)?;
    subject.vm.update_to(&a)?;
    subject.goes_on()?;

    let none = dir.join("none.pub").display().to_string();
    let started = |args: &[&str]| match Vm::with_args(args) {
        Ok(_) => anyhow::bail!("{args:?}: it has started"),
        Err(error) => Ok(format!("{error:#}")),
    };
    let told = started(&["--update-key", &none])?;
    ensure!(told.contains("none.pub: cannot be opened: No such file"), "{told}");
    fs::write(&none, "a password")?;
    let told = started(&["--update-key", &none])?;
    ensure!(told.contains("none.pub: is not a public key of minisign"), "{told}");
    fs::remove_dir_all(&dir)?;
    Ok(())
}
