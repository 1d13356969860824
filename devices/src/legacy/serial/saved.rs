//! The serial port from one image to the next. Its state: registers, the FIFO, output that has not gone out. Its
//! handles: the console. Input that has not reached the FIFO is in the kernel, behind the stored fds.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use theseus_resources::fd_store::{Claims, FdKind, FdStore, Slot, StoredFd};
use theseus_resources::state::Format;
use vm_superio::Serial;
use vm_superio::serial::NoEvents;

use super::console::{Backend, Console};
use super::stream::Stream;
use super::tty::{RawMode, SavedTermios};
use super::{IIR_NONE, IIR_RECEIVED, Line, SerialDevice};
use crate::interrupt::IrqLine;
use crate::migratable::{HostHandles, Migratable, MigrateError, Saved};

/// What the guest sees of the port, and what it has sent that has not gone out.
#[derive(Debug, Serialize, Deserialize)]
pub struct SerialState {
    /// Registers, and what waits in the FIFO.
    #[serde(with = "UartState")]
    uart: vm_superio::SerialState,
    /// Output on its way to the console, whatever that is.
    #[serde(with = "serde_bytes")]
    unsent: Vec<u8>,
}

/// The console's descriptors, and what belongs to them.
#[derive(Debug, Serialize, Deserialize)]
pub struct SerialHandles {
    console: ConsoleHandles,
    /// Bytes that this console has not taken.
    dropped: u64,
}

/// The fields of vm-superio's state, which has no serde of its own.
#[derive(Serialize, Deserialize)]
#[serde(remote = "vm_superio::SerialState")]
struct UartState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    #[serde(with = "serde_bytes")]
    in_buffer: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
enum ConsoleHandles {
    Null,
    /// `before`: the settings the terminal had before the VMM, if it was put into raw mode.
    Tty {
        input: Option<Slot>,
        output: Slot,
        before: Option<SavedTermios>,
    },
    Pty {
        master: Slot,
        slave: Slot,
        path: PathBuf,
    },
    File {
        file: Slot,
    },
    Socket {
        listener: Slot,
        client: Option<Slot>,
        path: PathBuf,
    },
}

/// What a restore needs. The interrupt controller must be restored before: a pending interrupt is raised again.
pub struct SerialParts<'a> {
    /// The pin `layout::SERIAL_GSI`.
    pub irq: Arc<dyn IrqLine>,
    /// On the console's descriptors.
    pub claims: &'a mut Claims,
    /// Keeps those of clients that are yet to connect.
    pub fd_store: &'a FdStore,
}

impl HostHandles for SerialHandles {
    const FORMAT: Format = Format::new("serial-handles", 1);

    fn upgrade(_: u16, handles: Self) -> Result<Self, MigrateError> {
        Ok(handles)
    }
}

impl Migratable for SerialDevice {
    const FORMAT: Format = Format::new("serial", 1);
    type State = SerialState;
    type Handles = SerialHandles;
    type Parts<'a> = SerialParts<'a>;

    fn save(&self) -> Result<Saved<Self>, MigrateError> {
        // `poller` and `wants_input` follow from the rest.
        let Self { uart, console, poller: _, wants_input: _ } = self;
        // An input that has ended, or that another job has, is found out again.
        let Console { backend, fd_store: _, unsent, dropped, deaf: _, background: _, look: _ } = console;
        let state = SerialState { uart: uart.state(), unsent: unsent.iter().copied().collect() };
        Ok(Saved { state, handles: SerialHandles { console: save_backend(backend), dropped: *dropped } })
    }

    fn upgrade(_: u16, state: Self::State) -> Result<Self::State, MigrateError> {
        Ok(state)
    }

    fn restore(saved: Saved<Self>, parts: SerialParts<'_>) -> Result<Self, MigrateError> {
        let Saved { state: SerialState { uart, unsent }, handles: SerialHandles { console, dropped } } = saved;
        let SerialParts { irq, claims, fd_store } = parts;
        let backend = restore_backend(console, claims)?;
        let console = Console { unsent: VecDeque::from(unsent), dropped, ..Console::new(backend, fd_store.clone()) };
        // Raises what was pending and not yet acknowledged.
        let raised = uart.interrupt_identification & (IIR_NONE | IIR_RECEIVED) == IIR_RECEIVED;
        let uart = Serial::from_state(&uart, Line(irq), NoEvents, Vec::new())
            .map_err(|error| MigrateError::State(format!("UART: {error}")))?;
        let device = Self::with_uart(uart, console)
            .map_err(|source| MigrateError::Os { what: "cannot make an epoll instance".to_owned(), source })?;
        if device.input_pending() && !raised {
            // Acknowledged, but the guest was stopped before it had read all: once more is legal, once too few is not.
            device.uart.interrupt_evt().0.pulse();
        }
        Ok(device)
    }
}

fn save_backend(backend: &Backend) -> ConsoleHandles {
    let slot = |stream: &Stream| stream.kept().slot();
    match backend {
        Backend::Null => ConsoleHandles::Null,
        Backend::Tty { input, output, raw } => ConsoleHandles::Tty {
            input: input.as_ref().map(slot),
            output: slot(output),
            before: raw.as_ref().map(|raw| raw.before().clone()),
        },
        Backend::Pty { master, slave, path } => {
            ConsoleHandles::Pty { master: slot(master), slave: slave.slot(), path: path.clone() }
        }
        Backend::File { file } => ConsoleHandles::File { file: slot(file) },
        Backend::Socket { listener, client, path } => {
            ConsoleHandles::Socket { listener: listener.slot(), client: client.as_ref().map(slot), path: path.clone() }
        }
    }
}

fn restore_backend(handles: ConsoleHandles, claims: &mut Claims) -> Result<Backend, MigrateError> {
    let mut claim = |slot: Slot| claims.claim(slot, FdKind::Console);
    let stream = |kept: StoredFd| {
        let what = kept.name().to_owned();
        Stream::new(kept).map_err(|source| MigrateError::Os { what, source })
    };
    Ok(match handles {
        ConsoleHandles::Null => Backend::Null,
        ConsoleHandles::Tty { input, output, before } => {
            let input = input.map(&mut claim).transpose()?.map(stream).transpose()?;
            let output = stream(claim(output)?)?;
            let raw = match (&input, before) {
                (Some(terminal), Some(before)) => Some(RawMode::resume(terminal.kept().clone(), before)),
                _ => None,
            };
            Backend::Tty { input, output, raw }
        }
        ConsoleHandles::Pty { master, slave, path } => {
            Backend::Pty { master: stream(claim(master)?)?, slave: claim(slave)?, path }
        }
        ConsoleHandles::File { file } => Backend::File { file: stream(claim(file)?)? },
        ConsoleHandles::Socket { listener, client, path } => Backend::Socket {
            listener: claim(listener)?,
            client: client.map(&mut claim).transpose()?.map(stream).transpose()?,
            path,
        },
    })
}
