/// A KVM call that failed: which one, on what, and why.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The open(2) of it.
    #[error("cannot open /dev/kvm: {0}: is the kvm module loaded, and may this user open it?")]
    Open(std::io::Error),
    /// One that this VMM cannot do without, by its name in the UAPI (KVM_CAP_...).
    #[error("this kernel's KVM lacks {0}: Linux 5.17 or later is needed")]
    MissingCapability(&'static str),
    /// An ioctl that was refused.
    #[error("KVM: {what}: {source}")]
    Call {
        /// Which one, and on what.
        what: String,
        /// Its errno.
        source: std::io::Error,
    },
    /// KVM_SET_MSRS stopped here.
    #[error("KVM: vCPU {vcpu}: MSR {index:#x} does not take its saved value {data:#x}")]
    Msr {
        /// The vCPU's index.
        vcpu: u32,
        /// The MSR's number.
        index: u32,
        /// What it was to be.
        data: u64,
    },
    /// From [`crate::Vm::adopt_gsis`].
    #[error("KVM: the saved state names a GSI twice, or one that is no MSI's")]
    GsiTaken,
    /// What a VM has only so many of: the limit is KVM's, or that of its bindings.
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
