//! Builds, signed as an operator signs them (`--update-key`).

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::Result;
use minisign::KeyPair;

use crate::harness::lab;

/// The trusted comment of a build.
pub fn comment(version: &str) -> String {
    format!("theseus version={version}")
}

pub fn sign(by: &KeyPair, file: &Path, comment: &str) -> Result<String> {
    Ok(minisign::sign(None, &by.sk, File::open(file)?, Some(comment), None)?.to_string())
}

/// Where a VMM looks for the signature of `file`.
pub fn beside(file: &Path) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(".minisig");
    path.into()
}

/// The public key, in a file.
pub fn public(path: &Path, pair: &KeyPair) -> Result<String> {
    fs::write(path, pair.pk.to_box()?.to_bytes())?;
    Ok(path.display().to_string())
}

/// A copy of the lab's build with this tag, signed.
pub fn build(dir: &Path, tag: &str, by: &KeyPair) -> Result<PathBuf> {
    let name = format!("theseus-{tag}");
    let path = dir.join(&name);
    fs::copy(lab::bin(&name)?, &path)?;
    let version = format!("{}+{tag}", env!("CARGO_PKG_VERSION"));
    fs::write(beside(&path), sign(by, &path, &comment(&version))?)?;
    Ok(path)
}
