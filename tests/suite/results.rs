//! The main function, as documented: frames in, results out on a real broker.

use std::collections::BTreeSet;
use std::fs;

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::Broker;
use lineside_tests::process::command;
use lineside_tests::site::folder_id;
use lineside_tests::{example, http, model_manifest, python, root, stream_manifest};

const FRAMES: usize = 40;

/// A folder with manifests for the bundled example, whose frames are played once, as fast as the model allows.
pub(crate) fn example_once(verdict: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let model = example("surface-defects.onnx");
    let frames = example("frames");
    fs::create_dir(folder.path().join("manifests")).unwrap();
    let text = model_manifest("parts", 1, &format!("file://{}", model.display()), "")
        + "---\n"
        + &stream_manifest("line-1", &format!("dir://{}", frames.display()), "parts", &format!("  fps: 0\n{verdict}"));
    fs::write(folder.path().join("manifests/all.yaml"), text).unwrap();
    folder
}

#[test]
fn every_frame_of_a_folder_produces_one_result_with_its_origin() {
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let verdict = "  verdict: 'classes[0].label == \"good\" ? \"pass\" : \"reject\"'\n";
    let folder = example_once(verdict);
    let data = folder.path().join("data");
    let start =
        AgentOptions { manifests: &folder.path().join("manifests"), data: &data, mqtt: &broker.url(), flags: &[] };
    let mut agent = Agent::start(&start);
    let results = subscriber.wait_for("/line-1/result", FRAMES);
    agent.wait_for_event("stream_ended");

    let mut correct = 0;
    for (index, result) in results.iter().enumerate() {
        let seq = index as u64 + 1;
        assert_eq!(result["seq"], seq, "results arrive in order, and no number is missing");
        assert_eq!(result["id"], format!("edge-1:{}.1:{seq}", folder_id(&data)));
        assert_eq!(result["model"]["name"], "parts");
        assert_eq!(result["model"]["version"], 1);
        assert_eq!(result["model"]["engine"], "tract");
        assert!(result["model"]["digest"].as_str().unwrap().starts_with("sha256:"));
        assert_eq!((result["frame"]["width"].as_u64(), result["frame"]["height"].as_u64()), (Some(640), Some(480)));
        let name = result["frame"]["name"].as_str().unwrap();
        let truth = name.trim_end_matches(".jpg").rsplit('-').next().unwrap();
        let predicted = result["classes"][0]["label"].as_str().unwrap();
        correct += usize::from(predicted == truth);
        assert_eq!(result["verdict"], if predicted == "good" { "pass" } else { "reject" });
    }
    assert!(correct * 100 >= FRAMES * 97, "{correct} of {FRAMES} are correct");
    let names: Vec<&str> = results.iter().map(|result| result["frame"]["name"].as_str().unwrap()).collect();
    let in_order: Vec<&str> = BTreeSet::from_iter(names.iter().copied()).into_iter().collect();
    assert_eq!(names, in_order, "images are played in the order of their names");
    assert!(
        subscriber
            .messages()
            .iter()
            .filter(|message| message.topic.ends_with("/result"))
            .all(|message| message.qos == 1)
    );

    // The metrics agree with the received results.
    agent.wait_for_metric_value("lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}", FRAMES as f64);
    agent.wait_for_metric_value("lineside_spool_records", 0.0);
    assert_eq!(agent.metric("lineside_frames_total{outcome=\"skipped\",stream=\"line-1\"}"), 0.0);
    let passed = agent.metric("lineside_verdicts_total{stream=\"line-1\",verdict=\"pass\"}");
    let rejected = agent.metric("lineside_verdicts_total{stream=\"line-1\",verdict=\"reject\"}");
    assert_eq!(passed + rejected, FRAMES as f64);
    check_metrics(agent.http());
    check_schema("result.schema.json", &results);
    check_schema("status.schema.json", &subscriber.payloads("edge-1/status"));

    assert!(agent.terminate().success());
    let states = subscriber.wait_for("edge-1/status", 2);
    assert_eq!(states.last().unwrap()["state"], "offline");

    // A second start with the same data folder assigns new ids.
    let mut again = Agent::start(&start);
    let more = subscriber.wait_for("/line-1/result", 2 * FRAMES);
    let ids: BTreeSet<&str> = more.iter().map(|result| result["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 2 * FRAMES);
    assert!(more[FRAMES]["id"].as_str().unwrap().starts_with(&format!("edge-1:{}.2:", folder_id(&data))));
    assert!(again.terminate().success());
}

/// Checks the metrics with promtool of the Prometheus project.
fn check_metrics(address: &str) {
    let (status, text) = http::get(address, "/metrics").unwrap();
    assert_eq!(status, 200);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("metrics");
    fs::write(&file, text).unwrap();
    let output = command("promtool").args(["check", "metrics"]).stdin(fs::File::open(&file).unwrap()).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Validates the messages against the committed schema with an independent validator.
pub(crate) fn check_schema(name: &str, messages: &[serde_json::Value]) {
    assert!(!messages.is_empty());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("messages.json");
    fs::write(&file, serde_json::to_vec(messages).unwrap()).unwrap();
    let script = "import json, sys, jsonschema\n\
                  schema = json.load(open(sys.argv[1]))\n\
                  jsonschema.Draft202012Validator.check_schema(schema)\n\
                  validator = jsonschema.Draft202012Validator(schema)\n\
                  [validator.validate(message) for message in json.load(open(sys.argv[2]))]\n\
                  assert not validator.is_valid({'id': 3})\n";
    let output =
        command(python()).args(["-c", script]).arg(root().join("docs/schemas").join(name)).arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn probes_respond_and_unknown_paths_list_the_endpoints() {
    let broker = Broker::start();
    let folder = example_once("");
    let mut agent = Agent::start(&AgentOptions {
        manifests: &folder.path().join("manifests"),
        data: &folder.path().join("data"),
        mqtt: &broker.url(),
        flags: &[],
    });
    agent.wait_until_ready();
    assert_eq!(http::get(agent.http(), "/livez").unwrap().0, 200);
    let (_, ready) = http::get(agent.http(), "/readyz").unwrap();
    let ready: serde_json::Value = serde_json::from_str(&ready).unwrap();
    assert_eq!(ready["models"]["parts"]["state"], "Ready");
    let (status, error) = http::get(agent.http(), "/nothing").unwrap();
    assert_eq!(status, 404);
    assert!(error.contains("/readyz"), "{error}");
    assert!(agent.terminate().success());
}
