//! The workflow of an operator, from an empty cluster to the deletion of the samples.

use lineside_tests::lab::{Lab, NAMESPACE};
use lineside_tests::paho::check_sequence;
use serde_json::{Value, json};

fn versions(results: &[Value]) -> Vec<u64> {
    let mut versions: Vec<u64> = results.iter().filter_map(|result| result["model"]["version"].as_u64()).collect();
    versions.dedup();
    versions
}

#[test]
fn the_operator_workflow_from_an_empty_cluster_to_a_deletion() {
    let Some(lab) = Lab::exclusive() else { return };
    lab.kubectl_ok(&["label", "node", lab.node(), "lineside.dev/edge-", "lineside.dev/line-"]);
    lab.apply_overlay(&[]);
    lab.kubectl_ok(&["rollout", "status", "deployment/lineside-controller", "-n", NAMESPACE, "--timeout=120s"]);
    let scheduled =
        || lab.get(&["daemonset", "lineside-agent", "-n", NAMESPACE])["status"]["desiredNumberScheduled"].clone();
    lab.until("no agent on a node without the label", || (scheduled() == 0 && lab.agent_pod().is_null()).then_some(()));
    lab.kubectl_ok(&["label", "node", lab.node(), "lineside.dev/edge=true"]);
    lab.wait_for_rollouts();

    let subscriber = lab.subscribe("story");
    let version = lab.apply_samples();
    // The model selects a label that the node does not have yet.
    lab.until("the condition NoNodes", || {
        (lab.ready_condition("edgemodel", "surface-defects").1 == "NoNodes").then_some(())
    });
    assert_eq!(subscriber.count("/line-1/result"), 0);
    lab.kubectl_ok(&["label", "node", lab.node(), "lineside.dev/line=a"]);
    let results = lab.until("verdicts", || Some(subscriber.results()).filter(|results| results.len() >= 20));
    assert!(
        results.iter().any(|result| result["verdict"] == "pass")
            && results.iter().any(|result| result["verdict"] == "reject")
    );
    lab.until("the model to be ready", || {
        (lab.ready_condition("edgemodel", "surface-defects").0 == "True").then_some(())
    });
    lab.until("the stream to be ready", || (lab.ready_condition("camerastream", "line-1").0 == "True").then_some(()));
    let table = lab.kubectl_ok(&["get", "em,cam,en", "-n", NAMESPACE]);
    eprintln!("{table}");
    for expected in ["VERSION", "CANDIDATE", "AllNodesReady", "StreamsReady", "BROKER", lab.node()] {
        assert!(table.contains(expected), "{expected} is not in\n{table}");
    }
    let events = lab.until("an Event", || {
        Some(lab.kubectl_ok(&["get", "events", "-n", NAMESPACE]))
            .filter(|events| events.contains(&format!("version {version} serves on {}", lab.node())))
    });
    eprintln!("{events}");
    // Events about a node are shown by `kubectl describe`.
    lab.patch_ok("cam", "line-1", &json!({"source": {"uri": "dir:///none"}}));
    lab.until("an Event about the node that kubectl describe shows", || {
        lab.kubectl_ok(&["describe", "en", lab.node(), "-n", NAMESPACE]).contains("StreamDown").then_some(())
    });
    let uri = "dir:///var/lib/lineside/quickstart/frames?loop=true";
    lab.patch_ok("cam", "line-1", &json!({"source": {"uri": uri}}));
    lab.until("the stream to be ready again", || {
        (lab.ready_condition("camerastream", "line-1").0 == "True").then_some(())
    });

    // A change to version 2 replaces the version, and no sequence number is missing.
    lab.patch_ok("em", "surface-defects", &json!({"version": version + 1}));
    lab.until("results of version 2", || (versions(&subscriber.results()) == [version, version + 1]).then_some(()));
    let model = lab.until("the controller to see version 2", || {
        let model = lab.get(&["em", "surface-defects", "-n", NAMESPACE]);
        (model["status"]["observedGeneration"] == 2 && model["status"]["nodes"]["ready"] == 1).then_some(model)
    });
    assert_eq!(model["status"]["nodes"]["desired"], 1);
    let summary = check_sequence(&subscriber.results());
    assert_eq!((summary.gaps, summary.duplicates), (Vec::new(), 0));

    // An invalid change is rejected, and the current version continues.
    let rejected = lab.patch("em", "surface-defects", &json!({"version": version}));
    let message = String::from_utf8_lossy(&rejected.stderr).into_owned();
    assert!(!rejected.status.success() && message.contains("set spec.rollback: true"), "{message}");

    for step in ["Downloaded", "Verified", "Compatible", "Loaded"] {
        lab.kubectl_ok(&[
            "wait",
            "em/surface-defects",
            "-n",
            NAMESPACE,
            &format!("--for=condition={step}"),
            "--timeout=60s",
        ]);
    }

    // A version without its file is reported in the status, and the previous version continues to serve.
    let missing = json!({"version": version + 2, "source": {"uri": "file:///var/lib/lineside/quickstart/none.onnx"}});
    lab.patch_ok("em", "surface-defects", &missing);
    let message = lab.until("the condition about the missing file", || {
        let model = lab.get(&["em", "surface-defects", "-n", NAMESPACE]);
        let conditions = model["status"]["conditions"].as_array()?.clone();
        let downloaded = conditions.into_iter().find(|condition| condition["type"] == "Downloaded")?;
        (downloaded["reason"] == "NodesFailed").then(|| downloaded["message"].to_string())
    });
    assert!(message.contains(lab.node()), "{message}");
    let before = subscriber.results().len();
    lab.until("further results", || (subscriber.results().len() > before + 5).then_some(()));
    assert_eq!(versions(&subscriber.results()), [version, version + 1]);

    // A deletion unloads the model; its blob stays until the quota requires the space.
    let blobs = lab.edge_node()["store"]["blobs"].clone();
    lab.kubectl_ok(&["delete", "-k", lineside_tests::root().join("edge-manifests/samples").to_str().unwrap()]);
    lab.until("the node to unload everything", || lab.is_idle(true).then_some(()));
    let node = lab.edge_node();
    assert!(blobs.as_u64() >= Some(1) && node["store"]["blobs"] == blobs, "{blobs} {node}");
    let events = subscriber.payloads(&format!("/{}/event", lab.node()));
    assert!(events.iter().any(|event| event["kind"] == "model" || event["event"].is_string()), "{events:#?}");
}

#[test]
fn invalid_specs_are_rejected_by_the_api_server_with_a_helpful_message() {
    let Some(lab) = Lab::shared() else { return };
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
        let printed = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "accepted:\n{text}");
        assert!(printed.contains(expected), "{expected:?} is not in {printed:?} for\n{text}");
    }
    // An error that only the agent can detect is reported in the status, with what to do.
    lab.apply_ok(&stream(&format!("{{{camera}, nodeName: {}, verdict: '1 +'}}", lab.node())));
    let stream = lab.until("the error of the verdict in the status", || {
        let streams = lab.edge_node()["streams"].as_array()?.clone();
        streams
            .into_iter()
            .find(|stream| stream["name"] == "s")
            .filter(|stream| stream["reason"].as_str().is_some_and(|reason| reason.contains("verdict")))
    });
    assert_eq!(stream["up"], false, "{stream}");
    // A change of the digest requires a higher version.
    lab.apply_ok(&model("m", &format!("{{version: 1, source: {{uri: 'https://h/m', digest: '{digest}'}}}}")));
    let output = lab.apply(&model(
        "m",
        &format!("{{version: 1, source: {{uri: 'https://h/m', digest: '{}'}}}}", digest.replace(":0", ":1")),
    ));
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && printed.contains("increase spec.version together with it"), "{printed}");
}
