//! Interfaces, addresses and ARP entries by ioctl: the guest has no `ip`, and L1's may be of any age.

use std::{
    fs, io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use crate::PATIENCE;

/// Parses `aa:bb:cc:dd:ee:ff`.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

fn inet_socket() -> io::Result<OwnedFd> {
    // SAFETY: plain system call without pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn sockaddr(ip: Ipv4Addr) -> libc::sockaddr {
    let inet = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain 16-byte structures, and sockaddr is the kernel's common name for them.
    unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(inet) }
}

fn ifreq(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::other(format!("interface name '{name}' is too long")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ioctl(what: &str, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    let socket = inet_socket()?;
    // SAFETY: `request` is a valid ifreq for the SIOC*IF* calls made here.
    if unsafe { libc::ioctl(socket.as_raw_fd(), number as libc::Ioctl, request as *mut libc::ifreq) } < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(error.kind(), format!("{what}: {error}")));
    }
    Ok(())
}

/// Gives `name` (or an alias like `eth0:1`) the address `ip`/`prefix`.
pub fn set_address(name: &str, ip: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let mut request = ifreq(name)?;
    request.ifr_ifru.ifru_addr = sockaddr(ip);
    ioctl(&format!("address {ip} for {name}"), libc::SIOCSIFADDR as libc::c_ulong, &mut request)?;
    let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0));
    let mut request = ifreq(name)?;
    request.ifr_ifru.ifru_netmask = sockaddr(mask);
    ioctl(&format!("netmask {mask} for {name}"), libc::SIOCSIFNETMASK as libc::c_ulong, &mut request)
}

/// Interfaces that come up from now on queue first in, first out. fq_codel, Debian's default, drops packets that waited
/// for more than 100 ms (RFC 8289): a stall of the machine would look like a loss on the way.
pub fn drop_nothing_by_age() {
    let _ = fs::write("/proc/sys/net/core/default_qdisc", "pfifo_fast");
}

/// Brings `name` up with `ip`/`prefix`, without IPv6 (whose packets would come unasked), and waits for its carrier.
pub fn interface_up(name: &str, ip: Ipv4Addr, prefix: u8) -> io::Result<()> {
    // No IPv6 in the kernel serves as well.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    set_address(name, ip, prefix)?;
    let mut request = ifreq(name)?;
    ioctl(&format!("flags of {name}"), libc::SIOCGIFFLAGS as libc::c_ulong, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has just filled this member.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
    ioctl(&format!("bringing {name} up"), libc::SIOCSIFFLAGS as libc::c_ulong, &mut request)?;
    let started = Instant::now();
    while fs::read_to_string(format!("/sys/class/net/{name}/carrier")).is_ok_and(|c| c.trim() != "1")
        || fs::read_to_string(format!("/sys/class/net/{name}/operstate")).is_ok_and(|s| s.trim() == "down")
    {
        if started.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("{name} has no carrier after {PATIENCE:?}")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A permanent ARP entry on `name`: neither side has to ask, so no packet is held up by a question.
pub fn set_neighbour(name: &str, ip: Ipv4Addr, mac: [u8; 6]) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid arpreq.
    let mut request: libc::arpreq = unsafe { std::mem::zeroed() };
    request.arp_pa = sockaddr(ip);
    request.arp_ha.sa_family = libc::ARPHRD_ETHER;
    for (to, from) in request.arp_ha.sa_data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    request.arp_flags = libc::ATF_PERM | libc::ATF_COM;
    if name.len() >= request.arp_dev.len() {
        return Err(io::Error::other(format!("interface name '{name}' is too long")));
    }
    for (to, from) in request.arp_dev.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let socket = inet_socket()?;
    // SAFETY: `request` is a valid arpreq, which SIOCSARP only reads.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSARP as libc::Ioctl, &request) } < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(error.kind(), format!("ARP entry {ip} on {name}: {error}")));
    }
    Ok(())
}

/// A UDP socket's receive buffer of `bytes`, beyond the usual limit: a stopped reader must not lose packets.
pub fn big_receive_buffer(socket: &std::net::UdpSocket, bytes: i32) -> io::Result<()> {
    // SAFETY: the option's value is an int that lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// struct ethtool_ringparam of linux/ethtool.h.
#[repr(C)]
#[derive(Default)]
struct RingParam {
    cmd: u32,
    rx_max: u32,
    other_max: [u32; 3],
    rx: u32,
    others: [u32; 3],
}

/// Gives the receive rings of `name` `descriptors` each, or as many as it can have, and says how many these are. An
/// interface that is up is reset by that.
pub fn set_receive_ring(name: &str, descriptors: u32) -> io::Result<u32> {
    const ETHTOOL_GRINGPARAM: u32 = 0x10;
    const ETHTOOL_SRINGPARAM: u32 = 0x11;
    let mut ring = RingParam { cmd: ETHTOOL_GRINGPARAM, ..RingParam::default() };
    ring_ioctl(name, &mut ring)?;
    let wanted = descriptors.min(ring.rx_max);
    if ring.rx != wanted {
        (ring.cmd, ring.rx) = (ETHTOOL_SRINGPARAM, wanted);
        ring_ioctl(name, &mut ring)?;
    }
    Ok(wanted)
}

fn ring_ioctl(name: &str, ring: &mut RingParam) -> io::Result<()> {
    // SAFETY: `ring` is what these two commands read and write, and outlives the call.
    unsafe { ethtool("ring size", name, (ring as *mut RingParam).cast()) }
}

/// SIOCETHTOOL.
///
/// # Safety
/// `command` points to the structure that its first word, the command, reads or writes, as long as the kernel takes it
/// to be.
pub unsafe fn ethtool(what: &str, name: &str, command: *mut libc::c_char) -> io::Result<()> {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let mut request = ifreq(name)?;
    request.ifr_ifru.ifru_data = command;
    ioctl(&format!("{what} of {name}"), SIOCETHTOOL, &mut request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs() {
        assert_eq!(parse_mac("52:54:00:aa:00:01"), Some([0x52, 0x54, 0, 0xaa, 0, 1]));
        assert_eq!(parse_mac("52:54:00:aa:00"), None);
        assert_eq!(parse_mac("52:54:00:aa:00:01:02"), None);
        assert_eq!(parse_mac("x"), None);
    }
}
