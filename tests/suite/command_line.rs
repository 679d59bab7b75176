//! The commands `check`, `demo` and `schema`.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use lineside_tests::agent::{lineside, program};
use lineside_tests::broker::Subscriber;
use lineside_tests::process::command;
use lineside_tests::wait::until;
use lineside_tests::{example, root};
use serde_json::Value;

#[test]
fn check_reports_the_same_as_text_and_as_json() {
    let model = example("surface-defects.onnx");
    let image = example("frames/part-012-scratch.jpg");
    let arguments = ["check", model.to_str().unwrap(), "--image", image.to_str().unwrap()];
    let output = lineside(&[&arguments[..], &["--json"]].concat());
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["pipeline"]["task"], "classify");
    assert_eq!(report["pipeline"]["labels"], serde_json::json!(["good", "scratch", "dent", "stain"]));
    assert_eq!(report["inputs"][0]["shape"], serde_json::json!([-1, 3, 128, 128]));
    assert_eq!(report["engines"][0]["engine"], "tract");
    assert_eq!(report["engines"][0]["runs"], true);
    assert!(report["engines"][0]["benchmark"]["p50_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(report["image"]["prediction"]["classes"][0]["label"], "scratch");
    let output = lineside(&arguments);
    let text = String::from_utf8_lossy(&output.stdout);
    for expected in ["tract", "128x128", "good, scratch, dent, stain", "P50 ms", "scratch"] {
        assert!(text.contains(expected), "{expected} is not in\n{text}");
    }
}

#[test]
fn the_bundled_model_reproduces_its_golden_samples() {
    for label in ["good", "scratch", "dent", "stain"] {
        let golden: Value =
            serde_json::from_slice(&std::fs::read(example(&format!("golden/{label}.json"))).unwrap()).unwrap();
        let image = example(&format!("golden/{label}.jpg"));
        let model = example("surface-defects.onnx");
        let output = lineside(&["check", model.to_str().unwrap(), "--image", image.to_str().unwrap(), "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let (found, expected) = (&report["image"]["prediction"]["classes"], &golden["classes"]);
        assert_eq!(found[0]["label"], label);
        // JPEG decoder and resize filter differ from those of the training, which changes the scores slightly.
        for class in expected.as_array().unwrap() {
            let same = found.as_array().unwrap().iter().find(|found| found["label"] == class["label"]).unwrap();
            let difference = same["score"].as_f64().unwrap() - class["score"].as_f64().unwrap();
            assert!(difference.abs() < 0.02, "{label}: {} is off by {difference}", class["label"]);
        }
    }
}

#[test]
fn demo_prints_verdicts_and_ends_after_the_requested_results() {
    let mut demo = command(program())
        .args(["demo", "--results", "30", "--fps", "20"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The mosquitto_sub command that the demo prints works unchanged.
    let mut lines = BufReader::new(demo.stderr.take().unwrap()).lines().map_while(Result::ok);
    let hint = until("the line for mosquitto_sub", || lines.find(|line| line.contains("mosquitto_sub")));
    let words: Vec<&str> = hint.split_whitespace().collect();
    let after =
        |flag: &str| words[words.iter().position(|word| *word == flag).unwrap() + 1].trim_matches('\'').to_owned();
    let subscriber = Subscriber::start(after("-p").parse().unwrap(), &after("-t"));
    let results = subscriber.wait_for("/line-1/result", 5);
    assert_eq!(results[0]["model"]["name"], "surface-defects");
    assert_eq!(subscriber.payloads("/status")[0]["state"], "online");
    let rest: Vec<String> = lines.collect();
    let output = demo.wait_with_output().unwrap();
    assert!(output.status.success());
    let table = String::from_utf8_lossy(&output.stdout);
    assert_eq!(table.lines().filter(|line| line.contains("part-")).count(), 30, "{table}");
    assert!(table.contains("VERDICT") && table.contains("reject") && table.contains("pass"), "{table}");
    assert!(rest.iter().any(|line| line.contains("30 results over MQTT")), "{rest:?}");
}

#[test]
fn an_interrupted_demo_prints_its_summary() {
    let mut demo =
        command(program()).args(["demo", "--fps", "20"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines().map_while(Result::ok);
    until("a result", || lines.find(|line| line.contains("part-")));
    assert!(command("kill").args(["-INT", &demo.id().to_string()]).status().unwrap().success());
    std::thread::spawn(move || lines.count());
    let output = demo.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("results over MQTT") && text.contains("Median inference"), "{text}");
}

#[test]
fn the_schema_command_prints_the_committed_schema() {
    for name in ["result", "status"] {
        let output = lineside(&["schema", name]);
        let committed = std::fs::read(root().join(format!("docs/schemas/{name}.schema.json"))).unwrap();
        assert!(output.stdout == committed, "{name}");
    }
}
