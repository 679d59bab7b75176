//! Trust: what decides is what is signed, and what is not known is refused (`attack/trust-downgrade`).

use std::fs;

use lineside_tests::agent::lineside;
use lineside_tests::process::output_text;
use lineside_tests::site::{TestSite, manifest_with_source, model_status, wait_for_rejection, wait_until_serving};
use lineside_tests::{example, utf8};
use serde_json::{Value, json};

const SPEC: &str = "  output: {threshold: 0.1}\n";

/// A site with the bundled model and a key.
fn site() -> (TestSite, String) {
    let site = TestSite::offline();
    let digest = site.write("parts.onnx", &fs::read(example("surface-defects.onnx")).unwrap());
    let output = lineside(&["keygen", utf8(&site.path("key"))]);
    assert!(output.status.success(), "{}", output_text(&output));
    (site, digest)
}

fn manifest(version: u64, digest: &str, signature: &Value, more: &str) -> String {
    let mut source = json!({"uri": "file:../parts.onnx", "digest": digest});
    if !signature.is_null() {
        source["signature"] = signature.clone();
    }
    manifest_with_source("parts", version, &source, more)
}

/// A manifest that is signed as it is.
fn signed(site: &TestSite, version: u64, digest: &str, more: &str) -> Value {
    site.write("unsigned.yaml", manifest(version, digest, &Value::Null, more).as_bytes());
    let (model, file, key) = (site.path("parts.onnx"), site.path("unsigned.yaml"), site.path("key"));
    let output = lineside(&["sign", utf8(&model), "--manifest", utf8(&file), "--key", utf8(&key), "--json"]);
    assert!(output.status.success(), "{}", output_text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_manifest_with_another_spec_or_an_unsigned_rollback_is_refused() {
    let (site, digest) = site();
    let first = signed(&site, 1, &digest, SPEC);
    let second = signed(&site, 2, &digest, SPEC);
    site.apply("model.yaml", &manifest(2, &digest, &second, SPEC));
    let public = site.path("key.pub");
    let mut agent = site.start(&["--trusted-keys", utf8(&public)]);
    wait_until_serving(&agent, "parts", 2);
    for (version, signature, more, word) in [
        (2, &second, "  output: {threshold: 0.9}\n".to_owned(), "specDigest"),
        (1, &first, SPEC.to_owned(), "rollback: true"),
        (1, &first, format!("{SPEC}  rollback: true\n"), "was not signed"),
    ] {
        // The version that serves is applied again in between, so that the refusal is of this manifest.
        site.apply("model.yaml", &manifest(2, &digest, &second, SPEC));
        lineside_tests::wait::until_long("the signed manifest to be ready", || {
            (model_status(&agent, "parts")["state"] == "Ready").then_some(())
        });
        site.apply("model.yaml", &manifest(version, &digest, signature, &more));
        let reason = wait_for_rejection(&agent, "parts");
        assert!(reason.contains(word), "{word}: {reason}");
        assert_eq!(model_status(&agent, "parts")["serving"]["version"], 2);
    }
    let rollback = format!("{SPEC}  rollback: true\n");
    let signature = signed(&site, 1, &digest, &rollback);
    site.apply("model.yaml", &manifest(1, &digest, &signature, &rollback));
    wait_until_serving(&agent, "parts", 1);
    assert!(agent.terminate().success());
}

#[test]
fn highest_versions_that_cannot_be_read_fail_closed_with_a_way_out() {
    let (site, digest) = site();
    site.apply("model.yaml", &manifest(2, &digest, &Value::Null, ""));
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 2);
    assert!(agent.terminate().success());
    site.apply("model.yaml", &manifest(1, &digest, &Value::Null, ""));
    for damaged in ["garbage", "", "[]"] {
        fs::write(site.data().join("highest-versions.json"), damaged).unwrap();
        let mut agent = site.start(&[]);
        let reason = wait_for_rejection(&agent, "parts");
        assert!(reason.contains("reset-highest-versions"), "{reason}");
        wait_until_serving(&agent, "parts", 2);
        assert!(agent.terminate().success());
    }
    assert!(site.store_ok(&["reset-highest-versions"]).contains("parts:2"));
    site.apply("model.yaml", &manifest(3, &digest, &Value::Null, ""));
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 3);
    assert!(agent.terminate().success());
}
