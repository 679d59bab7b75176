//! The model store: a blob is complete or absent after any kill or damage, and the versions that are needed are never
//! evicted.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lineside_tests::agent::{Agent, lineside};
use lineside_tests::hostile::Random;
use lineside_tests::process::{output_text, run_with_input};
use lineside_tests::site::{
    TestSite, failed_inspections, iterations, large_model, manifest_with_source, model_status, status,
    wait_until_serving, with_other_digest,
};
use lineside_tests::wait::until_long;
use lineside_tests::{model_manifest, utf8};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// An offline site whose store contains version 1 of `parts`, and the digest of the model.
fn site_with_stored_model() -> (TestSite, String) {
    let site = TestSite::offline();
    let digest = site.write("parts.onnx", &large_model(1, 1));
    site.apply("model.yaml", &manifest(1, &digest));
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    assert!(agent.terminate().success());
    (site, digest)
}

/// A manifest for `parts` with the source `parts.onnx` and this digest.
fn manifest(version: u64, digest: &str) -> String {
    manifest_with_source("parts", version, &json!({"uri": "file:../parts.onnx", "digest": digest}), "")
}

/// Kills the agent.
fn kill(agent: &mut Agent) {
    agent.signal("KILL");
    agent.wait();
}

/// Waits for a random time, so that a kill hits a random moment.
fn pause(random: &mut Random, max_ms: usize) {
    std::thread::park_timeout(Duration::from_millis(random.below(max_ms) as u64));
}

/// Flips one bit in the middle of a file.
fn flip_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn the_store_command_lists_pins_and_collects_versions() {
    let (site, digest) = site_with_stored_model();
    let list: Value = serde_json::from_str(&site.store_ok(&["ls", "--json"])).unwrap();
    let list = list.to_string();
    assert!(list.contains("\"parts\"") && list.contains(&digest), "{list}");
    let table = site.store_ok(&["ls"]);
    assert!(table.contains("parts") && table.contains(&digest["sha256:".len()..][..12]), "{table}");
    site.store_ok(&["verify"]);

    let is_pinned = || -> bool {
        let records = fs::read_dir(site.data().join("store/versions")).unwrap();
        let records = records.map(|entry| serde_json::from_slice(&fs::read(entry.unwrap().path()).unwrap()).unwrap());
        records.into_iter().any(|record: Value| record["name"] == "parts" && record["pinned"] == true)
    };
    assert!(!is_pinned());
    site.store_ok(&["pin", "parts:1"]);
    assert!(is_pinned());
    site.store_ok(&["gc"]);
    assert!(site.blob_path(&digest).exists(), "the version is pinned and last good");
    site.store_ok(&["unpin", "parts:1"]);
    assert!(!is_pinned());
    site.store_ok(&["gc"]);
    assert!(site.blob_path(&digest).exists(), "the version is last good");

    let (key, output) = (site.path("no-key"), site.path("bundle"));
    let export = ["export", "nobody", "--output", utf8(&output), "--key", utf8(&key)];
    for wrong in [&["pin", "parts:9"][..], &["unpin", "nobody:1"], &export] {
        let output = site.store(wrong);
        assert_eq!(output.status.code(), Some(1), "{wrong:?}: {}", output_text(&output));
        assert!(!output.stderr.is_empty(), "{wrong:?} gives no reason");
    }
    assert_eq!(site.store(&["polish"]).status.code(), Some(64));
}

#[test]
fn a_damaged_blob_is_reported_set_aside_and_fetched_again() {
    let (site, digest) = site_with_stored_model();
    flip_byte(&site.blob_path(&digest));
    let output = site.store(&["verify"]);
    assert_eq!(output.status.code(), Some(1), "{}", output_text(&output));
    assert!(output_text(&output).contains(&digest["sha256:".len()..][..12]), "{}", output_text(&output));
    site.verify_blobs();
    site.store_ok(&["verify"]);
    let mut agent = site.start(&[]);
    assert_eq!(wait_until_serving(&agent, "parts", 1)["serving"]["digest"], digest);
    assert!(site.blob_path(&digest).exists(), "the blob was fetched again");
    site.verify_blobs();
    assert!(agent.terminate().success());

    // Damage that `verify` has not found before is not loaded either.
    flip_byte(&site.blob_path(&digest));
    let mut agent = site.start(&[]);
    assert_eq!(wait_until_serving(&agent, "parts", 1)["serving"]["digest"], digest);
    site.verify_blobs();
    assert!(agent.terminate().success());
}

#[test]
fn a_signed_bundle_moves_a_version_to_an_offline_node_and_altered_ones_are_rejected() {
    let (site, digest) = site_with_stored_model();
    for name in ["key", "untrusted"] {
        assert!(lineside(&["keygen", utf8(&site.path(name))]).status.success());
    }
    let (key, public, untrusted) = (site.path("key"), site.path("key.pub"), site.path("untrusted.pub"));
    let bundle = site.path("bundle");
    site.store_ok(&["export", "parts:1", "--output", utf8(&bundle), "--key", utf8(&key)]);
    let manifest = bundle.join("bundle.json");
    let blob = bundle.join("blobs/sha256").join(&digest["sha256:".len()..]);
    assert!(blob.exists());

    let other = TestSite::offline();
    let import = |keys: &Path| other.store(&["import", utf8(&bundle), "--trusted-keys", utf8(keys)]);
    let expect_rejection = |what: &str, keys: &Path| {
        let output = import(keys);
        assert_eq!(output.status.code(), Some(1), "{what}: {}", output_text(&output));
        assert!(!output.stderr.is_empty(), "{what}: no reason is given");
        assert!(other.blobs().is_empty(), "{what}: a blob was imported");
    };
    expect_rejection("another key", &untrusted);
    let good = fs::read(&manifest).unwrap();
    let envelope: Value = serde_json::from_slice(&good).unwrap();
    let altered = |what: &str, change: &dyn Fn(&mut Value)| {
        let mut envelope = envelope.clone();
        change(&mut envelope);
        fs::write(&manifest, envelope.to_string()).unwrap();
        expect_rejection(what, &public);
    };
    altered("unsigned", &|envelope| envelope["signatures"] = json!([]));
    altered("another type", &|envelope| envelope["payloadType"] = json!("text/plain"));
    altered("another payload", &|envelope| {
        let payload =
            run_with_input("openssl", &["base64", "-d", "-A"], envelope["payload"].as_str().unwrap().as_bytes());
        let payload = String::from_utf8(payload).unwrap().replace("parts", "carts");
        let encoded = run_with_input("openssl", &["base64", "-A"], payload.as_bytes());
        envelope["payload"] = json!(String::from_utf8(encoded).unwrap());
    });
    fs::write(&manifest, "{").unwrap();
    expect_rejection("no JSON", &public);
    fs::write(&manifest, &good).unwrap();
    flip_byte(&blob);
    expect_rejection("another blob", &public);
    flip_byte(&blob);

    let output = import(&public);
    assert!(output.status.success(), "{}", output_text(&output));
    other.verify_blobs();
    let source = json!({"uri": "file:/no/such/parts.onnx", "digest": digest});
    other.apply("model.yaml", &manifest_with_source("parts", 1, &source, ""));
    let mut agent = other.start(&[]);
    assert_eq!(wait_until_serving(&agent, "parts", 1)["serving"]["digest"], digest);
    assert!(agent.terminate().success());
}

#[test]
fn a_stored_model_serves_when_no_source_is_reachable() {
    let site = TestSite::offline();
    let digest = site.write("parts.onnx", &large_model(1, 1));
    site.apply("parts.yaml", &manifest(1, &digest));
    site.write("plain.onnx", &large_model(1, 2));
    site.apply("plain.yaml", &model_manifest("plain", 1, "file:../plain.onnx", ""));
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    wait_until_serving(&agent, "plain", 1);
    assert!(agent.terminate().success());
    fs::remove_file(site.path("parts.onnx")).unwrap();
    fs::remove_file(site.path("plain.onnx")).unwrap();

    let mut agent = site.start(&[]);
    assert_eq!(wait_until_serving(&agent, "parts", 1)["state"], "Ready");
    // Without a digest in the manifest, the last good version serves.
    wait_until_serving(&agent, "plain", 1);
    agent.wait_until_ready();
    assert!(agent.terminate().success());
}

#[test]
fn the_last_good_version_serves_until_the_desired_one_is_available() {
    let site = TestSite::with_broker_and_stream(20);
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    site.wait_for_new_results(3);
    assert!(agent.terminate().success());
    site.apply("model.yaml", &model_manifest("parts", 2, "file:../late.onnx", ""));
    let mut agent = site.start(&[]);
    let entry = agent.wait_for_event("last_good_serving");
    assert_eq!((&entry["model"], &entry["version"], &entry["wanted"]), (&json!("parts"), &json!(1), &json!(2)));
    let results = site.wait_for_new_results(5);
    assert!(results.iter().all(|result| result["model"]["version"] == 1), "{results:#?}");
    agent.wait_until_ready();
    assert_eq!(model_status(&agent, "parts")["version"], 2);

    // An invalid file does not change that; a valid one does.
    site.write("late.onnx", b"not a model");
    site.wait_for_new_results(20);
    assert_eq!(model_status(&agent, "parts")["serving"]["version"], 1);
    site.write("late.onnx", &with_other_digest(&fs::read(site.path("parts.onnx")).unwrap(), 2));
    wait_until_serving(&agent, "parts", 2);
    assert_eq!(failed_inspections(&agent), 0.0);
    assert!(agent.terminate().success());
}

#[test]
fn kills_during_a_download_never_leave_a_blob_with_a_wrong_digest() {
    let kills = iterations("LINESIDE_EXPERIMENT_KILLS", 10);
    let site = TestSite::offline();
    let mut random = Random::new(17);
    let mut last = String::new();
    for version in 1..=kills {
        last = site.write("parts.onnx", &large_model(8, version));
        site.apply("model.yaml", &manifest(version, &last));
        let mut agent = site.start(&[]);
        pause(&mut random, 800);
        kill(&mut agent);
        site.verify_blobs();
    }
    let mut agent = site.start(&[]);
    assert_eq!(wait_until_serving(&agent, "parts", kills)["serving"]["digest"], last);
    site.verify_blobs();
    eprintln!("{kills} kills; {} blobs are complete", site.blobs().len());
    assert!(agent.terminate().success());
}

#[test]
fn the_quota_never_evicts_a_serving_last_good_or_pinned_version() {
    const VERSIONS: u64 = 10;
    let flags = ["--store-mib-max", "16"];
    let site = TestSite::offline();
    let mut random = Random::new(25);
    let publish = |version: u64| {
        let digest = site.write("parts.onnx", &large_model(3, version));
        site.apply("model.yaml", &manifest(version, &digest));
        digest
    };
    let pinned = publish(1);
    let mut agent = site.start(&flags);
    wait_until_serving(&agent, "parts", 1);
    assert!(agent.terminate().success());
    site.store_ok(&["pin", "parts:1"]);

    let expect_needed_blobs = |serving: &str| {
        let last_good = fs::read_to_string(site.data().join("last-good.json")).unwrap();
        let last_good = last_good.split("sha256:").skip(1).map(|rest| &rest[..64]);
        for digest in [&pinned[..], serving].into_iter().chain(last_good) {
            assert!(site.blob_path(digest).exists(), "{digest} was evicted");
        }
        site.verify_blobs();
    };
    let mut agent = site.start(&flags);
    let mut serving = pinned.clone();
    for version in 2..=VERSIONS {
        let desired = publish(version);
        if version % 2 == 0 {
            // Once the agent has read the manifest, it is killed at a random time of the rollout.
            until_long("the new manifest", || (model_status(&agent, "parts")["version"] == version).then_some(()));
            pause(&mut random, 900);
            kill(&mut agent);
            // The new version may or may not serve already; the last good version is recorded.
            expect_needed_blobs(&pinned);
            agent = site.start(&flags);
        }
        assert_eq!(wait_until_serving(&agent, "parts", version)["serving"]["digest"], desired);
        serving = desired;
        expect_needed_blobs(&serving);
    }
    let store = until_long("the store to be within its quota", || {
        let store = status(&agent)["store"].clone();
        (store["bytes"].as_u64()? as f64 <= 0.85 * (16 * MIB) as f64).then_some(store)
    });
    assert_eq!(store["quotaBytes"], 16 * MIB);
    let on_disk: u64 = site.blobs().iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    eprintln!("{on_disk} bytes in {} blobs of {VERSIONS} versions", site.blobs().len());
    assert!(on_disk <= 16 * MIB && (site.blobs().len() as u64) < VERSIONS);
    expect_needed_blobs(&serving);
    assert!(agent.terminate().success());
    expect_needed_blobs(&serving);
}

#[test]
fn the_agent_serves_after_any_damage_to_the_index() {
    let (site, digest) = site_with_stored_model();
    let index = site.data().join("store/index");
    let mut random = Random::new(4);
    let mut rebuilt = 0;
    for round in 0..iterations("LINESIDE_EXPERIMENT_INDEX_DAMAGE", 10) {
        for file in files(&index) {
            let mut bytes = fs::read(&file).unwrap();
            damage(&mut bytes, round, &mut random);
            fs::write(&file, bytes).unwrap();
        }
        let mut agent = site.start(&[]);
        assert_eq!(wait_until_serving(&agent, "parts", 1)["serving"]["digest"], digest);
        let state = status(&agent)["store"]["index"].as_str().unwrap().to_owned();
        assert!(["ok", "rebuilt", "off"].contains(&&state[..]), "{state}");
        rebuilt += agent.events("store_index_rebuilt").len();
        assert!(agent.terminate().success());
        assert!(site.store_ok(&["ls", "--json"]).contains(&digest));
    }
    eprintln!("the index was rebuilt {rebuilt} times");
    assert!(rebuilt > 0);
    site.verify_blobs();
}

/// All files in a folder, recursively.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries
        .flat_map(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() { files(&path) } else { vec![path] }
        })
        .collect()
}

/// Damages a file: random content, truncation, zeros, flipped bits or no content, depending on the round.
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
