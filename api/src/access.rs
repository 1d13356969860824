//! Who may use the API: whoever can is the VMM's user, as `vm.update` runs code.

use serde::{Deserialize, Serialize};
use theseus_resources::socket::{PRIVATE, Peer};

use crate::args::{ApiSocket, ArgError};

/// Where the API is served, and for whom: `PATH`, `path=PATH` or `fd=N`, with `,mode=MODE` and `,group=GROUP` behind
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiListen {
    /// Where.
    pub socket: ApiSocket,
    /// Permissions of the socket's file; they let its owner in. None: see [`ApiListen::file_mode`].
    pub mode: Option<u32>,
    /// Id of the group of the socket's file, whose members are let in. None: the file has that of this process.
    pub group: Option<u32>,
}

/// The value parser of `--api-socket`.
pub fn api_listen(s: &str) -> Result<ApiListen, ArgError> {
    let (mut rest, mut mode, mut group) = (s, None, None);
    // From the end: a path may have commas.
    while let Some((before, option)) = rest.rsplit_once(',') {
        match option.split_once('=') {
            Some(("mode", text)) if mode.is_none() => mode = Some(octal(text)?),
            Some(("group", text)) if group.is_none() => group = Some(group_id(text)?),
            _ => break,
        }
        rest = before;
    }
    let socket = crate::args::socket(rest)?;
    if matches!(socket, ApiSocket::Fd(_)) && mode.is_some() {
        return Err(ArgError::new("mode is for a socket that is made here: one that is inherited by fd=N has its own"));
    }
    Ok(ApiListen { socket, mode, group })
}

fn octal(text: &str) -> Result<u32, ArgError> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && mode & PRIVATE == PRIVATE && !text.starts_with('+') => Ok(mode),
        _ => Err(ArgError::new(format!("mode is {text:?}: give an octal one that lets the owner in, such as 0660"))),
    }
}

/// By its number or, as in group(5), its name. Not by getgrnam(3): a static binary cannot load the libraries that it
/// asks.
fn group_id(text: &str) -> Result<u32, ArgError> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let file = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let ids = file.lines().filter_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == text).then_some(())?;
        fields.nth(1)?.parse().ok()
    });
    ids.take(1)
        .next()
        .ok_or_else(|| ArgError::new(format!("group is {text:?}: it is not in /etc/group: give its number")))
}

/// Whom the server lets in, beside root and its own user. Goes over with an update.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// Those named.
    uids: Vec<u32>,
    /// Those of a group, to whom the operator has opened the socket.
    gid: Option<u32>,
    /// Everybody else.
    others: bool,
}

/// [`Peers`] in the saved state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PeersHandles {
    uids: Vec<u32>,
    gid: Option<u32>,
    others: bool,
}

impl ApiListen {
    /// What the operator has opened the socket to. `uids`: of `--api-uid`.
    pub fn peers(&self, uids: &[u32]) -> Peers {
        let mode = self.mode.unwrap_or(0);
        let own = rustix::process::getegid().as_raw();
        Peers {
            uids: uids.to_vec(),
            gid: self.group.or((mode & 0o020 != 0).then_some(own)),
            others: mode & 0o002 != 0 && uids.is_empty(),
        }
    }

    /// The mode of the socket's file. Where users are named the server tells who they are, and the file lets them come
    /// so far.
    pub fn file_mode(&self, uids: &[u32]) -> u32 {
        match (self.mode, self.group) {
            (Some(mode), _) => mode,
            (None, _) if !uids.is_empty() => 0o666,
            (None, Some(_)) => 0o660,
            (None, None) => PRIVATE,
        }
    }
}

impl Peers {
    /// For the next image, which serves the same people.
    pub fn save(&self) -> PeersHandles {
        let Self { uids, gid, others } = self.clone();
        PeersHandles { uids, gid, others }
    }

    /// As the image before had them.
    pub fn restore(handles: PeersHandles) -> Self {
        let PeersHandles { uids, gid, others } = handles;
        Self { uids, gid, others }
    }

    /// Whether this one is served. Root and the VMM's own user always are.
    pub fn admit(&self, peer: &Peer) -> bool {
        let Self { uids, gid, others } = self;
        let own = rustix::process::geteuid().as_raw();
        *others
            || peer.uid == 0
            || peer.uid == own
            || uids.contains(&peer.uid)
            || gid.is_some_and(|gid| peer.gids.contains(&gid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32, gids: &[u32]) -> Peer {
        Peer { uid, gids: gids.to_vec() }
    }

    #[test]
    fn sockets_and_their_options() {
        let listen = |s: &str| api_listen(s).map(|l| (l.socket, l.mode, l.group));
        let path = |p: &str| ApiSocket::Path(p.into());
        assert_eq!(listen("/run/a"), Ok((path("/run/a"), None, None)));
        assert_eq!(listen("path=/run/a,b,mode=0660,group=7"), Ok((path("/run/a,b"), Some(0o660), Some(7))));
        assert_eq!(listen("/run/a,group=root"), Ok((path("/run/a"), None, Some(0))));
        assert_eq!(listen("fd=7,group=7"), Ok((ApiSocket::Fd(7), None, Some(7))));
        for (bad, why) in [
            ("/a,mode=9", "octal"),
            ("/a,mode=0060", "lets the owner in"),
            ("/a,mode=01777", "octal"),
            ("/a,group=no such group", "/etc/group"),
            ("fd=7,mode=0660", "inherited"),
            (",mode=0600", "path is empty"),
        ] {
            let error = api_listen(bad).unwrap_err().to_string();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn who_may_come() {
        let own = rustix::process::geteuid().as_raw();
        let (listen, named) = (|s: &str| api_listen(s).unwrap(), [1234]);
        let plain = listen("/a").peers(&[]);
        assert_eq!((plain.clone(), listen("/a").file_mode(&[])), (Peers::default(), 0o600));
        assert!(plain.admit(&peer(0, &[])) && plain.admit(&peer(own, &[])) && !plain.admit(&peer(1234, &[0])));
        let by_uid = listen("/a").peers(&named);
        assert!(by_uid.admit(&peer(1234, &[])) && !by_uid.admit(&peer(1235, &[])));
        assert_eq!(listen("/a").file_mode(&named), 0o666);
        let by_group = listen("/a,group=55").peers(&[]);
        assert!(by_group.admit(&peer(9, &[1, 55])) && !by_group.admit(&peer(9, &[1])));
        assert_eq!(listen("/a,group=55").file_mode(&[]), 0o660);
        assert!(listen("/a,mode=0666").peers(&[]).admit(&peer(9, &[])));
        assert!(!listen("/a,mode=0666").peers(&named).admit(&peer(9, &[])), "users are named");
    }
}
