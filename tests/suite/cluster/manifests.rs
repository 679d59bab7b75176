//! The Kubernetes manifests are accepted by a real API server and meet the security baseline; so do the packages of
//! `make dist`. Applying them twice changes nothing, a namespace that is made again gets its data back, and an edge node needs no
//! manual step.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::process::Command;

use lineside_tests::lab::{Lab, NAMESPACE};
use lineside_tests::process::output_text;
use lineside_tests::{root, utf8};
use serde_json::{Value, json};

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

/// Kinds whose objects kubectl reports as `configured` although nothing changes: it replaces the selector of a
/// PodDisruptionBudget as a whole, so its patch is never empty.
const ALWAYS_CONFIGURED: &str = "poddisruptionbudget.policy/lineside-controller configured";

#[test]
fn applying_twice_changes_nothing() {
    let Some(lab) = Lab::shared() else { return };
    lab.install();
    let budget = || lab.get(&["pdb", "lineside-controller", "-n", NAMESPACE])["metadata"]["resourceVersion"].clone();
    let golden = json!({
        "apiVersion": "lineside.dev/v1alpha1", "kind": "EdgeModel",
        "metadata": {"name": "golden", "namespace": NAMESPACE},
        "spec": {
            "version": 1, "source": {"uri": "file:///var/lib/lineside/golden.onnx"}, "nodeSelector": {"nowhere": "true"},
            "golden": [{"input": "/var/lib/lineside/part.jpg", "output": "/var/lib/lineside/part.json"}],
        },
    });
    lab.apply_ok(&golden.to_string());
    let before = budget();
    let overlay = lab.apply_overlay(&[]);
    let changed: Vec<&str> =
        overlay.lines().filter(|line| !line.ends_with(" unchanged") && *line != ALWAYS_CONFIGURED).collect();
    assert!(changed.is_empty(), "{changed:#?}");
    assert_eq!(budget(), before);
    let output = output_text(&lab.apply(&golden.to_string()));
    assert!(output.contains("golden unchanged"), "{output}");
    lab.kubectl_ok(&["delete", "em", "golden", "-n", NAMESPACE]);
}

#[test]
fn objects_in_a_namespace_that_nobody_follows_are_refused() {
    let Some(lab) = Lab::shared() else { return };
    lab.install();
    let specs = [
        ("EdgeModel", json!({"version": 1, "source": {"uri": "file:///var/lib/lineside/part.onnx"}})),
        ("CameraStream", json!({"source": {"uri": "http://10.0.0.7/part.jpg"}, "nodeName": "edge-1", "model": "part"})),
    ];
    for (kind, spec) in specs {
        let object = json!({
            "apiVersion": "lineside.dev/v1alpha1", "kind": kind, "spec": spec,
            "metadata": {"name": "elsewhere", "namespace": "default"},
        });
        let output = output_text(&lab.apply(&object.to_string()));
        let expected = "no agent follows the namespace default; create this object in the namespace lineside";
        assert!(output.contains(expected), "{kind}: {output}");
    }
}

#[test]
fn a_namespace_that_is_made_again_gets_its_data_back() {
    let Some(lab) = Lab::exclusive_local() else { return };
    lab.install();
    let kept = lab.data().join("kept");
    std::fs::write(&kept, "content").unwrap();
    lab.kubectl_ok(&["delete", "namespace", NAMESPACE, "--timeout=120s"]);
    lab.until("the volume to be released", || {
        (lab.get(&["pv", "lineside-data"])["status"]["phase"] == "Released").then_some(())
    });
    lab.install();
    let claim = lab.get(&["pvc", "lineside-data", "-n", NAMESPACE]);
    let volume = lab.get(&["pv", "lineside-data"]);
    assert_eq!((&claim["status"]["phase"], &volume["status"]["phase"]), (&json!("Bound"), &json!("Bound")));
    assert_eq!(volume["spec"]["claimRef"]["uid"], claim["metadata"]["uid"]);
    assert_eq!(std::fs::read_to_string(kept).unwrap(), "content");
}

#[test]
fn an_edge_node_needs_no_manual_step() {
    let Some(lab) = Lab::exclusive_local() else { return };
    lab.install();
    let folder = lab.data();
    std::os::unix::fs::chown(&folder, Some(0), Some(0)).unwrap();
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    lab.apply_overlay(&["components: [../../../edge-manifests/components/prepare-nodes]"]);
    lab.until("the owner of the data folder", || {
        let found = std::fs::metadata(&folder).unwrap();
        ((found.uid(), found.gid(), found.mode() & 0o777) == (65532, 65532, 0o700)).then_some(())
    });
    let pods = lab.get(&["pods", "-n", "lineside-prepare"]);
    let pod = &pods["items"][0]["spec"];
    let capabilities = &pod["containers"][0]["securityContext"]["capabilities"];
    assert_eq!(capabilities, &json!({"add": ["CHOWN", "FOWNER"], "drop": ["ALL"]}));
    assert_eq!(pod["volumes"].as_array().map(Vec::len), Some(1), "the folder alone, and no token: {pod}");
    lab.kubectl_ok(&["delete", "namespace", "lineside-prepare", "--timeout=120s"]);
}

#[test]
fn images_are_never_pulled_except_from_a_registry_of_the_site() {
    let Some(lab) = Lab::shared() else { return };
    let folder = tempfile::Builder::new().prefix("site-").tempdir_in(root().join("target/lab")).unwrap();
    let render = |more: &str| -> Vec<Value> {
        let kustomization = format!(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n\
             resources: [../../../edge-manifests/overlays/k3s-install]\n{more}"
        );
        std::fs::write(folder.path().join("kustomization.yaml"), kustomization).unwrap();
        let printed = lab.kubectl_ok(&["create", "--dry-run=client", "-o", "json", "-k", utf8(folder.path())]);
        let objects = serde_json::Deserializer::from_str(&printed).into_iter::<Value>().map(Result::unwrap);
        let items = objects.flat_map(|object| object["items"].as_array().cloned().unwrap_or_else(|| vec![object]));
        items.filter(|object| object["kind"] == "DaemonSet" || object["kind"] == "Deployment").collect()
    };
    let images = |objects: Vec<Value>| -> Vec<(String, String, Value)> {
        let pods = objects.into_iter().map(|object| object["spec"]["template"]["spec"].clone());
        pods.map(|pod| {
            let container = &pod["containers"][0];
            let text = |key: &str| container[key].as_str().unwrap().to_owned();
            (text("image"), text("imagePullPolicy"), pod["imagePullSecrets"].clone())
        })
        .collect()
    };
    // `localhost` is not a registry, and the kubelet does not ask it.
    let imported =
        (concat!("localhost/lineside:", env!("CARGO_PKG_VERSION")).to_owned(), "Never".to_owned(), Value::Null);
    assert_eq!(images(render("")), vec![imported; 3]);
    let site = "components: [../../../edge-manifests/components/registry]\n\
                images: [{name: localhost/lineside, newName: images.plant.example/vision, newTag: '7'}]\n";
    let secret = json!([{"name": "lineside-registry"}]);
    let pulled = ("images.plant.example/vision:7".to_owned(), "IfNotPresent".to_owned(), secret);
    assert_eq!(images(render(site)), vec![pulled; 3]);
}

/// Writes the packages of `make dist` into a folder.
fn packages(folder: &std::path::Path) {
    let mut program = Command::new("python3");
    program
        .arg(root().join("cross/dist.py"))
        .arg("--output")
        .arg(folder)
        .env("KUBECTL", root().join("target/lab/bin/kubectl"));
    let output = program.output().unwrap();
    assert!(output.status.success(), "{}", output_text(&output));
}

#[test]
fn the_packages_are_valid_and_their_values_have_an_effect() {
    let Some(lab) = Lab::shared() else { return };
    lab.install();
    let folder = tempfile::tempdir().unwrap();
    packages(folder.path());
    // A dry run requires that the namespaces exist.
    lab.apply_ok(r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "lineside-prepare"}}"#);
    let dry_run = ["apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f"];
    lab.kubectl_ok(&[&dry_run[..], &[utf8(&folder.path().join("lineside-install.yaml"))]].concat());

    let helm = root().join("target/lab/bin/helm");
    if !helm.exists() {
        eprintln!("the chart was not rendered: target/lab/bin/helm is missing");
        return;
    }
    let chart = folder.path().join(format!("lineside-{}.tgz", env!("CARGO_PKG_VERSION")));
    let render = |values: &[&str]| {
        let mut program = Command::new(&helm);
        let output =
            program.args(["template", "plant", utf8(&chart), "--namespace", NAMESPACE]).args(values).output().unwrap();
        assert!(output.status.success(), "{}", output_text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let rendered = folder.path().join("rendered.yaml");
    std::fs::write(&rendered, render(&[])).unwrap();
    lab.kubectl_ok(&[&dry_run[..], &[utf8(&rendered)]].concat());
    let values = [
        ("image.repository=registry.plant.example/inspection", "image: \"registry.plant.example/inspection:"),
        ("image.pullPolicy=IfNotPresent", "imagePullPolicy: IfNotPresent"),
        ("imagePullSecrets[0].name=plant-registry", "- name: plant-registry"),
        ("config.site=north", "site: north"),
        ("config.mqtt=mqtts://broker.example:8883", "mqtt: mqtts://broker.example:8883"),
        ("config.sourceHosts[0]=models.example:5000", "- models.example:5000"),
        ("config.cameraHosts[0]=10.20.0.0/16", "- 10.20.0.0/16"),
        ("agent.resources.limits.memory=3Gi", "memory: 3Gi"),
        ("agent.nodeSelector.hall=h7", "hall: h7"),
        ("agent.maxUnavailable=7", "maxUnavailable: 7"),
        ("controller.replicas=3", "replicas: 3"),
        ("network.plantPorts[0].port=8000", "port: 8000"),
    ];
    let default = render(&[]);
    for (value, expected) in values {
        let text = render(&["--set", value]);
        assert!(text.contains(expected) && !default.contains(expected), "{value}: no `{expected}`");
    }
    assert!(
        default.contains("lineside-prepare")
            && !render(&["--set", "prepareNodes.enabled=false"]).contains("lineside-prepare")
    );
    let definition = "kind: CustomResourceDefinition";
    assert!(default.contains(definition) && !render(&["--set", "crds.install=false"]).contains(definition));
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
