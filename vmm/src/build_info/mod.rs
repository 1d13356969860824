//! Which build this is, for people, for reports, and for the build that looks at this file before it hands a guest to
//! it.

pub(crate) mod elf;

use std::path::Path;
use std::sync::OnceLock;

use theseus_api::types::BuildInfo;

use crate::boot::cpuid::{Hidden, Register};

pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A second build of the same source must have another build id, and offer a freshly booted guest another machine: that
/// is how the tests see that an update keeps the machine of the guest's boot.
const TAG: &str = match option_env!("THESEUS_BUILD_TAG") {
    Some(tag) => tag,
    None => "",
};

/// Build B writes the section `machine` as a later release would, one version on and with a field that A has never
/// heard of: every update between the two goes over a step of the saved state, there and back.
pub(crate) const IS_LATER: bool = cfg!(later_build);

/// Revision register of the host bridge at a guest's boot.
pub(crate) const HOST_BRIDGE_REVISION: u8 = IS_LATER as u8;

/// CPUID features that this build does not show to a guest it boots: for build B, MOVBE (leaf 1, ECX bit 22).
pub(crate) const HIDDEN_CPUID: &[Hidden] =
    if IS_LATER { &[Hidden { function: 1, index: 0, register: Register::Ecx, bits: 1 << 22 }] } else { &[] };

/// An ELF note by which a build is told to be Theseus without running it (owner "Theseus", type 1, the version as
/// text).
#[repr(C, align(4))]
struct Note {
    name_size: u32,
    description_size: u32,
    kind: u32,
    name: [u8; 8],
    description: [u8; 32],
}

pub(crate) const NOTE_OWNER: &[u8] = b"Theseus";
pub(crate) const NOTE_KIND: u32 = 1;

#[used]
#[unsafe(link_section = ".note.theseus")]
static NOTE: Note =
    Note { name_size: 8, description_size: 32, kind: NOTE_KIND, name: *b"Theseus\0", description: describe() };

/// Version and, after a plus sign, the tag; the rest is zero.
const fn describe() -> [u8; 32] {
    let mut text = [0; 32];
    let (version, tag) = (VERSION.as_bytes(), TAG.as_bytes());
    let mut at = 0;
    while at < version.len() {
        text[at] = version[at];
        at += 1;
    }
    if !tag.is_empty() {
        text[at] = b'+';
        at += 1;
    }
    let start = at;
    while at - start < tag.len() {
        text[at] = tag[at - start];
        at += 1;
    }
    text
}

/// This build. The build id is the linker's, read once from the running file.
pub(crate) fn this() -> &'static BuildInfo {
    static THIS: OnceLock<BuildInfo> = OnceLock::new();
    THIS.get_or_init(|| {
        let build_id = match elf::inspect(Path::new("/proc/self/exe")) {
            Ok(found) => found.build_id,
            Err(error) => {
                log::error!("cannot read the build id of this build: {error}");
                "unknown".into()
            }
        };
        let version = if TAG.is_empty() { VERSION.to_owned() } else { format!("{VERSION}+{TAG}") };
        BuildInfo { version, build_id }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_note_says_what_this_build_is() {
        let found = elf::inspect(Path::new("/proc/self/exe")).unwrap();
        assert_eq!(found.build_id.len(), 40, "{}", found.build_id);
        assert_eq!(found.version.as_deref(), Some(this().version.as_str()));
    }
}
