//! Option strings of the command line. What is accepted says the same when it is written out again.

use std::fmt::{Debug, Display};

use clap::{Args, Command};
use theseus_api::access::{ApiListen, api_listen};
use theseus_api::args::{self, ApiSocket, ForeignOptions};
use theseus_api::types::{CpusConfig, DeviceConfig, LandlockConfig, MemoryConfig, SerialConfig, SerialMode};

/// What a parser may make of a byte: a range of CPUs is a number for each.
const NUMBERS: usize = 1 << 20;

/// `parts` is each key with its value. A value with a bracket or quote that is not closed takes in all behind it, and
/// so can only be the last: one of the orders has to do.
fn same<T: PartialEq + Debug, E: Display>(value: &T, parts: &[String], parse: impl Fn(&str) -> Result<T, E>) {
    let texts = (0..parts.len().max(1)).map(|last| {
        let mut parts = parts.to_vec();
        parts.rotate_left(last);
        parts.join(",")
    });
    let texts: Vec<_> = texts.collect();
    assert!(
        texts.iter().any(|text| parse(text).is_ok_and(|again| again == *value)),
        "{value:?} from none of {texts:?}"
    );
}

fn cpus(text: &str) {
    let Ok(config) = args::cpus(text) else { return };
    let CpusConfig { boot_vcpus, max_vcpus, affinity } = &config;
    let mut parts = vec![format!("boot={boot_vcpus}")];
    parts.extend(max_vcpus.map(|max| format!("max={max}")));
    if let Some(list) = affinity {
        let numbers: usize = list.iter().map(|one| one.host_cpus.len()).sum();
        assert!(numbers <= NUMBERS, "{numbers} numbers of {} bytes", text.len());
        let list = list.iter().map(|one| {
            let cpus: Vec<_> = one.host_cpus.iter().map(u32::to_string).collect();
            format!("{}@[{}]", one.vcpu, cpus.join(","))
        });
        parts.push(format!("affinity=[{}]", list.collect::<Vec<_>>().join(",")));
    }
    same(&config, &parts, args::cpus);
}

fn memory(text: &str) {
    let Ok(config) = args::memory(text) else { return };
    let MemoryConfig { size, shared, hugepages, hugepage_size, thp, prefault } = &config;
    let switch = |key: &str, on: &bool| format!("{key}={}", if *on { "on" } else { "off" });
    let mut parts = vec![format!("size={size}"), switch("shared", shared), switch("hugepages", hugepages)];
    parts.extend(hugepage_size.map(|size| format!("hugepage_size={size}")));
    parts.extend([switch("thp", thp), switch("prefault", prefault)]);
    same(&config, &parts, args::memory);
}

fn serial(text: &str) {
    let Ok(config) = args::serial(text) else { return };
    let SerialConfig { mode, file, socket } = &config;
    let path = file.as_ref().or(socket.as_ref()).map(|path| path.display().to_string()).unwrap_or_default();
    let text = match mode {
        SerialMode::Off => "off".to_owned(),
        SerialMode::Null => "null".to_owned(),
        SerialMode::Tty => "tty".to_owned(),
        SerialMode::Pty => "pty".to_owned(),
        SerialMode::File => format!("file={path}"),
        SerialMode::Socket => format!("socket={path}"),
    };
    same(&config, &[text], args::serial);
}

fn device(text: &str) {
    let Ok(config) = args::device(text) else { return };
    let DeviceConfig { path, id, container } = &config;
    let mut parts = vec![format!("path={}", path.display())];
    parts.extend(id.as_ref().map(|id| format!("id={id}")));
    parts.extend(container.as_ref().map(|container| format!("container={container}")));
    same(&config, &parts, args::device);
    // And what is shown of its address names it again.
    if let Some(bdf) = config.bdf() {
        let shown = DeviceConfig { path: bdf.clone().into(), id: None, container: None };
        assert_eq!(shown.bdf(), Some(bdf));
    }
}

fn landlock(text: &str) {
    let Ok(rule) = args::landlock_rule(text) else { return };
    let LandlockConfig { path, access } = &rule;
    same(&rule, &[format!("path={}", path.display()), format!("access={access}")], args::landlock_rule);
}

fn socket_text(socket: &ApiSocket) -> String {
    match socket {
        ApiSocket::Path(path) => format!("path={}", path.display()),
        ApiSocket::Fd(fd) => format!("fd={fd}"),
    }
}

fn api_socket(text: &str) {
    let Ok(socket) = args::api_socket(text) else { return };
    same(&socket, &[socket_text(&socket)], args::api_socket);
}

fn listen(text: &str) {
    let Ok(listen) = api_listen(text) else { return };
    let ApiListen { socket, mode, group } = &listen;
    let mut parts = vec![socket_text(socket)];
    parts.extend(mode.map(|mode| format!("mode={mode:o}")));
    parts.extend(group.map(|group| format!("group={group}")));
    let text = parts.join(",");
    assert!(api_listen(&text).as_ref() == Ok(&listen), "{listen:?} is not {text}");
}

fn size(text: &str) {
    let Ok(size) = args::byte_size(text) else { return };
    same(&size, &[size.to_string()], args::byte_size);
}

/// Nothing of them is kept.
fn foreign(text: &str) {
    let command = ForeignOptions::augment_args(Command::new("theseus").no_binary_name(true));
    let _ = command.try_get_matches_from(text.split_ascii_whitespace());
}

pub fn run(data: &[u8]) {
    let Some((choice, text)) = data.split_first() else { return };
    // As the shell hands them over; what is no UTF-8 is refused before it gets here.
    let text = String::from_utf8_lossy(text);
    let parsers = [cpus, memory, serial, device, api_socket, listen, size, foreign, landlock];
    parsers[usize::from(*choice) % parsers.len()](&text);
}
