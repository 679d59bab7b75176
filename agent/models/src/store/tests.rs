//! Tests of the store on a real folder.

use std::time::Duration;

use super::*;

fn open(root: &Path) -> Store {
    Store::open(root, 100 << 20, Index::off()).unwrap()
}

fn version(name: &str, number: u64, bytes: &[u8]) -> VersionRecord {
    VersionRecord {
        name: name.into(),
        version: number,
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        source: "file:m.onnx".into(),
        fetched: "2026-11-24T00:00:00Z".into(),
        pinned: false,
        signature: None,
    }
}

fn put(store: &Store, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let mut partial = store.open_partial(&digest).unwrap();
    partial.append(bytes).unwrap();
    partial.commit().unwrap();
    digest
}

#[test]
fn a_blob_is_complete_and_verified_or_absent() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let digest = Digest::of(b"right");
    let mut partial = store.open_partial(&digest).unwrap();
    partial.append(b"wrong").unwrap();
    assert!(!store.contains_blob(&digest));
    let error = partial.commit().unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::DigestMismatch);
    assert!(error.to_string().contains(&digest.to_string()), "{error}");
    assert!(!store.contains_blob(&digest));
    assert_eq!(store.usage().unwrap().bytes, 0, "the received bytes are removed");
    assert_eq!(put(&store, b"right"), digest);
    assert_eq!(store.read_verified(&digest, 5).unwrap(), b"right");
    assert_eq!(store.read_verified(&digest, 4).unwrap_err().kind(), StoreErrorKind::Io);

    fs::write(store.blob_path(&digest), b"rotten").unwrap();
    let error = store.read_verified(&digest, 100).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::DigestMismatch);
    assert!(error.to_string().contains("damaged"), "{error}");
    assert!(!store.contains_blob(&digest), "a damaged blob is removed");
}

#[test]
fn verification_reports_every_blob_and_removes_damaged_ones() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let (intact, damaged) = (put(&store, b"intact"), put(&store, b"damaged"));
    fs::write(store.blob_path(&damaged), b"rotten").unwrap();
    let mut read_bytes = 0;
    let verified: BTreeMap<Digest, Result<u64>> =
        store.verify(|bytes| read_bytes += bytes).unwrap().into_iter().collect();
    assert_eq!((verified.len(), read_bytes), (2, 12));
    assert!(matches!(verified[&intact], Ok(6)));
    assert!(matches!(verified[&damaged], Err(StoreError::DamagedBlob { .. })));
    assert!(store.contains_blob(&intact) && !store.contains_blob(&damaged));
}

#[test]
fn a_partial_blob_resumes_at_its_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let bytes: Vec<u8> = (0..1000u32).flat_map(u32::to_le_bytes).collect();
    let digest = Digest::of(&bytes);
    let mut partial = store.open_partial(&digest).unwrap();
    partial.set_source("https://a", Some("\"1\""));
    partial.append(&bytes[..1000]).unwrap();
    partial.sync().unwrap();
    partial.append(&bytes[1000..1500]).unwrap();
    drop(partial);
    let mut partial = store.open_partial(&digest).unwrap();
    assert_eq!(partial.bytes(), 1000, "bytes after the checkpoint are discarded");
    assert_eq!(partial.validator("https://a"), Some("\"1\""));
    assert_eq!(partial.validator("https://b"), None, "another source starts from the beginning");
    partial.append(&bytes[1000..]).unwrap();
    assert_eq!(partial.commit().unwrap(), 4000);
    assert_eq!(store.read_verified(&digest, 4000).unwrap(), bytes);
    assert_eq!(fs::read_dir(root.path().join("partial")).unwrap().count(), 0);
}

#[test]
fn a_checkpoint_beyond_the_end_of_the_file_is_discarded() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let digest = Digest::of(b"other");
    let mut partial = store.open_partial(&digest).unwrap();
    partial.append(b"oth").unwrap();
    partial.sync().unwrap();
    drop(partial);
    fs::write(root.path().join("partial").join(digest.hex()), b"o").unwrap();
    assert_eq!(store.open_partial(&digest).unwrap().bytes(), 0);
}

#[test]
fn a_partial_blob_has_one_writer() {
    let root = tempfile::tempdir().unwrap();
    let (agent, command_line) = (open(root.path()), open(root.path()));
    let digest = Digest::of(b"x");
    let partial = agent.open_partial(&digest).unwrap();
    assert_eq!(command_line.open_partial(&digest).err().unwrap().kind(), StoreErrorKind::Locked);
    drop(partial);
    assert!(command_line.open_partial(&digest).is_ok());
}

#[test]
fn eviction_removes_versions_with_their_blob_and_keeps_protected_and_pinned_ones() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), 100, Index::off()).unwrap();
    let mut digests = Vec::new();
    for (number, byte) in (1..=3).zip(b"abc") {
        let bytes = vec![*byte; 28];
        digests.push(put(&store, &bytes));
        store.put_version(version("m", number, &bytes)).unwrap();
        let file = File::options().append(true).open(store.blob_path(&digests[number as usize - 1])).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(number)).unwrap();
    }
    assert!(store.set_pinned("m", 1, true).unwrap() && !store.set_pinned("m", 9, true).unwrap());
    let protected = BTreeSet::from([digests[1]]);
    let evicted = store.free_space(20, &protected).unwrap();
    assert_eq!(evicted.iter().map(|blob| blob.digest).collect::<Vec<_>>(), [digests[2]]);
    let left: Vec<u64> = store.versions().unwrap().iter().map(|version| version.version).collect();
    assert_eq!(left, [1, 2]);
    assert_eq!(store.free_space(60, &protected).unwrap_err().kind(), StoreErrorKind::NoSpace);
    assert_eq!(store.versions().unwrap().len(), 2, "nothing is evicted when eviction does not suffice");

    // Writing a version again keeps its pin.
    store.put_version(version("m", 1, &[b'a'; 28])).unwrap();
    assert!(store.version("m", 1).unwrap().unwrap().pinned);
}

#[test]
fn the_index_never_hides_a_change_of_the_files_and_may_be_lost() {
    let root = tempfile::tempdir().unwrap();
    let folder = Store::index_folder(root.path());
    let open_indexed = || {
        let (index, error) = Index::open(&folder, probe);
        (Store::open(root.path(), 1 << 20, index).unwrap(), error)
    };
    let (store, error) = open_indexed();
    assert!(error.is_none());
    assert_eq!(store.index_state(), IndexState::Ok);
    store.put_version(version("m", 1, b"x")).unwrap();
    assert_eq!(store.versions().unwrap().len(), 1);
    // Another process pins the version: the file is authoritative, not the entry.
    drop(store);
    open(root.path()).set_pinned("m", 1, true).unwrap();
    let (store, _) = open_indexed();
    assert!(store.version("m", 1).unwrap().unwrap().pinned);
    drop(store);

    let (index, error) = Index::open(&folder, |_| Err("exit status 101"));
    assert_eq!(index.state(), IndexState::Rebuilt);
    assert!(lineside_common::error_chain(&error.unwrap()).ends_with("damaged: exit status 101"));
    drop(index);
    fs::remove_dir_all(&folder).unwrap();
    fs::write(&folder, "not a folder").unwrap();
    let (store, error) = open_indexed();
    assert_eq!(store.index_state(), IndexState::Off);
    assert!(matches!(error, Some(IndexError::NotDeletable { .. } | IndexError::Sled(_))));
    assert_eq!(store.versions().unwrap().len(), 1);
}

#[test]
fn digest_records_are_read_written_and_deleted() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let key = Digest::of(b"t");
    assert_eq!(store.read_digest_record::<FailureRecord>(&key), None);
    let record = FailureRecord { failures: 2, ..FailureRecord::default() };
    store.write_digest_record(&key, &record).unwrap();
    assert_eq!(store.read_digest_record::<FailureRecord>(&key), Some(record));
    assert!(store.delete_digest_record(DigestRecordKind::Failure, &key).unwrap());
    assert!(!store.delete_digest_record(DigestRecordKind::Failure, &key).unwrap());
}

#[test]
fn unreadable_and_foreign_files_are_ignored() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    store.put_version(version("m", 1, b"x")).unwrap();
    let unreadable = root.path().join("versions").join(format!("{}.json", Digest::of(b"junk").hex()));
    fs::write(&unreadable, "{").unwrap();
    fs::write(root.path().join("versions/notes.txt"), "hello").unwrap();
    assert_eq!(store.versions().unwrap().len(), 1);
    let key = Digest::of(b"t");
    fs::write(root.path().join("trials").join(format!("{}.json", key.hex())), "[").unwrap();
    assert_eq!(store.read_digest_record::<FailureRecord>(&key), None);
    store.remove_stale_files().unwrap();
    assert!(root.path().join("versions/notes.txt").exists(), "a foreign file stays");
}

#[test]
fn stale_files_are_removed() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    fs::write(root.path().join("versions/x.json.tmp"), "half").unwrap();
    let kept = put(&store, b"kept");
    let admission = |name: &str, subject: &Digest| {
        let key = Digest::of(name.as_bytes());
        let path = root.path().join("verdicts").join(format!("{}.json", key.hex()));
        fs::write(&path, format!("{{\"digest\": \"{subject}\"}}")).unwrap();
        path
    };
    let (current, orphaned) = (admission("a", &kept), admission("b", &Digest::of(b"evicted")));
    let partial = |name: &str, age: Duration| {
        drop(store.open_partial(&Digest::of(name.as_bytes())).unwrap());
        let path = root.path().join("partial").join(Digest::of(name.as_bytes()).hex());
        File::options().append(true).open(&path).unwrap().set_modified(SystemTime::now() - age).unwrap();
        path
    };
    let (recent, abandoned) = (partial("c", Duration::ZERO), partial("d", Duration::from_secs(8 * 24 * 3600)));
    store.remove_stale_files().unwrap();
    assert!(!root.path().join("versions/x.json.tmp").exists());
    assert_eq!([&current, &orphaned, &recent, &abandoned].map(|path| path.exists()), [true, false, true, false]);
}

/// The names and fields below are those of the first build; a change of a type must not change them.
#[test]
fn records_of_an_earlier_build_are_read() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let digest = Digest::of(b"x");
    let versions = format!("versions/{}.json", Digest::of(b"m:1").hex());
    let text = format!(
        r#"{{"name": "m", "version": 1, "digest": "{digest}", "size": 1, "source": "file:m.onnx",
            "fetched": "2026-11-24T00:00:00Z", "pinned": true}}"#
    );
    fs::write(root.path().join(versions), text).unwrap();
    let expected = VersionRecord { pinned: true, ..version("m", 1, b"x") };
    assert_eq!(store.version("m", 1).unwrap(), Some(expected));
    let text = r#"{"failures": 3, "reason": "NaN", "at": "2026-11-24T00:00:00Z", "quarantined": true, "key": null}"#;
    fs::write(root.path().join(format!("trials/{}.json", digest.hex())), text).unwrap();
    let expected = FailureRecord {
        failures: 3,
        reason: "NaN".into(),
        at: "2026-11-24T00:00:00Z".into(),
        quarantined: true,
        key: None,
        unfinished_loads: 0,
        faults: vec![],
    };
    assert_eq!(store.read_digest_record::<FailureRecord>(&digest), Some(expected));
}
