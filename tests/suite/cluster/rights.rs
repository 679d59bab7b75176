//! What the pods' own tokens may do, asked of the real API server.

use lineside_tests::lab::{Lab, NAMESPACE};
use lineside_tests::wait::until_true;

/// A token that is bound to a pod, with the node's name in it, as the pod itself has one.
fn pod_token(lab: &Lab, account: &str, pod: &str) -> String {
    lab.done(&["create", "token", account, "-n", NAMESPACE, "--bound-object-kind=Pod", "--bound-object-name", pod])
        .trim()
        .to_owned()
}

/// What the API server answers to kubectl with a token.
fn says(lab: &Lab, token: &str, arguments: &[&str]) -> (bool, String) {
    // Another user's token beside the administrator's would lose against it, so the file has none.
    let bare = [
        "kubectl",
        "--kubeconfig=/dev/null",
        "--server",
        &lab.server(),
        "--insecure-skip-tls-verify",
        "--token",
        token,
    ];
    let output = lab.within("center", &[&bare, arguments].concat()).output().unwrap();
    (
        output.status.success(),
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)),
    )
}

/// What the API server answers to the very request that an agent makes.
fn patch_status(lab: &Lab, token: &str, node: &str) -> String {
    let url = format!(
        "{}/apis/lineside.dev/v1alpha1/namespaces/lineside/edgenodes/{node}/status?fieldManager=test&force=true",
        lab.server()
    );
    let body = format!(
        r#"{{"apiVersion":"lineside.dev/v1alpha1","kind":"EdgeNode","metadata":{{"name":"{node}"}},"status":{{}}}}"#
    );
    let (bearer, kind) = (format!("Authorization: Bearer {token}"), "Content-Type: application/apply-patch+yaml");
    let output = lab
        .within("center", &["curl", "-sk", "-X", "PATCH", "-H", &bearer, "-H", kind, "--data", &body, &url])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn an_agents_token_writes_its_own_node_and_nothing_else() {
    let Some(lab) = Lab::take() else { return };
    lab.install();
    let node = lab.node();
    let pod = lab.agent_pod()["metadata"]["name"].as_str().unwrap().to_owned();
    let token = pod_token(&lab, "lineside-agent", &pod);
    let allowed = |arguments: &[&str]| {
        let (done, said) = says(&lab, &token, arguments);
        assert!(done, "{arguments:?} is refused: {said}");
    };
    let refused = |arguments: &[&str]| {
        let (done, said) = says(&lab, &token, arguments);
        assert!(!done && said.contains("orbidden"), "{arguments:?}: {said}");
    };
    let lineside = ["-n", NAMESPACE];
    lab.until("the agent to have made its EdgeNode", || (!lab.edge_node().is_null()).then_some(()));
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let status = |node: &str| {
        let text = format!(
            r#"{{"apiVersion":"lineside.dev/v1alpha1","kind":"EdgeNode","metadata":{{"name":"{node}","namespace":"lineside"}},"status":{{"store":{{"index":"ok"}}}}}}"#
        );
        write(node, &text)
    };
    // kubectl's server-side apply sends one PATCH and reads nothing before, as the agent does.
    let apply = ["apply", "--server-side", "--force-conflicts", "--field-manager=test"];
    let (mine, others, new) = (status(node), status("other-2"), status("other-3"));

    // What an agent does.
    allowed(&["get", "--raw", "/apis/lineside.dev/v1alpha1/namespaces/lineside/edgemodels"]);
    allowed(&[
        "get",
        "--raw",
        "/apis/lineside.dev/v1alpha1/namespaces/lineside/camerastreams?watch=true&timeoutSeconds=1",
    ]);
    allowed(&["get", "node", node]);
    allowed(&[&apply[..], &["--subresource=status", "-f", &mine]].concat());
    allowed(&[&apply[..], &["-f", &mine]].concat());
    let event = |series: &str| {
        format!(
            r#"{{"apiVersion":"events.k8s.io/v1","kind":"Event","metadata":{{"name":"rights-test","namespace":"lineside"}},"type":"Normal",
            "reason":"Test","action":"Observe","note":"a test","eventTime":"2026-01-01T00:00:00.000000Z","reportingController":"test",
            "reportingInstance":"test","regarding":{{"kind":"EdgeNode","namespace":"lineside","name":"edge-1"}}{series}}}"#
        )
    };
    allowed(&["create", "-f", &write("event", &event(""))]);
    let series = r#","series":{"count":2,"lastObservedTime":"2026-01-01T00:00:01.000000Z"}"#;
    allowed(&[&apply[..], &["-f", &write("event-again", &event(series))]].concat());

    // Another node's EdgeNode: the rights would do, the policy does not.
    lab.done(&["apply", "-f", &others]);
    for arguments in [vec!["--subresource=status", "-f", &others], vec!["-f", &others], vec!["-f", &new]]
        .map(|rest| [&apply[..], &rest].concat())
    {
        let (done, said) = says(&lab, &token, &arguments);
        let expected = format!("is written by the agent of that node alone; this token is of the node {node}");
        assert!(!done && said.contains(&expected), "{arguments:?}: {said}");
    }
    // A token that is of no pod names no node.
    let bare = lab.done(&["create", "token", "lineside-agent", "-n", NAMESPACE]);
    let said = patch_status(&lab, bare.trim(), node);
    assert!(said.contains("this token is of no node"), "{said}");
    let said = patch_status(&lab, &token, "other-2");
    assert!(said.contains(&format!("this token is of the node {node}")), "{said}");
    let said = patch_status(&lab, &token, node);
    assert!(said.contains("\"uid\""), "{said}");

    // Everything else is forbidden.
    for verb in [
        &["get", "secrets"][..],
        &["get", "configmaps"],
        &["get", "pods"],
        &["get", "edgenodes"],
        &["get", "edgenode", node],
        &["get", "edgemodel", "any"],
        &["delete", "edgenode", node],
        &["delete", "edgemodel", "any"],
        &["delete", "pod", &pod],
        &["create", "configmap", "any"],
        &["create", "token", "lineside-controller"],
    ] {
        refused(&[verb, &lineside].concat());
    }
    for verb in [
        &["get", "nodes"][..],
        &["get", "edgemodels", "-A"],
        &["get", "camerastreams", "-A"],
        &["get", "secrets", "-A"],
        &["get", "namespaces"],
        &["label", "node", node, "a=b"],
    ] {
        refused(verb);
    }
    lab.done(&["delete", "edgenode", "other-2", "-n", NAMESPACE]);
    lab.done(&["delete", "events.v1.events.k8s.io", "rights-test", "-n", NAMESPACE]);

    // What the pod's process may do.
    if !lab.is_own() {
        return;
    }
    let (pid, _) = lab.process(&lab.agent_pod());
    let process = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for expected in ["Uid:\t65532\t65532", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(process.contains(expected), "{expected:?} is not in\n{process}");
    }
}

#[test]
fn an_agent_of_another_cluster_writes_the_node_that_its_account_is_named_after() {
    let Some(lab) = Lab::take() else { return };
    lab.install();
    let token = lab.outsider("far-1");
    let apply = |name: &str| {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), format!(r#"{{"apiVersion":"lineside.dev/v1alpha1","kind":"EdgeNode","metadata":{{"name":"{name}","namespace":"lineside"}}}}"#)).unwrap();
        says(&lab, &token, &["apply", "--server-side", "-f", path.path().to_str().unwrap()])
    };
    let (done, said) = apply("far-1");
    assert!(done, "{said}");
    let (done, said) = apply("edge-1");
    assert!(!done && said.contains("this token is of the node far-1"), "{said}");
    lab.done(&["delete", "edgenode", "far-1", "-n", NAMESPACE]);
    until_true("it to be gone", || lab.get(&["edgenode", "far-1", "-n", NAMESPACE]).is_null());
}
