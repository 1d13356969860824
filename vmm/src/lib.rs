//! The VMM process: machine, memory, vCPU threads, control loop, update.

mod available_memory;
mod boot;
mod build_info;
mod cli;
mod control;
mod elf;
mod ending;
mod events;
pub mod heap;
mod keeper;
mod logging;
mod machine;
mod main_thread;
mod memory_errors;
mod notify;
mod panics;
mod sandbox;
mod seams;
mod signals;
mod small_file;
mod spin;
mod supervisor;
mod talk;
#[cfg(feature = "test-hooks")]
mod test_hooks;
mod timeline;
mod update;
mod update_key;
mod vcpus;

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec};
use theseus_api::access::{ApiListen, Peers};
use theseus_api::args::ApiSocket;
use theseus_api::server::{self, KeptConnection, Server};
use theseus_api::types::{VmConfig, VmEvent, VmmEvent};
use theseus_devices::interrupt::GuestRequests;
use theseus_hypervisor::Hypervisor;
use theseus_resources::rate::Rate;
use theseus_resources::{Channel, FdStore, threads};
use vmm_sys_util::eventfd::EventFd;

use cli::{Cli, OnReset};
use control::{Control, Inbox, LostPages, Queue, Vm, Wish};
use events::EventStream;
use keeper::{Keeper, Newcomer, Role};
use logging::LogConfig;
use machine::Host;
use main_thread::MainThread;
use panics::panic_text;
use sandbox::{Confinement, seccomp};
use seams::Seams;
use signals::Signals;
use supervisor::Supervisor;
use timeline::Timeline;
use update::adopt::Adopted;
use update_key::UpdateKey;

/// The API or a signal asked the VMM to end.
const EXIT_OK: i32 = 0;
/// The guest has powered itself off.
const EXIT_POWER_OFF: i32 = 0;
const EXIT_FAILURE: i32 = 1;
/// The guest has reset itself (or crashed so that a real machine would have), and the VMM was told to end then.
const EXIT_RESET: i32 = 3;
/// The guest cannot go on, and did not ask for it: KVM or the VMM has failed it, or cannot boot it again after a reset.
const EXIT_GUEST_FAILED: i32 = 4;
/// A new VMM that failed before it had the guest, which is the old one's; nobody but its keeper sees it.
const EXIT_FAILED: i32 = 70;

/// When a thread that could not be started is tried again.
const AGAIN: Duration = Duration::from_millis(100);
static NO_THREAD: Rate = Rate::new(2, Duration::from_secs(60));

/// What `theseus` is: reads the command line and becomes the keeper, or, in an update, one of its VMMs. Its exit
/// status.
pub fn main() -> ExitCode {
    let started = timeline::now_ns();
    signals::unblock_faults();
    signals::ignore_limits();
    heap::keep();
    let result = match keeper::role() {
        Ok(Role::Newcomer(newcomer)) => Ok(in_update(newcomer, started)),
        Ok(Role::Beginner) => by_command_line(&Cli::parse()),
        Err(error) => Err(anyhow::Error::new(error).context("the keeper cannot begin")),
    };
    logging::settle();
    match result {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            emit(std::io::stderr(), &text(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, none of them said twice.
fn text(error: &anyhow::Error) -> String {
    theseus_api::ApiError::chain(500, error.as_ref()).to_string()
}

/// To standard output or error, if it takes it now: neither `println!`, which panics where nobody listens any more, nor
/// a write that waits for a terminal which stands still.
fn emit(mut to: impl Write + AsFd, what: &str) {
    if ready(&to) {
        let _ = writeln!(to, "theseus: {what}");
    }
}

/// Whether a write of a line (PIPE_BUF bytes at most, pipe(7)) would not wait.
fn ready(fd: &impl AsFd) -> bool {
    rustix::event::poll(&mut [PollFd::new(fd, PollFlags::OUT)], Some(&Timespec::default())) == Ok(1)
}

/// What tests do to this VMM.
fn seams() -> Arc<dyn Seams> {
    #[cfg(feature = "test-hooks")]
    return Arc::new(test_hooks::Hooks);
    #[cfg(not(feature = "test-hooks"))]
    seams::untouched()
}

/// The life of a new VMM. Returns the exit code; one that fails before its commit has touched nothing.
fn in_update(newcomer: Newcomer, started: u64) -> i32 {
    let Newcomer { keeper, channel, page } = newcomer;
    let timeline = match Timeline::map(&page, seams()) {
        Ok(timeline) => timeline,
        Err(_) => return EXIT_FAILED,
    };
    drop(page);
    let witness = seccomp::trap::Witness::new(&timeline);
    let prepare = |parts| take_over(parts, &channel, &timeline, started);
    let life = || {
        seccomp::begin()?;
        run(keeper, IfNone::TryAgain, prepare)
    };
    let ended = catch_unwind(AssertUnwindSafe(life));
    drop(witness);
    let cause = match ended {
        Ok(Ok(code)) => return code,
        Ok(Err(error)) => text(&error),
        Err(panic) => panic_text(&*panic),
    };
    if timeline.word().is_committed() {
        log::error!("the guest is lost: {cause}");
        logging::finish();
        return EXIT_GUEST_FAILED;
    }
    update::adopt::give_up(&channel, &timeline, cause);
    EXIT_FAILED
}

/// What the command line asks for. Returns the exit code.
fn by_command_line(cli: &Cli) -> anyhow::Result<i32> {
    if cli.version {
        let build = build_info::this();
        let _ = writeln!(std::io::stdout(), "theseus {} build {}", build.version, build.build_id);
        return Ok(EXIT_OK);
    }
    if cli.check_update {
        update::target::answer(&*seams()).context("--check-update")?;
        return Ok(EXIT_OK);
    }
    #[cfg(feature = "test-hooks")]
    cli.fault.iter().for_each(|fault| test_hooks::set_fault(fault));
    // Whoever is confined need not be let at them.
    let keys = cli.update_key.iter().map(|path| UpdateKey::read(path)).collect::<Result<Vec<_>, _>>()?;
    let (confinement, notes) = cli.confine()?;
    cli.seccomp.put_in_force();
    // From here on in the VMM.
    let keeper = keeper::start().context("the VMM's process cannot be started: raise pids.max or RLIMIT_NPROC")?;
    seccomp::begin()?;
    LogConfig { file: cli.log_file.clone(), verbose: cli.verbose }.start()?;
    notes.iter().for_each(|note| log::warn!("{note}"));
    signals::warn_of_limits();
    run(keeper, IfNone::Fail, |parts| boot(parts, cli, confinement, keys))
}

/// Starts the other threads, with what `prepare` boots or takes over, and then serves them. Returns the exit code.
fn run(keeper: Keeper, if_none: IfNone, prepare: impl FnOnce(Parts) -> anyhow::Result<Control>) -> anyhow::Result<i32> {
    // Found out now: a save may have to do without files, and without the lock of who would find it out.
    build_info::this();
    let memory_errors = memory_errors::install().context("signals")?;
    let signals = Signals::new().context("signals")?;
    vcpus::install_kick_handler().context("signals")?;
    keeper::watch::start(|| ending::abandon(EXIT_FAILURE))
        .context("cannot start the thread that watches the keeper")?;
    let (queue, inbox) = control::queue().context("control queue")?;
    let (main, orders) = main_thread::orders(seams().environment());
    let control = prepare(Parts { keeper, signals, queue, inbox, main, memory_errors })?;
    start(control, if_none)?;
    Ok(orders.serve())
}

/// What to do where a thread cannot be started.
#[derive(Clone, Copy, PartialEq)]
enum IfNone {
    /// Nothing runs yet.
    Fail,
    /// A guest runs, and no lack of threads is worth losing it: the old VMM of an update, for one, gives its own back
    /// soon.
    TryAgain,
}

fn start(control: Control, if_none: IfNone) -> anyhow::Result<()> {
    let hand_over = loop {
        let (sender, receiver) = channel::<Control>();
        let body = move || receiver.recv().into_iter().for_each(Control::run);
        match threads::spawn(threads::Role::Control, body) {
            Ok(_) => break sender,
            Err(error) if if_none == IfNone::TryAgain => NO_THREAD.warn(|| error.to_string()),
            Err(error) => return Err(error.into()),
        }
        std::thread::sleep(AGAIN);
    };
    // Its receiver waits in the thread.
    let _ = hand_over.send(control);
    Ok(())
}

/// Decodes a saved state as the dry run of an update does; the error says why it cannot be taken over. For tests and
/// fuzzing.
pub fn check_state(bytes: &[u8]) -> anyhow::Result<()> {
    let mut opened = update::saved::Opened::new(theseus_resources::StateReader::new(bytes)?)?;
    let vcpus = opened.take_vcpus();
    opened.decode(None)?;
    // As their threads do.
    Ok((0..).zip(vcpus).try_for_each(|(index, vcpu)| vcpu.decode(index).map(drop))?)
}

/// A saved state as this build takes it: what every section was decoded to, encoded again. For tests.
pub fn reread_state(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    Ok(update::saved::reread(&theseus_resources::StateReader::new(bytes)?)?)
}

struct Parts {
    keeper: Keeper,
    signals: Signals,
    queue: Queue,
    inbox: Inbox,
    main: MainThread,
    memory_errors: EventFd,
}

impl Parts {
    fn control(self, host: Host, server: Option<Server>, supervisor: Supervisor, events: EventStream) -> Control {
        let Self { keeper, signals, queue: _, inbox, main, memory_errors } = self;
        Control {
            host,
            keeper: Arc::new(keeper),
            main,
            inbox,
            signals,
            memory_errors: LostPages::new(memory_errors),
            server,
            peers: Peers::default(),
            supervisor,
            confinement: Confinement::default(),
            events,
            vm: Vm::None,
            booting: None,
            unwanted: None,
            updating: None,
            waiting: Default::default(),
            resets: Default::default(),
            watched: None,
            exit: None,
        }
    }
}

fn boot(parts: Parts, cli: &Cli, confinement: Confinement, keys: Vec<UpdateKey>) -> anyhow::Result<Control> {
    confinement.close();
    let fd_store = FdStore::new();
    let hypervisor = Arc::new(Hypervisor::open(&fd_store)?);
    let requests: Arc<dyn GuestRequests> = Arc::new(parts.queue.clone());
    let host = Host { hypervisor, fd_store, requests, seams: seams() };
    let config = cli.vm_config();
    if let Some(config) = &config {
        config.validate().map_err(|problems| anyhow::anyhow!("{}", problems.join("; ")))?;
    }
    let config = config.map(VmConfig::settled);
    anyhow::ensure!(
        config.is_some() || cli.api_socket.is_some(),
        "nothing to do: give --kernel for a guest, --api-socket for an API, or both"
    );
    let server = cli.api_socket.as_ref().map(|listen| serve_api(listen, &cli.api_uid, &parts.queue)).transpose()?;
    let ends_on_reset = cli.on_reset == OnReset::Exit;
    let mut supervisor = Supervisor::new(cli.pid_file.clone(), cli.update_dir.clone(), ends_on_reset);
    supervisor.believes(keys, cli.allow_downgrade);
    let name = update::target::started_from();
    supervisor.begins_as(update::target::default_path(name.as_deref()).context("/proc/self/exe")?);
    supervisor.is_started_from(name);
    supervisor.write_pid_file()?;
    let events = EventStream::open(cli.event_monitor.as_ref(), &host.fd_store)?;
    let peers = cli.api_socket.as_ref().map(|listen| listen.peers(&cli.api_uid)).unwrap_or_default();
    let mut control = parts.control(host, server, supervisor, events);
    control.confinement = confinement;
    control.peers = peers;
    control.events.emit(VmmEvent::Starting {});
    if let Some(config) = config {
        control.events.emit(VmEvent::Created {});
        control.events.emit(VmEvent::Booting {});
        control.vm = Vm::Created(config.clone());
        control.start_boot(config, Wish::CommandLine);
    } else {
        control.keeper.notify(notify::READY);
    }
    Ok(control)
}

fn serve_api(listen: &ApiListen, uids: &[u32], queue: &Queue) -> anyhow::Result<Server> {
    let listener = match &listen.socket {
        ApiSocket::Path(path) => server::bind_for(path, listen.file_mode(uids), listen.group)?,
        ApiSocket::Fd(fd) => {
            let socket = inherited(*fd).with_context(|| format!("--api-socket fd={fd}"))?;
            let wrong = theseus_resources::socket::not_listening(&socket);
            anyhow::ensure!(wrong.is_none(), "--api-socket fd={fd}: {}", wrong.unwrap_or_default());
            UnixListener::from(socket)
        }
    };
    start_api(listen.peers(uids), listener, Vec::new(), queue)
}

/// An fd that whoever has started this process has opened for it.
fn inherited(fd: RawFd) -> anyhow::Result<OwnedFd> {
    // SAFETY: for this one call, which finds out whether it is open.
    let is_open = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) });
    is_open.context("is not open: whoever starts this process has to leave it open")?;
    // SAFETY: open, and the one who started us says that it is ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

fn start_api(peers: Peers, listener: UnixListener, kept: Vec<KeptConnection>, queue: &Queue) -> anyhow::Result<Server> {
    Server::start_for(peers, listener, kept, Arc::new(queue.clone())).context("the API server cannot be started")
}

fn take_over(parts: Parts, channel: &Channel, timeline: &Timeline, started: u64) -> anyhow::Result<Control> {
    let requests: Arc<dyn GuestRequests> = Arc::new(parts.queue.clone());
    let adopted = update::adopt::adopt(channel, timeline, requests, started).map_err(anyhow::Error::msg)?;
    let Adopted { host, machine, config, was_shut_down, api, peers, supervisor, confinement, events } = adopted;
    // The guest runs: an API that cannot be served is no reason to lose it.
    let server = api.and_then(|api| {
        start_api(peers.clone(), api.listener, api.connections, &parts.queue)
            .inspect_err(|error| log::error!("{error:#}"))
            .ok()
    });
    let mut control = parts.control(host, server, supervisor, events);
    control.peers = peers;
    control.confinement = confinement;
    control.vm = match (machine, config) {
        (Some(mut machine), Some(config)) => {
            machine.populate();
            Vm::Booted { machine: Box::new(machine), config }
        }
        (None, Some(config)) if was_shut_down => Vm::ShutDown(config),
        (None, Some(config)) => Vm::Created(config),
        // A machine without a configuration was refused with its state.
        (_, None) => Vm::None,
    };
    logging::release();
    Ok(control)
}
