//! Arrays of KVM's structures in a saved state: one run of bytes, as the kernel's ABI has them, which no kernel
//! changes. Element by element they are most of what it takes to decode a vCPU, which is a part of an update's pause.

use serde::de::Error;
use serde::{Deserializer, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(super) fn serialize<T: IntoBytes + Immutable, S: Serializer>(items: &[T], to: S) -> Result<S::Ok, S::Error> {
    serde_bytes::serialize(items.as_bytes(), to)
}

pub(super) fn deserialize<'de, T: FromBytes, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    let bytes: Vec<u8> = serde_bytes::deserialize(from)?;
    let items = bytes.chunks(size_of::<T>()).map(|item| T::read_from_bytes(item).ok());
    let whole: Option<Vec<T>> = items.collect();
    whole.ok_or_else(|| D::Error::custom(format!("{} bytes are no array of {} each", bytes.len(), size_of::<T>())))
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_msr_entry;
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    struct Msrs(#[serde(with = "super")] Vec<kvm_msr_entry>);

    #[test]
    fn what_is_no_whole_number_of_them_is_refused() {
        let msrs: Vec<_> = (1..4).map(|n| kvm_msr_entry { index: n, data: 1 << 40, ..Default::default() }).collect();
        let encoded = rmp_serde::to_vec_named(&Msrs(msrs.clone())).unwrap();
        assert_eq!(rmp_serde::from_slice::<Msrs>(&encoded).unwrap().0, msrs);
        let cut = rmp_serde::to_vec_named(&serde_bytes::Bytes::new(&[0; 40])).unwrap();
        let error = rmp_serde::from_slice::<Msrs>(&cut).err().unwrap().to_string();
        assert!(error.contains("40 bytes are no array of 16 each"), "{error}");
    }
}
