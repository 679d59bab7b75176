//! Least authority: what a manifest may name, and the access rights of the data folder.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use lineside_tests::site::{TestSite, digest, model_status, status, wait_for_rejection, wait_until_serving};
use lineside_tests::{example, model_manifest, utf8};

/// `attack/file-model-copies-secrets`: a file outside of the allowed folders is not read, copied or described.
#[test]
fn a_file_outside_of_the_allowed_folders_leaves_no_trace() {
    let site = TestSite::offline();
    let secret = b"the-secret-of-another-user";
    fs::create_dir(site.path("outside")).unwrap();
    site.write("outside/secret", secret);
    site.write("good.onnx", &fs::read(example("surface-defects.onnx")).unwrap());
    fs::create_dir(site.path("models")).unwrap();
    fs::rename(site.path("good.onnx"), site.path("models/good.onnx")).unwrap();
    std::os::unix::fs::symlink(site.path("outside/secret"), site.path("models/link.onnx")).unwrap();
    let cases = [
        ("outside", "file:../outside/secret"),
        ("link", "file:../models/link.onnx"),
        ("shadow", "file:///etc/shadow"),
        ("kmsg", "file:///proc/kmsg"),
        ("device", "file:///dev/zero"),
    ];
    for (name, uri) in cases {
        site.apply(&format!("{name}.yaml"), &model_manifest(name, 1, uri, ""));
    }
    site.apply("good.yaml", &model_manifest("good", 1, "file:../models/good.onnx", ""));
    let models = site.path("models");
    let mut agent = site.start(&["--file-roots", utf8(&models)]);
    wait_until_serving(&agent, "good", 1);
    for (name, _) in cases {
        let reason = wait_for_rejection(&agent, name);
        assert!(reason.contains("--file-roots"), "{name}: {reason}");
        assert!(model_status(&agent, name)["serving"].is_null());
    }
    assert_eq!(site.blobs().len(), 1, "{:?}", site.blobs());
    let digest = digest(secret);
    let hex = digest.trim_start_matches("sha256:");
    assert!(!format!("{:?}{}", agent.logs(), status(&agent)).contains(hex));
    assert!(agent.terminate().success());
}

/// The folder and everything in it, of this agent and of an earlier one, can be used by its user only.
#[test]
fn the_data_folder_is_private() {
    let site = TestSite::with_stream(5);
    fs::create_dir_all(site.data().join("store/versions")).unwrap();
    fs::write(site.data().join("last-good.json"), "{\"models\": {}}").unwrap();
    for (path, mode) in [("", 0o755), ("store", 0o755), ("store/versions", 0o755), ("last-good.json", 0o644)] {
        fs::set_permissions(site.data().join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    assert!(agent.terminate().success());
    assert_private(&site.data());
}

fn assert_private(path: &Path) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let mode = metadata.permissions().mode() & 0o7777;
    let expected = if metadata.is_dir() { 0o700 } else { 0o600 };
    assert_eq!(mode, expected, "{} has the mode {mode:o}", path.display());
    if metadata.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            assert_private(&entry.unwrap().path());
        }
    }
}
