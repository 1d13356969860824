//! Who has signed the target: `FILE.minisig` beside it, which is to be of one of the keys of `--update-key`, of all of
//! the file as it was opened, and of the version that it says it has.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use minisign_verify::{Error, Signature, StreamVerifier};
use semver::Version;

use super::{by_fd, read_all};
use crate::small_file;
use crate::update_key::UpdateKey;

/// One has some 350 bytes; minisign's longest trusted comment has 8192.
const MOST: u64 = 16 << 10;
/// What the trusted comment is, and then the version.
const COMMENT: &str = "theseus version=";
/// So much of another one is told.
const TOLD: usize = 100;

/// Without the target's name.
#[derive(Debug, thiserror::Error)]
#[error("its signature {}: {reason}", path.display())]
pub(crate) struct Unsigned {
    path: PathBuf,
    reason: Reason,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Reason {
    #[error("{0}: sign the file (minisign -S), and put the signature there")]
    NotRead(#[from] small_file::SmallFileError),
    #[error("is not a signature of minisign, or not all of one ({0}): sign the file again, or copy it again")]
    Damaged(Error),
    #[error("is one of the old kind, of the file and not of its hash: sign it as minisign 0.11 does, without -l")]
    Legacy,
    #[error("is of another key than those of --update-key")]
    OtherKey,
    #[error("does not fit: it is another file's, or one of the two was changed: copy both of them again")]
    Wrong,
    #[error("has the trusted comment '{0}' in place of '{COMMENT}VERSION': sign it with -t '{COMMENT}VERSION'")]
    NoVersion(String),
    #[error("is of version {signed}, and the file says that it is {file}: sign it with -t '{COMMENT}{file}'")]
    OtherVersion { signed: String, file: String },
    #[error("cannot be checked: {0}")]
    NotChecked(#[from] io::Error),
}

/// Reads all of the open `file`. `version`: what that says of itself, if it says so.
pub(super) fn check(file: &File, keys: &[UpdateKey], version: Option<&str>) -> Result<(), Unsigned> {
    let path = beside(file).map_err(|error| Unsigned { path: ".minisig".into(), reason: error.into() })?;
    verify(file, &path, keys, version).map_err(|reason| Unsigned { path, reason })
}

/// Beside the file itself, whatever link has led to it: a link and what it leads to are changed at once.
fn beside(file: &File) -> io::Result<PathBuf> {
    let mut path = std::fs::read_link(by_fd(file))?.into_os_string();
    path.push(".minisig");
    Ok(path.into())
}

fn verify(file: &File, path: &Path, keys: &[UpdateKey], version: Option<&str>) -> Result<(), Reason> {
    let text = small_file::read(path, MOST)?;
    let signature = Signature::decode(&text).map_err(Reason::Damaged)?;
    let mut verifiers = Vec::new();
    for key in keys {
        match key.key().verify_stream(&signature) {
            Ok(verifier) => verifiers.push(verifier),
            // Looked at after the id of the key.
            Err(Error::UnsupportedLegacyMode) => return Err(Reason::Legacy),
            Err(_) => {}
        }
    }
    if verifiers.is_empty() {
        return Err(Reason::OtherKey);
    }
    read_all(file, |bytes| verifiers.iter_mut().for_each(|verifier| verifier.update(bytes)))?;
    // An id of eight bytes says which key it should be, and no more.
    let fits = |verifier: &mut StreamVerifier<'_>| verifier.finalize().is_ok();
    if !verifiers.iter_mut().any(fits) {
        return Err(Reason::Wrong);
    }
    let comment = signature.trusted_comment();
    let signed = comment.strip_prefix(COMMENT).filter(|signed| Version::parse(signed).is_ok());
    let signed = signed.ok_or_else(|| Reason::NoVersion(comment.escape_debug().take(TOLD).collect()))?;
    match version {
        Some(file) if file != signed => Err(Reason::OtherVersion { signed: signed.into(), file: file.into() }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use minisign::KeyPair;

    use super::*;

    fn sign(by: &KeyPair, bytes: &[u8], comment: &str) -> String {
        minisign::sign(None, &by.sk, bytes, Some(comment), None).unwrap().to_string()
    }

    fn public(pair: &KeyPair) -> UpdateKey {
        UpdateKey::try_from(pair.pk.to_base64()).unwrap()
    }

    #[test]
    fn only_the_right_signature_will_do() {
        let (ours, next, other) = (0, 1, 2);
        let pairs = [ours, next, other].map(|_| KeyPair::generate_unencrypted_keypair().unwrap());
        let keys = [public(&pairs[ours]), public(&pairs[next])];
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("theseus"), dir.path().join("link"));
        // More than is read at once.
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let file = File::open(&link).unwrap();
        let signature = dir.path().join("theseus.minisig");
        let told = |text: &str, keys: &[UpdateKey], version| {
            std::fs::write(&signature, text).unwrap();
            check(&file, keys, version).map_err(|error| error.to_string())
        };
        let good = sign(&pairs[ours], &bytes, "theseus version=1.2.3+x");
        told(&good, &keys, Some("1.2.3+x")).unwrap();
        told(&good, &keys, None).unwrap();
        told(&sign(&pairs[next], &bytes, "theseus version=1.2.3+x"), &keys, Some("1.2.3+x")).unwrap();

        let of_ours = |comment: &str| sign(&pairs[ours], &bytes, comment);
        let lines: Vec<&str> = good.lines().collect();
        let newer = good.replace("version=1.2.3+x", "version=1.2.4+x");
        let flipped = |line: usize, at: usize| {
            let mut lines: Vec<String> = lines.iter().map(|line| (*line).to_string()).collect();
            let letter = if &lines[line][at..=at] == "A" { "B" } else { "A" };
            lines[line].replace_range(at..=at, letter);
            lines.join("\n")
        };
        for (text, version, expected) in [
            (sign(&pairs[other], &bytes, "theseus version=1.2.3"), "1.2.3", "of another key"),
            (sign(&pairs[ours], &bytes[1..], "theseus version=1.2.3"), "1.2.3", "does not fit"),
            (sign(&pairs[ours], b"", "theseus version=1.2.3"), "1.2.3", "does not fit"),
            (newer, "1.2.4+x", "does not fit"),
            (flipped(1, 40), "1.2.3+x", "does not fit"),
            (flipped(3, 40), "1.2.3+x", "does not fit"),
            // The key's id, of eight bytes behind two.
            (flipped(1, 6), "1.2.3+x", "of another key"),
            (good[..good.len() - 20].into(), "1.2.3+x", "not all of one"),
            (lines[..3].join("\n"), "1.2.3+x", "not all of one"),
            (lines[..2].join("\n"), "1.2.3+x", "not all of one"),
            (String::new(), "1.2.3+x", "not all of one"),
            ("x".repeat(20_000), "1.2.3+x", "longer than 16384 bytes"),
            (of_ours("timestamp:1\tfile:theseus\thashed"), "1.2.3", r"comment 'timestamp:1\tfile:theseus\thashed'"),
            (of_ours(&"x".repeat(500)), "1.2.3", &format!("'{}'", "x".repeat(100))),
            (of_ours("theseus version="), "1.2.3", "in place of 'theseus version=VERSION'"),
            (of_ours("theseus version=1.2"), "1.2.3", "in place of"),
            (of_ours("theseus version=1.2.3 "), "1.2.3", "in place of"),
            (of_ours("theseus  version=1.2.3"), "1.2.3", "in place of"),
            (of_ours("theseus version=1.2.3, 1.2.4"), "1.2.3", "in place of"),
            (of_ours("theseus version=1.2.4"), "1.2.3", "is of version 1.2.4, and the file says that it is 1.2.3"),
            (of_ours("theseus version=1.2.3+a"), "1.2.3+b", "is of version 1.2.3+a"),
        ] {
            let error = told(&text, &keys, Some(version)).expect_err(expected);
            assert!(error.contains(expected) && error.contains("/theseus.minisig: "), "{expected}: {error}");
        }
        assert!(told(&good, &[public(&pairs[other])], None).unwrap_err().contains("of another key"));
        std::fs::remove_file(&signature).unwrap();
        assert!(check(&file, &keys, None).unwrap_err().to_string().contains("cannot be opened: No such file"));
    }

    /// Of the four bytes "test", by Debian's minisign 0.11.
    #[test]
    fn what_the_tool_makes_will_do() {
        const KEY: &str = "RWRWzntcbDqulZZbvXUy/gVSkXIiKEnlENrSNg+vLSeI4s6cq22+OD7j";
        const SIGNATURE: &str = "untrusted comment: signature from minisign secret key
RURWzntcbDqulRDggGPO0d9eIprRUciYYrkiMiGeX+w8dRAr/6+fNtwPXe2b+Oein5/ifY5vOCOaC4pBmmc6pimgj92l5VOvcAk=
trusted comment: theseus version=0.2.0
VrsPc6R/xdFxZWAISQqa2Z1/7UrPgxQwbEgvu2UQ5I9Vczd7XM0bVQeKQBBP7SWFAULEvAIdHv8cRvX67xr/AA==
";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test");
        std::fs::write(&path, "test").unwrap();
        std::fs::write(dir.path().join("test.minisig"), SIGNATURE).unwrap();
        let key = UpdateKey::try_from(KEY.to_owned()).unwrap();
        check(&File::open(&path).unwrap(), &[key], Some("0.2.0")).unwrap();
    }

    /// One that is published with the verifier: of the four bytes "test".
    #[test]
    fn a_signature_of_the_file_itself_is_refused() {
        const LEGACY: &str = "untrusted comment: signature from minisign secret key
RWQf6LRCGA9i59SLOFxz6NxvASXDJeRtuZykwQepbDEGt87ig1BNpWaVWuNrm73YiIiJbq71Wi+dP9eKL8OC351vwIasSSbXxwA=
trusted comment: timestamp:1555779966\tfile:test
QtKMXWyYcwdpZAlPF7tE2ENJkRd1ujvKjlj1m9RtHTBnZPa5WKU5uWRs5GoP5M/VqE81QFuMKI5k/SfNQUaOAA==";
        let key = UpdateKey::try_from(crate::update_key::EXAMPLE.to_owned()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test");
        std::fs::write(&path, "test").unwrap();
        std::fs::write(dir.path().join("test.minisig"), LEGACY).unwrap();
        let file = File::open(&path).unwrap();
        // It is a good one.
        let signature = Signature::decode(LEGACY).unwrap();
        key.key().verify(b"test", &signature, true).unwrap();
        assert!(check(&file, &[key], None).unwrap_err().to_string().contains("of the old kind"));
    }
}
