use super::*;

fn store(root: &Path) -> Store {
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
    let mut partial = store.partial(&digest).unwrap();
    partial.append(bytes).unwrap();
    partial.finish().unwrap();
    digest
}

#[test]
fn a_blob_is_there_whole_or_not_at_all() {
    let root = tempfile::tempdir().unwrap();
    let store = store(root.path());
    let wanted = Digest::of(b"right");
    let mut partial = store.partial(&wanted).unwrap();
    partial.append(b"wrong").unwrap();
    assert!(store.blob(&wanted).is_none());
    assert!(matches!(partial.finish(), Err(StoreError::WrongDigest(_))));
    assert!(store.blob(&wanted).is_none());
    assert_eq!(store.usage().unwrap().bytes, 0, "nothing of it is kept");
    assert_eq!(put(&store, b"right"), wanted);
    assert_eq!(store.read(&wanted, 5).unwrap(), b"right");

    fs::write(store.blob_path(&wanted), b"rotten").unwrap();
    assert!(store.read(&wanted, 100).unwrap_err().to_string().contains("damaged"));
    assert!(store.blob(&wanted).is_none(), "a damaged blob is removed");
}

#[test]
fn going_on_begins_with_what_is_safely_on_disk() {
    let root = tempfile::tempdir().unwrap();
    let store = store(root.path());
    let bytes: Vec<u8> = (0..1000u32).flat_map(u32::to_le_bytes).collect();
    let digest = Digest::of(&bytes);
    let mut partial = store.partial(&digest).unwrap();
    partial.begin("https://a", Some("\"1\""));
    partial.append(&bytes[..1000]).unwrap();
    partial.sync().unwrap();
    partial.append(&bytes[1000..1500]).unwrap();
    drop(partial);
    let mut partial = store.partial(&digest).unwrap();
    assert_eq!(partial.bytes(), 1000, "what was not synced does not count");
    assert_eq!(partial.validator("https://a"), Some("\"1\""));
    assert_eq!(partial.validator("https://b"), None, "another source begins anew");
    partial.append(&bytes[1000..]).unwrap();
    assert_eq!(partial.finish().unwrap(), 4000);
    assert_eq!(store.read(&digest, 4000).unwrap(), bytes);
    assert_eq!(fs::read_dir(root.path().join("partial")).unwrap().count(), 0);

    // A note that promises more than the file holds is not believed.
    let other = Digest::of(b"other");
    let mut partial = store.partial(&other).unwrap();
    partial.append(b"oth").unwrap();
    partial.sync().unwrap();
    drop(partial);
    fs::write(root.path().join("partial").join(other.hex()), b"o").unwrap();
    assert_eq!(store.partial(&other).unwrap().bytes(), 0);
}

#[test]
fn eviction_takes_the_versions_with_the_blob_and_spares_the_protected() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), 100, Index::off()).unwrap();
    let mut digests = Vec::new();
    for (number, byte) in (1..=3).zip(b"abc") {
        let bytes = vec![*byte; 28];
        digests.push(put(&store, &bytes));
        store.record(version("m", number, &bytes)).unwrap();
        let file = File::options().append(true).open(store.blob_path(&digests[number as usize - 1])).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(number)).unwrap();
    }
    assert!(store.pin("m", 1, true).unwrap() && !store.pin("m", 9, true).unwrap());
    let protected = BTreeSet::from([digests[1]]);
    let evicted = store.make_room(20, &protected).unwrap();
    assert_eq!(evicted.iter().map(|blob| blob.digest).collect::<Vec<_>>(), [digests[2]]);
    let left: Vec<u64> = store.versions().unwrap().iter().map(|version| version.version).collect();
    assert_eq!(left, [1, 2]);
    assert!(matches!(store.make_room(60, &protected), Err(StoreError::NoRoom(_))));
    assert_eq!(store.versions().unwrap().len(), 2, "what cannot help is not evicted either");

    // Recording a version again keeps its pin.
    store.record(version("m", 1, &[b'a'; 28])).unwrap();
    assert!(store.version("m", 1).unwrap().unwrap().pinned);
}

#[test]
fn the_index_gives_what_the_files_say_and_may_be_lost() {
    let root = tempfile::tempdir().unwrap();
    let folder = Store::index_folder(root.path());
    let check = |folder: &Path| index::probe(folder);
    let open = || {
        let (index, reason) = Index::open(&folder, check);
        (Store::open(root.path(), 1 << 20, index).unwrap(), reason)
    };
    let (store, reason) = open();
    assert_eq!((store.index_state(), reason), (IndexState::Ok, None));
    store.record(version("m", 1, b"x")).unwrap();
    assert_eq!(store.versions().unwrap().len(), 1);
    // Another process pins it: the file counts, not the entry.
    drop(store);
    self::store(root.path()).pin("m", 1, true).unwrap();
    let (store, _) = open();
    assert!(store.version("m", 1).unwrap().unwrap().pinned);
    drop(store);

    let refused = Index::open(&folder, |_| Err("damaged".into()));
    assert_eq!((refused.0.state(), refused.1.as_deref()), (IndexState::Rebuilt, Some("damaged")));
    drop(refused);
    fs::remove_dir_all(&folder).unwrap();
    fs::write(&folder, "no folder").unwrap();
    let (store, reason) = open();
    assert_eq!(store.index_state(), IndexState::Off);
    assert!(reason.is_some());
    assert_eq!(store.versions().unwrap().len(), 1);
}

#[test]
fn what_is_found_on_disk_may_be_anything() {
    let root = tempfile::tempdir().unwrap();
    let store = store(root.path());
    store.record(version("m", 1, b"x")).unwrap();
    let junk = root.path().join("versions").join(format!("{}.json", Digest::of(b"junk").hex()));
    fs::write(&junk, "{").unwrap();
    fs::write(root.path().join("versions/notes.txt"), "hello").unwrap();
    fs::write(root.path().join("versions/x.json.tmp"), "half").unwrap();
    assert_eq!(store.versions().unwrap().len(), 1);
    let failures_on_record = Digest::of(b"t");
    assert_eq!(store.recall::<FailureRecord>(NoteKind::FailureRecord, &failures_on_record), None);
    store
        .remember(
            NoteKind::FailureRecord,
            &failures_on_record,
            &FailureRecord { failures: 2, ..FailureRecord::default() },
        )
        .unwrap();
    assert_eq!(store.recall::<FailureRecord>(NoteKind::FailureRecord, &failures_on_record).unwrap().failures, 2);
    assert!(
        store.forget(NoteKind::FailureRecord, &failures_on_record).unwrap()
            && !store.forget(NoteKind::FailureRecord, &failures_on_record).unwrap()
    );
    store.tidy().unwrap();
    assert!(root.path().join("versions/notes.txt").exists() && !root.path().join("versions/x.json.tmp").exists());
}
