//! The endpoints of Cloud Hypervisor that Theseus does not have (yet): refused by name, with what to use instead.

use crate::types::foreign::{DISK, HOTPLUG, NET, SAVED, VSOCK};

const DEVICES: &str = "give the device in the configuration that the VM is created with (devices)";

/// Name, without `vm.`, and what to use instead; as subcommands of ch-remote they have the same names.
pub static NOT_YET: &[(&str, &str)] = &[
    ("add-device", DEVICES),
    ("add-disk", DISK),
    ("add-fs", DISK),
    ("add-generic-vhost-user", NET),
    ("add-net", NET),
    ("add-pmem", DISK),
    ("add-user-device", DEVICES),
    ("add-vdpa", NET),
    ("add-vsock", VSOCK),
    ("balloon-stats", "there is no balloon"),
    ("coredump", "have the guest dump itself (kdump): vm.nmi makes it panic if it is set up so"),
    ("receive-migration", SAVED),
    ("remove-device", "shut the VM down, delete it, and create it without the device"),
    ("resize", HOTPLUG),
    ("resize-disk", "there are no disks"),
    ("resize-zone", HOTPLUG),
    ("restore", SAVED),
    ("send-migration", SAVED),
    ("snapshot", SAVED),
];

/// Why there is no such endpoint, for `vm.NAME` or ch-remote's NAME; None where Cloud Hypervisor has none either.
pub fn not_yet(name: &str) -> Option<String> {
    let name = name.strip_prefix("vm.").unwrap_or(name);
    let (_, instead) = NOT_YET.iter().find(|(known, _)| *known == name)?;
    Some(format!("{name} is not supported by this build: {instead}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{API_PREFIX, Request};

    #[test]
    fn each_is_refused_by_name_with_what_to_use_instead() {
        for (name, instead) in NOT_YET {
            let error = Request::parse("PUT", &format!("{API_PREFIX}vm.{name}"), b"{}").unwrap_err();
            assert_eq!((error.status, error.causes.len()), (404, 2), "{name}");
            assert_eq!(error.causes[1], format!("{name} is not supported by this build: {instead}"));
        }
        assert!(not_yet("vm.colour").is_none());
    }
}
