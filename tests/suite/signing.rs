//! Model signatures: keys and signatures that openssl understands, rejections with their reason, and downgrade
//! protection.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use lineside_tests::agent::{Agent, lineside};
use lineside_tests::process::{output_text, run_with_input};
use lineside_tests::site::{
    TestSite, digest, manifest_with_source, model_status, status, wait_for_rejection, wait_until_serving,
};
use lineside_tests::wait::until_long;
use lineside_tests::{example, utf8};
use serde_json::{Value, json};

const PAYLOAD_TYPE: &str = "application/vnd.lineside.model.v1+json";

/// An offline site with the bundled model as `parts.onnx`, and the digest of the model.
fn site_with_model() -> (TestSite, String) {
    let site = TestSite::offline();
    let digest = site.write("parts.onnx", &fs::read(example("surface-defects.onnx")).unwrap());
    (site, digest)
}

/// A key created with `lineside keygen`; the public key is written to `<name>.pub`.
fn keygen(site: &TestSite, name: &str) -> PathBuf {
    let path = site.path(name);
    let output = lineside(&["keygen", utf8(&path)]);
    assert!(output.status.success(), "{}", output_text(&output));
    path
}

fn public(key: &Path) -> PathBuf {
    key.with_extension("pub")
}

/// The output of `lineside sign --json`.
fn sign(site: &TestSite, name: &str, version: u64, key: &Path, more: &[&str]) -> Value {
    let (model, version) = (site.path("parts.onnx"), version.to_string());
    let arguments = ["sign", utf8(&model), "--name", name, "--version", &version, "--key", utf8(key), "--json"];
    let output = lineside(&[&arguments[..], more].concat());
    assert!(output.status.success(), "{}", output_text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A manifest for `parts.onnx` with a signature, or without one if it is null.
fn signed(name: &str, version: u64, digest: &str, signature: &Value, more: &str) -> String {
    let mut source = json!({"uri": "file:../parts.onnx", "digest": digest});
    if !signature.is_null() {
        source["signature"] = signature.clone();
    }
    manifest_with_source(name, version, &source, more)
}

/// The pre-authentication encoding: the bytes that a DSSE signature covers.
fn pae(payload: &[u8]) -> Vec<u8> {
    let head = format!("DSSEv1 {} {PAYLOAD_TYPE} {} ", PAYLOAD_TYPE.len(), payload.len());
    [head.as_bytes(), payload].concat()
}

fn base64(bytes: &[u8]) -> String {
    String::from_utf8(run_with_input("openssl", &["base64", "-A"], bytes)).unwrap()
}

fn from_base64(text: &Value) -> Vec<u8> {
    run_with_input("openssl", &["base64", "-d", "-A"], text.as_str().unwrap().as_bytes())
}

/// SHA-256 of the 32 raw bytes of a public key, which are the last ones of its DER encoding.
fn key_id(public: &Path) -> String {
    let der = run_with_input("openssl", &["pkey", "-pubin", "-in", utf8(public), "-outform", "DER"], b"");
    digest(&der[der.len() - 32..])["sha256:".len()..].to_owned()
}

/// An envelope that is signed with openssl.
fn signed_by_openssl(key: &Path, payload: &Value) -> Value {
    let payload = payload.to_string();
    let folder = tempfile::tempdir().unwrap();
    let message = folder.path().join("message");
    fs::write(&message, pae(payload.as_bytes())).unwrap();
    let signature =
        run_with_input("openssl", &["pkeyutl", "-sign", "-inkey", utf8(key), "-rawin", "-in", utf8(&message)], b"");
    json!({
        "payloadType": PAYLOAD_TYPE,
        "payload": base64(payload.as_bytes()),
        "signatures": [{"keyid": key_id(&public(key)), "sig": base64(&signature)}],
    })
}

/// The statement of a payload about `parts.onnx`.
fn statement(site: &TestSite, name: &str, version: u64, digest: &str) -> Value {
    let size = fs::metadata(site.path("parts.onnx")).unwrap().len();
    // The manifests of these tests have no task, input or output.
    let spec = lineside_tests::site::digest(b"{}");
    json!({"name": name, "version": version, "digest": digest, "size": size, "rollback": false, "specDigest": spec})
}

#[test]
fn keygen_writes_keys_that_openssl_reads_and_never_overwrites_one() {
    let site = TestSite::offline();
    let key = keygen(&site, "key");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let derived = run_with_input("openssl", &["pkey", "-in", utf8(&key), "-pubout"], b"");
    let written = run_with_input("openssl", &["pkey", "-pubin", "-in", utf8(&public(&key)), "-pubout"], b"");
    assert_eq!(derived, written, "the files contain a key pair");
    let before = (fs::read(&key).unwrap(), fs::read(public(&key)).unwrap());
    let output = lineside(&["keygen", utf8(&key)]);
    assert_eq!(output.status.code(), Some(1), "{}", output_text(&output));
    assert!(output_text(&output).contains(utf8(&key)), "the message names the file: {}", output_text(&output));
    assert_eq!(before, (fs::read(&key).unwrap(), fs::read(public(&key)).unwrap()));
    assert_ne!(fs::read(keygen(&site, "other")).unwrap(), before.0, "every key is unique");
}

#[test]
fn dsse_signatures_interoperate_with_openssl() {
    let (site, digest) = site_with_model();
    let key = keygen(&site, "key");
    let envelope = sign(&site, "parts", 3, &key, &["--expires", "2099-12-31"]);
    assert_eq!(envelope["payloadType"], PAYLOAD_TYPE);
    assert_eq!(envelope["signatures"][0]["keyid"], key_id(&public(&key)));
    let payload = from_base64(&envelope["payload"]);
    let (message, signature) = (site.path("message"), site.path("signature"));
    fs::write(&message, pae(&payload)).unwrap();
    fs::write(&signature, from_base64(&envelope["signatures"][0]["sig"])).unwrap();
    let (key_file, message, signature) = (public(&key), utf8(&message), utf8(&signature));
    let verify = ["pkeyutl", "-verify", "-pubin", "-inkey", utf8(&key_file), "-rawin", "-in", message];
    run_with_input("openssl", &[&verify[..], &["-sigfile", signature]].concat(), b"");
    let mut signed_statement: Value = serde_json::from_slice(&payload).unwrap();
    assert!(signed_statement["expires"].as_str().unwrap().starts_with("2099-12-31"), "{signed_statement}");
    signed_statement.as_object_mut().unwrap().remove("expires");
    assert_eq!(signed_statement, statement(&site, "parts", 3, &digest));

    // Without `--json` the command prints the YAML for the manifest.
    let model = site.path("parts.onnx");
    let output = lineside(&["sign", utf8(&model), "--name", "parts", "--version", "3", "--key", utf8(&key)]);
    let yaml = String::from_utf8_lossy(&output.stdout);
    for expected in [digest.as_str(), "signature", "payload", "size"] {
        assert!(yaml.contains(expected), "{expected} is not in {yaml}");
    }

    // A key and a signature created with openssl.
    let openssl_key = site.path("openssl-key");
    run_with_input("openssl", &["genpkey", "-algorithm", "ed25519", "-out", utf8(&openssl_key)], b"");
    run_with_input(
        "openssl",
        &["pkey", "-in", utf8(&openssl_key), "-pubout", "-out", utf8(&public(&openssl_key))],
        b"",
    );
    let envelope = signed_by_openssl(&openssl_key, &statement(&site, "parts", 1, &digest));
    site.apply("model.yaml", &signed("parts", 1, &digest, &envelope, ""));
    let mut agent = site.start(&["--trusted-keys", utf8(&public(&openssl_key))]);
    assert_eq!(wait_until_serving(&agent, "parts", 1)["state"], "Ready");
    assert!(agent.terminate().success());
}

#[test]
fn a_version_without_a_valid_signature_is_not_loaded() {
    let (site, digest) = site_with_model();
    let (key, untrusted) = (keygen(&site, "key"), keygen(&site, "untrusted"));
    let by_key = |payload: Value| signed_by_openssl(&key, &payload);
    let with = |field: &str, value: Value| {
        let mut payload = statement(&site, field, 1, &digest);
        payload["name"] = json!(format!("other-{field}"));
        payload[field] = value;
        by_key(payload)
    };
    let mut altered = sign(&site, "altered", 2, &key, &[]);
    altered["payload"] = json!(base64(statement(&site, "altered", 1, &digest).to_string().as_bytes()));
    let mut no_signature = sign(&site, "no-signature", 1, &key, &[]);
    no_signature["signatures"] = json!([]);
    let mut other_type = sign(&site, "other-type", 1, &key, &[]);
    other_type["payloadType"] = json!("application/json");
    let cases = [
        ("unsigned", Value::Null, "sign"),
        ("no-signature", no_signature, "sign"),
        ("untrusted", sign(&site, "untrusted", 1, &untrusted, &[]), "sign"),
        ("altered", altered, "sign"),
        ("other-type", other_type, "sign"),
        ("other-name", with("name", json!("somebody-else")), "somebody-else"),
        ("other-version", with("version", json!(2)), "version"),
        ("other-digest", with("digest", json!(format!("sha256:{}", "0".repeat(64)))), "sign"),
        ("other-size", with("size", json!(12)), ""),
        ("other-expires", with("expires", json!("2020-01-01T00:00:00Z")), "expire"),
    ];
    for (name, envelope, _) in &cases {
        site.apply(&format!("{name}.yaml"), &signed(name, 1, &digest, envelope, ""));
    }
    site.apply("good.yaml", &signed("good", 1, &digest, &sign(&site, "good", 1, &key, &[]), ""));
    let mut agent = site.start(&["--trusted-keys", utf8(&public(&key))]);
    wait_until_serving(&agent, "good", 1);
    for (name, _, word) in &cases {
        let reason = wait_for_rejection(&agent, name);
        assert!(reason.contains(word), "{name}: {reason}");
        assert!(model_status(&agent, name)["serving"].is_null(), "{name} serves");
    }
    assert!(agent.terminate().success());
}

#[test]
fn the_signature_threshold_requires_distinct_keys() {
    let (site, digest) = site_with_model();
    let (one, two) = (keygen(&site, "one"), keygen(&site, "two"));
    let trusted = site.path("trusted");
    fs::create_dir(&trusted).unwrap();
    for key in [&one, &two] {
        fs::copy(public(key), trusted.join(public(key).file_name().unwrap())).unwrap();
    }
    let single = sign(&site, "parts", 1, &one, &[]);
    let file = site.path("envelope.json");
    fs::write(&file, single.to_string()).unwrap();
    let both = sign(&site, "parts", 1, &two, &["--envelope", utf8(&file)]);
    assert_eq!(both["signatures"].as_array().unwrap().len(), 2, "{both}");
    assert_eq!(both["payload"], single["payload"]);
    let twice = sign(&site, "twice", 1, &one, &[]);
    let mut doubled = twice.clone();
    doubled["signatures"] = json!([twice["signatures"][0], twice["signatures"][0]]);
    site.apply("model.yaml", &signed("parts", 1, &digest, &single, ""));
    site.apply("twice.yaml", &signed("twice", 1, &digest, &doubled, ""));
    let mut agent = site.start(&["--trusted-keys", utf8(&trusted), "--signature-threshold", "2"]);
    for name in ["parts", "twice"] {
        let reason = wait_for_rejection(&agent, name);
        assert!(reason.contains("sign"), "{name}: {reason}");
    }
    site.apply("model.yaml", &signed("parts", 1, &digest, &both, ""));
    wait_until_serving(&agent, "parts", 1);
    assert!(model_status(&agent, "twice")["serving"].is_null());
    assert!(agent.terminate().success());
}

#[test]
fn an_expired_signature_wait_for_condition_and_the_serving_version_continues() {
    // Sufficient to start the agent and to admit the model on a busy machine.
    const AHEAD: &str = "+15 seconds";
    let (site, digest) = site_with_model();
    let key = keygen(&site, "key");
    let public = public(&key);
    let flags = ["--trusted-keys", utf8(&public)];
    let expires = run_with_input("date", &["-u", "-d", AHEAD, "+%Y-%m-%dT%H:%M:%SZ"], b"");
    let expires = String::from_utf8(expires).unwrap();
    let expires = expires.trim();
    let envelope = sign(&site, "parts", 1, &key, &["--expires", expires]);
    site.apply("model.yaml", &signed("parts", 1, &digest, &envelope, ""));
    let mut agent = site.start(&flags);
    let parts = wait_until_serving(&agent, "parts", 1);
    assert!(parts["signatureExpires"].as_str().unwrap().starts_with(expires.trim_end_matches('Z')), "{parts}");
    assert!(agent.metric("lineside_model_signature_expiry_timestamp_seconds{model=\"parts\",version=\"1\"}") > 0.0);
    let wait_for_condition = |agent: &Agent| {
        until_long("the expiry to be reported", || {
            let status = status(agent);
            let mut conditions = status["conditions"].as_array()?.iter();
            conditions
                .find(|condition| condition["reason"] == "SignatureExpired" && condition["status"] == "True")
                .cloned()
        });
    };
    wait_for_condition(&agent);
    agent.wait_for_event("signature_expired");
    assert_eq!(model_status(&agent, "parts")["serving"]["version"], 1);
    agent.wait_until_ready();
    assert!(agent.terminate().success());

    let mut agent = site.start(&flags);
    wait_until_serving(&agent, "parts", 1);
    wait_for_condition(&agent);

    // A version that does not serve yet is rejected once its signature has expired.
    let late = sign(&site, "late", 1, &key, &["--expires", "2099-01-01"]);
    site.apply("late.yaml", &signed("late", 1, &digest, &late, ""));
    wait_until_serving(&agent, "late", 1);
    let mut payload = statement(&site, "late", 2, &digest);
    payload["expires"] = json!(expires);
    site.apply("late.yaml", &signed("late", 2, &digest, &signed_by_openssl(&key, &payload), ""));
    let reason = until_long("the rejection of version 2", || {
        let late = model_status(&agent, "late");
        (late["version"] == 2 && late["state"] == "Failed")
            .then(|| late["reason"].as_str().unwrap_or_default().to_owned())
    });
    assert!(reason.contains("expire"), "{reason}");
    assert_eq!(model_status(&agent, "late")["serving"]["version"], 1);
    assert!(agent.terminate().success());
}

#[test]
fn a_downgrade_is_rejected_across_restarts_unless_rollback_is_set() {
    let (site, digest) = site_with_model();
    let key = keygen(&site, "key");
    let (public, rollback) = (public(&key), "  rollback: true\n");
    let flags = ["--trusted-keys", utf8(&public)];
    let version = |version: u64, more: &str| {
        let flags: &[&str] = if more.is_empty() { &[] } else { &["--rollback"] };
        site.apply("model.yaml", &signed("parts", version, &digest, &sign(&site, "parts", version, &key, flags), more));
    };
    let expect_rejection = |agent: &Agent| {
        let reason = wait_for_rejection(agent, "parts");
        assert!(reason.contains("lower") || reason.contains("rollback"), "{reason}");
    };
    version(2, "");
    let mut agent = site.start(&flags);
    wait_until_serving(&agent, "parts", 2);
    assert!(agent.terminate().success());

    version(1, "");
    for _ in 0..2 {
        let mut agent = site.start(&flags);
        expect_rejection(&agent);
        wait_until_serving(&agent, "parts", 2);
        assert!(agent.terminate().success());
    }

    // Removing the model temporarily does not circumvent the check.
    site.delete("model.yaml");
    let mut agent = site.start(&flags);
    agent.wait_until_ready();
    until_long("the model to be removed", || model_status(&agent, "parts").is_null().then_some(()));
    version(1, "");
    expect_rejection(&agent);

    version(1, rollback);
    wait_until_serving(&agent, "parts", 1);
    assert!(agent.terminate().success());
    let mut agent = site.start(&flags);
    assert_eq!(wait_until_serving(&agent, "parts", 1)["state"], "Ready");
    assert!(agent.terminate().success());
}
