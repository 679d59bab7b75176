//! Detection against a reference that shares nothing with it: `detect_reference.py` builds the models, runs them in ONNX
//! Runtime and decodes them with numpy; the agent has to find the same boxes.

use std::fs;
use std::path::Path;
use std::process::Command;

use lineside_tests::agent::{Agent, Start};
use lineside_tests::broker::Broker;
use lineside_tests::{model_manifest, python, root, stream_manifest};
use serde_json::Value;

const IOU_LEAST: f64 = 0.95;

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
fn every_decoder_finds_the_references_boxes() {
    let folder = tempfile::tempdir().unwrap();
    let expected = reference(folder.path());
    let models = expected["models"].as_array().unwrap();
    assert!(models.len() >= 6);
    let (manifests, pictures) = (folder.path().join("manifests"), folder.path().join("pictures"));
    fs::create_dir(&manifests).unwrap();
    fs::create_dir(&pictures).unwrap();
    for entry in fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|suffix| suffix == "png") {
            fs::copy(&path, pictures.join(path.file_name().unwrap())).unwrap();
        }
    }
    for model in models {
        let file = model["file"].as_str().unwrap();
        let name = file.trim_end_matches(".onnx");
        let labels = &model["labels"];
        // The exports with metadata have to be understood without help: decoder, labels, size and task.
        let told_by_metadata = !matches!(name, "yolox" | "end2end-split");
        let help = match told_by_metadata {
            true => String::new(),
            false => format!("    decoder: {}\n    labels: {labels}\n", model["decoder"].as_str().unwrap()),
        };
        let more = format!(
            "  {}\n  input: {{color: {}, mean: {}, std: {}}}\n  output:\n{help}    threshold: {}\n    iou: {}\n    topK: {}\n",
            if told_by_metadata { "rollback: false" } else { "task: detect" },
            model["color"].as_str().unwrap(),
            model["mean"],
            model["std"],
            model["threshold"],
            model["iou"],
            model["top_k"],
        );
        let uri = format!("file:../{file}");
        let text = model_manifest(name, 1, &uri, &more) + "---\n" + &stream_manifest(name, "dir:../pictures", name, "");
        fs::write(manifests.join(format!("{name}.yaml")), text).unwrap();
    }
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let mut agent = Agent::start(&Start {
        manifests: &manifests,
        data: &folder.path().join("data"),
        mqtt: &broker.url(),
        flags: &[],
    });
    for model in models {
        let name = model["file"].as_str().unwrap().trim_end_matches(".onnx");
        let images = model["images"].as_object().unwrap();
        let results = subscriber.wait_for(&format!("/{name}/result"), images.len());
        for (image, wanted) in images {
            let result = results.iter().find(|result| result["frame"]["name"] == **image).unwrap();
            compare(&format!("{name} {image}"), result["detections"].as_array().unwrap(), wanted.as_array().unwrap());
        }
    }
    assert!(agent.end().success());
}

/// Each wanted box is found once, with its class and about its score, and no other is.
fn compare(what: &str, found: &[Value], wanted: &[Value]) {
    assert_eq!(found.len(), wanted.len(), "{what}\nfound {found:#?}\nwanted {wanted:#?}");
    let mut left: Vec<&Value> = found.iter().collect();
    for wish in wanted {
        let best = left
            .iter()
            .enumerate()
            .filter(|(_, found)| found["label"] == wish["label"] && found["class"] == wish["class"])
            .map(|(index, found)| (index, iou(sides(found), sides(wish))))
            .max_by(|left, right| left.1.total_cmp(&right.1));
        let Some((index, overlap)) = best else { panic!("{what}: {wish} was not found") };
        assert!(overlap > IOU_LEAST, "{what}: {wish} was found with an overlap of {overlap}");
        let (score, wanted) = (left[index]["score"].as_f64().unwrap(), wish["score"].as_f64().unwrap());
        assert!((score - wanted).abs() < 0.02, "{what}: score {score} instead of {wanted}");
        left.remove(index);
    }
    let scores: Vec<f64> = found.iter().map(|found| found["score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|left, right| left >= right), "{what}: best first: {scores:?}");
}
