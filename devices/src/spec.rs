//! What is made at a guest's boot, in the devices' own words.

use std::path::PathBuf;

/// Of a machine.
#[derive(Clone, Debug)]
pub struct Spec {
    /// In bytes.
    pub ram_size: u64,
    /// The host's side of the serial port.
    pub console: ConsoleConfig,
    /// The host bridge's revision register (PCI Local Bus 3.0, 6.2.1).
    pub revision: u8,
    /// Whether there is one that counts.
    #[cfg(feature = "test-devices")]
    pub counting: bool,
}

/// Where the serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleConfig {
    /// There is no serial port.
    Off,
    /// Output is dropped, there is no input.
    Null,
    /// Standard input and output of the VMM; a terminal is put into raw mode.
    Tty,
    /// A new pseudo-terminal, whose path the guest's tree of devices tells.
    Pty,
    /// Output is appended to a file.
    File(PathBuf),
    /// A unix stream socket that the VMM listens on.
    Socket(PathBuf),
}
