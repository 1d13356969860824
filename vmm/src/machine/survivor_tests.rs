//! What one thread saves of a machine is what all save, on this machine's own KVM where it has one.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use kvm_bindings::KVM_MP_STATE_HALTED;
use parking_lot::Mutex;
use theseus_api::types::VmConfig;
use theseus_devices::host_bridge::function::{self, HostBridge};
use theseus_devices::interrupt::{GuestRequest, GuestRequests};
use theseus_devices::legacy::cmos::{self, Cmos};
use theseus_devices::turn::Turn;
use theseus_hypervisor::Hypervisor;
use theseus_resources::state::Section;
use theseus_resources::{FdStore, StateReader, StateWriter, survivor};

use super::spec::MachineSpec;
use super::state::{SaveScope, take_vcpus};
use super::{Host, Machine};
use crate::heap;
use crate::timeline::now_ns;
use crate::vcpus::{Saving, install_kick_handler, saved};

const VCPUS: u32 = 2;
const LONG: Duration = Duration::from_secs(600);

/// In long mode: mov edx, 0x3ff; mov al, 0x5a; out dx, al (the scratch register of the serial port); cli; 1: hlt; jmp
/// 1b
const HALTS: [u8; 12] = [0xBA, 0xFF, 0x03, 0x00, 0x00, 0xB0, 0x5A, 0xEE, 0xFA, 0xF4, 0xEB, 0xFD];

/// mov edx, 0x3ff; 1: out dx, al; jmp 1b
const WRITES: [u8; 8] = [0xBA, 0xFF, 0x03, 0x00, 0x00, 0xEE, 0xEB, 0xFD];

/// A bzImage of `code`, with what the boot protocol asks for (Documentation/arch/x86/boot.rst).
fn kernel(code: &[u8]) -> tempfile::NamedTempFile {
    let mut image = vec![0; 1024 + 0x200];
    for (at, bytes) in [
        (0x1F1, &[1][..]),                       // setup_sects
        (0x1FE, &[0x55, 0xAA]),                  // boot_flag
        (0x202, b"HdrS"),                        // header
        (0x206, &0x20F_u16.to_le_bytes()),       // version
        (0x211, &[1]),                           // loadflags: LOADED_HIGH
        (0x214, &0x10_0000_u32.to_le_bytes()),   // code32_start
        (0x22C, &0x7FFF_FFFF_u32.to_le_bytes()), // initrd_addr_max
        (0x230, &0x20_0000_u32.to_le_bytes()),   // kernel_alignment
        (0x236, &1_u16.to_le_bytes()),           // xloadflags: XLF_KERNEL_64
        (0x238, &255_u32.to_le_bytes()),         // cmdline_size
        (0x258, &0x10_0000_u64.to_le_bytes()),   // pref_address
        (0x260, &0x10_0000_u32.to_le_bytes()),   // init_size
    ] {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    image.extend(code);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&image).unwrap();
    file
}

struct Nobody;

impl GuestRequests for Nobody {
    fn notify(&self, request: GuestRequest) {
        panic!("{request:?}");
    }

    fn pending(&self) -> bool {
        false
    }
}

/// None where there is no KVM.
fn machine(code: &[u8]) -> Option<Machine> {
    let fd_store = FdStore::new();
    let hypervisor = Hypervisor::open(&fd_store).inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
    install_kick_handler().unwrap();
    let host = Host {
        hypervisor: Arc::new(hypervisor),
        fd_store,
        requests: Arc::new(Nobody),
        seams: crate::seams::untouched(),
    };
    let kernel = kernel(code);
    let config: VmConfig = serde_json::from_value(serde_json::json!({
        "cpus": { "boot_vcpus": VCPUS },
        "memory": { "size": 128 << 20 },
        "payload": { "kernel": kernel.path() },
        "serial": { "mode": "Null" },
    }))
    .unwrap();
    let spec = MachineSpec::of(&config.settled()).unwrap();
    Some(Machine::build(&spec, &host, &AtomicBool::new(false)).unwrap())
}

/// When all vCPUs have gone into the guest.
fn entered(machine: &Machine) -> u64 {
    loop {
        if let Some(at) = machine.vcpus.entered() {
            return at;
        }
        std::thread::yield_now();
    }
}

/// One that has halted for ever, and is paused, and its state as all threads save it.
fn halted() -> Option<(Machine, Vec<u8>)> {
    let mut machine = machine(&HALTS)?;
    loop {
        machine.resume().unwrap();
        std::thread::yield_now();
        machine.pause(LONG).unwrap();
        let state = save(&machine, machine.vcpus.begin_save(&|| ()).unwrap());
        let boot_processor = take_vcpus(&mut StateReader::new(&state).unwrap()).unwrap().swap_remove(0);
        let (boot_processor, _) = boot_processor.decode(0).unwrap();
        if boot_processor.mp_state.mp_state == KVM_MP_STATE_HALTED {
            return Some((machine, state));
        }
    }
}

fn save(machine: &Machine, saving: Saving<'_>) -> Vec<u8> {
    let mut writer = StateWriter::new("id");
    machine.save_frame(&mut writer, SaveScope::Full, true).unwrap();
    machine.save(&mut writer, Some(saving)).unwrap();
    writer.finish().unwrap()
}

/// By name, but the clock, which runs.
fn sections(state: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut reader = StateReader::new(state).unwrap();
    let data = |section: &Section<'_>| (section.name.to_string(), section.data.to_vec());
    let mut sections: BTreeMap<_, _> = reader.sections().map(data).collect();
    assert!(["clock", "clock.handles"].iter().all(|name| sections.remove(*name).is_some()));
    for (index, encoded) in (0..).zip(take_vcpus(&mut reader).unwrap()) {
        let (mut vcpu, _) = encoded.decode(index).unwrap();
        // XSTATE_BV (SDM 1, 13.4.2): what of x87 and SSE the CPU takes to be in use may change with no instruction run,
        // as host tasks take turns; what is in them is compared.
        vcpu.xsave.0[512] &= !3;
        sections.insert(saved::section(index as usize), rmp_serde::to_vec_named(&vcpu).unwrap());
    }
    sections
}

fn assert_same(one: &[u8], all: &[u8]) {
    let (one, all) = (sections(one), sections(all));
    assert_eq!(one.keys().collect::<Vec<_>>(), all.keys().collect::<Vec<_>>());
    assert!(
        ["vcpu1", "vcpu1.handles", "serial", "serial.handles"].iter().all(|name| all.contains_key(*name)),
        "{:?}",
        all.keys()
    );
    for (name, data) in &all {
        let other = one[name].iter().zip(data).position(|(one, all)| one != all);
        assert_eq!(
            (other, one[name].len()),
            (None, data.len()),
            "section '{name}': the first byte that differs, length"
        );
    }
}

#[test]
fn one_thread_saves_what_all_do() {
    let Some((mut machine, all)) = halted() else { return };
    assert_same(&save(&machine, machine.vcpus.begin_save_alone()), &all);
    // The threads have their vCPUs again.
    machine.resume().unwrap();
    let running = machine.vcpus.begin_save_alone().finish();
    assert_eq!(running.err().unwrap().to_string(), "the vCPUs run");
    machine.pause(LONG).unwrap();
    assert_same(&save(&machine, machine.vcpus.begin_save(&|| ()).unwrap()), &all);
}

#[test]
fn a_save_that_is_given_up_holds_nobody() {
    let Some(mut machine) = machine(&HALTS) else { return };
    for round in 0..100 {
        machine.resume().unwrap();
        entered(&machine);
        machine.pause(LONG).unwrap();
        // Some threads may be about to begin with it, and some be at it.
        let given_up = machine.vcpus.begin_save(&|| ()).unwrap();
        if round % 2 == 0 {
            std::thread::yield_now();
        }
        drop(given_up);
        machine.resume().unwrap();
        entered(&machine);
        machine.pause(LONG).unwrap();
        // What comes late of the other is not taken for its answers.
        assert_eq!(machine.vcpus.begin_save(&|| ()).unwrap().finish().unwrap().len(), VCPUS as usize);
    }
}

/// Or it could not be saved.
#[test]
fn a_paused_vcpu_has_left_nothing_to_be_done() {
    let Some(mut machine) = machine(&WRITES) else { return };
    for _ in 0..100 {
        machine.resume().unwrap();
        std::thread::yield_now();
        machine.pause(LONG).unwrap();
        assert_eq!(machine.vcpus.begin_save_alone().finish().unwrap().len(), VCPUS as usize);
    }
}

#[test]
fn it_is_known_since_when_all_vcpus_run() {
    let Some(mut machine) = machine(&HALTS) else { return };
    assert_eq!(machine.vcpus.entered(), None);
    let mut last = now_ns();
    for _ in 0..3 {
        machine.resume().unwrap();
        let since = entered(&machine);
        assert!(since > last && since <= now_ns());
        last = since;
        machine.pause(LONG).unwrap();
    }
}

/// In a process of its own, as it never is the same again.
#[test]
fn a_survivor_saves_what_all_do() {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "machine::survivor_tests::survivor", "--ignored", "--nocapture"]);
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {text}", output.status);
    assert!(text.contains("skipped: ") || text.contains("saved alone"), "{text}");
}

static FROZEN: AtomicUsize = AtomicUsize::new(0);

/// The thread makes no step more: as good as dead, with all that it has locked.
extern "C" fn freeze(_: libc::c_int) {
    FROZEN.fetch_add(1, Ordering::SeqCst);
    loop {
        // SAFETY: waits for a signal.
        unsafe { libc::pause() };
    }
}

#[test]
#[ignore = "run by the one above, in a process of its own"]
fn survivor() {
    heap::keep();
    // SAFETY: ends this process, should it wait for a lock after all.
    unsafe { libc::alarm(LONG.as_secs() as u32) };
    let Some((machine, all)) = halted() else { return };
    // Never dropped: that would wait for the dead.
    let machine: &'static mut Machine = Box::leak(Box::new(machine));
    machine.resume().unwrap();
    let machine: &'static Machine = machine;
    // SAFETY: the handler makes system calls only; all zeroes is a sigaction.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = freeze as *const () as usize;
        assert_eq!(libc::sigaction(libc::SIGTRAP, &action, std::ptr::null_mut()), 0);
    }
    while machine.vcpus.in_hand() < VCPUS as usize {
        std::thread::yield_now();
    }
    // They die with their vCPUs in hand, of what no thread has blocked.
    for (index, tid) in machine.vcpus.threads().into_iter().enumerate() {
        // SAFETY: a thread of this process.
        assert_eq!(unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGTRAP) }, 0);
        while FROZEN.load(Ordering::SeqCst) <= index {
            std::thread::yield_now();
        }
    }
    // One dies in accesses to devices.
    let (died, dead) = channel();
    let serial = machine.serial().unwrap();
    let cmos = machine.devices.get::<Mutex<Cmos>>(cmos::NAME).unwrap();
    let host_bridge = machine.devices.get::<Turn<HostBridge>>(function::NAME).unwrap();
    let theirs = cmos.clone();
    std::thread::spawn(move || {
        let _held = (serial.lock(), theirs.lock(), host_bridge.lock());
        died.send(()).unwrap();
        loop {
            std::thread::park();
        }
    });
    dead.recv().unwrap();

    // SAFETY: takes no pointer.
    let of_malloc = || unsafe { libc::mallinfo2() }.uordblks;
    // SAFETY: all others wait for ever, that of the test harness for this one; no guard is alive.
    unsafe { survivor::begin() };
    heap::switch_to_arena();
    let before = of_malloc();
    let one = save(machine, machine.vcpus.begin_save_alone());
    assert_eq!(of_malloc(), before, "the C library has allocated something");
    let (used, size) = heap::arena_use();
    assert_same(&one, &all);
    assert!(survivor::look(&*cmos).may_be_torn());
    assert!(!survivor::look(&*machine.power_management().unwrap()).may_be_torn());
    // With the 64 vCPUs that a guest may have.
    assert!(used / VCPUS as usize * 64 <= size / 2, "{used} of {size} bytes for {VCPUS} vCPUs");
    println!("saved alone: {used} of {size} bytes for {VCPUS} vCPUs");
    // SAFETY: ends this process, in which nobody else can do so.
    unsafe { libc::_exit(0) }
}
