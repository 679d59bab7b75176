//! What an operator does, from an empty cluster to a deletion.

use lineside_tests::lab::{Lab, NAMESPACE};
use lineside_tests::paho::check_sequence;
use serde_json::{Value, json};

fn versions(results: &[Value]) -> Vec<u64> {
    let mut versions: Vec<u64> = results.iter().filter_map(|result| result["model"]["version"].as_u64()).collect();
    versions.dedup();
    versions
}

#[test]
fn from_an_empty_cluster_to_verdicts_a_new_version_and_a_deletion() {
    let Some(lab) = Lab::take() else { return };
    lab.done(&["label", "node", lab.node(), "lineside.dev/edge-", "lineside.dev/line-"]);
    lab.apply_overlay(&[]);
    lab.done(&["rollout", "status", "deployment/lineside-controller", "-n", NAMESPACE, "--timeout=120s"]);
    let scheduled =
        || lab.get(&["daemonset", "lineside-agent", "-n", NAMESPACE])["status"]["desiredNumberScheduled"].clone();
    lab.until("an unlabelled node to get no agent", || (scheduled() == 0 && lab.agent_pod().is_null()).then_some(()));
    lab.done(&["label", "node", lab.node(), "lineside.dev/edge=true"]);
    lab.settled();

    let subscriber = lab.subscribe("story");
    let version = lab.apply_samples();
    // The model asks for a label that the node does not bear yet.
    lab.until("the model to be for no node", || {
        (lab.ready("edgemodel", "surface-defects").1 == "NoNodes").then_some(())
    });
    assert_eq!(subscriber.count("/line-1/result"), 0);
    lab.done(&["label", "node", lab.node(), "lineside.dev/line=a"]);
    let results = lab.until("verdicts", || Some(subscriber.results()).filter(|results| results.len() >= 20));
    assert!(
        results.iter().any(|result| result["verdict"] == "pass")
            && results.iter().any(|result| result["verdict"] == "reject")
    );
    lab.until("the model to be ready", || (lab.ready("edgemodel", "surface-defects").0 == "True").then_some(()));
    lab.until("the stream to be ready", || (lab.ready("camerastream", "line-1").0 == "True").then_some(()));
    let table = lab.done(&["get", "em,cam,en", "-n", NAMESPACE]);
    eprintln!("{table}");
    for expected in ["VERSION", "CANDIDATE", "AllNodesReady", "StreamsReady", "BROKER", lab.node()] {
        assert!(table.contains(expected), "{expected} is not in\n{table}");
    }
    let events = lab.until("an Event", || {
        Some(lab.done(&["get", "events", "-n", NAMESPACE]))
            .filter(|events| events.contains(&format!("version {version} serves on {}", lab.node())))
    });
    eprintln!("{events}");
    // What is said of a node is shown where people look.
    lab.patched("cam", "line-1", &json!({"source": {"uri": "dir:///none"}}));
    lab.until("an Event about the node that kubectl describe shows", || {
        lab.done(&["describe", "en", lab.node(), "-n", NAMESPACE]).contains("StreamDown").then_some(())
    });
    let uri = "dir:///var/lib/lineside/quickstart/frames?loop=true";
    lab.patched("cam", "line-1", &json!({"source": {"uri": uri}}));
    lab.until("the stream to be ready again", || (lab.ready("camerastream", "line-1").0 == "True").then_some(()));

    // An edit to version 2 swaps, and no number is missing.
    lab.patched("em", "surface-defects", &json!({"version": version + 1}));
    lab.until("results of version 2", || (versions(&subscriber.results()) == [version, version + 1]).then_some(()));
    let model = lab.until("the controller to see version 2", || {
        let model = lab.get(&["em", "surface-defects", "-n", NAMESPACE]);
        (model["status"]["observedGeneration"] == 2 && model["status"]["nodes"]["ready"] == 1).then_some(model)
    });
    assert_eq!(model["status"]["nodes"]["desired"], 1);
    let summary = check_sequence(&subscriber.results());
    assert_eq!((summary.gaps, summary.duplicates), (Vec::new(), 0));

    // A bad edit is refused, and what runs goes on.
    let refused = lab.patch("em", "surface-defects", &json!({"version": version}));
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && message.contains("set spec.rollback: true"), "{message}");

    for step in ["Downloaded", "Verified", "Compatible", "Loaded"] {
        lab.done(&["wait", "em/surface-defects", "-n", NAMESPACE, &format!("--for=condition={step}"), "--timeout=60s"]);
    }

    // A version whose file is not there is told where people look, and the one before serves on.
    let missing = json!({"version": version + 2, "source": {"uri": "file:///var/lib/lineside/quickstart/none.onnx"}});
    lab.patched("em", "surface-defects", &missing);
    let message = lab.until("the missing file to be told", || {
        let model = lab.get(&["em", "surface-defects", "-n", NAMESPACE]);
        let conditions = model["status"]["conditions"].as_array()?.clone();
        let downloaded = conditions.into_iter().find(|condition| condition["type"] == "Downloaded")?;
        (downloaded["reason"] == "NodesFailed").then(|| downloaded["message"].to_string())
    });
    assert!(message.contains(lab.node()), "{message}");
    let before = subscriber.results().len();
    lab.until("results to go on", || (subscriber.results().len() > before + 5).then_some(()));
    assert_eq!(versions(&subscriber.results()), [version, version + 1]);

    // A deletion unloads; the file stays until the quota wants its room.
    let blobs = lab.edge_node()["store"]["blobs"].clone();
    lab.done(&["delete", "-k", lineside_tests::root().join("edge-manifests/samples").to_str().unwrap()]);
    lab.until("the node to run nothing", || lab.runs_nothing(true).then_some(()));
    let node = lab.edge_node();
    assert!(blobs.as_u64() >= Some(1) && node["store"]["blobs"] == blobs, "{blobs} {node}");
    let events = subscriber.payloads(&format!("/{}/event", lab.node()));
    assert!(events.iter().any(|event| event["kind"] == "model" || event["event"].is_string()), "{events:#?}");
}

#[test]
fn bad_specs_are_refused_by_the_api_server_with_a_message_that_helps() {
    let Some(lab) = Lab::take() else { return };
    lab.install();
    let model = |name: &str, spec: &str| {
        format!(
            "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: {name}, namespace: lineside}}\nspec: {spec}\n"
        )
    };
    let stream = |spec: &str| {
        format!(
            "apiVersion: lineside.dev/v1alpha1\nkind: CameraStream\nmetadata: {{name: s, namespace: lineside}}\nspec: {spec}\n"
        )
    };
    let file = "source: {uri: 'file:///m.onnx'}";
    let camera = "source: {uri: 'http://10.0.0.7/a.jpg'}, model: m";
    let digest = format!("sha256:{}", "0".repeat(64));
    let long = "a".repeat(64);
    let cases = [
        (model("m", &format!("{{{file}}}")), "spec.version: Required value"),
        (model("m", "{version: 1}"), "spec.source: Required value"),
        (model("m", "{version: 1, source: {uri: 'https://h/m.onnx'}}"), "what `sha256sum model.onnx` prints"),
        (model("m", "{version: 1, source: {uri: 'https://h/m', digest: 'sha256:12'}}"), "spec.source.digest"),
        (
            model("m", &format!("{{version: 1, source: {{uri: 'ftp://h/m', digest: '{digest}'}}}}")),
            "supported schemes are https, http, s3, gs, az, oci and file",
        ),
        (model("m", "{version: 1, source: {uri: 'file:m.onnx'}}"), "a file needs its absolute path on the node"),
        (model("m", &format!("{{version: -1, {file}}}")), "greater than or equal to 0"),
        (model("m", &format!("{{version: one, {file}}}")), "spec.version"),
        (model("m", &format!("{{version: 1, {file}, task: guess}}")), "supported values: \"classify\""),
        (model("m", &format!("{{version: 1, {file}, colour: red}}")), "unknown field \"spec.colour\""),
        (model("m", &format!("{{version: 1, {file}, runtime: {{threads: 0}}}}")), "spec.runtime.threads"),
        (model("m", &format!("{{version: 1, {file}, output: {{threshold: 2}}}}")), "spec.output.threshold"),
        (model("m", &format!("{{version: 1, {file}, rollout: {{waves: [10]}}}}")), "is not supported by this version"),
        (model("a.b", &format!("{{version: 1, {file}}}")), "at most 63 of a-z, 0-9 and -"),
        (model(&long, &format!("{{version: 1, {file}}}")), "at most 63 of a-z, 0-9 and -"),
        (model("m", &format!("{{version: 1, {file}, nodeSelector: {{a: {long}}}}}")), "spec.nodeSelector.a"),
        (stream(&format!("{{{camera}}}")), "the node of the camera is required"),
        (stream(&format!("{{{camera}, nodeName: a, nodeSelector: {{b: c}}}}")), "are mutually exclusive"),
        (stream(&format!("{{{camera}, nodeName: a, fps: -1}}")), "spec.fps"),
        (stream(&format!("{{{camera}, nodeName: a, maxAgeMs: 0}}")), "spec.maxAgeMs"),
        (stream(&format!("{{{camera}, nodeName: a, trigger: {{mqtt: true}}}}")), "is not supported by this version"),
        (stream("{source: {uri: 'gopher://a'}, model: m, nodeName: a}"), "spec.source"),
        (stream("{model: m, nodeName: a}"), "spec.source: Required value"),
        (stream(&format!("{{{camera}, nodeName: a, verdict: '{}'}}", "a".repeat(4097))), "spec.verdict"),
    ];
    for (text, expected) in &cases {
        let output = lab.apply(text);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "taken:\n{text}");
        assert!(said.contains(expected), "{expected:?} is not in {said:?} about\n{text}");
    }
    // What only the agent can judge comes back in the status, with what to do.
    lab.applied(&stream(&format!("{{{camera}, nodeName: {}, verdict: '1 +'}}", lab.node())));
    let node = lab.until("the node to say what is wrong", || {
        Some(lab.edge_node())
            .filter(|node| node["streams"][0]["reason"].as_str().is_some_and(|reason| reason.contains("verdict")))
    });
    assert_eq!(node["streams"][0]["up"], false, "{node}");
    // The version of a file does not change with its content.
    lab.applied(&model("m", &format!("{{version: 1, source: {{uri: 'https://h/m', digest: '{digest}'}}}}")));
    let output = lab.apply(&model(
        "m",
        &format!("{{version: 1, source: {{uri: 'https://h/m', digest: '{}'}}}}", digest.replace(":0", ":1")),
    ));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("raise spec.version with it"), "{said}");
}
