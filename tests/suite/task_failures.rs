//! The failure of each supervised task of the agent: the task is restarted, or the process ends with its name, and no result is
//! lost. The agent runs within the test, because only the supervisor itself can make a task panic.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lineside::app::App;
use lineside::config::flags::Flags;
use lineside::config::settings::{Config, ConfigLayers};
use lineside_api::names::ConfigErrors;
use lineside_tests::http;
use lineside_tests::site::TestSite;
use lineside_tests::wait::{until, until_long};
use lineside_tests::{example, model_manifest, utf8};
use serde_json::Value;

/// The tasks of an agent that reads a folder of manifests with one stream, and whether each is restarted.
const TASKS: [(&str, bool); 9] = [
    ("http", true),
    ("probes", true),
    ("manifest-watcher", true),
    ("memory-budget", true),
    ("metrics-publisher", true),
    ("publisher", true),
    ("stream-client/line-1", true),
    ("stream-source/line-1", true),
    ("reconciler", false),
];

fn config(site: &TestSite) -> Config {
    let (manifests, data) = (site.path("manifests"), site.data());
    // The model lies beside the manifests, and the frames in the repository.
    let roots = format!("{},{}", site.path("").display(), example("frames").canonicalize().unwrap().display());
    let flags = [
        ("node", "edge-1"),
        ("site", "plant"),
        ("http", "127.0.0.1:0"),
        ("probes", "127.0.0.1:0"),
        ("mqtt", &site.broker_url()),
        ("manifests", utf8(&manifests)),
        ("data-dir", utf8(&data)),
        ("file-roots", &roots),
    ];
    let flags: BTreeMap<String, String> = flags.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    ConfigLayers::new(Flags(flags)).resolve(ConfigErrors::default(), "edge-1").unwrap()
}

fn restarts(http: &str, task: &str) -> f64 {
    let series = format!("lineside_task_restarts_total{{task=\"{task}\"}} ");
    let Ok((200, metrics)) = http::get(http, "/metrics") else { return 0.0 };
    let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
    value.and_then(|value| value.parse().ok()).unwrap_or(0.0)
}

#[test]
fn a_panic_of_any_task_is_survived_or_ends_the_process_and_no_result_is_lost() {
    let site = TestSite::with_broker_and_stream(10);
    // The program admits the model. The test's own process can be neither an admission child nor a worker.
    let isolation = "  runtime: {isolation: inProcess}\n";
    site.apply("model.yaml", &model_manifest("parts", 1, "file:../parts.onnx", isolation));
    let mut admitting = site.start(&[]);
    site.wait_for_new_results(1);
    assert!(admitting.terminate().success());
    let published_before = site.results().len();

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let app =
        runtime.block_on(App::start(config(&site), std::sync::Arc::new(|level: &str| Ok(level.to_owned())))).unwrap();
    let address = app.http().to_string();
    site.wait_for_new_results(3);
    let tasks: BTreeSet<String> = app.supervisor().tasks().into_iter().collect();
    let expected: BTreeSet<String> = TASKS.iter().map(|(task, _)| (*task).to_owned()).collect();
    assert_eq!(tasks, expected, "a task was added or renamed; state here what follows its failure");

    for (task, _) in TASKS.iter().filter(|(_, is_restarted)| *is_restarted) {
        assert!(app.supervisor().inject_panic(task));
        until_long(&format!("{task} to be restarted"), || (restarts(&address, task) >= 1.0).then_some(()));
        let degraded = until(&format!("the status to report {task}"), || {
            let (_, status) = http::get(&address, "/v1/status").ok()?;
            let status: Value = serde_json::from_str(&status).ok()?;
            let conditions = status["conditions"].as_array()?.clone();
            let degraded = conditions.into_iter().find(|condition| condition["type"] == "Degraded")?;
            degraded["message"].as_str().is_some_and(|message| message.contains(task)).then_some(degraded)
        });
        assert_eq!((&degraded["status"], &degraded["reason"]), (&"True".into(), &"TaskRestarted".into()), "{degraded}");
        site.wait_for_new_results(3);
        assert_eq!(app.supervisor().failure(), None, "{task}");
    }

    assert!(app.supervisor().inject_panic("reconciler"));
    let failure =
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), app.failed()).await }).unwrap();
    assert_eq!(failure.task, "reconciler");
    assert!(failure.reason.contains("panicked"), "{failure}");
    runtime.block_on(app.stop());

    let results = site.results();
    let published: BTreeSet<u64> =
        results[published_before..].iter().filter_map(|result| result["seq"].as_u64()).collect();
    let last = published.last().copied().unwrap();
    let missing: Vec<u64> = (1..=last).filter(|seq| !published.contains(seq)).collect();
    assert!(missing.is_empty(), "{missing:?} of {last} results were not published");
}
