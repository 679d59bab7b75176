//! Bundles: model versions in a folder, signed, for nodes that no network reaches.
//!
//! ```text
//! bundle.json           a DSSE envelope (see `trust.rs`) whose payload lists the versions as the store records them
//! blobs/sha256/<hex>    their files
//! ```
//!
//! A folder, not an archive: nothing has to be unpacked, and a stick can be looked at. The signature covers the list, the
//! list the digests, the digests the files. An import reads the list only when enough trusted keys have signed it, takes in
//! every file through the same door as a download, and records no version before its file is in the store.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::signing::{Keyring, SigningKey, sign};
use crate::store::{Store, VersionRecord};
use lineside_api::envelope::Envelope;
use lineside_common::digest::Digest;
use lineside_common::files;

/// The payload type of a bundle's list.
const PAYLOAD: &str = "application/vnd.lineside.bundle.v1+json";
const LIST: &str = "bundle.json";
/// Bytes of the list at most.
const LIST_BYTES_MAX: u64 = 16 << 20;

#[derive(Serialize, Deserialize)]
struct List {
    versions: Vec<VersionRecord>,
}

/// Writes the versions of a model, or one of them, into `folder`. `total` is told the bytes there are, `progress` those
/// that were written.
///
/// # Errors
/// When there are none, a file is damaged, or the folder cannot be written.
pub fn export(
    store: &Store,
    name: &str,
    version: Option<u64>,
    folder: &Path,
    key: &SigningKey,
    total: impl Fn(u64),
    progress: impl Fn(u64),
) -> anyhow::Result<Vec<VersionRecord>> {
    let is_meant = |found: &VersionRecord| found.name == name && version.is_none_or(|version| found.version == version);
    let versions: Vec<VersionRecord> = store.versions()?.into_iter().filter(is_meant).collect();
    if versions.is_empty() {
        bail!("the store has no such version of {name}; `lineside store ls` lists what it has");
    }
    total(versions.iter().map(|version| version.size).sum());
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).with_context(|| blobs.display().to_string())?;
    for version in &versions {
        let source = store.blob_path(&version.digest);
        let target = blobs.join(version.digest.hex());
        let copied = File::create(&target)
            .map_err(anyhow::Error::from)
            .and_then(|mut file| {
                let (copied, _) = Digest::of_pieces(files::open_regular(&source)?, |piece| {
                    progress(piece.len() as u64);
                    file.write_all(piece)
                })?;
                file.sync_all()?;
                Ok(copied)
            })
            .with_context(|| target.display().to_string())?;
        if copied != version.digest {
            bail!("{} is damaged; run `lineside store verify`", source.display());
        }
    }
    let list =
        List { versions: versions.iter().map(|version| VersionRecord { pinned: false, ..version.clone() }).collect() };
    let mut envelope = Envelope::new(PAYLOAD, &serde_json::to_vec(&list)?);
    sign(&mut envelope, key).map_err(anyhow::Error::msg)?;
    // Last, so that a folder with a list is complete.
    let path = folder.join(LIST);
    files::replace(&path, &serde_json::to_vec_pretty(&envelope)?).with_context(|| path.display().to_string())?;
    Ok(versions)
}

/// Takes in a bundle. `protected` are the digests that must not give way to it.
///
/// # Errors
/// When it is not signed as it should be, a file is missing or damaged, or there is no room.
pub fn import(
    store: &Store,
    folder: &Path,
    keys: &Keyring,
    protected: &BTreeSet<Digest>,
    total: impl Fn(u64),
    progress: impl Fn(u64),
) -> anyhow::Result<Vec<VersionRecord>> {
    let path = folder.join(LIST);
    let refused = || format!("{} is refused", path.display());
    let text = files::read_bounded(&path, LIST_BYTES_MAX).with_context(|| path.display().to_string())?;
    let envelope: Envelope = serde_json::from_slice(&text).with_context(refused)?;
    let payload = keys.verify(&envelope, PAYLOAD).map_err(anyhow::Error::msg).with_context(refused)?;
    let list: List = serde_json::from_slice(&payload).with_context(refused)?;
    if let Some(wrong) = list.versions.iter().find(|version| !lineside_api::names::is_name(&version.name)) {
        bail!("{}: `{}` is no name of a model", path.display(), wrong.name.escape_debug());
    }
    total(list.versions.iter().map(|version| version.size).sum());
    // What the bundle brings must not give way to the rest of it.
    let protected: BTreeSet<Digest> =
        protected.iter().copied().chain(list.versions.iter().map(|version| version.digest)).collect();
    for version in &list.versions {
        let source = folder.join("blobs/sha256").join(version.digest.hex());
        if store.blob(&version.digest).is_none() {
            let facts = fs::metadata(&source).with_context(|| source.display().to_string())?;
            store.make_room(facts.len(), &protected)?;
            let mut partial = store.partial(&version.digest)?;
            partial.restart()?;
            let copied = Digest::of_pieces(files::open_regular(&source)?, |piece| {
                progress(piece.len() as u64);
                partial.append(piece).map_err(anyhow::Error::from)
            });
            copied.with_context(|| source.display().to_string())?;
            partial.finish().with_context(|| format!("{} is damaged", source.display()))?;
        } else {
            progress(version.size);
        }
        store.record(version.clone())?;
    }
    Ok(list.versions)
}
