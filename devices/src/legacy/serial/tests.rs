use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use theseus_resources::FdStore;

use super::*;
use crate::legacy::test_parts::Pulses;
use crate::migratable::{Migratable, sent, written};
use crate::spec::ConsoleConfig;

const IER: u64 = 1;
const IIR: u64 = 2;
const MCR: u64 = 4;
const LSR: u64 = 5;

fn device(config: &ConsoleConfig, fd_store: &FdStore) -> (SerialDevice, Arc<Pulses>) {
    let irq = Arc::new(Pulses::default());
    let console = Console::open(config, fd_store).unwrap().unwrap();
    (SerialDevice::new(console, irq.clone()).unwrap(), irq)
}

fn register(device: &mut SerialDevice, offset: u64) -> u8 {
    let mut byte = [0];
    device.read(offset, &mut byte);
    byte[0]
}

fn guest_sends(device: &mut SerialDevice, bytes: &[u8]) {
    for byte in bytes {
        device.write(0, &[*byte]);
    }
}

/// Reads like a driver: while LSR says that there is data.
fn guest_receives(device: &mut SerialDevice, max: usize) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < max && register(device, LSR) & 1 != 0 {
        got.push(register(device, 0));
    }
    got
}

/// Is there something for the control loop to do, within `ms`?
fn ready(device: &SerialDevice, ms: i64) -> bool {
    let fd = device.poll_fd();
    let timeout = Timespec { tv_sec: 0, tv_nsec: ms * 1_000_000 };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

/// The control loop until there is nothing more to do.
fn run_loop(device: &mut SerialDevice) {
    for turn in 0.. {
        if !ready(device, 20) {
            return;
        }
        assert!(turn < 10_000, "the loop spins");
        device.handle_ready();
    }
}

/// As exec would: everything in `fd_store` reaches a second image, through real serialisation.
fn update(old: SerialDevice, fd_store: &FdStore) -> (SerialDevice, Arc<Pulses>, FdStore) {
    let saved = sent(&old);
    let (fd_store, mut claims) = fd_store.handed_over().unwrap();
    let irq = Arc::new(Pulses::default());
    let parts = SerialParts { irq: irq.clone(), claims: &mut claims, fd_store: &fd_store };
    let new = SerialDevice::restore(saved, parts).unwrap();
    claims.finish().unwrap();
    // The old VMM ends without destructors.
    std::mem::forget(old);
    (new, irq, fd_store)
}

fn connect(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client
}

fn socket_device(dir: &Path, fd_store: &FdStore) -> (SerialDevice, Arc<Pulses>, UnixStream) {
    let path = dir.join("serial.sock");
    let (mut device, irq) = device(&ConsoleConfig::Socket(path.clone()), fd_store);
    let client = connect(&path);
    run_loop(&mut device);
    (device, irq, client)
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(31).wrapping_add(i >> 8).wrapping_add(seed)) as u8).collect()
}

#[test]
fn off_is_no_device_and_null_swallows() {
    let fd_store = FdStore::new();
    assert!(Console::open(&ConsoleConfig::Off, &fd_store).unwrap().is_none());
    let (mut device, _) = device(&ConsoleConfig::Null, &fd_store);
    guest_sends(&mut device, b"gone");
    assert!(!ready(&device, 0));
    assert_eq!(device.dropped(), 0);
    let (mut device, ..) = update(device, &fd_store);
    assert_eq!(guest_receives(&mut device, 1), b"");
}

#[test]
fn a_file_is_appended_to_across_an_update() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.log");
    std::fs::write(&path, "before ").unwrap();
    let fd_store = FdStore::new();
    let (mut device, _) = device(&ConsoleConfig::File(path.clone()), &fd_store);
    guest_sends(&mut device, b"one ");
    let (mut device, _, _vault) = update(device, &fd_store);
    guest_sends(&mut device, b"two");
    assert_eq!(std::fs::read(&path).unwrap(), b"before one two");
    let missing = ConsoleConfig::File(dir.path().join("no/such/dir"));
    assert!(Console::open(&missing, &fd_store).err().unwrap().to_string().contains("no/such/dir"));
}

#[test]
fn a_pty_carries_both_directions_and_an_update() {
    let fd_store = FdStore::new();
    let (mut device, irq) = device(&ConsoleConfig::Pty, &fd_store);
    device.write(IER, &[1]);
    let path = device.pty_path().unwrap().to_owned();
    let mut terminal = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    terminal.write_all(b"hello\r\x03").unwrap();
    run_loop(&mut device);
    assert_eq!(irq.take(), 1);
    assert_eq!(guest_receives(&mut device, 100), b"hello\r\x03", "raw: nothing is edited, nothing is a signal");
    guest_sends(&mut device, b"one\n");
    let (mut device, ..) = update(device, &fd_store);
    assert_eq!(device.pty_path().unwrap(), path);
    guest_sends(&mut device, b"two\n");
    run_loop(&mut device);
    let mut got = [0; 8];
    terminal.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"one\ntwo\n");
    drop(terminal);
    assert!(!ready(&device, 20), "a pty that nobody has open does not spin");
    assert_eq!(guest_receives(&mut device, 100), b"", "and does not echo");
}

#[test]
fn a_terminal_is_raw_also_after_an_update_and_whole_at_the_end() {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    unlockpt(&master).unwrap();
    let fd_store = FdStore::new();
    let [input, output] = ["in", "out"].map(|name| {
        let fd = ioctl_tiocgptpeer(&master, flags).unwrap();
        stream::Stream::new(fd_store.keep(name, theseus_resources::fd_store::FdKind::Console, fd)).unwrap()
    });
    let modes = || rustix::termios::tcgetattr(&master).unwrap().local_modes;
    let before = modes();
    let raw = tty::RawMode::enter(input.kept().clone()).unwrap();
    assert_ne!(modes(), before);
    let backend = console::Backend::Tty { input: Some(input), output, raw: Some(raw) };
    let device = SerialDevice::new(Console::new(backend, fd_store.clone()), Arc::new(Pulses::default())).unwrap();
    let (mut device, _, _vault) = update(device, &fd_store);
    assert_ne!(modes(), before);
    let mut screen = std::fs::File::from(master.try_clone().unwrap());
    screen.write_all(b"keys\x03").unwrap();
    run_loop(&mut device);
    assert_eq!(guest_receives(&mut device, 100), b"keys\x03");
    guest_sends(&mut device, b"text\n");
    let mut got = [0; 5];
    screen.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"text\n");
    drop(device);
    assert_eq!(modes(), before);
}

#[test]
fn without_a_client_output_is_dropped_and_clients_come_one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let fd_store = FdStore::new();
    let path = dir.path().join("serial.sock");
    let (mut device, _) = device(&ConsoleConfig::Socket(path.clone()), &fd_store);
    guest_sends(&mut device, b"nobody hears this");
    let mut first = connect(&path);
    run_loop(&mut device);
    let mut second = connect(&path);
    second.write_all(b"second").unwrap();
    assert!(!ready(&device, 20), "the second waits");
    guest_sends(&mut device, b"1");
    first.write_all(b"last words").unwrap();
    let mut got = [0; 1];
    first.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"1");
    drop(first);
    guest_sends(&mut device, b"lost");
    assert!(ready(&device, 20));
    run_loop(&mut device);
    guest_sends(&mut device, b"2");
    assert_eq!(guest_receives(&mut device, 100), b"last wordssecond", "what a client sent before it left arrives");
    second.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"2");
}

/// The control loop prepares an update, say, and does not turn.
#[test]
fn output_goes_on_without_the_control_loop() {
    let dir = tempfile::tempdir().unwrap();
    let fd_store = FdStore::new();
    let path = dir.path().join("serial.sock");
    let (mut device, _) = device(&ConsoleConfig::Socket(path.clone()), &fd_store);
    let mut client = connect(&path);
    let mut sent = pattern(50_000, 7);
    guest_sends(&mut device, &sent);
    assert!(!device.console.unsent.is_empty(), "more than the socket takes");
    let mut got = vec![0; sent.len() - device.console.unsent.len()];
    client.read_exact(&mut got).unwrap();
    let more = pattern(1, 8);
    guest_sends(&mut device, &more);
    sent.extend(more);
    let mut rest = vec![0; sent.len() - got.len()];
    client.read_exact(&mut rest).unwrap();
    assert!([got, rest].concat() == sent);
    client.write_all(b"heard").unwrap();
    run_loop(&mut device);
    assert_eq!(guest_receives(&mut device, 100), b"heard");
}

#[test]
fn a_stale_socket_is_replaced_but_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let fd_store = FdStore::new();
    let path = dir.path().join("serial.sock");
    let config = ConsoleConfig::Socket(path.clone());
    let first = Console::open(&config, &fd_store).unwrap();
    assert!(Console::open(&config, &fd_store).is_err(), "in use");
    drop(first);
    assert!(path.exists());
    Console::open(&config, &fd_store).unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(Console::open(&ConsoleConfig::Socket(file.clone()), &fd_store).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

#[test]
fn a_client_that_does_not_read_loses_nothing_up_to_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let fd_store = FdStore::new();
    let (mut device, _, mut client) = socket_device(dir.path(), &fd_store);
    let sent = pattern(300_000, 1);
    guest_sends(&mut device, &sent);
    assert!(!device.console.unsent.is_empty());
    assert!(!ready(&device, 20), "does not spin while the client has no room");
    let (mut device, ..) = update(device, &fd_store);
    let more = pattern(1000, 2);
    guest_sends(&mut device, &more);
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; 301_000];
        client.read_exact(&mut got).unwrap();
        (got, client)
    });
    while !reader.is_finished() {
        run_loop(&mut device);
    }
    let (got, _client) = reader.join().unwrap();
    assert!(got == [sent, more].concat());
    assert_eq!(device.dropped(), 0);
    assert!(!ready(&device, 20));
    guest_sends(&mut device, &vec![0; UNSENT_MAX + 400_000]);
    assert_eq!(device.console.unsent.len(), UNSENT_MAX);
    assert!(device.dropped() > 0);
}

#[test]
fn input_waits_in_the_kernel_and_survives_updates() {
    let dir = tempfile::tempdir().unwrap();
    let mut fd_store = FdStore::new();
    let (mut device, mut irq, mut client) = socket_device(dir.path(), &fd_store);
    device.write(IER, &[1]);
    let sent = pattern(20_000, 3);
    client.write_all(&sent).unwrap();
    run_loop(&mut device);
    assert!(!ready(&device, 20), "the FIFO is full: nothing to wait for");
    assert_eq!(irq.take(), 1);
    let mut got = guest_receives(&mut device, 10);
    for _ in 0..20 {
        (device, irq, fd_store) = update(device, &fd_store);
        assert_eq!(irq.take(), 1, "bytes are waiting: raised again");
        assert_eq!(register(&mut device, IIR) & 0x0F, 0x04);
        got.extend(guest_receives(&mut device, 997));
        run_loop(&mut device);
    }
    got.extend(guest_receives(&mut device, usize::MAX));
    assert!(got == sent);
    // The vCPU has drained the client: from here the control loop waits for it again.
    client.write_all(b"more").unwrap();
    run_loop(&mut device);
    assert_eq!(guest_receives(&mut device, 100), b"more");
}

#[test]
fn a_handler_that_stops_half_way_is_told_of_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let fd_store = FdStore::new();
    let (mut device, irq, mut client) = socket_device(dir.path(), &fd_store);
    device.write(IER, &[1]);
    client.write_all(b"abcdef").unwrap();
    run_loop(&mut device);
    assert_eq!(irq.take(), 1);
    assert_eq!(register(&mut device, IIR) & 0x0F, 0x04);
    guest_receives(&mut device, 3);
    assert_eq!(register(&mut device, IIR) & 0x0F, 0x04);
    guest_receives(&mut device, 3);
    assert_eq!(register(&mut device, IIR) & 0x0F, 0x01);
}

#[test]
fn a_pending_transmit_interrupt_is_raised_again() {
    let fd_store = FdStore::new();
    let (mut device, irq) = device(&ConsoleConfig::Null, &fd_store);
    device.write(IER, &[2]);
    assert_eq!(irq.take(), 1);
    let (mut device, irq, fd_store) = update(device, &fd_store);
    assert_eq!(irq.take(), 1);
    assert_eq!(register(&mut device, IIR) & 0x0F, 0x02);
    let (_device, irq, _) = update(device, &fd_store);
    assert_eq!(irq.take(), 0, "acknowledged");
}

#[test]
fn loopback_does_not_eat_input() {
    let dir = tempfile::tempdir().unwrap();
    let fd_store = FdStore::new();
    let (mut device, _, mut client) = socket_device(dir.path(), &fd_store);
    device.write(MCR, &[0x10]);
    client.write_all(b"line").unwrap();
    run_loop(&mut device);
    guest_sends(&mut device, b"loop");
    assert_eq!(guest_receives(&mut device, 100), b"loop");
    let (mut device, _, _vault) = update(device, &fd_store);
    run_loop(&mut device);
    device.write(MCR, &[0x08]);
    assert_eq!(guest_receives(&mut device, 100), b"line");
}

#[test]
fn save_is_pure_and_reset_keeps_the_client() {
    let dir = tempfile::tempdir().unwrap();
    let fd_store = FdStore::new();
    let (mut device, _, mut client) = socket_device(dir.path(), &fd_store);
    client.write_all(b"in").unwrap();
    run_loop(&mut device);
    assert_eq!(written(&device), written(&device));
    device.write(7, &[0x5A]);
    device.reset();
    assert_eq!(register(&mut device, 7), 0);
    guest_sends(&mut device, b"again");
    let mut got = [0; 5];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"again");
}

#[test]
fn a_state_that_lies_is_refused() {
    let fd_store = FdStore::new();
    let (device, _) = device(&ConsoleConfig::Pty, &fd_store);
    let saved = device.save().unwrap();
    let other = FdStore::new();
    let (_, mut claims) = other.handed_over().unwrap();
    let parts = SerialParts { irq: Arc::new(Pulses::default()), claims: &mut claims, fd_store: &other };
    assert!(SerialDevice::restore(saved, parts).is_err());
}

/// A raw byte-for-byte pump at the pace of a line protocol: 64 KiB both ways, with updates on the way.
#[test]
fn both_directions_at_once_over_updates() {
    let dir = tempfile::tempdir().unwrap();
    let mut fd_store = FdStore::new();
    let (mut device, _, client) = socket_device(dir.path(), &fd_store);
    let (to_guest, to_client) = (pattern(65_536, 5), pattern(65_536, 6));
    let mut reading = client.try_clone().unwrap();
    let mut writing: UnixStream = OwnedFd::from(client).into();
    let (input, expected) = (to_guest.clone(), to_client.clone());
    let writer = std::thread::spawn(move || writing.write_all(&input).map(|()| writing));
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        reading.read_exact(&mut got).unwrap();
        assert!(got == expected);
    });
    let mut received = Vec::new();
    for chunk in to_client.chunks(1024) {
        guest_sends(&mut device, chunk);
        received.extend(guest_receives(&mut device, 1500));
        if ready(&device, 0) {
            device.handle_ready();
        }
        (device, _, fd_store) = update(device, &fd_store);
    }
    while received.len() < to_guest.len() {
        assert!(ready(&device, 900) || register(&mut device, LSR) & 1 != 0, "stalled");
        device.handle_ready();
        received.extend(guest_receives(&mut device, usize::MAX));
    }
    run_loop(&mut device);
    reader.join().unwrap();
    assert!(received == to_guest);
    writer.join().unwrap().unwrap();
}
