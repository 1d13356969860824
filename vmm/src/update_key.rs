//! The public keys of `--update-key`: who signs builds that this VMM may be updated to. They are read once and go over
//! with every update: what becomes of their files changes nothing.

use std::path::{Path, PathBuf};

use minisign_verify::PublicKey;
use serde::{Deserialize, Serialize};

use crate::small_file;

/// A key has some 110 bytes; its comment, in tools, 1024 at most.
const MOST: u64 = 4096;

/// Of minisign (Ed25519).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct UpdateKey {
    /// As in the second line of its file, as the key itself cannot be written again.
    text: String,
    key: PublicKey,
}

#[derive(Debug, thiserror::Error)]
#[error("--update-key {}: {reason}", path.display())]
pub(crate) struct NotAKey {
    path: PathBuf,
    reason: Reason,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Reason {
    #[error(transparent)]
    NotRead(#[from] small_file::SmallFileError),
    #[error("is a secret key: keep it where builds are signed, and give the public one that belongs to it")]
    Secret,
    #[error("has more than one key in it: give each a file of its own, and --update-key for each")]
    Several,
    #[error("{0}: give the public key as `minisign -G` has written it (minisign.pub)")]
    Wrong(#[from] NoKey),
}

#[derive(Debug, thiserror::Error)]
#[error("is not a public key of minisign ({0})")]
pub(crate) struct NoKey(minisign_verify::Error);

impl UpdateKey {
    /// From a file as minisign has them: a line of comment, and a line with the key.
    pub(crate) fn read(path: &Path) -> Result<Self, NotAKey> {
        let text = small_file::read(path, MOST).map_err(Reason::from);
        text.and_then(|text| Self::parse(&text)).map_err(|reason| NotAKey { path: path.into(), reason })
    }

    fn parse(text: &str) -> Result<Self, Reason> {
        let mut lines = text.trim_end().lines();
        let comment = lines.next().unwrap_or_default();
        let key = lines.next().unwrap_or_default();
        // Named by both of the tools that write it.
        if comment.contains("secret key") {
            return Err(Reason::Secret);
        }
        if !comment.starts_with("untrusted comment:") {
            return Err(NoKey(minisign_verify::Error::InvalidEncoding).into());
        }
        let key = Self::try_from(key.to_owned())?;
        if lines.next().is_some() { Err(Reason::Several) } else { Ok(key) }
    }

    pub(crate) fn key(&self) -> &PublicKey {
        &self.key
    }
}

impl TryFrom<String> for UpdateKey {
    type Error = NoKey;

    fn try_from(text: String) -> Result<Self, NoKey> {
        let key = PublicKey::from_base64(&text).map_err(NoKey)?;
        Ok(Self { text, key })
    }
}

impl From<UpdateKey> for String {
    fn from(key: UpdateKey) -> Self {
        key.text
    }
}

/// The key of minisign's own releases.
#[cfg(test)]
pub(crate) const EXAMPLE: &str = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_one_public_key_or_the_error_says_what_it_has() {
        let pair = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
        let public = pair.pk.to_box().unwrap().into_string();
        let secret = pair.sk.to_box(None).unwrap().into_string();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pub");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            UpdateKey::read(&path).map_err(|error| error.to_string())
        };
        let key = read(&public).unwrap();
        assert_eq!(String::from(key.clone()), pair.pk.to_base64());
        assert_eq!(UpdateKey::try_from(pair.pk.to_base64()).unwrap(), key);
        assert_eq!(read(&format!("{public}\n\n")).unwrap(), key);
        for (text, expected) in [
            ("", "not a public key of minisign"),
            ("ssh-ed25519 AAAA me", "not a public key of minisign"),
            (EXAMPLE, "not a public key of minisign"),
            (&public[..public.len() - 5], "not a public key of minisign"),
            (&secret, "is a secret key"),
            (&format!("{public}\n{public}"), "more than one key"),
            (&"x".repeat(5000), "longer than 4096 bytes"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected) && error.contains("--update-key /"), "{expected}: {error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(UpdateKey::read(&path).unwrap_err().to_string().contains("key.pub: cannot be opened: No such file"));
    }
}
