//! Detection compared with an independent reference: `detect_reference.py` builds the models, runs them in ONNX Runtime
//! and decodes the outputs with numpy. The agent must find the same boxes.

use std::fs;
use std::path::Path;
use std::process::Command;

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::Broker;
use lineside_tests::{model_manifest, python, root, stream_manifest};
use serde_json::Value;

const MIN_IOU: f64 = 0.95;

fn reference(folder: &Path) -> Value {
    let script = root().join("tests/suite/detect_reference.py");
    let output = Command::new(python()).arg(&script).arg(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap()
}

fn sides(found: &Value) -> [f64; 4] {
    std::array::from_fn(|index| found["box"][index].as_f64().unwrap())
}

fn iou(one: [f64; 4], other: [f64; 4]) -> f64 {
    let area = |sides: [f64; 4]| (sides[2] - sides[0]).max(0.0) * (sides[3] - sides[1]).max(0.0);
    let shared = area([one[0].max(other[0]), one[1].max(other[1]), one[2].min(other[2]), one[3].min(other[3])]);
    shared / (area(one) + area(other) - shared)
}

#[test]
fn every_decoder_matches_the_reference_boxes() {
    let folder = tempfile::tempdir().unwrap();
    let reference = reference(folder.path());
    let models = reference["models"].as_array().unwrap();
    assert!(models.len() >= 6);
    let (manifests, images) = (folder.path().join("manifests"), folder.path().join("images"));
    fs::create_dir(&manifests).unwrap();
    fs::create_dir(&images).unwrap();
    for entry in fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|suffix| suffix == "png") {
            fs::copy(&path, images.join(path.file_name().unwrap())).unwrap();
        }
    }
    for model in models {
        let file = model["file"].as_str().unwrap();
        let name = file.trim_end_matches(".onnx");
        let labels = &model["labels"];
        // Exports with metadata must work without further settings: decoder, labels, size and task come from the
        // metadata.
        let has_metadata = !matches!(name, "yolox" | "end2end-split");
        let output = if has_metadata {
            String::new()
        } else {
            let decoder = model["decoder"].as_str().unwrap();
            let first_class = if name == "end2end-split" { "    firstClass: 0\n" } else { "" };
            format!("    decoder: {decoder}\n{first_class}    labels: {labels}\n")
        };
        let more = format!(
            "  {}\n  input: {{filter: antialias, color: {}, mean: {}, std: {}}}\n  output:\n{output}    threshold: {}\n    iou: {}\n    topK: {}\n",
            if has_metadata { "rollback: false" } else { "task: detect" },
            model["color"].as_str().unwrap(),
            model["mean"],
            model["std"],
            model["threshold"],
            model["iou"],
            model["top_k"],
        );
        let uri = format!("file:../{file}");
        let text = model_manifest(name, 1, &uri, &more) + "---\n" + &stream_manifest(name, "dir:../images", name, "");
        fs::write(manifests.join(format!("{name}.yaml")), text).unwrap();
    }
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let mut agent = Agent::start(&AgentOptions {
        manifests: &manifests,
        data: &folder.path().join("data"),
        mqtt: &broker.url(),
        flags: &[],
    });
    for model in models {
        let name = model["file"].as_str().unwrap().trim_end_matches(".onnx");
        let references = model["images"].as_object().unwrap();
        let results = subscriber.wait_for(&format!("/{name}/result"), references.len());
        for (image, expected) in references {
            let result = results.iter().find(|result| result["frame"]["name"] == **image).unwrap();
            compare(&format!("{name} {image}"), result["detections"].as_array().unwrap(), expected.as_array().unwrap());
        }
    }
    assert!(agent.terminate().success());
}

/// Every expected box is found once, with its class and approximately its score, and there are no other boxes.
fn compare(what: &str, found: &[Value], expected: &[Value]) {
    assert_eq!(found.len(), expected.len(), "{what}\nfound {found:#?}\nexpected {expected:#?}");
    let mut left: Vec<&Value> = found.iter().collect();
    for reference in expected {
        let best = left
            .iter()
            .enumerate()
            .filter(|(_, found)| found["label"] == reference["label"] && found["class"] == reference["class"])
            .map(|(index, found)| (index, iou(sides(found), sides(reference))))
            .max_by(|left, right| left.1.total_cmp(&right.1));
        let Some((index, overlap)) = best else { panic!("{what}: {reference} was not found") };
        assert!(overlap > MIN_IOU, "{what}: {reference} was found with an overlap of {overlap}");
        let (score, expected) = (left[index]["score"].as_f64().unwrap(), reference["score"].as_f64().unwrap());
        assert!((score - expected).abs() < 0.02, "{what}: score {score} instead of {expected}");
        left.remove(index);
    }
    let scores: Vec<f64> = found.iter().map(|found| found["score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|left, right| left >= right), "{what}: not sorted by score: {scores:?}");
}
