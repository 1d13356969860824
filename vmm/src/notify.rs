//! systemd's notify socket (sd_notify(3)).

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The VMM serves.
pub(crate) const READY: &str = "READY=1";

/// How long whoever listens may take for a message.
const PATIENCE: Duration = Duration::from_secs(1);

/// As far as it may: with NotifyAccess=main only the keeper is heard.
pub(crate) fn send(text: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        path => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path)),
    };
    let sent = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        socket.send_to_addr(text.as_bytes(), &address)
    });
    if let Err(error) = sent {
        log::warn!("systemd cannot be notified: {error}");
    }
}
