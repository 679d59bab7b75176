//! OCI registries and S3.

use lineside_tests::site::{TestSite, digest};
use lineside_tests::source::{BASIC, MODEL_PACK, PASSWORD, Registry, S3, TlsFiles, USER, write_secret};
use lineside_tests::utf8;
use serde_json::json;

use super::{apply, apply_with_secret, assert_stored, expect_rejection, expect_serving, variant};

#[test]
fn oci_artifacts_are_pulled_by_tag_and_by_digest() {
    let (tls, site) = (TlsFiles::create(), TestSite::offline());
    let (closed, open) = (Registry::start(&tls, true), Registry::start(&tls, false));
    let secrets = site.path("secrets");
    write_secret(&secrets, "registry", &[("username", USER), ("password", PASSWORD)]);
    write_secret(&secrets, "wrong", &[("username", USER), ("password", "guessed")]);
    let docker = json!({"auths": {closed.host(): {"auth": BASIC.trim_start_matches("Basic ")}}}).to_string();
    write_secret(&secrets, "docker", &[(".dockerconfigjson", &docker)]);
    let push = |registry: &Registry, tag: u8, kind| {
        let bytes = variant(tag);
        let layers = [("README.md", &b"parts"[..]), ("model/parts.onnx", bytes.as_slice())];
        registry.push("models/parts", &format!("v{tag}"), &layers, kind)
    };
    let pack = push(&closed, 0, Some(MODEL_PACK));
    let other_pack = push(&closed, 1, Some(MODEL_PACK));
    push(&closed, 2, None);
    let oras = push(&closed, 3, None);
    push(&open, 4, None);
    assert_ne!(pack, other_pack);
    let only = variant(5);
    closed.push("models/only", "v5", &[("weights.bin", &only)], Some(MODEL_PACK));

    let tagged = |tag: u8| closed.url("models/parts", &format!(":v{tag}"));
    let pinned = |digest: &str| closed.url("models/parts", &format!("@{digest}"));
    let served = [
        ("pack-tag", tagged(0), "registry", 0),
        ("pack-pinned", pinned(&other_pack), "registry", 1),
        ("oras-tag", tagged(2), "docker", 2),
        ("oras-pinned", pinned(&oras), "registry", 3),
        ("only-layer", closed.url("models/only", ":v5"), "registry", 5),
    ];
    for (name, uri, secret, tag) in &served {
        apply_with_secret(&site, name, uri, &digest(&variant(*tag)), secret);
    }
    apply(&site, "open", &open.url("models/parts", ":v4"), &digest(&variant(4)));
    // The store contains no blob with the digests that these models require.
    let other = |tag| digest(&variant(tag));
    apply(&site, "no-secret", &tagged(0), &other(6));
    apply_with_secret(&site, "wrong-password", &tagged(0), &other(7), "wrong");
    apply_with_secret(&site, "other-digest", &tagged(0), &other(8), "registry");
    apply_with_secret(&site, "no-tag", &closed.url("models/parts", ":v99"), &other(9), "registry");

    let hosts = format!("{},{}", closed.host(), open.host());
    let mut agent =
        site.start(&["--source-hosts", &hosts, "--source-ca", utf8(&tls.ca()), "--secrets-dir", utf8(&secrets)]);
    for (name, _, _, tag) in &served {
        expect_serving(&agent, name, &variant(*tag));
    }
    expect_serving(&agent, "open", &variant(4));
    expect_rejection(&agent, "no-secret", &["secretRef", "credentials", "401"]);
    expect_rejection(&agent, "wrong-password", &["credentials", "password", "401", "refuse"]);
    expect_rejection(&agent, "other-digest", &["digest"]);
    expect_rejection(&agent, "no-tag", &["not found", "no such", "404", "unknown"]);
    assert!(!format!("{:?}", agent.logs()).contains(PASSWORD));
    let stored: Vec<Vec<u8>> = (0..6).map(variant).collect();
    assert_stored(&site, &stored.iter().map(Vec::as_slice).collect::<Vec<_>>());
    assert!(agent.terminate().success());
}

#[test]
fn a_download_is_retried_until_the_registry_is_back() {
    let (tls, site, bytes) = (TlsFiles::create(), TestSite::offline(), variant(0));
    let mut registry = Registry::start(&tls, false);
    registry.push("models/parts", "v1", &[("parts.onnx", &bytes)], None);
    registry.stop();
    apply(&site, "parts", &registry.url("models/parts", ":v1"), &digest(&bytes));
    let host = registry.host();
    let mut agent = site.start(&["--source-hosts", &host, "--source-ca", utf8(&tls.ca())]);
    expect_rejection(&agent, "parts", &["connect", "reach"]);
    registry.restart();
    expect_serving(&agent, "parts", &bytes);
    assert!(agent.terminate().success());
}

#[test]
fn s3_objects_are_downloaded_with_signed_requests() {
    let (tls, site, bytes) = (TlsFiles::create(), TestSite::offline(), variant(0));
    let s3 = S3::start(Some(&tls));
    let secrets = site.path("secrets");
    write_secret(&secrets, "s3", &[("accessKeyId", "edge"), ("secretAccessKey", "s3-hidden-key")]);
    s3.put("models", "plant/parts.onnx", &bytes);
    let url = s3.url("models", "plant/parts.onnx");
    apply_with_secret(&site, "parts", &url, &digest(&bytes), "s3");
    apply_with_secret(&site, "missing", &s3.url("models", "none.onnx"), &digest(&variant(1)), "s3");
    apply(&site, "unsigned", &url, &digest(&variant(2)));
    let mut agent =
        site.start(&["--source-hosts", s3.host(), "--source-ca", utf8(&tls.ca()), "--secrets-dir", utf8(&secrets)]);
    expect_serving(&agent, "parts", &bytes);
    expect_rejection(&agent, "missing", &["not found", "no such", "404"]);
    expect_rejection(&agent, "unsigned", &["secretRef", "credentials", "403", "refuse"]);
    let logs = format!("{:?}", agent.logs());
    assert!(!logs.contains("s3-hidden-key"), "{logs}");
    assert!(!logs.contains("169.254."), "the metadata service of the cloud is never queried: {logs}");
    assert_stored(&site, &[&bytes]);
    assert!(agent.terminate().success());
}
