//! The Kubernetes manifests are accepted by a real API server and meet the security baseline.

use lineside_tests::lab::Lab;
use lineside_tests::root;
use serde_json::Value;

const OVERLAYS: [&str; 5] = ["k3s-amd64", "k3s-arm64", "gpu", "mig", "time-slicing"];

#[test]
fn every_overlay_is_valid_and_meets_the_security_baseline() {
    let Some(lab) = Lab::shared() else { return };
    // A server-side dry run requires the namespace and the CRDs.
    lab.install();
    for overlay in OVERLAYS {
        let folder = root().join("edge-manifests/overlays").join(overlay);
        let folder = folder.to_str().unwrap();
        lab.kubectl_ok(&["apply", "--server-side", "--force-conflicts", "--dry-run=server", "-k", folder]);
        let printed = lab.kubectl_ok(&["apply", "--dry-run=client", "-o", "json", "-k", folder]);
        let list: Value = serde_json::from_str(&printed).unwrap();
        let objects = list["items"].as_array().cloned().unwrap_or_default();
        assert!(objects.len() > 20, "{overlay}: {} objects", objects.len());
        objects.iter().for_each(|object| check(overlay, object));
        let of_kind = |kind: &str| objects.iter().filter(|object| object["kind"] == kind).count();
        assert_eq!(
            (of_kind("DaemonSet"), of_kind("Deployment"), of_kind("PodDisruptionBudget")),
            (1, 1, 1),
            "{overlay}"
        );
        let deny = objects
            .iter()
            .find(|object| object["kind"] == "NetworkPolicy" && object["metadata"]["name"] == "default-deny");
        assert_eq!(deny.unwrap()["spec"]["podSelector"], serde_json::json!({}), "{overlay}");
    }
    lab.kubectl_ok(&[
        "apply",
        "--server-side",
        "--force-conflicts",
        "--dry-run=server",
        "-k",
        root().join("edge-manifests/samples").to_str().unwrap(),
    ]);
}

fn check(overlay: &str, object: &Value) {
    let name = format!("{overlay}: {} {}", object["kind"], object["metadata"]["name"]);
    match object["kind"].as_str().unwrap_or_default() {
        "DaemonSet" | "Deployment" => check_pod(&name, &object["spec"]["template"]["spec"]),
        "Role" | "ClusterRole" => {
            for rule in object["rules"].as_array().unwrap() {
                let text = rule.to_string();
                assert!(!text.contains('*') && !text.contains("secrets"), "{name}: {text}");
                let may_delete = text.contains("delete");
                assert!(!may_delete || rule["resources"] == serde_json::json!(["edgenodes"]), "{name}: {text}");
            }
        }
        "Namespace" => {
            assert_eq!(object["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "restricted", "{name}");
        }
        "PersistentVolume" => {
            assert_eq!(object["spec"]["hostPath"]["path"], "/var/lib/lineside", "{name}");
            assert_eq!(object["spec"]["claimRef"]["namespace"], "lineside", "{name}");
        }
        "Service" => assert_eq!(object["spec"]["internalTrafficPolicy"], "Local", "{name}"),
        _ => {}
    }
}

fn check_pod(name: &str, pod: &Value) {
    for forbidden in ["hostNetwork", "hostPID", "hostIPC"] {
        assert!(pod[forbidden].is_null(), "{name}: {forbidden}");
    }
    let security = &pod["securityContext"];
    assert_eq!(
        (&security["runAsNonRoot"], &security["runAsUser"]),
        (&Value::from(true), &Value::from(65532)),
        "{name}"
    );
    assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault", "{name}");
    for volume in pod["volumes"].as_array().into_iter().flatten() {
        assert!(volume["hostPath"].is_null(), "{name}: {volume}");
        let is_unbounded = !volume["emptyDir"].is_null() && volume["emptyDir"]["sizeLimit"].is_null();
        assert!(!is_unbounded, "{name}: {volume}");
    }
    for container in pod["containers"].as_array().unwrap() {
        let security = &container["securityContext"];
        assert_eq!(security["allowPrivilegeEscalation"], false, "{name}");
        assert_eq!(security["readOnlyRootFilesystem"], true, "{name}");
        assert_eq!(security["capabilities"]["drop"], serde_json::json!(["ALL"]), "{name}");
        assert!(security["privileged"].is_null() && security["capabilities"]["add"].is_null(), "{name}");
        for resource in ["cpu", "memory", "ephemeral-storage"] {
            assert!(container["resources"]["limits"][resource].is_string(), "{name}: no limit of {resource}");
        }
        assert!(container["livenessProbe"].is_object() && container["readinessProbe"].is_object(), "{name}");
        let image = container["image"].as_str().unwrap();
        assert!(image.contains(':') && !image.ends_with(":latest"), "{name}: {image}");
    }
}
