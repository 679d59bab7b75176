//! The store: whole or not there, whatever is killed or damaged, and never without the versions that are needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lineside_tests::agent::{Agent, lineside};
use lineside_tests::hostile::Random;
use lineside_tests::model_manifest;
use lineside_tests::plant::{
    Plant, failures, feed, heavy, model, rounds, said, serves, sourced, status, twin, until_late, utf8,
};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A plant without a network whose store holds version 1 of `parts`; its digest.
fn stocked() -> (Plant, String) {
    let plant = Plant::offline();
    let digest = plant.put("parts.onnx", &heavy(1, 1));
    plant.apply("model.yaml", &wanting(1, &digest));
    let mut agent = plant.start(&[]);
    serves(&agent, "parts", 1);
    assert!(agent.end().success());
    (plant, digest)
}

/// A manifest for `parts`, from the file `parts.onnx` with this digest.
fn wanting(version: u64, digest: &str) -> String {
    sourced("parts", version, &json!({"uri": "file:../parts.onnx", "digest": digest}), "")
}

/// Ends the agent as a power cut would.
fn kill(agent: &mut Agent) {
    agent.signal("KILL");
    agent.wait();
}

/// A moment of random length.
fn pause(random: &mut Random, most_ms: usize) {
    std::thread::park_timeout(Duration::from_millis(random.below(most_ms) as u64));
}

/// Turns over one byte in the middle of a file.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn the_tool_lists_pins_and_tidies_what_the_agent_has_stored() {
    let (plant, digest) = stocked();
    let list: Value = serde_json::from_str(&plant.store_done(&["ls", "--json"])).unwrap();
    let list = list.to_string();
    assert!(list.contains("\"parts\"") && list.contains(&digest), "{list}");
    let table = plant.store_done(&["ls"]);
    assert!(table.contains("parts") && table.contains(&digest["sha256:".len()..][..12]), "{table}");
    plant.store_done(&["verify"]);

    let is_pinned = || -> bool {
        let records = fs::read_dir(plant.data().join("store/versions")).unwrap();
        let records = records.map(|entry| serde_json::from_slice(&fs::read(entry.unwrap().path()).unwrap()).unwrap());
        records.into_iter().any(|record: Value| record["name"] == "parts" && record["pinned"] == true)
    };
    assert!(!is_pinned());
    plant.store_done(&["pin", "parts:1"]);
    assert!(is_pinned());
    plant.store_done(&["gc"]);
    assert!(plant.blob(&digest).exists(), "pinned, and it served last");
    plant.store_done(&["unpin", "parts:1"]);
    assert!(!is_pinned());
    plant.store_done(&["gc"]);
    assert!(plant.blob(&digest).exists(), "it served last");

    let (key, output) = (plant.path("no-key"), plant.path("bundle"));
    let export = ["export", "nobody", "--output", utf8(&output), "--key", utf8(&key)];
    for wrong in [&["pin", "parts:9"][..], &["unpin", "nobody:1"], &export] {
        let output = plant.store(wrong);
        assert_eq!(output.status.code(), Some(1), "{wrong:?}: {}", said(&output));
        assert!(!output.stderr.is_empty(), "{wrong:?} says why");
    }
    assert_eq!(plant.store(&["polish"]).status.code(), Some(64));
}

#[test]
fn a_damaged_blob_is_named_set_aside_and_fetched_again() {
    let (plant, digest) = stocked();
    flip(&plant.blob(&digest));
    let output = plant.store(&["verify"]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains(&digest["sha256:".len()..][..12]), "{}", said(&output));
    plant.check_blobs();
    plant.store_done(&["verify"]);
    let mut agent = plant.start(&[]);
    assert_eq!(serves(&agent, "parts", 1)["serving"]["digest"], digest);
    assert!(plant.blob(&digest).exists(), "it came from its source again");
    plant.check_blobs();
    assert!(agent.end().success());

    // Damage that nobody has looked for does not serve either.
    flip(&plant.blob(&digest));
    let mut agent = plant.start(&[]);
    assert_eq!(serves(&agent, "parts", 1)["serving"]["digest"], digest);
    plant.check_blobs();
    assert!(agent.end().success());
}

#[test]
fn a_bundle_carries_a_version_to_a_node_without_network_and_nothing_else_is_let_in() {
    let (plant, digest) = stocked();
    for name in ["key", "stranger"] {
        assert!(lineside(&["keygen", utf8(&plant.path(name))]).status.success());
    }
    let (key, public, stranger) = (plant.path("key"), plant.path("key.pub"), plant.path("stranger.pub"));
    let bundle = plant.path("bundle");
    plant.store_done(&["export", "parts:1", "--output", utf8(&bundle), "--key", utf8(&key)]);
    let manifest = bundle.join("bundle.json");
    let blob = bundle.join("blobs/sha256").join(&digest["sha256:".len()..]);
    assert!(blob.exists());

    let other = Plant::offline();
    let import = |keys: &Path| other.store(&["import", utf8(&bundle), "--trusted-keys", utf8(keys)]);
    let refused = |what: &str, keys: &Path| {
        let output = import(keys);
        assert_eq!(output.status.code(), Some(1), "{what}: {}", said(&output));
        assert!(!output.stderr.is_empty(), "{what}: it says why");
        assert!(other.blobs().is_empty(), "{what}: nothing is let in");
    };
    refused("another key", &stranger);
    let good = fs::read(&manifest).unwrap();
    let envelope: Value = serde_json::from_slice(&good).unwrap();
    let altered = |what: &str, change: &dyn Fn(&mut Value)| {
        let mut envelope = envelope.clone();
        change(&mut envelope);
        fs::write(&manifest, envelope.to_string()).unwrap();
        refused(what, &public);
    };
    altered("unsigned", &|envelope| envelope["signatures"] = json!([]));
    altered("another type", &|envelope| envelope["payloadType"] = json!("text/plain"));
    altered("another payload", &|envelope| {
        let payload = feed("openssl", &["base64", "-d", "-A"], envelope["payload"].as_str().unwrap().as_bytes());
        let payload = String::from_utf8(payload).unwrap().replace("parts", "carts");
        let encoded = feed("openssl", &["base64", "-A"], payload.as_bytes());
        envelope["payload"] = json!(String::from_utf8(encoded).unwrap());
    });
    fs::write(&manifest, "{").unwrap();
    refused("no JSON", &public);
    fs::write(&manifest, &good).unwrap();
    flip(&blob);
    refused("another blob", &public);
    flip(&blob);

    let output = import(&public);
    assert!(output.status.success(), "{}", said(&output));
    other.check_blobs();
    let source = json!({"uri": "file:/no/such/parts.onnx", "digest": digest});
    other.apply("model.yaml", &sourced("parts", 1, &source, ""));
    let mut agent = other.start(&[]);
    assert_eq!(serves(&agent, "parts", 1)["serving"]["digest"], digest);
    assert!(agent.end().success());
}

#[test]
fn a_model_that_is_stored_serves_when_nothing_can_be_reached() {
    let plant = Plant::offline();
    let digest = plant.put("parts.onnx", &heavy(1, 1));
    plant.apply("parts.yaml", &wanting(1, &digest));
    plant.put("plain.onnx", &heavy(1, 2));
    plant.apply("plain.yaml", &model_manifest("plain", 1, "file:../plain.onnx", ""));
    let mut agent = plant.start(&[]);
    serves(&agent, "parts", 1);
    serves(&agent, "plain", 1);
    assert!(agent.end().success());
    fs::remove_file(plant.path("parts.onnx")).unwrap();
    fs::remove_file(plant.path("plain.onnx")).unwrap();

    let mut agent = plant.start(&[]);
    assert_eq!(serves(&agent, "parts", 1)["state"], "Ready");
    // Without a digest the version that served last is all there is to go by.
    serves(&agent, "plain", 1);
    agent.wait_ready();
    assert!(agent.end().success());
}

#[test]
fn the_last_good_version_serves_until_the_one_that_is_wanted_can_be_had() {
    let plant = Plant::with_stream(20);
    let mut agent = plant.start(&[]);
    serves(&agent, "parts", 1);
    plant.more_results(3);
    assert!(agent.end().success());
    plant.apply("model.yaml", &model_manifest("parts", 2, "file:../late.onnx", ""));
    let mut agent = plant.start(&[]);
    let entry = agent.wait_for_event("last_good_serving");
    assert_eq!((&entry["model"], &entry["version"], &entry["wanted"]), (&json!("parts"), &json!(1), &json!(2)));
    let results = plant.more_results(5);
    assert!(results.iter().all(|result| result["model"]["version"] == 1), "{results:#?}");
    agent.wait_ready();
    assert_eq!(model(&agent, "parts")["version"], 2);

    // A file that is no model does not change that; a good one does.
    plant.put("late.onnx", b"not a model");
    plant.more_results(20);
    assert_eq!(model(&agent, "parts")["serving"]["version"], 1);
    plant.put("late.onnx", &twin(&fs::read(plant.path("parts.onnx")).unwrap(), 2));
    serves(&agent, "parts", 2);
    assert_eq!(failures(&agent), 0.0);
    assert!(agent.end().success());
}

#[test]
fn whatever_is_killed_while_it_takes_a_model_in_a_wrong_digest_is_never_seen() {
    let kills = rounds("LINESIDE_EXPERIMENT_KILLS", 10);
    let plant = Plant::offline();
    let mut random = Random::new(17);
    let mut last = String::new();
    for version in 1..=kills {
        last = plant.put("parts.onnx", &heavy(8, version));
        plant.apply("model.yaml", &wanting(version, &last));
        let mut agent = plant.start(&[]);
        pause(&mut random, 800);
        kill(&mut agent);
        plant.check_blobs();
    }
    let mut agent = plant.start(&[]);
    assert_eq!(serves(&agent, "parts", kills)["serving"]["digest"], last);
    plant.check_blobs();
    eprintln!("{kills} kills; {} blobs are whole", plant.blobs().len());
    assert!(agent.end().success());
}

#[test]
fn the_quota_never_costs_a_version_that_serves_served_last_or_is_pinned() {
    const VERSIONS: u64 = 10;
    let flags = ["--store-mib-max", "16"];
    let plant = Plant::offline();
    let mut random = Random::new(25);
    let take = |version: u64| {
        let digest = plant.put("parts.onnx", &heavy(3, version));
        plant.apply("model.yaml", &wanting(version, &digest));
        digest
    };
    let pinned = take(1);
    let mut agent = plant.start(&flags);
    serves(&agent, "parts", 1);
    assert!(agent.end().success());
    plant.store_done(&["pin", "parts:1"]);

    let needed_are_there = |serving: &str| {
        let last_good = fs::read_to_string(plant.data().join("last-good.json")).unwrap();
        let last_good = last_good.split("sha256:").skip(1).map(|rest| &rest[..64]);
        for digest in [&pinned[..], serving].into_iter().chain(last_good) {
            assert!(plant.blob(digest).exists(), "{digest} is gone");
        }
        plant.check_blobs();
    };
    let mut agent = plant.start(&flags);
    let mut serving = pinned.clone();
    for version in 2..=VERSIONS {
        let wanted = take(version);
        if version % 2 == 0 {
            // Not before the change can have been seen, which takes two looks at the folder.
            std::thread::park_timeout(Duration::from_millis(700));
            pause(&mut random, 900);
            kill(&mut agent);
            // The new version may or may not have taken over; what served last is written down.
            needed_are_there(&pinned);
            agent = plant.start(&flags);
        }
        assert_eq!(serves(&agent, "parts", version)["serving"]["digest"], wanted);
        serving = wanted;
        needed_are_there(&serving);
    }
    let store = until_late("the store to be within its quota", || {
        let store = status(&agent)["store"].clone();
        (store["bytes"].as_u64()? as f64 <= 0.85 * (16 * MIB) as f64).then_some(store)
    });
    assert_eq!(store["quotaBytes"], 16 * MIB);
    let on_disk: u64 = plant.blobs().iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    eprintln!("{on_disk} bytes in {} blobs of {VERSIONS} versions", plant.blobs().len());
    assert!(on_disk <= 16 * MIB && (plant.blobs().len() as u64) < VERSIONS);
    needed_are_there(&serving);
    assert!(agent.end().success());
    needed_are_there(&serving);
}

#[test]
fn whatever_befalls_the_index_the_agent_starts_and_serves() {
    let (plant, digest) = stocked();
    let index = plant.data().join("store/index");
    let mut random = Random::new(4);
    let mut rebuilt = 0;
    for round in 0..rounds("LINESIDE_EXPERIMENT_INDEX_DAMAGE", 10) {
        for file in files(&index) {
            let mut bytes = fs::read(&file).unwrap();
            damage(&mut bytes, round, &mut random);
            fs::write(&file, bytes).unwrap();
        }
        let mut agent = plant.start(&[]);
        assert_eq!(serves(&agent, "parts", 1)["serving"]["digest"], digest);
        let state = status(&agent)["store"]["index"].as_str().unwrap().to_owned();
        assert!(["ok", "rebuilt", "off"].contains(&&state[..]), "{state}");
        rebuilt += agent.events("store_index_rebuilt").len();
        assert!(agent.end().success());
        assert!(plant.store_done(&["ls", "--json"]).contains(&digest));
    }
    eprintln!("the index was rebuilt {rebuilt} times");
    assert!(rebuilt > 0);
    plant.check_blobs();
}

/// All files in a folder and below it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries
        .flat_map(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() { files(&path) } else { vec![path] }
        })
        .collect()
}

/// Cuts off, empties, flips, or makes up bytes, in turn.
fn damage(bytes: &mut Vec<u8>, round: u64, random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let at = random.below(bytes.len());
    match round % 5 {
        0 => bytes.iter_mut().for_each(|byte| *byte = random.next() as u8),
        1 => bytes.truncate(at),
        2 => bytes[at..].fill(0),
        3 => (0..20).for_each(|_| {
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }),
        _ => bytes.clear(),
    }
}
