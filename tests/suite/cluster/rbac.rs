//! The permissions of the tokens of the agent's pods and of external agents, checked with the real API server.

use lineside_tests::lab::{Lab, NAMESPACE};
use lineside_tests::wait::until_true;

/// A token that is bound to a pod and contains the name of its node, as the token of the pod itself does.
fn pod_token(lab: &Lab, account: &str, pod: &str) -> String {
    lab.kubectl_ok(&[
        "create",
        "token",
        account,
        "-n",
        NAMESPACE,
        "--bound-object-kind=Pod",
        "--bound-object-name",
        pod,
    ])
    .trim()
    .to_owned()
}

/// Runs kubectl with a token. Returns whether it succeeded, and its output.
fn kubectl_with_token(lab: &Lab, token: &str, arguments: &[&str]) -> (bool, String) {
    // The credentials of the administrator's kubeconfig would take precedence over the token.
    let base = [
        "kubectl",
        "--kubeconfig=/dev/null",
        "--server",
        &lab.server(),
        "--insecure-skip-tls-verify",
        "--token",
        token,
    ];
    let output = lab.command_in("center", &[&base, arguments].concat()).output().unwrap();
    (
        output.status.success(),
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)),
    )
}

/// The response of the API server to the same request that an agent sends.
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
        .command_in("center", &["curl", "-sk", "-X", "PATCH", "-H", &bearer, "-H", kind, "--data", &body, &url])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_agent_token_writes_only_its_own_node() {
    let Some(lab) = Lab::shared() else { return };
    lab.install();
    let node = lab.node();
    let pod = lab.agent_pod()["metadata"]["name"].as_str().unwrap().to_owned();
    let token = pod_token(&lab, "lineside-agent", &pod);
    let allowed = |arguments: &[&str]| {
        let (succeeded, printed) = kubectl_with_token(&lab, &token, arguments);
        assert!(succeeded, "{arguments:?} is rejected: {printed}");
    };
    let forbidden = |arguments: &[&str]| {
        let (succeeded, printed) = kubectl_with_token(&lab, &token, arguments);
        assert!(!succeeded && printed.contains("orbidden"), "{arguments:?}: {printed}");
    };
    let lineside = ["-n", NAMESPACE];
    lab.until("the agent to create its EdgeNode", || (!lab.edge_node().is_null()).then_some(()));
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
    // kubectl's server-side apply sends a single PATCH without reading the object, as the agent does.
    let apply = ["apply", "--server-side", "--force-conflicts", "--field-manager=test"];
    let (own, foreign, new) = (status(node), status("other-2"), status("other-3"));

    // The operations of an agent.
    allowed(&["get", "--raw", "/apis/lineside.dev/v1alpha1/namespaces/lineside/edgemodels"]);
    allowed(&[
        "get",
        "--raw",
        "/apis/lineside.dev/v1alpha1/namespaces/lineside/camerastreams?watch=true&timeoutSeconds=1",
    ]);
    allowed(&["get", "node", node]);
    allowed(&[&apply[..], &["--subresource=status", "-f", &own]].concat());
    allowed(&[&apply[..], &["-f", &own]].concat());
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

    // The EdgeNode of another node: RBAC permits it, the admission policy denies it.
    lab.kubectl_ok(&["apply", "-f", &foreign]);
    for arguments in [vec!["--subresource=status", "-f", &foreign], vec!["-f", &foreign], vec!["-f", &new]]
        .map(|rest| [&apply[..], &rest].concat())
    {
        let (succeeded, printed) = kubectl_with_token(&lab, &token, &arguments);
        let expected = format!("is written by the agent of that node alone; this token is of the node {node}");
        assert!(!succeeded && printed.contains(&expected), "{arguments:?}: {printed}");
    }
    // A token that is not bound to a pod contains no node name.
    let unbound = lab.kubectl_ok(&["create", "token", "lineside-agent", "-n", NAMESPACE]);
    let printed = patch_status(&lab, unbound.trim(), node);
    assert!(printed.contains("this token is of no node"), "{printed}");
    let printed = patch_status(&lab, &token, "other-2");
    assert!(printed.contains(&format!("this token is of the node {node}")), "{printed}");
    let printed = patch_status(&lab, &token, node);
    assert!(printed.contains("\"uid\""), "{printed}");

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
        forbidden(&[verb, &lineside].concat());
    }
    for verb in [
        &["get", "nodes"][..],
        &["get", "edgemodels", "-A"],
        &["get", "camerastreams", "-A"],
        &["get", "secrets", "-A"],
        &["get", "namespaces"],
        &["label", "node", node, "a=b"],
    ] {
        forbidden(verb);
    }
    lab.kubectl_ok(&["delete", "edgenode", "other-2", "-n", NAMESPACE]);
    lab.kubectl_ok(&["delete", "events.v1.events.k8s.io", "rights-test", "-n", NAMESPACE]);

    // The privileges of the pod's process.
    if !lab.is_local() {
        return;
    }
    let (pid, _) = lab.process(&lab.agent_pod());
    let process = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for expected in ["Uid:\t65532\t65532", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(process.contains(expected), "{expected:?} is not in\n{process}");
    }
}

#[test]
fn an_external_agent_writes_only_the_node_of_its_account() {
    let Some(lab) = Lab::shared() else { return };
    lab.install();
    let token = lab.external_account_token("far-1");
    let apply = |name: &str| {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), format!(r#"{{"apiVersion":"lineside.dev/v1alpha1","kind":"EdgeNode","metadata":{{"name":"{name}","namespace":"lineside"}}}}"#)).unwrap();
        kubectl_with_token(&lab, &token, &["apply", "--server-side", "-f", path.path().to_str().unwrap()])
    };
    let (succeeded, printed) = apply("far-1");
    assert!(succeeded, "{printed}");
    let (succeeded, printed) = apply("edge-1");
    assert!(!succeeded && printed.contains("this token is of the node far-1"), "{printed}");
    lab.kubectl_ok(&["delete", "edgenode", "far-1", "-n", NAMESPACE]);
    until_true("the deletion of the EdgeNode", || lab.get(&["edgenode", "far-1", "-n", NAMESPACE]).is_null());
}
