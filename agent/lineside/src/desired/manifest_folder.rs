//! A folder of local manifests: the desired state of a node without a cluster.
//!
//! A scan compares the attributes of the files with those of the previous scan. This works on every file system, including those
//! without change notifications (NFS, overlays, the symbolic links of a mounted ConfigMap). A change is applied when two scans in
//! a row see the same attributes, so that a file that is being rewritten is not read as an empty or missing file. A file that
//! cannot be read or that contains an error is rejected as a whole and reported once; its last valid content remains in effect.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use lineside_api::kinds::manifest::{self, Object, RuleCheck};
use lineside_common::files::read_bounded;

/// Maximum size of one manifest file, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Extensions of manifest files.
const SUFFIXES: [&str; 3] = ["yaml", "yml", "json"];

/// Attributes that change with the content of a file: inode, size, and the times of modification and status change, each in
/// seconds and nanoseconds.
type Signature = (u64, u64, i64, i64, i64, i64);

/// A folder of manifests and the last valid content of its files.
pub struct ManifestFolder {
    path: PathBuf,
    files: BTreeMap<PathBuf, FileState>,
    last_signatures: Option<BTreeMap<PathBuf, Signature>>,
    /// The reason why the last scan failed.
    unreadable: Option<String>,
}

/// The last version of a file that was read.
struct FileState {
    signature: Signature,
    is_rejected: bool,
    objects: Vec<Object>,
}

/// A change that a scan found.
#[derive(Debug, PartialEq)]
pub enum Finding {
    /// A file is valid. The number is that of its objects.
    Accepted(PathBuf, usize),
    /// A file is rejected for these reasons. Its last valid content remains in effect.
    Rejected(PathBuf, Vec<String>),
    /// A file was removed.
    Removed(PathBuf),
    /// The folder cannot be read. The content of all files remains in effect.
    Unreadable(String),
}

impl ManifestFolder {
    /// A folder that has not been scanned.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), files: BTreeMap::new(), last_signatures: None, unreadable: None }
    }

    /// The objects of all files with the path of their file, in the order of the paths.
    pub fn objects(&self) -> impl Iterator<Item = (&Path, &Object)> {
        self.files.iter().flat_map(|(path, file)| file.objects.iter().map(move |object| (path.as_path(), object)))
    }

    /// Whether the folder and the current content of every file are valid. Otherwise a missing object may be in a rejected file.
    pub fn is_complete(&self) -> bool {
        self.unreadable.is_none() && !self.files.values().any(|file| file.is_rejected)
    }

    /// Scans the folder and applies its changes. `check_rule` checks verdict rules.
    pub fn scan(&mut self, check_rule: RuleCheck<'_>) -> Vec<Finding> {
        let current = match signatures(&self.path) {
            Ok(signatures) => signatures,
            Err(error) => {
                let reason = error.to_string();
                let is_new_reason = self.unreadable.replace(reason.clone()).as_ref() != Some(&reason);
                return if is_new_reason { vec![Finding::Unreadable(reason)] } else { Vec::new() };
            }
        };
        self.unreadable = None;
        let previous = self.last_signatures.replace(current.clone());
        let is_stable =
            |path: &PathBuf| previous.as_ref().is_none_or(|previous| previous.get(path) == current.get(path));
        let mut findings = Vec::new();
        let removed: Vec<PathBuf> =
            self.files.keys().filter(|path| !current.contains_key(*path) && is_stable(path)).cloned().collect();
        for path in removed {
            self.files.remove(&path);
            findings.push(Finding::Removed(path));
        }
        for (path, signature) in &current {
            let is_unchanged = self.files.get(path).is_some_and(|file| file.signature == *signature);
            if !is_unchanged && is_stable(path) {
                findings.extend(self.read_file(path, *signature, check_rule));
            }
        }
        findings
    }

    /// Reads a file that is new or has changed. `None` when it has been removed since the scan; the next scan reports that.
    fn read_file(&mut self, path: &Path, signature: Signature, check_rule: RuleCheck<'_>) -> Option<Finding> {
        let read = match read_bounded(path, FILE_BYTES_MAX) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => Err(vec![error.to_string()]),
            Ok(bytes) => {
                String::from_utf8(bytes).map_err(|_| vec!["the file is not valid UTF-8".to_owned()]).and_then(|text| {
                    manifest::read(&text, &self.path, check_rule).map_err(manifest::ManifestErrors::into_list)
                })
            }
        };
        Some(match read {
            Ok(objects) => {
                let count = objects.len();
                self.files.insert(path.to_owned(), FileState { signature, is_rejected: false, objects });
                Finding::Accepted(path.to_owned(), count)
            }
            Err(reasons) => {
                let file = self.files.entry(path.to_owned()).or_insert(FileState {
                    signature,
                    is_rejected: true,
                    objects: Vec::new(),
                });
                (file.signature, file.is_rejected) = (signature, true);
                Finding::Rejected(path.to_owned(), reasons)
            }
        })
    }
}

/// The manifest files of a folder with their signatures. Skips hidden files, and files that are removed during the scan.
fn signatures(folder: &Path) -> std::io::Result<BTreeMap<PathBuf, Signature>> {
    let mut signatures = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let suffix = path.extension().and_then(|suffix| suffix.to_str()).unwrap_or_default();
        if is_hidden || !SUFFIXES.contains(&suffix) {
            continue;
        }
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            // A file whose attributes cannot be read must not be treated as removed.
            Err(error) => return Err(std::io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        };
        let signature = (
            metadata.ino(),
            metadata.size(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        );
        signatures.insert(path, signature);
    }
    Ok(signatures)
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
    fn a_change_is_applied_when_two_scans_see_the_same_attributes() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.yaml");
        fs::write(&path, stream("one")).unwrap();
        let mut folder = ManifestFolder::new(root.path());
        assert_eq!(folder.scan(&|_| Ok(())), [Finding::Accepted(path.clone(), 1)]);
        assert_eq!(folder.scan(&|_| Ok(())), []);

        fs::write(&path, stream("two") + "---\n" + &stream("three")).unwrap();
        assert_eq!(
            (folder.scan(&|_| Ok(())).len(), names(&folder)),
            (0, vec!["one".to_owned()]),
            "the change is not stable yet"
        );
        assert_eq!(folder.scan(&|_| Ok(())), [Finding::Accepted(path.clone(), 2)]);
        assert_eq!(names(&folder), ["two", "three"]);

        fs::remove_file(&path).unwrap();
        assert_eq!(folder.scan(&|_| Ok(())), []);
        assert_eq!(folder.scan(&|_| Ok(())), [Finding::Removed(path.clone())]);
        assert!(names(&folder).is_empty());
        assert_eq!(
            folder.read_file(&path, Signature::default(), &|_| Ok(())),
            None,
            "a file that is removed after the scan is not rejected"
        );
    }

    #[test]
    fn an_invalid_file_is_reported_once_and_its_last_valid_content_remains_in_effect() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.yaml");
        fs::write(&path, stream("one")).unwrap();
        let mut folder = ManifestFolder::new(root.path());
        folder.scan(&|_| Ok(()));
        for invalid in ["kind: [", "kind: Pod\n", "\u{0}", "speed: 3"] {
            fs::write(&path, invalid).unwrap();
            let findings: Vec<Finding> = (0..4).flat_map(|_| folder.scan(&|_| Ok(()))).collect();
            assert!(matches!(findings.as_slice(), [Finding::Rejected(..)]), "{invalid}: {findings:?}");
            assert_eq!(names(&folder), ["one"]);
        }
        fs::write(&path, [0xFF, 0xFE]).unwrap();
        assert_eq!((0..3).flat_map(|_| folder.scan(&|_| Ok(()))).count(), 1);
        fs::write(&path, stream("two")).unwrap();
        assert_eq!((0..3).flat_map(|_| folder.scan(&|_| Ok(()))).collect::<Vec<_>>(), [Finding::Accepted(path, 1)]);
    }

    #[test]
    fn objects_remain_in_effect_when_the_folder_cannot_be_read() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("manifests");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("a.yaml"), stream("one")).unwrap();
        let mut folder = ManifestFolder::new(&inner);
        folder.scan(&|_| Ok(()));
        fs::rename(&inner, root.path().join("away")).unwrap();
        assert!(matches!(folder.scan(&|_| Ok(())).as_slice(), [Finding::Unreadable(_)]));
        assert_eq!((folder.scan(&|_| Ok(())), names(&folder)), (vec![], vec!["one".to_owned()]));
    }

    #[test]
    fn symbolic_links_of_a_configmap_are_followed_and_hidden_files_are_skipped() {
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
        folder.scan(&|_| Ok(()));
        assert_eq!(names(&folder), ["one"]);
        fs::remove_file(root.path().join("..data")).unwrap();
        link("..2", "..data");
        (0..2).for_each(|_| drop(folder.scan(&|_| Ok(()))));
        assert_eq!(names(&folder), ["two"]);
    }
}
