//! What is encoded ahead of a pause: where it is the same in the pause, nobody has to do it again.

use theseus_devices::migratable::SavedSection;

use super::MachineError;

/// A value that was saved, and the sections that say it.
pub(super) struct Draft<T> {
    value: T,
    sections: Vec<SavedSection>,
}

/// How values of a kind are encoded.
pub(super) type Encode<'a, T> = &'a dyn Fn(&T) -> Result<Vec<SavedSection>, MachineError>;

impl<T: PartialEq> Draft<T> {
    pub(super) fn new(value: T, encode: Encode<'_, T>) -> Result<Self, MachineError> {
        Ok(Self { sections: encode(&value)?, value })
    }

    /// The sections of `value`.
    pub(super) fn sections(
        draft: Option<&Self>,
        value: &T,
        encode: Encode<'_, T>,
    ) -> Result<Vec<SavedSection>, MachineError> {
        match draft {
            Some(draft) if draft.value == *value => Ok(draft.sections.clone()),
            _ => encode(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use theseus_resources::StateWriter;
    use theseus_resources::state::Format;

    use super::*;

    const FORMAT: Format = Format::new("thing", 1);

    #[test]
    fn what_is_the_same_is_not_encoded_again() {
        let encoded = Cell::new(0);
        let encode = |value: &u32| {
            encoded.set(encoded.get() + 1);
            Ok(vec![SavedSection::new(FORMAT, "thing".into(), value)?])
        };
        let written = |sections: Vec<SavedSection>| {
            let mut writer = StateWriter::new("id");
            for SavedSection { format, encoded } in sections {
                writer.add_encoded(encoded, &format).unwrap();
            }
            writer.finish().unwrap()
        };
        let draft = Draft::new(7, &encode).unwrap();
        let of = |draft, value| written(Draft::sections(draft, &value, &encode).unwrap());
        let (same, other) = (of(Some(&draft), 7), of(Some(&draft), 8));
        assert_eq!(encoded.get(), 2, "once for the draft, once for what is another");
        assert_eq!((same, other), (of(None, 7), of(None, 8)));
    }
}
