//! The folder of local manifests: the desired state where no cluster gives one.
//!
//! The folder is looked at twice a second, by the files' attributes only; that works on every file system, also where
//! change notifications do not (NFS, overlays, the symbolic links of a mounted ConfigMap). A change is believed when two
//! looks in a row agree on it, so that a file being rewritten is never taken for an empty or a missing one. A file that
//! cannot be read or holds a error is refused as a whole, reported once, and what it last said well stays in force.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use lineside_api::kinds::manifest;
use lineside_api::kinds::manifest::Object;
use lineside_common::files::read_bounded;

/// Bytes of one manifest file at most.
const FILE_BYTES_MAX: u64 = 1 << 20;
const SUFFIXES: [&str; 3] = ["yaml", "yml", "json"];

/// Attributes that change whenever a file's content does: inode, size, and both times in nanoseconds.
type Signature = (u64, u64, i64, i64, i64, i64);

/// A folder of manifests and what it last said.
pub struct ManifestFolder {
    path: PathBuf,
    files: BTreeMap<PathBuf, Known>,
    last_look: Option<BTreeMap<PathBuf, Signature>>,
    unreadable: Option<String>,
}

struct Known {
    signature: Signature,
    is_refused: bool,
    objects: Vec<Object>,
}

/// What a look at the folder found.
#[derive(Debug, PartialEq)]
pub enum Finding {
    /// A file was read; this many objects are in it.
    Accepted(PathBuf, usize),
    /// A file is refused, for these reasons.
    Rejected(PathBuf, Vec<String>),
    /// A file is gone.
    Removed(PathBuf),
    /// The folder cannot be read; everything stays as it is.
    Unreadable(String),
}

impl ManifestFolder {
    /// A folder not yet looked at.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), files: BTreeMap::new(), last_look: None, unreadable: None }
    }

    /// Everything the folder says, in the order of the files' names.
    pub fn objects(&self) -> impl Iterator<Item = (&Path, &Object)> {
        self.files.iter().flat_map(|(path, known)| known.objects.iter().map(move |object| (path.as_path(), object)))
    }

    /// Whether every file could be read, so that what they do not name is not wanted.
    pub fn is_complete(&self) -> bool {
        self.unreadable.is_none() && !self.files.values().any(|known| known.is_refused)
    }

    /// Looks at the folder and takes in what has changed.
    pub fn scan(&mut self) -> Vec<Finding> {
        let look = match signatures(&self.path) {
            Ok(look) => look,
            Err(error) => {
                let reason = error.to_string();
                let is_news = self.unreadable.replace(reason.clone()).as_ref() != Some(&reason);
                return if is_news { vec![Finding::Unreadable(reason)] } else { Vec::new() };
            }
        };
        self.unreadable = None;
        let before = self.last_look.replace(look.clone());
        let settled = |path: &PathBuf| before.as_ref().is_none_or(|before| before.get(path) == look.get(path));
        let mut findings = Vec::new();
        let gone: Vec<PathBuf> =
            self.files.keys().filter(|path| !look.contains_key(*path) && settled(path)).cloned().collect();
        for path in gone {
            self.files.remove(&path);
            findings.push(Finding::Removed(path));
        }
        for (path, signature) in &look {
            let is_known = self.files.get(path).is_some_and(|known| known.signature == *signature);
            if !is_known && settled(path) {
                findings.extend(self.take_in(path, *signature));
            }
        }
        findings
    }

    /// `None` where the file has vanished since it was looked at; the next look says so.
    fn take_in(&mut self, path: &Path, signature: Signature) -> Option<Finding> {
        let read = match read_bounded(path, FILE_BYTES_MAX) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => Err(vec![error.to_string()]),
            Ok(bytes) => {
                String::from_utf8(bytes).map_err(|_| vec!["it is no UTF-8 text".to_owned()]).and_then(|text| {
                    manifest::read(&text, &self.path, &crate::desired::check_rule)
                        .map_err(manifest::ManifestErrors::into_list)
                })
            }
        };
        Some(match read {
            Ok(objects) => {
                let count = objects.len();
                self.files.insert(path.to_owned(), Known { signature, is_refused: false, objects });
                Finding::Accepted(path.to_owned(), count)
            }
            Err(reasons) => {
                let known = self.files.entry(path.to_owned()).or_insert(Known {
                    signature,
                    is_refused: true,
                    objects: Vec::new(),
                });
                (known.signature, known.is_refused) = (signature, true);
                Finding::Rejected(path.to_owned(), reasons)
            }
        })
    }
}

/// The manifest files of a folder. Hidden ones are left out, as are those that vanish while they are looked at.
fn signatures(folder: &Path) -> std::io::Result<BTreeMap<PathBuf, Signature>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let suffix = path.extension().and_then(|suffix| suffix.to_str()).unwrap_or_default();
        if is_hidden || !SUFFIXES.contains(&suffix) {
            continue;
        }
        let facts = match fs::metadata(&path) {
            Ok(facts) => facts,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            // A file that is there and cannot be looked at is not gone.
            Err(error) => return Err(std::io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        };
        let signature =
            (facts.ino(), facts.size(), facts.mtime(), facts.mtime_nsec(), facts.ctime(), facts.ctime_nsec());
        found.insert(path, signature);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(name: &str) -> String {
        format!(
            "apiVersion: lineside.dev/v1alpha1\nkind: CameraStream\nmetadata: {{name: {name}}}\n\
             spec: {{source: {{uri: 'dir:f'}}, model: m}}\n"
        )
    }

    fn names(folder: &ManifestFolder) -> Vec<String> {
        folder.objects().map(|(_, object)| object.key().1.to_owned()).collect()
    }

    #[test]
    fn a_change_is_taken_in_when_two_looks_agree() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.yaml");
        fs::write(&path, stream("one")).unwrap();
        let mut folder = ManifestFolder::new(root.path());
        assert_eq!(folder.scan(), [Finding::Accepted(path.clone(), 1)]);
        assert_eq!(folder.scan(), []);

        fs::write(&path, stream("two") + "---\n" + &stream("three")).unwrap();
        assert_eq!((folder.scan().len(), names(&folder)), (0, vec!["one".to_owned()]), "not yet believed");
        assert_eq!(folder.scan(), [Finding::Accepted(path.clone(), 2)]);
        assert_eq!(names(&folder), ["two", "three"]);

        fs::remove_file(&path).unwrap();
        assert_eq!(folder.scan(), []);
        assert_eq!(folder.scan(), [Finding::Removed(path.clone())]);
        assert!(names(&folder).is_empty());
        assert_eq!(
            folder.take_in(&path, Signature::default()),
            None,
            "one that vanishes between two looks is not refused"
        );
    }

    #[test]
    fn a_bad_file_is_reported_once_and_its_last_good_content_stays() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.yaml");
        fs::write(&path, stream("one")).unwrap();
        let mut folder = ManifestFolder::new(root.path());
        folder.scan();
        for bad in ["kind: [", "kind: Pod\n", "\u{0}", "speed: 3"] {
            fs::write(&path, bad).unwrap();
            let findings: Vec<Finding> = (0..4).flat_map(|_| folder.scan()).collect();
            assert!(matches!(findings.as_slice(), [Finding::Rejected(..)]), "{bad}: {findings:?}");
            assert_eq!(names(&folder), ["one"]);
        }
        fs::write(&path, [0xFF, 0xFE]).unwrap();
        assert_eq!((0..3).flat_map(|_| folder.scan()).count(), 1);
        fs::write(&path, stream("two")).unwrap();
        assert_eq!((0..3).flat_map(|_| folder.scan()).collect::<Vec<_>>(), [Finding::Accepted(path, 1)]);
    }

    #[test]
    fn a_folder_that_vanishes_takes_nothing_with_it() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("manifests");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("a.yaml"), stream("one")).unwrap();
        let mut folder = ManifestFolder::new(&inner);
        folder.scan();
        fs::rename(&inner, root.path().join("away")).unwrap();
        assert!(matches!(folder.scan().as_slice(), [Finding::Unreadable(_)]));
        assert_eq!((folder.scan(), names(&folder)), (vec![], vec!["one".to_owned()]));
    }

    #[test]
    fn links_of_a_mounted_configmap_are_followed_and_hidden_files_are_not() {
        let root = tempfile::tempdir().unwrap();
        for (version, name) in [("..1", "one"), ("..2", "two")] {
            fs::create_dir(root.path().join(version)).unwrap();
            fs::write(root.path().join(version).join("a.yaml"), stream(name)).unwrap();
        }
        let link = |target: &str, name: &str| std::os::unix::fs::symlink(target, root.path().join(name)).unwrap();
        link("..1", "..data");
        link("..data/a.yaml", "a.yaml");
        link("nowhere", "b.yaml");
        fs::write(root.path().join(".a.yaml.swp"), "x").unwrap();
        let mut folder = ManifestFolder::new(root.path());
        folder.scan();
        assert_eq!(names(&folder), ["one"]);
        fs::remove_file(root.path().join("..data")).unwrap();
        link("..2", "..data");
        (0..2).for_each(|_| drop(folder.scan()));
        assert_eq!(names(&folder), ["two"]);
    }
}
