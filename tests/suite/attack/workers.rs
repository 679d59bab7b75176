//! Models that crash, hang or allocate without bound while they serve: the worker process ends, the agent and the other models
//! go on, and the file is quarantined.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use lineside_tests::agent::Agent;
use lineside_tests::hostile::{Outburst, hostile_on_green};
use lineside_tests::onnx::mean_colour_classifier;
use lineside_tests::site::{TestSite, model_status, status, wait_until_serving};
use lineside_tests::wait::{until_long, until_true};
use lineside_tests::{example, model_manifest, png, stream_manifest, utf8};

const GREEN: [u8; 3] = [0, 255, 0];
const GREY: [u8; 3] = [100, 100, 100];

/// The worker processes of an agent: process id and model.
fn workers(agent: &Agent) -> Vec<(u32, String)> {
    let is_child = |stat: &str| {
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        parent == Some(agent.pid())
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        if is_child(&read("stat")) && read("cmdline").contains("worker-child") {
            // The threads bear the model's name: `d0-parts`.
            let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            let names = threads.filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
            let name = names.filter_map(|name| Some(name.trim().strip_prefix("d0-")?.to_owned())).next();
            found.push((pid, name.unwrap_or_default()));
        }
    }
    found
}

fn worker_of(agent: &Agent, model: &str) -> u32 {
    until_long(&format!("a worker of {model}"), || {
        workers(agent).into_iter().find(|(_, name)| name == model).map(|(pid, _)| pid)
    })
}

/// A site with the stream `line-1` of a healthy model, and a folder of grey frames with one green one among them, which a second
/// model is to inspect.
fn site_with_hostile_model(outburst: Outburst) -> (TestSite, PathBuf) {
    let site = TestSite::with_broker_and_stream(20);
    let frames = site.path("frames");
    fs::create_dir(&frames).unwrap();
    for index in 0..10 {
        let pixel = if index == 5 { GREEN } else { GREY };
        fs::write(frames.join(format!("{index}.png")), png::flat(8, 8, pixel)).unwrap();
    }
    site.write("hostile.onnx", &hostile_on_green(outburst));
    (site, frames)
}

fn inspect(site: &TestSite, frames: &std::path::Path) {
    site.apply("hostile.yaml", &model_manifest("hostile", 1, "file:../hostile.onnx", "  task: tensor\n"));
    let source = format!("dir://{}?loop=true", frames.display());
    site.apply("hostile-stream.yaml", &stream_manifest("line-2", &source, "hostile", "  fps: 50\n"));
}

fn failed(agent: &Agent, stream: &str) -> f64 {
    agent.metric(&format!("lineside_frames_total{{outcome=\"failed\",stream=\"{stream}\"}}"))
}

/// Checks that the agent and the healthy model are as before.
fn expect_unaffected(site: &TestSite, agent: &mut Agent, healthy_worker: u32) {
    assert!(agent.is_running());
    assert_eq!(worker_of(agent, "parts"), healthy_worker, "the worker of the other model is the same process");
    assert_eq!(failed(agent, "line-1"), 0.0);
    assert!(site.wait_for_new_results(5).iter().all(|result| result["model"]["version"] == 1));
}

#[test]
fn a_model_that_asks_for_eight_gib_on_one_frame_fails_that_frame_and_harms_nobody() {
    let (site, frames) = site_with_hostile_model(Outburst::Memory);
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    let healthy = worker_of(&agent, "parts");
    inspect(&site, &frames);
    wait_until_serving(&agent, "hostile", 1);
    // The engine reports that it got no memory. A version whose worker dies of it is quarantined instead.
    until_long(&format!("failed frames or quarantine; {}", status(&agent)), || {
        (failed(&agent, "line-2") >= 3.0).then_some(())
    });
    let peak = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB").trim().to_owned();
        line.trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
    };
    for (pid, name) in workers(&agent) {
        assert!(peak(pid) < 512, "the worker of {name} used {} MiB", peak(pid));
    }
    assert!(peak(agent.pid()) < 256, "the agent used {} MiB", peak(agent.pid()));
    expect_unaffected(&site, &mut agent, healthy);
}

#[test]
fn a_model_that_computes_for_minutes_on_one_frame_is_quarantined_and_harms_nobody() {
    let (site, frames) = site_with_hostile_model(Outburst::Time);
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    let healthy = worker_of(&agent, "parts");
    inspect(&site, &frames);
    let model = until_long(&format!("quarantine; {}", status(&agent)), || {
        let model = model_status(&agent, "hostile");
        (model["state"] == "Quarantined").then_some(model)
    });
    assert!(model["reason"].as_str().unwrap().contains("3 times"), "{model}");
    // Each fault cost the worker one green frame.
    assert_eq!(failed(&agent, "line-2"), 3.0);
    expect_unaffected(&site, &mut agent, healthy);
    assert!(agent.terminate().success());
    assert_eq!(workers(&agent), []);
    // The quarantine is remembered, and a start is not disturbed by it.
    let again = site.start(&[]);
    wait_until_serving(&again, "parts", 1);
    until_true("the quarantine after a restart", || model_status(&again, "hostile")["state"] == "Quarantined");
}

#[test]
fn the_version_before_a_quarantined_one_serves_again() {
    let (site, frames) = site_with_hostile_model(Outburst::Time);
    site.write("good.onnx", &mean_colour_classifier(8, 8, 3).build());
    site.apply("hostile.yaml", &model_manifest("hostile", 1, "file:../good.onnx", ""));
    let source = format!("dir://{}?loop=true", frames.display());
    site.apply("hostile-stream.yaml", &stream_manifest("line-2", &source, "hostile", "  fps: 50\n"));
    let agent = site.start(&[]);
    wait_until_serving(&agent, "hostile", 1);
    site.apply("hostile.yaml", &model_manifest("hostile", 2, "file:../hostile.onnx", "  task: tensor\n"));
    wait_until_serving(&agent, "hostile", 2);
    wait_until_serving(&agent, "hostile", 1);
    until_long("the quarantine of version 2", || {
        (model_status(&agent, "hostile")["state"] == "Quarantined").then_some(())
    });
    let before = agent.metric("lineside_frames_total{outcome=\"processed\",stream=\"line-2\"}");
    agent.wait_for_metric("lineside_frames_total{outcome=\"processed\",stream=\"line-2\"}", before + 20.0);
}

#[test]
fn a_worker_that_is_killed_is_replaced_and_no_result_is_lost() {
    let site = TestSite::with_broker();
    let frames = site.path("frames");
    fs::create_dir(&frames).unwrap();
    const COUNT: usize = 300;
    for index in 0..COUNT {
        fs::write(frames.join(format!("{index:03}.png")), png::flat(64, 64, GREY)).unwrap();
    }
    site.write("parts.onnx", &fs::read(example("surface-defects.onnx")).unwrap());
    site.apply("model.yaml", &model_manifest("parts", 1, "file:../parts.onnx", ""));
    let agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    let source = format!("dir://{}", utf8(&frames));
    site.apply("stream.yaml", &stream_manifest("line-1", &source, "parts", "  fps: 0\n"));
    // SIGSEGV is what a defect in an engine or a driver does; SIGKILL what the system does when memory runs out.
    for signal in ["SEGV", "KILL", "ABRT"] {
        site.wait_for_new_results(5);
        let pid = worker_of(&agent, "parts");
        until_true("another worker", || {
            // Rust's handler takes the first SIGSEGV that is not a fault of the processor. The process may be gone already.
            let kill = std::process::Command::new("kill").args([format!("-{signal}"), pid.to_string()]).output();
            kill.is_ok() && worker_of(&agent, "parts") != pid
        });
    }
    until_long("all results", || (site.results().len() + failed(&agent, "line-1") as usize >= COUNT).then_some(()));
    let results = site.results();
    let mut names: Vec<&str> = results.iter().map(|result| result["frame"]["name"].as_str().unwrap()).collect();
    names.dedup();
    assert_eq!(names.len(), results.len(), "a frame was reported twice");
    // A signal that comes from the process itself blames what it executed; SIGKILL does not.
    assert!(failed(&agent, "line-1") <= 2.0, "{} frames failed", failed(&agent, "line-1"));
    assert!(agent.metric("lineside_worker_replacements_total{model=\"parts\",version=\"1\"}") >= 3.0);
}

#[test]
fn sigterm_ends_the_agent_while_a_model_hangs() {
    let (site, frames) = site_with_hostile_model(Outburst::Time);
    for index in 0..10 {
        fs::write(frames.join(format!("{index}.png")), png::flat(8, 8, GREEN)).unwrap();
    }
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    inspect(&site, &frames);
    // From here on the model hangs in one green frame after the other.
    agent.wait_for_event("worker_replaced");
    assert!(agent.terminate().success());
    assert_eq!(workers(&agent), [], "no worker is left");
}

#[test]
fn a_worker_has_no_descriptor_of_the_agent_and_ends_with_it() {
    let site = TestSite::with_broker_and_stream(20);
    let agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    let worker = worker_of(&agent, "parts");
    let open = |process: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten();
        entries.map(|entry| fs::read_link(entry.path()).unwrap_or_default().display().to_string()).collect()
    };
    // What the shell or cargo left open for this test passes through the agent.
    let inherited = open("self");
    let own: Vec<String> = open(&worker.to_string()).difference(&inherited).cloned().collect();
    // Standard input with its duplicates is one socket; the pipes are standard output and standard error.
    let count = |start: &str| own.iter().filter(|target| target.starts_with(start)).count();
    assert_eq!(
        (own.len(), count("socket:"), count("pipe:"), count("/memfd:lineside-activity")),
        (4, 1, 2, 1),
        "{own:?}"
    );
    agent.signal("KILL");
    until_true("the end of the worker", || !PathBuf::from(format!("/proc/{worker}/exe")).exists());
}
