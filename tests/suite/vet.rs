//! Vetting: what means harm, answers nonsense or answers otherwise than it should never serves, and nobody else notices.

use std::fs;

use lineside_tests::agent::Agent;
use lineside_tests::hostile::{hostile_models, mutations};
use lineside_tests::onnx::mean_colour_classifier;
use lineside_tests::plant::{Plant, failures, model, not_a_number, refusal, rounds, serves, sourced, until_late};
use lineside_tests::{example, model_manifest};
use serde_json::{Value, json};

/// Tight limits, so that hostile models are found out soon.
const TIGHT: [&str; 4] = ["--admission-memory-mib", "512", "--admission-seconds", "5"];
/// A long chain does no harm in itself: where the node works it off within the limits, it may serve.
const MAY_SERVE: [&str; 1] = ["chain"];

/// The stream goes on, with the version it had and without a failure.
fn is_undisturbed(plant: &Plant, agent: &mut Agent) {
    assert!(agent.is_running());
    let results = plant.more_results(5);
    assert!(results.iter().all(|result| result["model"]["version"] == 1), "{results:#?}");
    assert_eq!(failures(agent), 0.0);
}

/// Waits until a model's fate is decided, and returns the reason where it was refused.
fn fate(agent: &Agent, name: &str) -> Option<String> {
    until_late(&format!("the fate of {name}"), || match model(agent, name)["state"].as_str() {
        Some("Ready") => Some(None),
        Some("Failed" | "Quarantined") => Some(Some(refusal(agent, name))),
        _ => None,
    })
}

/// Numbers of a stream's results: one after the other.
fn assert_no_gap(results: &[Value]) {
    for pair in results.windows(2) {
        assert_eq!(pair[0]["seq"].as_u64().unwrap() + 1, pair[1]["seq"].as_u64().unwrap(), "a result is missing");
    }
}

#[test]
fn hostile_models_end_with_a_reason_and_disturb_nobody() {
    let plant = Plant::with_stream(20);
    let mut agent = plant.start(&TIGHT);
    serves(&agent, "parts", 1);
    for (name, bytes) in hostile_models() {
        plant.put(&format!("{name}.onnx"), &bytes);
        let manifest = model_manifest(name, 1, &format!("file:../{name}.onnx"), "  task: tensor\n");
        plant.apply("hostile.yaml", &manifest);
        let reason = fate(&agent, name);
        eprintln!("{name}: {reason:?}");
        assert!(reason.is_some() || MAY_SERVE.contains(&name), "{name} serves");
        is_undisturbed(&plant, &mut agent);
    }
    plant.withdraw("hostile.yaml");
    assert_no_gap(&plant.results());
    assert!(agent.end().success());
}

#[test]
fn mutated_models_serve_or_end_with_a_reason_and_disturb_nobody() {
    const AT_ONCE: usize = 10;
    let count = rounds("LINESIDE_EXPERIMENT_MUTATIONS", 20) as usize;
    let plant = Plant::with_stream(20);
    let mut agent = plant.start(&TIGHT);
    serves(&agent, "parts", 1);
    let mutants = mutations(&mean_colour_classifier(8, 8, 3).build(), count, 16);
    let mut refused = 0;
    for (batch, mutants) in mutants.chunks(AT_ONCE).enumerate() {
        let name = |index: usize| format!("mutant-{batch}-{index}");
        let manifests: Vec<String> = mutants
            .iter()
            .enumerate()
            .map(|(index, bytes)| {
                plant.put(&format!("{}.onnx", name(index)), bytes);
                model_manifest(&name(index), 1, &format!("file:../{}.onnx", name(index)), "  task: tensor\n")
            })
            .collect();
        plant.apply("mutants.yaml", &manifests.join("---\n"));
        for index in 0..mutants.len() {
            refused += usize::from(fate(&agent, &name(index)).is_some());
        }
        is_undisturbed(&plant, &mut agent);
    }
    eprintln!("{refused} of {count} mutants refused");
    assert!(refused > 0);
    assert_no_gap(&plant.results());
    assert!(agent.end().success());
}

#[test]
fn three_failed_attempts_are_quarantine_which_outlasts_a_restart_until_it_is_released() {
    let plant = Plant::with_stream(20);
    let mut agent = plant.start(&TIGHT);
    serves(&agent, "parts", 1);
    let digest = plant.put("nan.onnx", &not_a_number());
    let source = json!({"uri": "file:../nan.onnx", "digest": digest});
    plant.apply("model.yaml", &sourced("parts", 2, &source, ""));
    let quarantined = |agent: &Agent| {
        until_late("quarantine", || (model(agent, "parts")["state"] == "Quarantined").then_some(()));
    };
    quarantined(&agent);
    let entry = agent.wait_for_event("model_quarantined");
    assert_eq!((&entry["digest"], &entry["failures"]), (&json!(digest), &json!(3)), "{entry}");
    assert_eq!(agent.metric("lineside_admission_failures_total"), 3.0);
    is_undisturbed(&plant, &mut agent);
    assert!(agent.end().success());

    // It is remembered, and costs no further attempt.
    let mut agent = plant.start(&TIGHT);
    quarantined(&agent);
    assert!(!refusal(&agent, "parts").is_empty());
    serves(&agent, "parts", 1);
    is_undisturbed(&plant, &mut agent);
    assert_eq!(agent.metric("lineside_admission_failures_total"), 0.0);
    assert!(agent.end().success());

    // Somebody says that it may be tried again.
    plant.store_done(&["release", &digest]);
    let mut agent = plant.start(&TIGHT);
    until_late("another attempt", || (agent.metric("lineside_admission_failures_total") >= 1.0).then_some(()));
    is_undisturbed(&plant, &mut agent);
    assert!(agent.end().success());
}

#[test]
fn golden_samples_decide_whether_a_version_serves() {
    let plant = Plant::with_stream(20);
    fs::create_dir(plant.path("manifests/golden")).unwrap();
    for entry in fs::read_dir(example("golden")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, plant.path("manifests/golden").join(path.file_name().unwrap())).unwrap();
    }
    let sample = |input: &str, output: &str, tolerance: &str| {
        format!("    - {{input: golden/{input}.jpg, output: golden/{output}.json, tolerance: {tolerance}}}\n")
    };
    let wanting =
        |name: &str, samples: &str| model_manifest(name, 1, "file:../parts.onnx", &format!("  golden:\n{samples}"));
    // Other decoders and resizers than those of the reference move the figures a little; another class is far off.
    let right: String = ["good", "scratch", "dent", "stain"].map(|label| sample(label, label, "0.5")).concat();
    let swapped = sample("good", "good", "0.5") + &sample("scratch", "good", "0.5");
    plant.apply("right.yaml", &wanting("right", &right));
    plant.apply("swapped.yaml", &wanting("swapped", &swapped));
    plant.apply("tight.yaml", &wanting("tight", &sample("dent", "dent", "0.000000001")));
    plant.apply("missing.yaml", &wanting("missing", &sample("nothing", "good", "0.5")));
    let mut agent = plant.start(&[]);
    serves(&agent, "right", 1);
    let reason = refusal(&agent, "swapped");
    assert!(reason.contains("scratch") && !reason.contains("good.jpg"), "it names the sample: {reason}");
    let reason = refusal(&agent, "tight");
    let names_the_difference = ["differ", "off", "tolerance"].iter().any(|word| reason.contains(word));
    assert!(reason.contains("dent") && names_the_difference, "{reason}");
    assert!(refusal(&agent, "missing").contains("nothing.jpg"));
    for name in ["swapped", "tight", "missing"] {
        assert!(model(&agent, name)["serving"].is_null(), "{name}");
    }
    is_undisturbed(&plant, &mut agent);
    assert!(agent.end().success());
}

#[test]
fn a_verdict_comes_with_figures_and_is_kept() {
    let plant = Plant::with_stream(20);
    let mut agent = plant.start(&[]);
    let before = serves(&agent, "parts", 1);
    assert_eq!(agent.events("model_admitted").len(), 1);
    let figure = |model: &Value, name: &str| model[name].as_f64().unwrap_or_default();
    for name in ["p50Ms", "p99Ms", "peakMemoryMiB"] {
        assert!(figure(&before, name) > 0.0, "{name} in {before}");
    }
    assert!(figure(&before, "p50Ms") <= figure(&before, "p99Ms"));
    assert!(agent.end().success());

    let mut agent = plant.start(&[]);
    let after = serves(&agent, "parts", 1);
    assert!(agent.events("model_admitted").is_empty(), "the verdict was kept");
    for name in ["p50Ms", "p99Ms", "peakMemoryMiB"] {
        assert_eq!(after[name], before[name], "{name}");
    }
    assert!(agent.end().success());
}

#[test]
fn a_version_that_answers_nan_takes_nothing_from_the_one_before() {
    let plant = Plant::with_stream(0);
    let mut agent = plant.start(&[]);
    serves(&agent, "parts", 1);
    plant.more_results(20);
    plant.put("nan.onnx", &not_a_number());
    plant.apply("model.yaml", &model_manifest("parts", 2, "file:../nan.onnx", ""));
    let reason = refusal(&agent, "parts");
    assert!(reason.contains("NaN") || reason.contains("not a number"), "{reason}");
    let entry = agent.wait_for_event("model_load_failed");
    assert_eq!((&entry["version"], &entry["serving"]), (&json!(2), &json!(1)), "{entry}");
    is_undisturbed(&plant, &mut agent);
    let results = plant.results();
    assert_eq!(results[0]["seq"], 1);
    assert_no_gap(&results);
    assert!(agent.end().success());
}
