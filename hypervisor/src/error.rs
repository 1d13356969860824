/// A KVM call that failed: which one, on what, and why.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open /dev/kvm: {0}: is the kvm module loaded, and may this user open it?")]
    Open(std::io::Error),
    #[error("this kernel's KVM lacks {0}: Linux 5.17 or later is needed")]
    MissingCapability(&'static str),
    #[error("KVM: {what}: {source}")]
    Call { what: String, source: std::io::Error },
    #[error("KVM: vCPU {vcpu}: MSR {index:#x} does not take its saved value {data:#x}")]
    Msr { vcpu: u32, index: u32, data: u64 },
    #[error("KVM: the saved state names a GSI twice, or one that is no MSI's")]
    GsiTaken,
    #[error("KVM: no free {0}")]
    Exhausted(&'static str),
}

impl Error {
    pub(crate) fn call(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let what = what.into();
        move |error| Self::Call { what, source: std::io::Error::from_raw_os_error(error.errno()) }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Call { what, source }
    }
}
