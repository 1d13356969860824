//! The options of Cloud Hypervisor that Theseus does not have (yet): taken where they say nothing, else refused by
//! name.

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::Value;

use super::options::object;
use super::{Result, err};
use crate::types::foreign::{instead, says_nothing};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Flag,
    /// `key=value,...`, or a word.
    One,
    /// The same, and a word at its head is the value of `mode`.
    Mode,
    /// Each value is one more device.
    List,
}
use Form::{Flag, List, Mode, One};

/// Name, key in the API, form.
const OPTIONS: &[(&str, &str, Form)] = &[
    ("balloon", "balloon", One),
    ("console", "console", Mode),
    ("debug-console", "debug_console", Mode),
    ("disk", "disks", List),
    ("firmware", "firmware", One),
    ("fs", "fs", List),
    ("fw-cfg-config", "fw_cfg_config", One),
    ("gdb", "gdb", One),
    ("generic-vhost-user", "generic_vhost_user", List),
    ("host-data", "host_data", One),
    ("igvm", "igvm", One),
    ("ivshmem", "ivshmem", One),
    ("memory-zone", "zones", List),
    ("net", "net", List),
    ("no-shutdown", "no_shutdown", Flag),
    ("numa", "numa", List),
    ("pci-segment", "pci_segments", List),
    ("platform", "platform", One),
    ("pmem", "pmem", List),
    ("pvmemcontrol", "pvmemcontrol", Flag),
    ("pvpanic", "pvpanic", Flag),
    ("rate-limit-group", "rate_limit_groups", List),
    ("restore", "restore", One),
    ("rng", "rng", One),
    ("sgx-epc", "sgx_epc", List),
    ("tpm", "tpm", One),
    ("user-device", "user_devices", List),
    ("vdpa", "vdpa", List),
    ("vsock", "vsock", One),
    ("watchdog", "watchdog", Flag),
];

fn check(key: &str, form: Form, words: &str) -> Result<()> {
    let value = match form {
        Flag => words.parse().map_or_else(|_| words.into(), Value::Bool),
        List => Value::Array(vec![words.into()]),
        One if !words.contains('=') => words.into(),
        One => object(words, None)?,
        Mode => object(words, Some("mode"))?,
    };
    let mut notes = Vec::new();
    if says_nothing(key, &value, &mut notes) && notes.is_empty() {
        return Ok(());
    }
    err(format!("not supported by this build: {}", instead(key).unwrap_or("leave it out")))
}

/// For `#[command(flatten)]`: all of these options. Nothing of them is kept.
#[derive(Clone, Copy, Debug)]
pub struct ForeignOptions;

impl clap::Args for ForeignOptions {
    fn augment_args(command: Command) -> Command {
        OPTIONS.iter().fold(command, |command, &(name, key, form)| {
            let arg = Arg::new(name).long(name).hide(true).action(ArgAction::Append);
            let arg = match form {
                Flag => arg.num_args(0..=1).default_missing_value("true"),
                One | Mode => arg.num_args(1),
                List => arg.num_args(1..),
            };
            command.arg(arg.value_parser(move |words: &str| check(key, form, words)))
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for ForeignOptions {
    fn from_arg_matches(_: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        Ok(Self)
    }

    fn update_from_arg_matches(&mut self, _: &ArgMatches) -> std::result::Result<(), clap::Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Args;

    use super::*;

    fn parse(words: &str) -> std::result::Result<ArgMatches, String> {
        let command = ForeignOptions::augment_args(Command::new("x").no_binary_name(true));
        command.try_get_matches_from(words.split_whitespace()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_says_nothing_is_taken() {
        let words = [
            "--console off",
            "--console null,iommu=off",
            "--debug-console off,iobase=0xe9",
            "--rng src=/dev/urandom",
            "--rng src=/dev/urandom,iommu=off",
            "--platform num_pci_segments=1",
            "--platform num_pci_segments=1,iommufd=off,oem_strings=[]",
            "--balloon size=0",
            "--watchdog false",
        ];
        for words in words {
            parse(words).unwrap_or_else(|error| panic!("{words}: {error}"));
        }
    }

    #[test]
    fn all_else_is_refused_by_name() {
        let table = [
            ("--console tty", "use the serial port"),
            ("--debug-console file=/x", "use the serial port"),
            ("--rng src=/dev/hwrng", "RDRAND"),
            ("--disk path=/a path=/b", "storage controller"),
            ("--net tap=,mac=,ip=,mask=", "pass a NIC"),
            ("--fs tag=x,socket=/s", "storage controller"),
            ("--pmem file=/x", "storage controller"),
            ("--vsock cid=3,socket=/s", "serial port"),
            ("--firmware /usr/share/OVMF.fd", "payload.kernel"),
            ("--platform num_pci_segments=2", "leave it out"),
            ("--numa guest_numa_id=0,cpus=[0-2,9]", "numactl"),
            ("--memory-zone id=a,size=1G", "numactl"),
            ("--balloon size=1G", "less memory"),
            ("--tpm socket=/s", "leave it out"),
            ("--watchdog", "watch the guest from outside"),
            ("--platform num_pci_segments=1,", "comma with nothing"),
        ];
        for (words, expected) in table {
            let error = parse(words).unwrap_err();
            let option = words.split(' ').next().unwrap();
            assert!(error.contains(option) && error.contains(expected), "{words}: {error}");
        }
    }

    /// Else there would be no hint.
    #[test]
    fn every_option_has_a_hint() {
        for (name, key, _) in OPTIONS {
            assert!(instead(key).is_some(), "{name}");
        }
    }
}
