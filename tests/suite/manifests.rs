//! Manifests that are added, edited, made invalid, repaired and removed while the agent runs.

use std::fs;
use std::path::PathBuf;

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::{Broker, Subscriber};
use lineside_tests::onnx::mean_colour_classifier;
use lineside_tests::wait::until_true;
use lineside_tests::{example, http, model_manifest, stream_manifest};
use tempfile::TempDir;

struct Site {
    _broker: Broker,
    subscriber: Subscriber,
    folder: TempDir,
    agent: Agent,
}

impl Site {
    fn start(files: &[(&str, String)]) -> Self {
        let broker = Broker::start();
        let subscriber = broker.subscribe("lineside/v1/plant/#");
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("manifests")).unwrap();
        fs::copy(example("surface-defects.onnx"), folder.path().join("parts.onnx")).unwrap();
        for (name, text) in files {
            fs::write(folder.path().join("manifests").join(name), text).unwrap();
        }
        let agent = Agent::start(&AgentOptions {
            manifests: &folder.path().join("manifests"),
            data: &folder.path().join("data"),
            mqtt: &broker.url(),
            flags: &["--labels", "line=a", "--readiness", "models"],
        });
        Self { _broker: broker, subscriber, folder, agent }
    }

    fn manifest(&self, name: &str) -> PathBuf {
        self.folder.path().join("manifests").join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.manifest(name), text).unwrap();
    }

    /// The results of a stream. Their `seq` has no gaps as long as there is only one stream.
    fn results(&self, stream: &str) -> Vec<serde_json::Value> {
        self.subscriber.payloads(&format!("/{stream}/result"))
    }
}

fn frames(name: &str, more: &str) -> String {
    stream_manifest(name, &format!("dir://{}?loop=true", example("frames").display()), "parts", more)
}

fn parts(version: u64, more: &str) -> String {
    model_manifest("parts", version, "file:../parts.onnx", more)
}

#[test]
fn manifest_changes_are_applied_without_restarting_other_streams() {
    let mut site = Site::start(&[
        ("model.yaml", parts(1, "")),
        ("steady.yaml", frames("steady", "  fps: 20\n")),
        ("changing.yaml", frames("changing", "  fps: 20\n")),
    ]);
    site.subscriber.wait_for("/steady/result", 3);
    site.subscriber.wait_for("/changing/result", 3);

    // An edit: the verdict changes, and only this stream is restarted.
    site.write("changing.yaml", &frames("changing", "  fps: 20\n  verdict: '\"reject\"'\n"));
    until_true("the edited verdict", || site.results("changing").iter().any(|result| result["verdict"] == "reject"));

    // An addition.
    site.write("added.yaml", &frames("added", "  fps: 20\n"));
    site.subscriber.wait_for("/added/result", 3);

    // A new version of the model replaces the previous one between two frames.
    site.write("model.yaml", &parts(2, "  output: {topK: 1}\n"));
    until_true("version 2", || site.results("steady").last().unwrap()["model"]["version"] == 2);
    let versions: Vec<u64> =
        site.results("steady").iter().map(|result| result["model"]["version"].as_u64().unwrap()).collect();
    assert!(versions.is_sorted(), "version 1 answered after version 2: {versions:?}");
    for result in site.results("steady") {
        let expected = if result["model"]["version"] == 2 { 1 } else { 4 };
        assert_eq!(result["classes"].as_array().unwrap().len(), expected, "a result of the wrong version");
    }
    // The new version answers before the old one has finished and the status is written.
    site.agent.wait_for_metric_value("lineside_model_state{model=\"parts\",state=\"Ready\",version=\"2\"}", 1.0);
    assert_eq!(site.agent.metric("lineside_model_state{model=\"parts\",state=\"Ready\",version=\"1\"}"), 0.0);

    // A removal.
    fs::remove_file(site.manifest("added.yaml")).unwrap();
    until_true("the removal", || site.agent.events("stream_stopped").iter().any(|entry| entry["stream"] == "added"));
    let at_removal = site.results("added").len();
    let so_far = site.results("steady").len();
    site.subscriber.wait_for("/steady/result", so_far + 10);
    assert!(site.results("added").len() <= at_removal + 2, "the stream has stopped");

    assert_eq!(site.agent.metric("lineside_frames_total{outcome=\"failed\",stream=\"steady\"}"), 0.0);
    let starts = site.agent.events("stream_started");
    assert_eq!(starts.iter().filter(|entry| entry["stream"] == "steady").count(), 1, "the stream was never restarted");
    let seqs: Vec<u64> = ["steady", "changing", "added"]
        .iter()
        .flat_map(|stream| site.results(stream))
        .map(|result| result["seq"].as_u64().unwrap())
        .collect();
    let highest = seqs.iter().max().copied().unwrap();
    assert_eq!(seqs.len() as u64, highest, "every number up to {highest} was received once");
    assert!(site.agent.terminate().success());
}

#[test]
fn an_invalid_file_is_reported_once_and_the_last_good_state_stays_in_force() {
    let mut site = Site::start(&[("model.yaml", parts(1, "")), ("stream.yaml", frames("line-1", "  fps: 20\n"))]);
    site.subscriber.wait_for("/line-1/result", 3);
    site.write("stream.yaml", &frames("line-1", "  fps: fast\n  colour: blue\n"));
    let rejected = "lineside_manifest_rejected{file=\"stream.yaml\"}";
    site.agent.wait_for_metric_value(rejected, 1.0);
    let so_far = site.results("line-1").len();
    site.subscriber.wait_for("/line-1/result", so_far + 20);
    let rejections = site.agent.events("manifest_rejected");
    assert_eq!(rejections.len(), 1, "a rejected file is one log entry: {rejections:?}");
    let reason = rejections[0]["reason"].as_str().unwrap();
    assert!(reason.contains("spec.fps") && reason.contains("spec.colour: is not a known key"), "{reason}");
    assert!(rejections[0]["file"].as_str().unwrap().ends_with("stream.yaml"));

    site.write("stream.yaml", &frames("line-1", "  fps: 30\n"));
    site.agent.wait_for_metric_value(rejected, 0.0);
    let so_far = site.results("line-1").len();
    site.subscriber.wait_for("/line-1/result", so_far + 5);
    assert!(site.agent.terminate().success());
}

#[test]
fn a_version_that_fails_to_load_leaves_the_previous_version_serving() {
    let mut site = Site::start(&[("model.yaml", parts(1, "")), ("stream.yaml", frames("line-1", "  fps: 20\n"))]);
    site.subscriber.wait_for("/line-1/result", 3);
    fs::write(site.folder.path().join("broken.onnx"), b"not a model").unwrap();
    site.write("model.yaml", &model_manifest("parts", 2, "file:../broken.onnx", ""));
    let entry = site.agent.wait_for_event("model_load_failed");
    let reason = entry["reason"].as_str().unwrap();
    assert!(reason.contains("broken.onnx") && reason.contains("not an ONNX model"), "{reason}");
    assert_eq!(entry["serving"], 1);
    let (status, ready) = http::get(site.agent.http(), "/readyz").unwrap();
    assert_eq!(status, 200, "the last good version serves: {ready}");
    assert!(ready.contains("\"Failed\"") && ready.contains("broken.onnx"), "{ready}");
    let so_far = site.results("line-1").len();
    let results = site.subscriber.wait_for("/line-1/result", so_far + 10);
    assert!(results.iter().all(|result| result["model"]["version"] == 1));

    // A repaired file is detected without a change of the manifest.
    fs::copy(site.folder.path().join("parts.onnx"), site.folder.path().join("broken.onnx")).unwrap();
    until_true("the repaired version", || site.results("line-1").last().unwrap()["model"]["version"] == 2);

    // A lower version requires `rollback`.
    site.write("model.yaml", &parts(1, ""));
    let rejection = site.agent.wait_for_event("model_version_refused");
    assert_eq!((rejection["version"].as_u64(), rejection["highest"].as_u64()), (Some(1), Some(2)));
    site.write("model.yaml", &parts(1, "  rollback: true\n"));
    until_true("the rollback", || site.results("line-1").last().unwrap()["model"]["version"] == 1);
    assert!(site.agent.terminate().success());
}

#[test]
fn a_wrong_digest_and_wrong_labels_are_rejected_with_the_field_name() {
    let site = Site::start(&[
        (
            "digest.yaml",
            format!(
                "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: digest}}\nspec:\n  version: 1\n  \
                 source: {{uri: 'file:../parts.onnx', digest: 'sha256:{}'}}\n",
                "0".repeat(64)
            ),
        ),
        ("labels.yaml", model_manifest("labels", 1, "file:../parts.onnx", "  output: {labels: [a, b]}\n")),
        ("elsewhere.yaml", model_manifest("elsewhere", 1, "file:../none.onnx", "  nodeSelector: {line: b}\n")),
        ("missing.yaml", model_manifest("missing", 1, "file:../none.onnx", "  nodeSelector: {line: a}\n")),
    ]);
    let reason = |name: &str| {
        lineside_tests::wait::until(&format!("{name} to be rejected"), || {
            let entries = site.agent.events("model_load_failed");
            entries
                .iter()
                .find(|entry| entry["model"] == name)
                .map(|entry| entry["reason"].as_str().unwrap().to_owned())
        })
    };
    assert!(reason("digest").contains("spec.source.digest is sha256:0000"), "{}", reason("digest"));
    assert!(reason("labels").contains("spec.output.labels has 2 names, but the model has 4 classes"));
    assert!(reason("missing").contains("none.onnx"));
    let (status, ready) = http::get(site.agent.http(), "/readyz").unwrap();
    assert_eq!(status, 503);
    assert!(!ready.contains("elsewhere"), "the model selects another node: {ready}");
}

#[test]
fn two_models_with_instances_serve_streams_concurrently() {
    let site = Site::start(&[
        ("parts.yaml", parts(1, "  runtime: {instances: 2, engine: tract, device: cpu}\n")),
        ("colour.yaml", model_manifest("colour", 7, "file:../colour.onnx", "  output: {labels: [red, green, blue]}\n")),
        ("a.yaml", frames("a", "  fps: 0\n")),
        ("b.yaml", frames("b", "  fps: 0\n")),
        ("c.yaml", frames("c", "  fps: 20\n").replace("model: parts", "model: colour")),
    ]);
    // The model file appears after the stream.
    fs::write(site.folder.path().join("colour.onnx"), mean_colour_classifier(32, 32, 3).build()).unwrap();
    for stream in ["a", "b", "c"] {
        let results = site.subscriber.wait_for(&format!("/{stream}/result"), 50);
        let names: Vec<&str> = results.iter().map(|result| result["frame"]["name"].as_str().unwrap()).collect();
        // `a` and `b` skip no frames, so their frames stay in order regardless of the number of instances.
        if stream != "c" {
            let first: Vec<&str> = names.iter().take(40).copied().collect();
            assert!(first.is_sorted(), "{stream}: {first:?}");
        }
        let model = if stream == "c" { "colour" } else { "parts" };
        assert!(results.iter().all(|result| result["model"]["name"] == model));
    }
    assert_eq!(site.results("c")[0]["model"]["version"], 7);
}
