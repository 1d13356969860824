//! The serial port: a 16550 UART and a [`Console`] on the host's side of it.
//!
//! ```text
//! guest writes THR -> console, at once from the vCPU thread; what does not fit waits for the control loop or the next
//!                    byte
//! guest reads RBR  <- FIFO (64 bytes) <- console: filled by the control loop, or by the vCPU that has drained it
//! ```
//!
//! While the FIFO is full the console's input is not waited for: its bytes stay in the kernel, and nothing spins.

mod console;
mod device;
mod open;
mod poller;
mod saved;
mod stream;
#[cfg(test)]
mod tests;
mod tty;

pub use tty::SavedTermios;

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use theseus_resources::rate::Rate;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use console::Console;
pub use console::UNSENT_MAX;
pub use device::NAME;
pub use saved::{SerialHandles, SerialParts, SerialState};

use crate::bus::LockedDevice;
use crate::interrupt::IrqLine;
use poller::Poller;
use stream::Input;

/// Ports of a 16550.
pub const SERIAL_SIZE: u64 = 8;
/// What the UART's receive FIFO holds, in bytes.
const FIFO_SIZE: usize = 64;

// Registers and bits (16550 data sheet, table 2).
const DATA: u8 = 0;
const INTERRUPT_ID: u8 = 2;
const MODEM_CONTROL: u8 = 4;
const IER_RECEIVED: u8 = 1;
const IIR_ID: u8 = 0x0F;
const IIR_NONE: u8 = 0x01;
const IIR_RECEIVED: u8 = 0x04;
const MCR_LOOPBACK: u8 = 0x10;

/// What a guest, or whoever is at the other end of the line, can provoke as often as they like.
static TROUBLE: Rate = Rate::new(10, Duration::from_secs(60));

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

/// What the guest transmits goes through the `Vec`, which is emptied after every register write.
type Uart = Serial<Line, NoEvents, Vec<u8>>;

/// See the module.
pub struct SerialDevice {
    uart: Uart,
    console: Console,
    poller: Poller,
    /// There is room in the FIFO, and the console had nothing to put there: wait for it.
    wants_input: bool,
}

impl SerialDevice {
    /// Fails if the system has no epoll instance to give.
    pub fn new(console: Console, irq: Arc<dyn IrqLine>) -> std::io::Result<Self> {
        Self::with_uart(Serial::new(Line(irq), Vec::new()), console)
    }

    fn with_uart(uart: Uart, console: Console) -> std::io::Result<Self> {
        let mut device = Self { uart, console, poller: Poller::new()?, wants_input: true };
        device.watch();
        Ok(device)
    }

    /// The guest was reset: registers and FIFO are as at power-on, the console and its client stay.
    pub fn reset(&mut self) {
        let irq = self.uart.interrupt_evt().0.clone();
        self.uart = Serial::new(Line(irq), Vec::new());
        self.wants_input = true;
        self.watch();
    }

    /// The slave's path, for a person to attach to, if the console is a pty.
    pub fn pty_path(&self) -> Option<&Path> {
        self.console.pty_path()
    }

    /// Output dropped because nobody took it, in bytes.
    pub fn dropped(&self) -> u64 {
        self.console.dropped
    }

    /// Readable when [`Self::handle_ready`] has something to do: watch it, level-triggered, for as long as the device
    /// lives. It does not survive an exec.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    /// Moves waiting output out and new input in. Never blocks; harmless when nothing is ready.
    pub fn handle_ready(&mut self) {
        self.console.flush();
        if self.console.lacks_client() {
            self.console.accept();
        } else if self.wants_input && self.fill() == Input::Ended {
            // Its fd is about to be closed, and the number may come back as another client.
            self.poller.watch(&[]);
            self.console.hang_up();
        }
        self.watch();
    }

    /// Moves input into the FIFO as far as it has room.
    fn fill(&mut self) -> Input {
        let room = if self.in_loopback() { 0 } else { self.uart.fifo_capacity() };
        let mut buf = [0; FIFO_SIZE];
        let Some(buf) = buf.get_mut(..room).filter(|buf| !buf.is_empty()) else {
            self.wants_input = false;
            return Input::Nothing;
        };
        let input = self.console.read(buf);
        self.wants_input = input != Input::Bytes(room);
        if let Input::Bytes(count) = input
            && let Err(error) = self.uart.enqueue_raw_bytes(buf.get(..count).unwrap_or_default())
        {
            TROUBLE.warn(|| format!("serial: input lost: {error}"));
        }
        input
    }

    /// The FIFO is empty and nobody waits for input: get some, on the vCPU's own thread.
    fn refill(&mut self) {
        if !self.wants_input && self.uart.fifo_capacity() == FIFO_SIZE && !self.in_loopback() {
            self.fill();
            self.watch();
        }
    }

    /// In loopback the receiver hears the transmitter, not the line.
    fn in_loopback(&mut self) -> bool {
        self.uart.read(MODEM_CONTROL) & MCR_LOOPBACK != 0
    }

    /// Bytes in the FIFO that the guest wants an interrupt for.
    fn input_pending(&self) -> bool {
        let state = self.uart.state();
        !state.in_buffer.is_empty() && state.interrupt_enable & IER_RECEIVED != 0
    }

    fn read_register(&mut self, register: u8) -> u8 {
        let value = self.uart.read(register);
        match register {
            // vm-superio forgets this interrupt at the first byte read; the real one stays until the FIFO is empty, and
            // a handler that stops half-way (Linux: after 256 bytes) relies on it.
            INTERRUPT_ID if value & IIR_ID == IIR_NONE && self.input_pending() => {
                return value & !IIR_ID | IIR_RECEIVED;
            }
            DATA => self.refill(),
            _ => {}
        }
        value
    }

    fn write_register(&mut self, register: u8, value: u8) {
        if let Err(error) = self.uart.write(register, value) {
            TROUBLE.warn(|| format!("serial: register {register}: {error}"));
        }
        if !self.uart.writer().is_empty() {
            let waits = |console: &Console| (console.unsent.is_empty(), console.deaf, console.lacks_client());
            let before = waits(&self.console);
            self.console.write(self.uart.writer());
            self.uart.writer_mut().clear();
            if waits(&self.console) != before {
                self.watch();
            }
        }
        if register == MODEM_CONTROL {
            self.refill();
        }
    }

    /// Waits for what is of interest now.
    fn watch(&mut self) {
        self.poller.watch(&self.console.interest(self.wants_input));
    }
}

impl LockedDevice for SerialDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            *byte = u8::try_from(register).map_or(0xFF, |register| self.read_register(register));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            if let Ok(register) = u8::try_from(register) {
                self.write_register(register, *byte);
            }
        }
    }
}
