//! Who may say what runs: keys and signatures as openssl knows them, refusals by name, and no way back unasked.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use lineside_tests::agent::{Agent, lineside};
use lineside_tests::example;
use lineside_tests::plant::{Plant, digest, feed, model, refusal, said, serves, sourced, status, until_late, utf8};
use serde_json::{Value, json};

const PAYLOAD_TYPE: &str = "application/vnd.lineside.model.v1+json";

/// A plant without a network that has the bundled model as `parts.onnx`; the model's digest.
fn plant_with_model() -> (Plant, String) {
    let plant = Plant::offline();
    let digest = plant.put("parts.onnx", &fs::read(example("surface-defects.onnx")).unwrap());
    (plant, digest)
}

/// A key made by `lineside keygen`; the public one lies beside it in `<name>.pub`.
fn keygen(plant: &Plant, name: &str) -> PathBuf {
    let path = plant.path(name);
    let output = lineside(&["keygen", utf8(&path)]);
    assert!(output.status.success(), "{}", said(&output));
    path
}

fn public(key: &Path) -> PathBuf {
    key.with_extension("pub")
}

/// What `lineside sign --json` prints.
fn sign(plant: &Plant, name: &str, version: u64, key: &Path, more: &[&str]) -> Value {
    let (model, version) = (plant.path("parts.onnx"), version.to_string());
    let arguments = ["sign", utf8(&model), "--name", name, "--version", &version, "--key", utf8(key), "--json"];
    let output = lineside(&[&arguments[..], more].concat());
    assert!(output.status.success(), "{}", said(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A manifest for `parts.onnx` with a signature, or with none where it is null.
fn signed(name: &str, version: u64, digest: &str, signature: &Value, more: &str) -> String {
    let mut source = json!({"uri": "file:../parts.onnx", "digest": digest});
    if !signature.is_null() {
        source["signature"] = signature.clone();
    }
    sourced(name, version, &source, more)
}

/// The bytes that a DSSE signature is over.
fn pae(payload: &[u8]) -> Vec<u8> {
    let head = format!("DSSEv1 {} {PAYLOAD_TYPE} {} ", PAYLOAD_TYPE.len(), payload.len());
    [head.as_bytes(), payload].concat()
}

fn base64(bytes: &[u8]) -> String {
    String::from_utf8(feed("openssl", &["base64", "-A"], bytes)).unwrap()
}

fn from_base64(text: &Value) -> Vec<u8> {
    feed("openssl", &["base64", "-d", "-A"], text.as_str().unwrap().as_bytes())
}

/// SHA-256 of a public key's 32 raw bytes, which are the last of its DER form.
fn key_id(public: &Path) -> String {
    let der = feed("openssl", &["pkey", "-pubin", "-in", utf8(public), "-outform", "DER"], b"");
    digest(&der[der.len() - 32..])["sha256:".len()..].to_owned()
}

/// An envelope that openssl has signed.
fn signed_by_openssl(key: &Path, payload: &Value) -> Value {
    let payload = payload.to_string();
    let folder = tempfile::tempdir().unwrap();
    let message = folder.path().join("message");
    fs::write(&message, pae(payload.as_bytes())).unwrap();
    let signature = feed("openssl", &["pkeyutl", "-sign", "-inkey", utf8(key), "-rawin", "-in", utf8(&message)], b"");
    json!({
        "payloadType": PAYLOAD_TYPE,
        "payload": base64(payload.as_bytes()),
        "signatures": [{"keyid": key_id(&public(key)), "sig": base64(&signature)}],
    })
}

/// What `parts` says of itself in a payload.
fn statement(plant: &Plant, name: &str, version: u64, digest: &str) -> Value {
    let size = fs::metadata(plant.path("parts.onnx")).unwrap().len();
    json!({"name": name, "version": version, "digest": digest, "size": size})
}

#[test]
fn keys_are_files_that_openssl_reads_and_nothing_overwrites() {
    let plant = Plant::offline();
    let key = keygen(&plant, "key");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let derived = feed("openssl", &["pkey", "-in", utf8(&key), "-pubout"], b"");
    let written = feed("openssl", &["pkey", "-pubin", "-in", utf8(&public(&key)), "-pubout"], b"");
    assert_eq!(derived, written, "the two belong together");
    let before = (fs::read(&key).unwrap(), fs::read(public(&key)).unwrap());
    let output = lineside(&["keygen", utf8(&key)]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains(utf8(&key)), "it names the file: {}", said(&output));
    assert_eq!(before, (fs::read(&key).unwrap(), fs::read(public(&key)).unwrap()));
    assert_ne!(fs::read(keygen(&plant, "other")).unwrap(), before.0, "every key is another one");
}

#[test]
fn signatures_are_dsse_which_openssl_verifies_and_makes() {
    let (plant, digest) = plant_with_model();
    let key = keygen(&plant, "key");
    let envelope = sign(&plant, "parts", 3, &key, &["--expires", "2099-12-31"]);
    assert_eq!(envelope["payloadType"], PAYLOAD_TYPE);
    assert_eq!(envelope["signatures"][0]["keyid"], key_id(&public(&key)));
    let payload = from_base64(&envelope["payload"]);
    let (message, signature) = (plant.path("message"), plant.path("signature"));
    fs::write(&message, pae(&payload)).unwrap();
    fs::write(&signature, from_base64(&envelope["signatures"][0]["sig"])).unwrap();
    let (key_file, message, signature) = (public(&key), utf8(&message), utf8(&signature));
    let verify = ["pkeyutl", "-verify", "-pubin", "-inkey", utf8(&key_file), "-rawin", "-in", message];
    feed("openssl", &[&verify[..], &["-sigfile", signature]].concat(), b"");
    let mut says: Value = serde_json::from_slice(&payload).unwrap();
    assert!(says["expires"].as_str().unwrap().starts_with("2099-12-31"), "{says}");
    says.as_object_mut().unwrap().remove("expires");
    assert_eq!(says, statement(&plant, "parts", 3, &digest));

    // For people it prints what goes into the manifest.
    let model = plant.path("parts.onnx");
    let output = lineside(&["sign", utf8(&model), "--name", "parts", "--version", "3", "--key", utf8(&key)]);
    let yaml = String::from_utf8_lossy(&output.stdout);
    for expected in [digest.as_str(), "signature", "payload", "size"] {
        assert!(yaml.contains(expected), "{expected} in {yaml}");
    }

    // A key and a signature that are none of our making.
    let foreign = plant.path("foreign");
    feed("openssl", &["genpkey", "-algorithm", "ed25519", "-out", utf8(&foreign)], b"");
    feed("openssl", &["pkey", "-in", utf8(&foreign), "-pubout", "-out", utf8(&public(&foreign))], b"");
    let envelope = signed_by_openssl(&foreign, &statement(&plant, "parts", 1, &digest));
    plant.apply("model.yaml", &signed("parts", 1, &digest, &envelope, ""));
    let mut agent = plant.start(&["--trusted-keys", utf8(&public(&foreign))]);
    assert_eq!(serves(&agent, "parts", 1)["state"], "Ready");
    assert!(agent.end().success());
}

#[test]
fn what_is_not_signed_for_exactly_this_version_does_not_load() {
    let (plant, digest) = plant_with_model();
    let (key, stranger) = (keygen(&plant, "key"), keygen(&plant, "stranger"));
    let by_key = |payload: Value| signed_by_openssl(&key, &payload);
    let with = |field: &str, value: Value| {
        let mut payload = statement(&plant, field, 1, &digest);
        payload["name"] = json!(format!("other-{field}"));
        payload[field] = value;
        by_key(payload)
    };
    let mut altered = sign(&plant, "altered", 2, &key, &[]);
    altered["payload"] = json!(base64(statement(&plant, "altered", 1, &digest).to_string().as_bytes()));
    let mut nobody = sign(&plant, "nobody", 1, &key, &[]);
    nobody["signatures"] = json!([]);
    let mut other_type = sign(&plant, "other-type", 1, &key, &[]);
    other_type["payloadType"] = json!("application/json");
    let cases = [
        ("unsigned", Value::Null, "sign"),
        ("nobody", nobody, "sign"),
        ("stranger", sign(&plant, "stranger", 1, &stranger, &[]), "sign"),
        ("altered", altered, "sign"),
        ("other-type", other_type, "sign"),
        ("other-name", with("name", json!("somebody-else")), "somebody-else"),
        ("other-version", with("version", json!(2)), "version"),
        ("other-digest", with("digest", json!(format!("sha256:{}", "0".repeat(64)))), "sign"),
        ("other-size", with("size", json!(12)), ""),
        ("other-expires", with("expires", json!("2020-01-01T00:00:00Z")), "expire"),
    ];
    for (name, envelope, _) in &cases {
        plant.apply(&format!("{name}.yaml"), &signed(name, 1, &digest, envelope, ""));
    }
    plant.apply("good.yaml", &signed("good", 1, &digest, &sign(&plant, "good", 1, &key, &[]), ""));
    let mut agent = plant.start(&["--trusted-keys", utf8(&public(&key))]);
    serves(&agent, "good", 1);
    for (name, _, word) in &cases {
        let reason = refusal(&agent, name);
        assert!(reason.contains(word), "{name}: {reason}");
        assert!(model(&agent, name)["serving"].is_null(), "{name} serves");
    }
    assert!(agent.end().success());
}

#[test]
fn two_of_two_keys_have_to_sign_where_that_is_asked_for() {
    let (plant, digest) = plant_with_model();
    let (one, two) = (keygen(&plant, "one"), keygen(&plant, "two"));
    let trusted = plant.path("trusted");
    fs::create_dir(&trusted).unwrap();
    for key in [&one, &two] {
        fs::copy(public(key), trusted.join(public(key).file_name().unwrap())).unwrap();
    }
    let single = sign(&plant, "parts", 1, &one, &[]);
    let file = plant.path("envelope.json");
    fs::write(&file, single.to_string()).unwrap();
    let both = sign(&plant, "parts", 1, &two, &["--envelope", utf8(&file)]);
    assert_eq!(both["signatures"].as_array().unwrap().len(), 2, "{both}");
    assert_eq!(both["payload"], single["payload"]);
    let twice = sign(&plant, "twice", 1, &one, &[]);
    let mut doubled = twice.clone();
    doubled["signatures"] = json!([twice["signatures"][0], twice["signatures"][0]]);
    plant.apply("model.yaml", &signed("parts", 1, &digest, &single, ""));
    plant.apply("twice.yaml", &signed("twice", 1, &digest, &doubled, ""));
    let mut agent = plant.start(&["--trusted-keys", utf8(&trusted), "--signature-threshold", "2"]);
    for name in ["parts", "twice"] {
        let reason = refusal(&agent, name);
        assert!(reason.contains("sign"), "{name}: {reason}");
    }
    plant.apply("model.yaml", &signed("parts", 1, &digest, &both, ""));
    serves(&agent, "parts", 1);
    assert!(model(&agent, "twice")["serving"].is_null());
    assert!(agent.end().success());
}

#[test]
fn a_signature_that_expires_is_reported_and_the_running_version_goes_on() {
    // Long enough to start and vet meanwhile on a busy machine.
    const AHEAD: &str = "+15 seconds";
    let (plant, digest) = plant_with_model();
    let key = keygen(&plant, "key");
    let public = public(&key);
    let flags = ["--trusted-keys", utf8(&public)];
    let expires = feed("date", &["-u", "-d", AHEAD, "+%Y-%m-%dT%H:%M:%SZ"], b"");
    let expires = String::from_utf8(expires).unwrap();
    let expires = expires.trim();
    let envelope = sign(&plant, "parts", 1, &key, &["--expires", expires]);
    plant.apply("model.yaml", &signed("parts", 1, &digest, &envelope, ""));
    let mut agent = plant.start(&flags);
    let parts = serves(&agent, "parts", 1);
    assert!(parts["signatureExpires"].as_str().unwrap().starts_with(expires.trim_end_matches('Z')), "{parts}");
    assert!(agent.metric("lineside_model_signature_expiry_timestamp_seconds{model=\"parts\",version=\"1\"}") > 0.0);
    let is_reported = |agent: &Agent| {
        until_late("the expiry to be reported", || {
            let status = status(agent);
            let mut conditions = status["conditions"].as_array()?.iter();
            conditions
                .find(|condition| condition["reason"] == "SignatureExpired" && condition["status"] == "True")
                .cloned()
        });
    };
    is_reported(&agent);
    agent.wait_for_event("signature_expired");
    assert_eq!(model(&agent, "parts")["serving"]["version"], 1);
    agent.wait_ready();
    assert!(agent.end().success());

    let mut agent = plant.start(&flags);
    serves(&agent, "parts", 1);
    is_reported(&agent);

    // A version that does not run yet has no such grace.
    let late = sign(&plant, "late", 1, &key, &["--expires", "2099-01-01"]);
    plant.apply("late.yaml", &signed("late", 1, &digest, &late, ""));
    serves(&agent, "late", 1);
    let mut payload = statement(&plant, "late", 2, &digest);
    payload["expires"] = json!(expires);
    plant.apply("late.yaml", &signed("late", 2, &digest, &signed_by_openssl(&key, &payload), ""));
    let reason = until_late("the refusal of version 2", || {
        let late = model(&agent, "late");
        (late["version"] == 2 && late["state"] == "Failed")
            .then(|| late["reason"].as_str().unwrap_or_default().to_owned())
    });
    assert!(reason.contains("expire"), "{reason}");
    assert_eq!(model(&agent, "late")["serving"]["version"], 1);
    assert!(agent.end().success());
}

#[test]
fn an_older_version_is_refused_after_a_restart_too_unless_it_is_asked_for() {
    let (plant, digest) = plant_with_model();
    let key = keygen(&plant, "key");
    let (public, asked) = (public(&key), "  rollback: true\n");
    let flags = ["--trusted-keys", utf8(&public)];
    let version = |version: u64, more: &str| {
        plant.apply("model.yaml", &signed("parts", version, &digest, &sign(&plant, "parts", version, &key, &[]), more));
    };
    let is_refused = |agent: &Agent| {
        let reason = refusal(agent, "parts");
        assert!(reason.contains("lower") || reason.contains("rollback"), "{reason}");
    };
    version(2, "");
    let mut agent = plant.start(&flags);
    serves(&agent, "parts", 2);
    assert!(agent.end().success());

    version(1, "");
    for _ in 0..2 {
        let mut agent = plant.start(&flags);
        is_refused(&agent);
        serves(&agent, "parts", 2);
        assert!(agent.end().success());
    }

    // To take the model away for a while is no way round.
    plant.withdraw("model.yaml");
    let mut agent = plant.start(&flags);
    agent.wait_ready();
    until_late("the model to be gone", || model(&agent, "parts").is_null().then_some(()));
    version(1, "");
    is_refused(&agent);

    version(1, asked);
    serves(&agent, "parts", 1);
    assert!(agent.end().success());
    let mut agent = plant.start(&flags);
    assert_eq!(serves(&agent, "parts", 1)["state"], "Ready");
    assert!(agent.end().success());
}
