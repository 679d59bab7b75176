//! A folder of local manifests: the desired state of a node without a cluster.
//!
//! A scan compares the attributes of the files with those of the previous scan. This works on every file system, including those
//! without change notifications (NFS, overlays, the symbolic links of a mounted ConfigMap). A change is applied when two scans in
//! a row see the same attributes, so that a file that is being rewritten is not read as an empty or missing file.
//!
//! An error belongs to the smallest thing that it is about:
//!
//! - A file that contains an error is rejected as a whole and reported once; its last valid content remains in effect. It is read
//!   again when its attributes change.
//! - An entry whose attributes or content cannot be read (a symbolic link that leads nowhere or in a circle, a missing
//!   permission, a pipe, a folder) is rejected in the same way. It is tried again at every scan, and reported again when the
//!   reason changes.
//! - Only a folder that cannot be listed is unreadable as a whole; the content of all files remains in effect.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use lineside_api::kinds::manifest::{self, ManifestErrors, Object, RuleCheck};
use lineside_common::files::read_bounded;

use super::RejectedFiles;

/// Maximum size of one manifest file, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Extensions of manifest files.
const SUFFIXES: [&str; 3] = ["yaml", "yml", "json"];

/// Attributes that change with the content of a file: inode, size, and the times of modification and status change, each in
/// seconds and nanoseconds.
type Signature = (u64, u64, i64, i64, i64, i64);

/// The attributes of an entry of the folder, or why they cannot be read.
type Attributes = Result<Signature, FileError>;

/// Why a manifest file is rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read.
    #[error("the file cannot be read: {0}")]
    Unreadable(String),
    /// A symbolic link whose target does not exist.
    #[error("the file cannot be read: it is a symbolic link to a file that does not exist")]
    DanglingLink,
    /// The entry is not a regular file, or the file is too large.
    #[error("{0}")]
    Unsuitable(String),
    /// The content is not valid UTF-8.
    #[error("the file is not valid UTF-8")]
    NotUtf8,
    /// The content is not a valid manifest.
    #[error(transparent)]
    Invalid(#[from] ManifestErrors),
}

/// The kind of a [`FileError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileErrorKind {
    /// The file cannot be read now; it is tried again.
    Unreadable,
    /// The file is invalid until it changes.
    Invalid,
}

impl FileError {
    /// The kind, to branch on.
    pub fn kind(&self) -> FileErrorKind {
        match self {
            Self::Unreadable(_) | Self::DanglingLink => FileErrorKind::Unreadable,
            Self::Unsuitable(_) | Self::NotUtf8 | Self::Invalid(_) => FileErrorKind::Invalid,
        }
    }
}

/// A folder of manifests and the last valid content of its files.
pub struct ManifestFolder {
    path: PathBuf,
    files: BTreeMap<PathBuf, FileState>,
    /// Rejected files, which are also in `files`.
    rejected: BTreeSet<PathBuf>,
    /// Whether a scan was complete.
    is_known: bool,
    /// The attributes that the last complete scan saw.
    last_attributes: Option<BTreeMap<PathBuf, Attributes>>,
    /// The reason why the last scan failed.
    unreadable: Option<String>,
}

/// The last version of a file that was read.
struct FileState {
    /// The attributes of the file when it was read; an error when it could not be read, so that it is tried again.
    attributes: Attributes,
    /// The last valid content.
    objects: Vec<Object>,
}

/// A change that a scan found.
#[derive(Debug, PartialEq)]
pub enum Finding {
    /// A file is valid. The number is that of its objects.
    Accepted(PathBuf, usize),
    /// A file is rejected. Its last valid content remains in effect.
    Rejected(PathBuf, FileError),
    /// A file was removed.
    Removed(PathBuf),
    /// The folder cannot be read. The content of all files remains in effect.
    Unreadable(String),
    /// The folder can be read again.
    Readable,
}

impl ManifestFolder {
    /// A folder that has not been scanned.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            files: BTreeMap::new(),
            rejected: BTreeSet::new(),
            is_known: false,
            last_attributes: None,
            unreadable: None,
        }
    }

    /// The objects of all files with the path of their file, in the order of the paths.
    pub fn objects(&self) -> impl Iterator<Item = (&Path, &Object)> {
        self.files.iter().flat_map(|(path, file)| file.objects.iter().map(move |object| (path.as_path(), object)))
    }

    /// Whether the folder has been scanned completely at least once. Until then its objects are not known.
    pub fn is_known(&self) -> bool {
        self.is_known
    }

    /// Why the folder could not be read by the last scan.
    pub fn unreadable(&self) -> Option<&str> {
        self.unreadable.as_deref()
    }

    /// The files whose current content is not in effect.
    pub fn rejected(&self) -> RejectedFiles {
        RejectedFiles::new(self.rejected.iter().map(PathBuf::as_path))
    }

    /// Whether the folder and the current content of every file are valid. Otherwise a missing object may be in a rejected file.
    pub fn is_complete(&self) -> bool {
        self.is_known && self.unreadable.is_none() && self.rejected.is_empty()
    }

    /// Scans the folder and applies its changes. `check_rule` checks verdict rules.
    pub fn scan(&mut self, check_rule: RuleCheck<'_>) -> Vec<Finding> {
        let current = match attributes(&self.path) {
            Ok(attributes) => attributes,
            Err(error) => {
                let reason = error.to_string();
                let is_new_reason = self.unreadable.replace(reason.clone()).as_ref() != Some(&reason);
                return if is_new_reason { vec![Finding::Unreadable(reason)] } else { Vec::new() };
            }
        };
        let mut findings: Vec<Finding> = self.unreadable.take().map(|_| Finding::Readable).into_iter().collect();
        let previous = self.last_attributes.take();
        let is_stable =
            |path: &PathBuf| previous.as_ref().is_none_or(|previous| previous.get(path) == current.get(path));
        let removed: Vec<PathBuf> =
            self.files.keys().filter(|path| !current.contains_key(*path) && is_stable(path)).cloned().collect();
        for path in removed {
            self.files.remove(&path);
            self.rejected.remove(&path);
            findings.push(Finding::Removed(path));
        }
        for (path, attributes) in &current {
            let is_unchanged = self.files.get(path).is_some_and(|file| file.attributes == *attributes);
            if !is_unchanged && is_stable(path) {
                findings.extend(self.read_file(path, attributes, check_rule));
            }
        }
        self.last_attributes = Some(current);
        self.is_known = true;
        findings
    }

    /// Reads a file that is new or has changed, or that could not be read before. `None` when there is nothing to report: the file
    /// has been removed since the scan, which the next scan reports, or it still cannot be read for the same reason.
    fn read_file(&mut self, path: &Path, attributes: &Attributes, check_rule: RuleCheck<'_>) -> Option<Finding> {
        let error = match self.read_objects(path, attributes, check_rule) {
            Ok(None) => return None,
            Ok(Some(objects)) => {
                let count = objects.len();
                self.rejected.remove(path);
                self.files.insert(path.to_owned(), FileState { attributes: attributes.clone(), objects });
                return Some(Finding::Accepted(path.to_owned(), count));
            }
            Err(error) => error,
        };
        let attributes = match error.kind() {
            FileErrorKind::Unreadable => Err(error.clone()),
            FileErrorKind::Invalid => attributes.clone(),
        };
        let is_first = self.rejected.insert(path.to_owned());
        let file = self
            .files
            .entry(path.to_owned())
            .or_insert(FileState { attributes: Ok(Signature::default()), objects: Vec::new() });
        let is_reported = !is_first && file.attributes == attributes;
        file.attributes = attributes;
        (!is_reported).then(|| Finding::Rejected(path.to_owned(), error))
    }

    /// The objects of a file; `None` when the file does not exist any more.
    fn read_objects(
        &self,
        path: &Path,
        attributes: &Attributes,
        check_rule: RuleCheck<'_>,
    ) -> Result<Option<Vec<Object>>, FileError> {
        attributes.as_ref().map_err(FileError::clone)?;
        let bytes = match read_bounded(path, FILE_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::NotFound => Ok(None),
                    // `read_bounded` reports in this way what is not a matter of the file system.
                    io::ErrorKind::Other => Err(FileError::Unsuitable(error.to_string())),
                    _ => Err(FileError::Unreadable(error.to_string())),
                };
            }
        };
        let text = String::from_utf8(bytes).map_err(|_| FileError::NotUtf8)?;
        Ok(Some(manifest::read(&text, &self.path, check_rule)?))
    }
}

/// The manifest files of a folder with their attributes. Skips hidden files, and files that are removed during the scan.
///
/// # Errors
/// When the folder itself cannot be listed. An entry whose attributes cannot be read is not missing: it has the error.
fn attributes(folder: &Path) -> io::Result<BTreeMap<PathBuf, Attributes>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let suffix = path.extension().and_then(|suffix| suffix.to_str()).unwrap_or_default();
        if is_hidden || !SUFFIXES.contains(&suffix) {
            continue;
        }
        let attributes = match fs::metadata(&path) {
            Ok(metadata) => Ok((
                metadata.ino(),
                metadata.size(),
                metadata.mtime(),
                metadata.mtime_nsec(),
                metadata.ctime(),
                metadata.ctime_nsec(),
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(FileError::DanglingLink),
            Err(error) => Err(FileError::Unreadable(error.to_string())),
        };
        found.insert(path, attributes);
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
            folder.read_file(&path, &Ok(Signature::default()), &|_| Ok(())),
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
    fn a_folder_is_known_after_one_complete_scan() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("manifests");
        let mut folder = ManifestFolder::new(&path);
        assert!(matches!(folder.scan(&|_| Ok(())).as_slice(), [Finding::Unreadable(_)]));
        assert_eq!((folder.is_known(), folder.is_complete(), folder.scan(&|_| Ok(()))), (false, false, vec![]));
        assert!(folder.unreadable().unwrap().contains("No such file"), "{:?}", folder.unreadable());
        fs::create_dir(&path).unwrap();
        fs::write(path.join("a.yaml"), stream("one")).unwrap();
        assert_eq!(folder.scan(&|_| Ok(())), [Finding::Readable, Finding::Accepted(path.join("a.yaml"), 1)]);
        assert!(folder.is_known() && folder.is_complete() && folder.unreadable().is_none());
    }

    /// Entries that cannot be read, each with a part of the reason.
    fn bad_entries(folder: &Path) -> [(PathBuf, &'static str); 7] {
        let link = |target: &str, name: &str| {
            std::os::unix::fs::symlink(target, folder.join(name)).unwrap();
            folder.join(name)
        };
        fs::create_dir(folder.join("folder.yaml")).unwrap();
        let pipe = folder.join("pipe.yaml");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        [
            (link("loop.yaml", "loop.yaml"), "symbolic link"),
            (link("/etc/passwd/x", "not-a-folder.yaml"), "Not a directory"),
            (link(&"n".repeat(300), "long.yaml"), "name too long"),
            (link("nowhere", "nowhere.yaml"), "does not exist"),
            (link("/dev/zero", "device.yaml"), "not a regular file"),
            (folder.join("folder.yaml"), "not a regular file"),
            (pipe, "not a regular file"),
        ]
    }

    #[test]
    fn an_entry_that_cannot_be_read_is_rejected_and_the_others_are_followed() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("a.yaml"), stream("one")).unwrap();
        let bad = bad_entries(root.path());
        fs::write(root.path().join("z.yaml"), stream("two")).unwrap();
        let mut folder = ManifestFolder::new(root.path());
        let findings = folder.scan(&|_| Ok(()));
        assert_eq!(findings.len(), 2 + bad.len(), "{findings:?}");
        for (path, expected) in &bad {
            let is_rejected = |finding: &Finding| {
                matches!(finding, Finding::Rejected(file, error)
                if file == path && error.to_string().contains(expected))
            };
            assert!(findings.iter().any(is_rejected), "{}: {expected}\n{findings:#?}", path.display());
        }
        assert_eq!((folder.scan(&|_| Ok(())), names(&folder)), (vec![], vec!["one".to_owned(), "two".to_owned()]));
        assert!(folder.is_known() && !folder.is_complete());
        assert_eq!((folder.rejected().count, folder.rejected().first[0].as_str()), (7, "device.yaml"));

        fs::write(root.path().join("b.yaml"), stream("three")).unwrap();
        (0..2).for_each(|_| drop(folder.scan(&|_| Ok(()))));
        assert_eq!(names(&folder), ["one", "three", "two"], "a later file is followed");
        for (path, _) in &bad {
            fs::remove_file(path).or_else(|_| fs::remove_dir(path)).unwrap();
        }
        let removed = (0..2)
            .flat_map(|_| folder.scan(&|_| Ok(())))
            .filter(|finding| matches!(finding, Finding::Removed(_)))
            .count();
        assert_eq!((removed, folder.rejected().count, folder.is_complete()), (bad.len(), 0, true));
    }

    #[test]
    fn a_link_that_breaks_keeps_its_last_valid_content_until_it_is_mended_or_removed() {
        let root = tempfile::tempdir().unwrap();
        let (target, link) = (root.path().join("target"), root.path().join("a.yaml"));
        fs::write(&target, stream("one")).unwrap();
        std::os::unix::fs::symlink("target", &link).unwrap();
        let mut folder = ManifestFolder::new(root.path());
        folder.scan(&|_| Ok(()));
        fs::rename(&target, root.path().join("away")).unwrap();
        let findings: Vec<Finding> = (0..3).flat_map(|_| folder.scan(&|_| Ok(()))).collect();
        assert_eq!(findings, [Finding::Rejected(link.clone(), FileError::DanglingLink)]);
        assert_eq!(names(&folder), ["one"]);
        fs::rename(root.path().join("away"), &target).unwrap();
        assert_eq!(
            (0..3).flat_map(|_| folder.scan(&|_| Ok(()))).collect::<Vec<_>>(),
            [Finding::Accepted(link.clone(), 1)]
        );
        fs::remove_file(&link).unwrap();
        assert_eq!((0..3).flat_map(|_| folder.scan(&|_| Ok(()))).collect::<Vec<_>>(), [Finding::Removed(link)]);
        assert!(names(&folder).is_empty());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_tried_again_without_a_change_of_its_attributes() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.yaml");
        fs::write(&path, stream("one")).unwrap();
        let mut folder = ManifestFolder::new(root.path());
        folder.scan(&|_| Ok(()));
        let unreadable = Err(FileError::Unreadable("input/output error".into()));
        assert!(matches!(folder.read_file(&path, &unreadable, &|_| Ok(())), Some(Finding::Rejected(..))));
        assert_eq!((folder.read_file(&path, &unreadable, &|_| Ok(())), names(&folder)), (None, vec!["one".to_owned()]));
        assert_eq!(folder.scan(&|_| Ok(())), [Finding::Accepted(path, 1)]);
    }

    #[test]
    fn a_panic_while_one_file_is_read_rejects_this_file() {
        fn check(rule: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            assert_ne!(rule, "\"reject\"", "injected for a test");
            Ok(())
        }
        let root = tempfile::tempdir().unwrap();
        for (name, verdict) in [("a", "pass"), ("b", "reject"), ("c", "none")] {
            let text = stream(name).replace("model: m", &format!("model: m, verdict: '\"{verdict}\"'"));
            fs::write(root.path().join(format!("{name}.yaml")), text).unwrap();
        }
        let mut folder = ManifestFolder::new(root.path());
        let findings = folder.scan(&check);
        let [Finding::Accepted(..), Finding::Rejected(path, error), Finding::Accepted(..)] = findings.as_slice() else {
            panic!("{findings:?}")
        };
        assert!(path.ends_with("b.yaml") && error.to_string().contains("panicked"), "{error}");
        assert_eq!(names(&folder), ["a", "c"]);
    }

    #[test]
    fn ten_thousand_rejected_files_are_counted() {
        let root = tempfile::tempdir().unwrap();
        (0..10_000).for_each(|number| fs::write(root.path().join(format!("{number}.yaml")), "kind: Pod\n").unwrap());
        let mut folder = ManifestFolder::new(root.path());
        assert_eq!(folder.scan(&|_| Ok(())).len(), 10_000);
        let rejected = folder.rejected();
        assert_eq!((rejected.count, rejected.first.len(), folder.scan(&|_| Ok(())).len()), (10_000, 5, 0));
        assert_eq!(
            rejected.to_string(),
            "10000 manifest files are rejected: 0.yaml, 1.yaml, 10.yaml, 100.yaml, 1000.yaml, ..."
        );
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
