//! Admission: a model that is hostile, returns invalid values or fails its golden samples never serves, and other
//! models are not affected.

use std::fs;

use lineside_tests::agent::Agent;
use lineside_tests::hostile::{hostile_models, mutations};
use lineside_tests::onnx::mean_colour_classifier;
use lineside_tests::site::{
    TestSite, failed_inspections, iterations, manifest_with_source, model_status, nan_model, wait_for_rejection,
    wait_until_serving,
};
use lineside_tests::wait::until_long;
use lineside_tests::{example, model_manifest};
use serde_json::{Value, json};

/// Strict limits, so that hostile models are rejected soon.
const STRICT_LIMITS: [&str; 4] = ["--admission-memory-mib", "512", "--admission-seconds", "5"];
/// A long chain of operators is not harmful in itself: it may serve if it runs within the limits.
const MAY_SERVE: [&str; 1] = ["chain"];

/// Checks that the stream continues with version 1 and without failures.
fn expect_unaffected(site: &TestSite, agent: &mut Agent) {
    assert!(agent.is_running());
    let results = site.wait_for_new_results(5);
    assert!(results.iter().all(|result| result["model"]["version"] == 1), "{results:#?}");
    assert_eq!(failed_inspections(agent), 0.0);
}

/// Waits until a model serves or is rejected, and returns the reason of a rejection.
fn wait_for_outcome(agent: &Agent, name: &str) -> Option<String> {
    until_long(&format!("the outcome for {name}"), || match model_status(agent, name)["state"].as_str() {
        Some("Ready") => Some(None),
        Some("Failed" | "Quarantined") => Some(Some(wait_for_rejection(agent, name))),
        _ => None,
    })
}

/// Checks that the sequence numbers of the results are consecutive.
fn assert_no_gap(results: &[Value]) {
    for pair in results.windows(2) {
        assert_eq!(pair[0]["seq"].as_u64().unwrap() + 1, pair[1]["seq"].as_u64().unwrap(), "a result is missing");
    }
}

#[test]
fn hostile_models_are_rejected_with_a_reason_and_do_not_affect_others() {
    let site = TestSite::with_broker_and_stream(20);
    let mut agent = site.start(&STRICT_LIMITS);
    wait_until_serving(&agent, "parts", 1);
    for (name, bytes) in hostile_models() {
        site.write(&format!("{name}.onnx"), &bytes);
        let manifest = model_manifest(name, 1, &format!("file:../{name}.onnx"), "  task: tensor\n");
        site.apply("hostile.yaml", &manifest);
        let reason = wait_for_outcome(&agent, name);
        eprintln!("{name}: {reason:?}");
        assert!(reason.is_some() || MAY_SERVE.contains(&name), "{name} serves");
        expect_unaffected(&site, &mut agent);
    }
    site.delete("hostile.yaml");
    assert_no_gap(&site.results());
    assert!(agent.terminate().success());
}

#[test]
fn mutated_models_serve_or_are_rejected_and_do_not_affect_others() {
    const BATCH: usize = 10;
    let count = iterations("LINESIDE_EXPERIMENT_MUTATIONS", 20) as usize;
    let site = TestSite::with_broker_and_stream(20);
    let mut agent = site.start(&STRICT_LIMITS);
    wait_until_serving(&agent, "parts", 1);
    let mutants = mutations(&mean_colour_classifier(8, 8, 3).build(), count, 16);
    let mut rejected = 0;
    for (batch, mutants) in mutants.chunks(BATCH).enumerate() {
        let name = |index: usize| format!("mutant-{batch}-{index}");
        let manifests: Vec<String> = mutants
            .iter()
            .enumerate()
            .map(|(index, bytes)| {
                site.write(&format!("{}.onnx", name(index)), bytes);
                model_manifest(&name(index), 1, &format!("file:../{}.onnx", name(index)), "  task: tensor\n")
            })
            .collect();
        site.apply("mutants.yaml", &manifests.join("---\n"));
        for index in 0..mutants.len() {
            rejected += usize::from(wait_for_outcome(&agent, &name(index)).is_some());
        }
        expect_unaffected(&site, &mut agent);
    }
    eprintln!("{rejected} of {count} mutants rejected");
    assert!(rejected > 0);
    assert_no_gap(&site.results());
    assert!(agent.terminate().success());
}

#[test]
fn three_failed_attempts_quarantine_a_version_across_restarts_until_it_is_released() {
    let site = TestSite::with_broker_and_stream(20);
    let mut agent = site.start(&STRICT_LIMITS);
    wait_until_serving(&agent, "parts", 1);
    let digest = site.write("nan.onnx", &nan_model());
    let source = json!({"uri": "file:../nan.onnx", "digest": digest});
    site.apply("model.yaml", &manifest_with_source("parts", 2, &source, ""));
    let quarantined = |agent: &Agent| {
        until_long("quarantine", || (model_status(agent, "parts")["state"] == "Quarantined").then_some(()));
    };
    quarantined(&agent);
    let entry = agent.wait_for_event("model_quarantined");
    assert_eq!((&entry["digest"], &entry["failures"]), (&json!(digest), &json!(3)), "{entry}");
    assert_eq!(agent.metric("lineside_admission_failures_total"), 3.0);
    expect_unaffected(&site, &mut agent);
    assert!(agent.terminate().success());

    // The quarantine is persistent, and there is no further attempt.
    let mut agent = site.start(&STRICT_LIMITS);
    quarantined(&agent);
    assert!(!wait_for_rejection(&agent, "parts").is_empty());
    wait_until_serving(&agent, "parts", 1);
    expect_unaffected(&site, &mut agent);
    assert_eq!(agent.metric("lineside_admission_failures_total"), 0.0);
    assert!(agent.terminate().success());

    // An operator releases the version.
    site.store_ok(&["release", &digest]);
    let mut agent = site.start(&STRICT_LIMITS);
    until_long("another attempt", || (agent.metric("lineside_admission_failures_total") >= 1.0).then_some(()));
    expect_unaffected(&site, &mut agent);
    assert!(agent.terminate().success());
}

#[test]
fn golden_samples_decide_whether_a_version_serves() {
    let site = TestSite::with_broker_and_stream(20);
    fs::create_dir(site.path("manifests/golden")).unwrap();
    for entry in fs::read_dir(example("golden")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, site.path("manifests/golden").join(path.file_name().unwrap())).unwrap();
    }
    let sample = |input: &str, output: &str, tolerance: &str| {
        format!("    - {{input: golden/{input}.jpg, output: golden/{output}.json, tolerance: {tolerance}}}\n")
    };
    let with_golden =
        |name: &str, samples: &str| model_manifest(name, 1, "file:../parts.onnx", &format!("  golden:\n{samples}"));
    // JPEG decoder and resize filter differ from those of the reference, which changes the scores slightly; another
    // class differs a lot.
    let right: String = ["good", "scratch", "dent", "stain"].map(|label| sample(label, label, "0.5")).concat();
    let swapped = sample("good", "good", "0.5") + &sample("scratch", "good", "0.5");
    site.apply("right.yaml", &with_golden("right", &right));
    site.apply("swapped.yaml", &with_golden("swapped", &swapped));
    site.apply("tight.yaml", &with_golden("tight", &sample("dent", "dent", "0.000000001")));
    site.apply("missing.yaml", &with_golden("missing", &sample("nothing", "good", "0.5")));
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "right", 1);
    let reason = wait_for_rejection(&agent, "swapped");
    assert!(reason.contains("scratch") && !reason.contains("good.jpg"), "the reason names the sample: {reason}");
    let reason = wait_for_rejection(&agent, "tight");
    let names_difference = ["differ", "off", "tolerance"].iter().any(|word| reason.contains(word));
    assert!(reason.contains("dent") && names_difference, "{reason}");
    assert!(wait_for_rejection(&agent, "missing").contains("nothing.jpg"));
    for name in ["swapped", "tight", "missing"] {
        assert!(model_status(&agent, name)["serving"].is_null(), "{name}");
    }
    expect_unaffected(&site, &mut agent);
    assert!(agent.terminate().success());
}

#[test]
fn admission_reports_its_benchmark_and_is_cached() {
    let site = TestSite::with_broker_and_stream(20);
    let mut agent = site.start(&[]);
    let before = wait_until_serving(&agent, "parts", 1);
    assert_eq!(agent.events("model_admitted").len(), 1);
    let number = |model: &Value, name: &str| model[name].as_f64().unwrap_or_default();
    for name in ["p50Ms", "p99Ms", "peakMemoryMiB"] {
        assert!(number(&before, name) > 0.0, "{name} of {before}");
    }
    assert!(number(&before, "p50Ms") <= number(&before, "p99Ms"));
    assert!(agent.terminate().success());

    let mut agent = site.start(&[]);
    let after = wait_until_serving(&agent, "parts", 1);
    assert!(agent.events("model_admitted").is_empty(), "the admission result is cached");
    for name in ["p50Ms", "p99Ms", "peakMemoryMiB"] {
        assert_eq!(after[name], before[name], "{name}");
    }
    assert!(agent.terminate().success());
}

#[test]
fn a_version_that_returns_nan_is_rejected_and_the_previous_one_serves() {
    let site = TestSite::with_broker_and_stream(0);
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    site.wait_for_new_results(20);
    site.write("nan.onnx", &nan_model());
    site.apply("model.yaml", &model_manifest("parts", 2, "file:../nan.onnx", ""));
    let reason = wait_for_rejection(&agent, "parts");
    assert!(reason.contains("NaN") || reason.contains("not a number"), "{reason}");
    let entry = agent.wait_for_event("model_load_failed");
    assert_eq!((&entry["version"], &entry["serving"]), (&json!(2), &json!(1)), "{entry}");
    expect_unaffected(&site, &mut agent);
    let results = site.results();
    assert_eq!(results[0]["seq"], 1);
    assert_no_gap(&results);
    assert!(agent.terminate().success());
}
