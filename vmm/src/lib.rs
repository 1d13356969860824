//! The VMM process: machine, memory, vCPU threads, control loop, update.

pub mod boot;
mod build_info;
mod cli;
mod control;
mod log_config;
mod machine;
mod main_thread;
mod signals;
mod test_hooks;
mod update;
mod vcpus;

use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use theseus_api::args::ApiSocket;
use theseus_api::server::{self, KeptConnection, Server};
use theseus_devices::interrupt::GuestRequests;
use theseus_hypervisor::Hypervisor;
use theseus_resources::Vault;

use cli::Cli;
use control::{Control, Inbox, Queue, Vm};
use log_config::LogConfig;
use machine::Host;
use main_thread::MainThread;
use signals::Signals;
use update::adopt::Adopted;

/// The API or a signal asked the VMM to end.
pub const EXIT_OK: i32 = 0;
/// The guest has powered itself off.
pub const EXIT_POWER_OFF: i32 = 0;
pub const EXIT_FAILURE: i32 = 1;
/// The guest has reset itself (or crashed so that a real machine would have).
pub const EXIT_RESET: i32 = 3;
/// An update failed after exec: the guest is lost.
pub const EXIT_LOST: i32 = 70;

pub fn main() -> ExitCode {
    let started = update::timeline::now_ns();
    let result = match handed_over() {
        // The guest is waiting: nothing that can be done later is done before.
        Some(state) => run(|parts| take_over(parts, state, started)).or_else(|error| {
            log::error!("the update failed after exec, the guest is lost: {error:#}");
            eprintln!("theseus: the update failed after exec, the guest is lost: {error:#}");
            Ok(EXIT_LOST)
        }),
        None => start(&Cli::parse()),
    };
    match result {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("theseus: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What the command line asks for. Returns the exit code.
fn start(cli: &Cli) -> anyhow::Result<i32> {
    if cli.version {
        let build = build_info::this();
        println!("theseus {} build {}", build.version, build.build_id);
        return Ok(EXIT_OK);
    }
    if cli.check_update {
        update::target::answer().context("--check-update")?;
        return Ok(EXIT_OK);
    }
    LogConfig { file: cli.log_file.clone(), verbose: cli.verbose }.start()?;
    run(|parts| boot(parts, cli))
}

/// Starts the other threads, with what `prepare` boots or takes over, and then serves them. Returns the exit code.
fn run(prepare: impl FnOnce(Parts) -> anyhow::Result<Control>) -> anyhow::Result<i32> {
    let signals = Signals::new().context("signals")?;
    vcpus::install_kick_handler().context("signals")?;
    // exec leaves "fd N" or the file's old name as the thread's name.
    let _ = rustix::thread::set_name(c"theseus");
    let (queue, inbox) = control::queue().context("control queue")?;
    let (main, orders) = main_thread::orders();
    let control = prepare(Parts { signals, queue, inbox, main })?;
    std::thread::Builder::new().name("control".into()).spawn(move || control.run()).context("control thread")?;
    Ok(orders.serve())
}

/// The fd of the saved state, where this image was started by an update.
fn handed_over() -> Option<i32> {
    std::env::var(main_thread::HANDOVER_VARIABLE).ok()?.parse().ok()
}

struct Parts {
    signals: Signals,
    queue: Queue,
    inbox: Inbox,
    main: MainThread,
}

impl Parts {
    fn control(self, host: Host, server: Option<Server>) -> Control {
        let Self { signals, queue: _, inbox, main } = self;
        Control {
            host,
            main,
            inbox,
            signals,
            server,
            vm: Vm::None,
            helper: None,
            asked: None,
            watched: None,
            exit: None,
        }
    }
}

fn boot(parts: Parts, cli: &Cli) -> anyhow::Result<Control> {
    let vault = Vault::new();
    let hypervisor = Arc::new(Hypervisor::open(&vault)?);
    let requests: Arc<dyn GuestRequests> = Arc::new(parts.queue.clone());
    let host = Host { hypervisor, vault, requests };
    let config = cli.vm_config();
    if let Some(config) = &config {
        config.validate().map_err(|problems| anyhow::anyhow!("{}", problems.join("; ")))?;
    }
    anyhow::ensure!(
        config.is_some() || cli.api_socket.is_some(),
        "nothing to do: give --kernel for a guest, --api-socket for an API, or both"
    );
    let server = cli.api_socket.as_ref().map(|socket| serve_api(socket, &parts.queue)).transpose()?;
    let mut control = parts.control(host, server);
    if let Some(config) = config {
        control.boot_config(config).context("the guest cannot be booted")?;
    }
    Ok(control)
}

fn serve_api(socket: &ApiSocket, queue: &Queue) -> anyhow::Result<Server> {
    let listener = match socket {
        ApiSocket::Path(path) => server::bind(path)?,
        ApiSocket::Fd(fd) => {
            use std::os::fd::FromRawFd;
            // SAFETY: the one who started us says that this fd is ours.
            unsafe { UnixListener::from_raw_fd(*fd) }
        }
    };
    start_api(listener, Vec::new(), queue)
}

fn start_api(listener: UnixListener, kept: Vec<KeptConnection>, queue: &Queue) -> anyhow::Result<Server> {
    Server::start(listener, kept, Arc::new(queue.clone())).context("the API server cannot be started")
}

fn take_over(parts: Parts, state: i32, started: u64) -> anyhow::Result<Control> {
    let requests: Arc<dyn GuestRequests> = Arc::new(parts.queue.clone());
    let adopted = update::adopt::adopt(state, requests, started).map_err(anyhow::Error::msg)?;
    let Adopted { host, machine, config, was_shut_down, api, helper } = adopted;
    // The guest runs: an API that cannot be served is no reason to lose it.
    let server = api.and_then(|api| {
        start_api(api.listener, api.connections, &parts.queue).inspect_err(|error| log::error!("{error:#}")).ok()
    });
    let ram = machine.as_ref().map(|machine| machine.ram.clone());
    let mut control = parts.control(host, server);
    control.helper = helper;
    control.vm = match (machine, config) {
        (Some(machine), _) => Vm::Booted(Box::new(machine)),
        (None, Some(config)) if was_shut_down => Vm::ShutDown(config),
        (None, Some(config)) => Vm::Created(config),
        (None, None) => Vm::None,
    };
    if let Some(ram) = ram {
        populate(ram);
    }
    Ok(control)
}

/// Page tables for guest memory, in the background: else the guest faults them in one by one.
fn populate(ram: Arc<theseus_resources::GuestRam>) {
    let body = move || {
        // At normal priority: it holds mmap_lock, and a thread that is starved while holding it would stop the vCPUs.
        if let Err(error) = ram.populate_page_tables() {
            log::debug!("background population: {error}");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("populate".into()).spawn(body) {
        log::debug!("no background population: {error}");
    }
}
