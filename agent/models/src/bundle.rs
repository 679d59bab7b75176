//! Bundles: signed model versions in a folder, for nodes without a network.
//!
//! ```text
//! bundle.json           a DSSE envelope (see `signing`) whose payload lists the version records of the bundle
//! blobs/sha256/<hex>    the model files
//! ```
//!
//! A bundle is a folder and not an archive: it needs no unpacking, and the content of a USB stick can be inspected. The
//! signature covers the list, the list names the digests, and the digests cover the files. An import reads the list
//! only when enough trusted keys have signed it, receives every file like a download, and writes a version record only
//! after its file is in the store.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use lineside_api::envelope::Envelope;
use lineside_common::digest::Digest;
use lineside_common::files;

use crate::signing::{Keyring, SigningError, SigningKey, sign};
use crate::store::{Store, StoreError, VersionRecord};

/// The payload type of the list of a bundle.
const PAYLOAD_TYPE: &str = "application/vnd.lineside.bundle.v1+json";
const LIST_FILE: &str = "bundle.json";
const BLOBS_FOLDER: &str = "blobs/sha256";
/// Upper bound of the list.
const LIST_BYTES_MAX: u64 = 16 << 20;

/// The signed list.
#[derive(Serialize, Deserialize)]
struct List {
    versions: Vec<VersionRecord>,
}

/// Which versions to export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VersionSelector {
    /// Name of the model.
    pub name: String,
    /// One version. `None` selects all versions of the model.
    pub version: Option<u64>,
}

/// The progress of an export or import.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BundleProgress {
    /// The bytes of all files. Reported once, at the start.
    Total(u64),
    /// This many more bytes were processed.
    Advanced(u64),
}

/// What a caller branches on when an export or import fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BundleErrorKind {
    /// A file cannot be read or written.
    Io,
    /// The store does not have a selected version.
    NoSuchVersion,
    /// The bundle is not signed by enough trusted keys, or the key cannot sign.
    Signature,
    /// The list of the bundle is not valid.
    InvalidList,
    /// A file does not have its digest.
    Damaged,
    /// The store reports an error.
    Store,
}

/// Why an export or import failed. The message names the file.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A file cannot be read or written.
    #[error("cannot access {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// The store does not have a selected version.
    #[error("the store does not have this version of {name}; `lineside store ls` lists its versions")]
    NoSuchVersion {
        /// Name of the model.
        name: String,
    },
    /// The bundle is not signed by enough trusted keys, or the key cannot sign.
    #[error("the signature of {} is rejected", path.display())]
    Signature {
        /// The list of the bundle.
        path: PathBuf,
        /// Why the signature is rejected.
        source: SigningError,
    },
    /// The list is not valid JSON.
    #[error("{} is not a valid bundle list", path.display())]
    InvalidList {
        /// The list of the bundle.
        path: PathBuf,
        /// Why it is not valid.
        source: serde_json::Error,
    },
    /// The list contains a name that is not a model name.
    #[error("{}: `{name}` is not a model name", path.display())]
    InvalidName {
        /// The list of the bundle.
        path: PathBuf,
        /// The name, escaped.
        name: String,
    },
    /// A file does not have its digest.
    #[error("{} is damaged: it does not have the digest of its name", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The store reports an error.
    #[error("the store cannot be used")]
    Store(#[from] StoreError),
}

impl BundleError {
    /// What a caller branches on.
    pub fn kind(&self) -> BundleErrorKind {
        match self {
            Self::Io { .. } => BundleErrorKind::Io,
            Self::NoSuchVersion { .. } => BundleErrorKind::NoSuchVersion,
            Self::Signature { .. } => BundleErrorKind::Signature,
            Self::InvalidList { .. } | Self::InvalidName { .. } => BundleErrorKind::InvalidList,
            Self::Damaged { .. } => BundleErrorKind::Damaged,
            Self::Store(_) => BundleErrorKind::Store,
        }
    }

    fn io(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    fn list(path: &Path) -> impl Fn(serde_json::Error) -> Self + '_ {
        move |source| Self::InvalidList { path: path.to_owned(), source }
    }
}

/// Writes the selected versions of the store into a folder, signed with `key`. Returns their records.
///
/// # Errors
/// When the store has no selected version, a blob is damaged, or the folder cannot be written.
pub fn export(
    store: &Store,
    selector: &VersionSelector,
    folder: &Path,
    key: &SigningKey,
    progress: impl Fn(BundleProgress),
) -> Result<Vec<VersionRecord>, BundleError> {
    let mut versions = store.versions()?;
    versions.retain(|record| {
        record.name == selector.name && selector.version.is_none_or(|version| record.version == version)
    });
    if versions.is_empty() {
        return Err(BundleError::NoSuchVersion { name: selector.name.clone() });
    }
    progress(BundleProgress::Total(versions.iter().map(|version| version.size).sum()));
    let blobs = folder.join(BLOBS_FOLDER);
    fs::create_dir_all(&blobs).map_err(BundleError::io(&blobs))?;
    for version in &versions {
        let advance = |bytes| progress(BundleProgress::Advanced(bytes));
        export_blob(&store.blob_path(&version.digest), &blobs, &version.digest, advance)?;
    }
    let path = folder.join(LIST_FILE);
    let unpinned = versions.iter().map(|version| VersionRecord { pinned: false, ..version.clone() });
    let payload = serde_json::to_vec(&List { versions: unpinned.collect() }).map_err(BundleError::list(&path))?;
    let mut envelope = Envelope::new(PAYLOAD_TYPE, &payload);
    sign(&mut envelope, key).map_err(|source| BundleError::Signature { path: path.clone(), source })?;
    // The list is written last, so that a folder with a list is complete.
    let text = serde_json::to_vec_pretty(&envelope).map_err(BundleError::list(&path))?;
    files::replace(&path, &text).map_err(BundleError::io(&path))?;
    // Other nodes and users import the bundle.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(BundleError::io(&path))?;
    Ok(versions)
}

fn export_blob(source: &Path, blobs: &Path, digest: &Digest, advance: impl Fn(u64)) -> Result<(), BundleError> {
    let target = blobs.join(digest.hex());
    let blob = files::open_regular(source).map_err(BundleError::io(source))?;
    let copy = || {
        let mut file = File::create(&target)?;
        let (copied, _) = Digest::of_pieces(blob, |piece| {
            advance(piece.len() as u64);
            file.write_all(piece)
        })?;
        file.sync_all()?;
        Ok(copied)
    };
    let copied = copy().map_err(BundleError::io(&target))?;
    if copied == *digest { Ok(()) } else { Err(BundleError::Damaged { path: source.to_owned() }) }
}

/// Imports a bundle into the store. Blobs in `protected` are not evicted for it. Returns the records of its versions.
///
/// # Errors
/// When the bundle is not signed by enough trusted keys, a file is missing or damaged, or the store does not have
/// enough space.
pub fn import(
    store: &Store,
    folder: &Path,
    keys: &Keyring,
    protected: &BTreeSet<Digest>,
    progress: impl Fn(BundleProgress),
) -> Result<Vec<VersionRecord>, BundleError> {
    let list = read_list(&folder.join(LIST_FILE), keys)?;
    progress(BundleProgress::Total(list.versions.iter().map(|version| version.size).sum()));
    // The versions of the bundle must not be evicted for each other.
    let protected: BTreeSet<Digest> =
        protected.iter().copied().chain(list.versions.iter().map(|version| version.digest)).collect();
    for version in &list.versions {
        if store.contains_blob(&version.digest) {
            progress(BundleProgress::Advanced(version.size));
        } else {
            let path = folder.join(BLOBS_FOLDER).join(version.digest.hex());
            import_blob(store, &path, &version.digest, &protected, |bytes| progress(BundleProgress::Advanced(bytes)))?;
        }
        store.put_version(version.clone())?;
    }
    Ok(list.versions)
}

/// Reads and verifies the list of a bundle.
fn read_list(path: &Path, keys: &Keyring) -> Result<List, BundleError> {
    let text = files::read_bounded(path, LIST_BYTES_MAX).map_err(BundleError::io(path))?;
    let envelope: Envelope = serde_json::from_slice(&text).map_err(BundleError::list(path))?;
    let payload = keys
        .verify(&envelope, PAYLOAD_TYPE)
        .map_err(|source| BundleError::Signature { path: path.to_owned(), source })?;
    let list: List = serde_json::from_slice(&payload).map_err(BundleError::list(path))?;
    match list.versions.iter().find(|version| !lineside_api::names::is_name(&version.name)) {
        Some(invalid) => {
            let name = invalid.name.escape_debug().to_string();
            Err(BundleError::InvalidName { path: path.to_owned(), name })
        }
        None => Ok(list),
    }
}

fn import_blob(
    store: &Store,
    path: &Path,
    digest: &Digest,
    protected: &BTreeSet<Digest>,
    advance: impl Fn(u64),
) -> Result<(), BundleError> {
    let metadata = fs::metadata(path).map_err(BundleError::io(path))?;
    store.free_space(metadata.len(), protected)?;
    let mut partial = store.open_partial(digest)?;
    partial.reset()?;
    let file = files::open_regular(path).map_err(BundleError::io(path))?;
    let copied = Digest::of_pieces(file, |piece| {
        advance(piece.len() as u64);
        partial.append(piece).map_err(io::Error::other)
    });
    copied.map_err(BundleError::io(path))?;
    match partial.commit() {
        Ok(_) => Ok(()),
        Err(StoreError::DigestMismatch { .. }) => Err(BundleError::Damaged { path: path.to_owned() }),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::store::Index;

    fn open(folder: &Path) -> Store {
        Store::open(folder, 1 << 20, Index::off()).unwrap()
    }

    fn put(store: &Store, version: u64, bytes: &[u8]) {
        let digest = Digest::of(bytes);
        let mut partial = store.open_partial(&digest).unwrap();
        partial.append(bytes).unwrap();
        partial.commit().unwrap();
        let record = VersionRecord {
            name: "m".into(),
            version,
            digest,
            size: bytes.len() as u64,
            source: "file:m.onnx".into(),
            fetched: "2026-11-24T00:00:00Z".into(),
            pinned: true,
            signature: None,
        };
        store.put_version(record).unwrap();
    }

    fn selector(version: Option<u64>) -> VersionSelector {
        VersionSelector { name: "m".into(), version }
    }

    #[test]
    fn a_bundle_is_exported_and_imported_without_pins() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let (from, to) = (open(&at("from")), open(&at("to")));
        put(&from, 1, b"one");
        put(&from, 2, b"three");
        fs::create_dir(at("keys")).unwrap();
        let key = SigningKey::generate(&at("keys/release")).unwrap();
        let (total, advanced) = (Cell::new(0), Cell::new(0));
        let progress = |progress| match progress {
            BundleProgress::Total(bytes) => total.set(bytes),
            BundleProgress::Advanced(bytes) => advanced.set(advanced.get() + bytes),
        };
        export(&from, &selector(None), &at("bundle"), &key, progress).unwrap();
        assert_eq!((total.get(), advanced.take()), (8, 8));
        let keys = Keyring::read(&at("keys"), 1).unwrap();
        import(&to, &at("bundle"), &keys, &BTreeSet::new(), progress).unwrap();
        assert_eq!((total.get(), advanced.take()), (8, 8));
        assert!(to.versions().unwrap().iter().all(|version| !version.pinned && to.contains_blob(&version.digest)));
        assert_eq!(to.versions().unwrap().len(), 2);
        // A second import finds the files in the store.
        import(&to, &at("bundle"), &keys, &BTreeSet::new(), progress).unwrap();
        assert_eq!(advanced.take(), 8);
    }

    #[test]
    fn a_bundle_that_is_damaged_or_signed_by_another_key_is_rejected() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let (from, to) = (open(&at("from")), open(&at("to")));
        put(&from, 1, b"one");
        for folder in ["keys", "others"] {
            fs::create_dir(at(folder)).unwrap();
        }
        let key = SigningKey::generate(&at("keys/release")).unwrap();
        SigningKey::generate(&at("others/release")).unwrap();
        let missing = export(&from, &selector(Some(7)), &at("bundle"), &key, |_| {}).unwrap_err();
        assert_eq!(missing.kind(), BundleErrorKind::NoSuchVersion);
        export(&from, &selector(Some(1)), &at("bundle"), &key, |_| {}).unwrap();
        let import_with =
            |keys: &str| import(&to, &at("bundle"), &Keyring::read(&at(keys), 1).unwrap(), &BTreeSet::new(), |_| {});
        assert_eq!(import_with("others").unwrap_err().kind(), BundleErrorKind::Signature);
        fs::write(at("bundle/blobs/sha256").join(Digest::of(b"one").hex()), b"two").unwrap();
        assert_eq!(import_with("keys").unwrap_err().kind(), BundleErrorKind::Damaged);
        fs::write(at("bundle/bundle.json"), "{").unwrap();
        assert_eq!(import_with("keys").unwrap_err().kind(), BundleErrorKind::InvalidList);
        assert!(to.versions().unwrap().is_empty(), "nothing of a rejected bundle is recorded");
    }
}
