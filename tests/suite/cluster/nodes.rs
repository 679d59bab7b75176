//! Nodes that fall silent, and nodes that are gone.

use lineside_tests::lab::{Lab, NAMESPACE};

/// An `EdgeNode` that nobody writes any more; `uid` is the node it was of.
fn ghost(lab: &Lab, name: &str, uid: &str) {
    let object = format!(
        r#"{{"apiVersion":"lineside.dev/v1alpha1","kind":"EdgeNode","metadata":{{"name":"{name}","namespace":"lineside"}},
        "status":{{"agent":{{"labels":{{"lineside.dev/line":"a"}},"lastHeartbeatTime":"2026-01-01T00:00:00Z"{uid}}},
        "conditions":[{{"type":"Ready","status":"True","reason":"ModelsReady","message":"","lastTransitionTime":"2026-01-01T00:00:00Z"}}]}}}}"#
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), object).unwrap();
    let file = file.path().to_str().unwrap();
    lab.done(&["apply", "--server-side", "-f", file]);
    lab.done(&["apply", "--server-side", "--subresource=status", "-f", file]);
}

#[test]
fn a_silent_node_is_marked_and_forgotten_once_the_cluster_has_no_such_node() {
    let Some(lab) = Lab::take() else { return };
    lab.install();
    let patience = ["LINESIDE_SILENT_AFTER_SECONDS", "LINESIDE_GONE_AFTER_SECONDS"];
    let set = |values: &[&str]| {
        lab.done(&[&["set", "env", "deployment/lineside-controller", "-n", NAMESPACE], values].concat());
        lab.settled();
    };
    set(&[&format!("{}=20", patience[0]), &format!("{}=60", patience[1])]);
    ghost(&lab, "gone-1", r#","nodeUID":"00000000-0000-0000-0000-000000000000""#);
    ghost(&lab, "far-1", "");
    lab.apply_samples();
    lab.until("the silent node to be marked", || {
        (lab.ready("edgenode", "gone-1") == ("Unknown".into(), "NodeUnreachable".into())).then_some(())
    });
    // A node that bears the label is one that the model is for, whatever has become of it.
    lab.until("the model to say so", || {
        (lab.ready("edgemodel", "surface-defects").1 == "NodesUnreachable").then_some(())
    });
    let model = lab.get(&["edgemodel", "surface-defects", "-n", NAMESPACE]);
    assert!(model["status"]["conditions"][0]["message"].as_str().unwrap().contains("gone-1"), "{model}");
    lab.until("the node that is gone to be forgotten", || {
        lab.get(&["edgenode", "gone-1", "-n", NAMESPACE]).is_null().then_some(())
    });
    lab.until("the other one to be marked", || (lab.ready("edgenode", "far-1").0 == "Unknown").then_some(()));
    let events = lab.done(&["get", "events", "-n", NAMESPACE]);
    assert!(events.contains("NodeUnreachable"), "{events}");
    // One that never was a node of this cluster stays until somebody removes it, and so does one whose node is there.
    assert!(!lab.get(&["edgenode", "far-1", "-n", NAMESPACE]).is_null());
    assert!(!lab.get(&["edgenode", lab.node(), "-n", NAMESPACE]).is_null());
    lab.done(&["delete", "edgenode", "far-1", "-n", NAMESPACE]);
    set(&[&format!("{}-", patience[0]), &format!("{}-", patience[1])]);
    // The agent takes the mark back with its next word.
    lab.until("the agent's own word to count again", || (lab.ready("edgenode", lab.node()).0 == "True").then_some(()));
    lab.until("the model to be ready", || (lab.ready("edgemodel", "surface-defects").0 == "True").then_some(()));
}
