//! Nodes whose agent stops reporting, and nodes that are deleted from the cluster.

use lineside_tests::lab::{Lab, NAMESPACE};

/// An `EdgeNode` that no agent updates; `uid` is a JSON fragment with the uid of its node.
fn create_orphan(lab: &Lab, name: &str, uid: &str) {
    let object = format!(
        r#"{{"apiVersion":"lineside.dev/v1alpha1","kind":"EdgeNode","metadata":{{"name":"{name}","namespace":"lineside"}},
        "status":{{"agent":{{"labels":{{"lineside.dev/line":"a"}},"lastHeartbeatTime":"2026-01-01T00:00:00Z"{uid}}},
        "conditions":[{{"type":"Ready","status":"True","reason":"ModelsReady","message":"","lastTransitionTime":"2026-01-01T00:00:00Z"}}]}}}}"#
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), object).unwrap();
    let file = file.path().to_str().unwrap();
    lab.kubectl_ok(&["apply", "--server-side", "-f", file]);
    lab.kubectl_ok(&["apply", "--server-side", "--subresource=status", "-f", file]);
}

#[test]
fn a_silent_node_is_marked_unreachable_and_removed_once_its_node_is_gone() {
    let Some(lab) = Lab::exclusive() else { return };
    lab.install();
    let settings = ["LINESIDE_UNREACHABLE_AFTER_SECONDS", "LINESIDE_REMOVE_AFTER_SECONDS"];
    let set = |values: &[&str]| {
        lab.kubectl_ok(&[&["set", "env", "deployment/lineside-controller", "-n", NAMESPACE], values].concat());
        lab.wait_for_rollouts();
    };
    set(&[&format!("{}=20", settings[0]), &format!("{}=60", settings[1])]);
    create_orphan(&lab, "gone-1", r#","nodeUID":"00000000-0000-0000-0000-000000000000""#);
    create_orphan(&lab, "far-1", "");
    lab.apply_samples();
    lab.until("the condition of the silent node", || {
        (lab.ready_condition("edgenode", "gone-1") == ("Unknown".into(), "NodeUnreachable".into())).then_some(())
    });
    // A model selects nodes by label, whether or not they are reachable.
    lab.until("the condition of the model", || {
        (lab.ready_condition("edgemodel", "surface-defects").1 == "NodesUnreachable").then_some(())
    });
    let model = lab.get(&["edgemodel", "surface-defects", "-n", NAMESPACE]);
    assert!(model["status"]["conditions"][0]["message"].as_str().unwrap().contains("gone-1"), "{model}");
    lab.until("the removal of the deleted node", || {
        lab.get(&["edgenode", "gone-1", "-n", NAMESPACE]).is_null().then_some(())
    });
    lab.until("the condition of the other silent node", || {
        (lab.ready_condition("edgenode", "far-1").0 == "Unknown").then_some(())
    });
    let events = lab.kubectl_ok(&["get", "events", "-n", NAMESPACE]);
    assert!(events.contains("NodeUnreachable"), "{events}");
    // An EdgeNode without a node of this cluster stays until an operator deletes it, and so does one whose node exists.
    assert!(!lab.get(&["edgenode", "far-1", "-n", NAMESPACE]).is_null());
    assert!(!lab.get(&["edgenode", lab.node(), "-n", NAMESPACE]).is_null());
    lab.kubectl_ok(&["delete", "edgenode", "far-1", "-n", NAMESPACE]);
    set(&[&format!("{}-", settings[0]), &format!("{}-", settings[1])]);
    // The next heartbeat of the agent replaces the condition.
    lab.until("the agent to report readiness again", || {
        (lab.ready_condition("edgenode", lab.node()).0 == "True").then_some(())
    });
    lab.until("the model to be ready", || {
        (lab.ready_condition("edgemodel", "surface-defects").0 == "True").then_some(())
    });
}
