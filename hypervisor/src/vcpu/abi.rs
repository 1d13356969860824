//! Arrays of KVM's structures in a saved state: one run of bytes, as the kernel's ABI has them, which no kernel
//! changes. Element by element they are most of what it takes to decode a vCPU, which is a part of an update's pause.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(super) fn serialize<T: IntoBytes + Immutable, S: Serializer>(items: &[T], to: S) -> Result<S::Ok, S::Error> {
    serde_bytes::serialize(items.as_bytes(), to)
}

pub(super) fn deserialize<'de, T: FromBytes + IntoBytes, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    from.deserialize_bytes(Items(PhantomData))
}

/// Copies them as a whole.
struct Items<T>(PhantomData<T>);

impl<T: FromBytes + IntoBytes> Visitor<'_> for Items<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an array of {} bytes each", size_of::<T>())
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<T>, E> {
        if !bytes.len().is_multiple_of(size_of::<T>()) {
            return Err(E::custom(format!("{} bytes are no array of {} each", bytes.len(), size_of::<T>())));
        }
        let mut items = Vec::new();
        items.resize_with(bytes.len() / size_of::<T>(), T::new_zeroed);
        items.as_mut_slice().as_mut_bytes().copy_from_slice(bytes);
        Ok(items)
    }
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
