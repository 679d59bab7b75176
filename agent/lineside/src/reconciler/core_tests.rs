//! Tests of the reconciler's state machine: manifests and load outcomes in, actions and snapshots out. No process, no network.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lineside_api::kinds::ModelManifest;
use lineside_api::kinds::manifest::{Object, read};
use lineside_api::message::ModelInfo;
use lineside_api::state::ModelState;
use lineside_common::digest::Digest;
use lineside_models::admission::Benchmark;
use lineside_models::last_good::LastGoodVersions;
use serde_json::json;
use tempfile::TempDir;

use super::core::{Action, Core, LoadOutcome};
use super::load_task::{LoadFailure, LoadRequest, LoadedVersion};
use super::snapshot::{ModelSnapshot, StreamSnapshot};
use crate::desired::{DesiredObject, DesiredState, Identity, Node, Refused};

fn model(name: &str, version: u64, more: &str) -> String {
    format!(
        "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: {name}}}\n\
         spec: {{version: {version}, source: {{uri: 'file:{name}.onnx'}}{more}}}\n---\n"
    )
}

fn stream(name: &str, model: &str, more: &str) -> String {
    format!(
        "apiVersion: lineside.dev/v1alpha1\nkind: CameraStream\nmetadata: {{name: {name}}}\n\
         spec: {{source: {{uri: 'dir:f'}}, model: {model}{more}}}\n---\n"
    )
}

fn desired(text: &str) -> DesiredState {
    let objects = read(text, Path::new("/"), &|_| Ok(())).unwrap();
    let object = |object: Object| DesiredObject { object, place: "a.yaml".into(), identity: Identity::default() };
    DesiredState { objects: objects.into_iter().map(object).collect(), is_complete: true, ..DesiredState::default() }
}

fn loaded(version: u64) -> LoadedVersion {
    let info = ModelInfo {
        name: "m".into(),
        version,
        digest: digest(version).to_string(),
        engine: "tract".into(),
        device: "cpu".into(),
    };
    let benchmark = Benchmark { p50_ms: 1.0, p99_ms: 2.0, load_ms: 3.0, peak_memory_bytes: 4, runs: 5 };
    LoadedVersion {
        info: Arc::new(info),
        id: version,
        digest: digest(version),
        benchmark,
        expires: None,
        took: Duration::ZERO,
    }
}

fn digest(version: u64) -> Digest {
    Digest::of(&version.to_be_bytes())
}

fn failure(reason: &str) -> LoadFailure {
    LoadFailure { reason: reason.into(), quarantined_after: None, digest: None }
}

fn quarantined() -> LoadFailure {
    LoadFailure { reason: "it failed 3 times".into(), quarantined_after: Some(3), digest: Some(digest(1)) }
}

/// A core with its data folder, a clock that is set by hand, and the versions that serve.
struct Bench {
    folder: TempDir,
    core: Core,
    now: Instant,
    serving: BTreeMap<String, u64>,
}

impl Bench {
    fn new() -> Self {
        Self::on(tempfile::tempdir().unwrap(), true)
    }

    fn on(folder: TempDir, has_blobs: bool) -> Self {
        let node = Node { name: "edge-3".into(), labels: BTreeMap::from([("line".into(), "a".into())]) };
        let core = Core::new(node, LastGoodVersions::read(folder.path()), Box::new(move |_| has_blobs));
        Self { folder, core, now: Instant::now(), serving: BTreeMap::new() }
    }

    /// The same node after a restart of the agent.
    fn restart(self, has_blobs: bool) -> Self {
        Self::on(self.folder, has_blobs)
    }

    fn apply(&mut self, text: &str) -> Vec<Action> {
        self.apply_state(desired(text))
    }

    fn apply_state(&mut self, state: DesiredState) -> Vec<Action> {
        self.core.on_desired(Arc::new(state));
        self.poll()
    }

    fn poll(&mut self) -> Vec<Action> {
        self.core.poll(self.now)
    }

    fn after(&mut self, seconds: u64) -> Vec<Action> {
        self.now += Duration::from_secs(seconds);
        self.poll()
    }

    fn finish(
        &mut self,
        manifest: &ModelManifest,
        is_restored: bool,
        result: Result<Option<LoadedVersion>, LoadFailure>,
    ) {
        if let Ok(Some(loaded)) = &result {
            self.serving.insert(manifest.name.clone(), loaded.info.version);
        }
        let still_serves = self.serving.contains_key(&manifest.name);
        let outcome = LoadOutcome { manifest: manifest.clone(), is_restored, result };
        self.core.on_load_finished(outcome, still_serves, self.now);
    }

    /// Applies a text with one model, and lets its load end well.
    fn serve(&mut self, text: &str) {
        let request = only_load(self.apply(text));
        let version = request.manifest.version;
        self.finish(&request.manifest, request.is_restored, Ok(Some(loaded(version))));
        assert!(loads(&self.poll()).is_empty());
    }

    fn model(&self) -> ModelSnapshot {
        let mut models = self.core.snapshot().models;
        assert_eq!(models.len(), 1);
        models.remove(0)
    }

    fn streams(&self) -> Vec<StreamSnapshot> {
        self.core.snapshot().streams
    }

    fn serving_version(&self) -> Option<u64> {
        self.core.snapshot().serving.get("m").map(|loaded| loaded.info.version)
    }
}

fn only_load(mut actions: Vec<Action>) -> LoadRequest {
    let index = actions.iter().position(|action| matches!(action, Action::Load(_)));
    let action = actions.swap_remove(index.unwrap_or_else(|| panic!("no load in {}", names(&actions).join(", "))));
    assert!(loads(&actions).is_empty(), "more than one load");
    match action {
        Action::Load(request) => *request,
        _ => unreachable!("a load was found"),
    }
}

fn loads(actions: &[Action]) -> Vec<&LoadRequest> {
    let mut requests = Vec::new();
    for action in actions {
        if let Action::Load(request) = action {
            requests.push(&**request);
        }
    }
    requests
}

fn names(actions: &[Action]) -> Vec<String> {
    let name = |action: &Action| match action {
        Action::Load(request) if request.is_restored => format!("restore {}", request.manifest.version),
        Action::Load(request) => format!("load {}", request.manifest.version),
        Action::Unload(name) => format!("unload {name}"),
        Action::StartStream(manifest) => format!("start {}", manifest.name),
        Action::StopStream(name) => format!("stop {name}"),
    };
    actions.iter().map(name).collect()
}

#[test]
fn a_new_model_is_loaded_and_serves() {
    let mut bench = Bench::new();
    assert_eq!(names(&bench.apply(&model("m", 1, ""))), ["load 1"]);
    assert_eq!(bench.model().state, ModelState::Pending);
    assert!(bench.poll().is_empty(), "one load at a time");
    let manifest = desired_model(1, "");
    bench.finish(&manifest, false, Ok(Some(loaded(1))));
    assert_eq!((bench.model().state, bench.serving_version()), (ModelState::Ready, Some(1)));
    assert!(bench.poll().is_empty());
}

fn desired_model(version: u64, more: &str) -> ModelManifest {
    match desired(&model("m", version, more)).objects.remove(0).object {
        Object::Model(manifest) => *manifest,
        Object::Stream(_) => unreachable!("a model was written"),
    }
}

#[test]
fn nothing_happens_without_a_desired_state() {
    let mut bench = Bench::new();
    assert!(bench.poll().is_empty());
    let snapshot = bench.core.snapshot();
    assert!(!snapshot.is_configured && snapshot.models.is_empty());
}

#[test]
fn an_empty_desired_state_is_a_configuration() {
    let mut bench = Bench::new();
    assert!(bench.apply_state(DesiredState { is_complete: true, ..DesiredState::default() }).is_empty());
    assert!(bench.core.snapshot().is_configured);
}

#[test]
fn last_good_versions_are_restored_while_the_desired_state_is_pending() {
    let pending = || DesiredState::pending(Some("the folder cannot be read".into()));
    for (desired, expected) in [
        (model("m", 1, ""), vec![]),
        (model("m", 2, ""), vec!["load 2".to_owned()]),
        (model("other", 1, ""), vec!["unload m".to_owned(), "load 1".to_owned()]),
    ] {
        let mut bench = Bench::new();
        bench.serve(&model("m", 1, ""));
        let mut bench = bench.restart(true);
        let request = only_load(bench.apply_state(pending()));
        assert_eq!(request.manifest.version, 1);
        bench.finish(&request.manifest, false, Ok(Some(loaded(1))));
        assert!(bench.poll().is_empty() && bench.apply_state(pending()).is_empty());
        let snapshot = bench.core.snapshot();
        assert!(!snapshot.is_configured && snapshot.serving.contains_key("m"));
        assert_eq!(snapshot.unreadable.as_deref(), Some("the folder cannot be read"));
        assert_eq!(names(&bench.apply(&desired)), expected);
        assert!(bench.core.snapshot().is_configured);
    }
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let mut bench = bench.restart(false);
    assert!(bench.apply_state(pending()).is_empty(), "the file is not in the store any more");
}

#[test]
fn the_state_of_a_load_is_shown_while_it_runs() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    for state in [ModelState::Downloading, ModelState::Verifying, ModelState::Vetting, ModelState::Warming] {
        request.progress.set(state);
        assert_eq!(bench.model().state, state);
        assert_eq!(bench.model().download.is_some(), state == ModelState::Downloading);
    }
}

#[test]
fn a_newer_version_is_loaded_beside_the_one_that_serves() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let request = only_load(bench.apply(&model("m", 2, "")));
    assert!(request.has_alternative);
    assert_eq!(bench.serving_version(), Some(1));
    bench.finish(&request.manifest, false, Ok(Some(loaded(2))));
    assert_eq!((bench.model().state, bench.serving_version()), (ModelState::Ready, Some(2)));
}

#[test]
fn a_load_is_superseded_by_a_changed_manifest() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    assert!(!request.superseded.is_cancelled());
    assert!(bench.apply(&model("m", 2, "")).is_empty(), "the old load ends first");
    assert!(request.superseded.is_cancelled());
    bench.finish(&request.manifest, false, Ok(None));
    assert_eq!(names(&bench.poll()), ["load 2"]);
}

#[test]
fn a_superseded_load_that_ended_well_serves_until_the_next_one_is_loaded() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    bench.apply(&model("m", 2, ""));
    bench.finish(&request.manifest, false, Ok(Some(loaded(1))));
    assert_eq!(bench.serving_version(), Some(1));
    assert_eq!(names(&bench.poll()), ["load 2"]);
}

#[test]
fn an_unchanged_manifest_does_not_supersede_a_load() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    assert!(bench.apply(&model("m", 1, "")).is_empty());
    assert!(!request.superseded.is_cancelled());
}

#[test]
fn a_model_deleted_while_it_loads_is_unloaded_after_the_load() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    assert!(bench.apply(&stream("s", "x", "")).iter().all(|action| !matches!(action, Action::Unload(_))));
    assert!(request.superseded.is_cancelled());
    bench.finish(&request.manifest, false, Ok(Some(loaded(1))));
    assert_eq!(names(&bench.poll()), ["unload m"]);
    assert!(bench.core.snapshot().models.is_empty());
}

#[test]
fn a_model_deleted_while_it_loads_leaves_nothing_when_the_load_was_cancelled() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    bench.apply_state(DesiredState { is_complete: true, ..DesiredState::default() });
    bench.finish(&request.manifest, false, Ok(None));
    assert!(bench.poll().is_empty());
    assert!(!bench.core.needs_deployment("m"));
}

#[test]
fn a_deleted_model_is_unloaded_and_forgotten() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let gone = DesiredState { is_complete: true, ..DesiredState::default() };
    assert_eq!(names(&bench.apply_state(gone)), ["unload m"]);
    assert!(!bench.core.needs_deployment("m"));
    let mut bench = bench.restart(true);
    assert_eq!(names(&bench.apply(&model("m", 1, ""))), ["load 1"], "nothing is restored");
}

#[test]
fn a_deleted_model_may_not_return_in_a_lower_version() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 3, ""));
    bench.apply_state(DesiredState { is_complete: true, ..DesiredState::default() });
    assert!(bench.apply(&model("m", 2, "")).is_empty());
    assert_eq!(bench.model().state, ModelState::Failed);
}

#[test]
fn an_incomplete_state_keeps_the_last_good_version_of_models_it_does_not_name() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let mut bench = bench.restart(true);
    bench.apply_state(DesiredState::default());
    assert_eq!(names(&bench.apply(&model("m", 2, ""))), ["restore 1"]);
}

#[test]
fn a_failed_load_is_retried_with_a_growing_backoff() {
    let mut bench = Bench::new();
    let mut delays = Vec::new();
    let mut request = only_load(bench.apply(&model("m", 1, "")));
    for _ in 0..8 {
        bench.finish(&request.manifest, false, Err(failure("no route to host")));
        assert_eq!(bench.model().state, ModelState::Failed);
        let mut seconds = 0;
        request = loop {
            let mut actions = bench.after(1);
            seconds += 1;
            match actions.pop() {
                Some(Action::Load(request)) => break *request,
                _ => assert!(seconds < 200, "it is never retried"),
            }
        };
        delays.push(seconds);
    }
    assert!(delays[0] <= 4 && delays[7] >= 60 && delays.iter().all(|seconds| *seconds <= 121), "{delays:?}");
}

#[test]
fn a_failure_shows_its_reason_and_how_far_it_came() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    request.progress.set(ModelState::Vetting);
    bench.finish(&request.manifest, false, Err(failure("it answers NaN")));
    let model = bench.model();
    assert_eq!((model.reason.as_deref(), model.failed_phase), (Some("it answers NaN"), Some(ModelState::Vetting)));
}

#[test]
fn a_retry_keeps_showing_how_far_the_last_try_came() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    request.progress.set(ModelState::Vetting);
    bench.finish(&request.manifest, false, Err(failure("it answers NaN")));
    let again = only_load(bench.after(5));
    again.progress.set(ModelState::Downloading);
    assert_eq!((bench.model().state, bench.model().failed_phase), (ModelState::Downloading, Some(ModelState::Vetting)));
}

#[test]
fn a_failed_version_leaves_the_one_before_serving() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let request = only_load(bench.apply(&model("m", 2, "")));
    bench.finish(&request.manifest, false, Err(failure("bad")));
    assert_eq!((bench.model().state, bench.serving_version()), (ModelState::Failed, Some(1)));
    assert!(bench.poll().is_empty());
}

#[test]
fn a_changed_manifest_is_tried_at_once_after_a_failure() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    bench.finish(&request.manifest, false, Err(failure("bad")));
    assert_eq!(names(&bench.apply(&model("m", 1, ", task: detect"))), ["load 1"]);
}

#[test]
fn a_success_resets_the_backoff() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    bench.finish(&request.manifest, false, Err(failure("bad")));
    let request = only_load(bench.after(5));
    bench.finish(&request.manifest, false, Ok(Some(loaded(1))));
    assert_eq!((bench.model().state, bench.model().failed_phase), (ModelState::Ready, None));
}

#[test]
fn a_quarantined_version_is_not_tried_again() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    bench.finish(&request.manifest, false, Err(quarantined()));
    assert_eq!(bench.model().state, ModelState::Quarantined);
    assert!(bench.after(100_000).is_empty());
    bench.core.retry_now(bench.now);
    assert!(bench.poll().is_empty(), "not even on request");
}

#[test]
fn a_quarantined_version_makes_room_for_the_next() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    bench.finish(&request.manifest, false, Err(quarantined()));
    bench.serve(&model("m", 2, ""));
    assert_eq!(bench.serving_version(), Some(2));
}

#[test]
fn a_reload_retries_failed_models_at_once() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    bench.finish(&request.manifest, false, Err(failure("bad")));
    assert!(bench.poll().is_empty());
    bench.core.retry_now(bench.now);
    assert_eq!(names(&bench.poll()), ["load 1"]);
}

#[test]
fn a_lower_version_is_refused() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 3, ""));
    assert!(bench.apply(&model("m", 2, "")).is_empty());
    let model = bench.model();
    assert_eq!((model.state, bench.serving_version()), (ModelState::Failed, Some(3)));
    assert!(model.reason.unwrap().contains("rollback: true"));
}

#[test]
fn a_lower_version_with_rollback_is_loaded() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 3, ""));
    bench.serve(&model("m", 2, ", rollback: true"));
    assert_eq!(bench.serving_version(), Some(2));
}

#[test]
fn a_lower_version_is_refused_after_a_restart_too() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 3, ""));
    let mut bench = bench.restart(true);
    let request = only_load(bench.apply(&model("m", 2, "")));
    assert!(request.is_restored && request.manifest.version == 3);
    bench.finish(&request.manifest, true, Ok(Some(loaded(3))));
    assert!(bench.poll().is_empty());
    assert_eq!((bench.model().state, bench.serving_version()), (ModelState::Failed, Some(3)));
}

#[test]
fn the_version_after_a_refused_one_is_loaded() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 3, ""));
    bench.apply(&model("m", 2, ""));
    assert_eq!(names(&bench.apply(&model("m", 4, ""))), ["load 4"]);
}

#[test]
fn the_last_good_version_is_restored_before_a_new_one_is_fetched() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let mut bench = bench.restart(true);
    let request = only_load(bench.apply(&model("m", 2, "")));
    assert_eq!((request.is_restored, request.known_good), (true, Some(digest(1))));
    bench.finish(&request.manifest, true, Ok(Some(loaded(1))));
    assert_eq!(bench.serving_version(), Some(1));
    assert_eq!(names(&bench.poll()), ["load 2"]);
}

#[test]
fn the_wanted_version_is_loaded_and_not_restored_when_it_is_the_last_good_one() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let mut bench = bench.restart(true);
    let request = only_load(bench.apply(&model("m", 1, "")));
    assert_eq!((request.is_restored, request.known_good), (false, Some(digest(1))));
}

#[test]
fn a_last_good_version_without_its_file_is_not_restored() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let mut bench = bench.restart(false);
    assert_eq!(names(&bench.apply(&model("m", 2, ""))), ["load 2"]);
}

#[test]
fn a_restore_that_fails_does_not_hold_up_the_wanted_version() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let mut bench = bench.restart(true);
    let request = only_load(bench.apply(&model("m", 2, "")));
    bench.finish(&request.manifest, true, Err(failure("damaged")));
    assert_eq!(names(&bench.poll()), ["load 2"]);
    assert_eq!(bench.model().failed_phase, None, "it is no failure of the wanted version");
}

#[test]
fn a_restore_is_tried_again_later_while_nothing_serves() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let mut bench = bench.restart(true);
    let restore = only_load(bench.apply(&model("m", 2, "")));
    bench.finish(&restore.manifest, true, Err(failure("damaged")));
    let load = only_load(bench.poll());
    bench.finish(&load.manifest, false, Err(failure("unreachable")));
    assert!(bench.poll().is_empty());
    let again = only_load(bench.after(31));
    assert!(again.is_restored);
}

#[test]
fn models_are_restored_once_a_version_serves_or_the_restore_has_failed() {
    let mut bench = Bench::new();
    bench.apply(&model("new", 1, ""));
    assert!(bench.core.snapshot().is_restored, "nothing served before");
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let mut bench = bench.restart(true);
    let restore = only_load(bench.apply(&model("m", 2, "")));
    assert!(!bench.core.snapshot().is_restored);
    bench.finish(&restore.manifest, true, Err(failure("damaged")));
    bench.poll();
    assert!(bench.core.snapshot().is_restored);
}

#[test]
fn a_restore_is_not_superseded_by_a_changed_manifest() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let mut bench = bench.restart(true);
    let restore = only_load(bench.apply(&model("m", 2, "")));
    bench.apply(&model("m", 3, ""));
    assert!(!restore.superseded.is_cancelled());
    bench.apply_state(DesiredState { is_complete: true, ..DesiredState::default() });
    assert!(restore.superseded.is_cancelled(), "the model is gone");
}

#[test]
fn the_last_good_version_is_restored_after_the_wanted_one_was_stopped_first_and_failed() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let request = only_load(bench.apply(&model("m", 2, ", runtime: {stopFirst: true}")));
    assert!(request.manifest.stop_first);
    // The load stopped version 1 to make room, and then failed.
    bench.serving.clear();
    bench.finish(&request.manifest, false, Err(failure("out of memory")));
    assert_eq!(bench.serving_version(), None);
    assert_eq!(names(&bench.poll()), ["restore 1"]);
}

#[test]
fn a_version_that_the_scheduler_gave_up_counts_as_failed() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    bench.core.on_given_up("m", "the execution limit was exceeded, 4 times", bench.now);
    bench.serving.clear();
    assert_eq!((bench.model().state, bench.serving_version()), (ModelState::Failed, None));
    assert!(bench.model().reason.unwrap().contains("execution limit"));
    assert!(bench.poll().is_empty(), "it would hang again");
    bench.now += Duration::from_secs(3600);
    assert_eq!(names(&bench.poll()), ["restore 1"], "no other version can serve");
}

#[test]
fn streams_start_after_models_and_stop_before_them() {
    let mut bench = Bench::new();
    let actions = bench.apply(&(stream("s", "m", "") + &model("m", 1, "")));
    assert_eq!(names(&actions), ["load 1", "start s"]);
    let request = only_load(actions);
    bench.finish(&request.manifest, false, Ok(Some(loaded(1))));
    let gone = DesiredState { is_complete: true, ..DesiredState::default() };
    assert_eq!(names(&bench.apply_state(gone)), ["stop s", "unload m"]);
}

#[test]
fn a_changed_stream_is_restarted_and_others_are_not() {
    let mut bench = Bench::new();
    bench.apply(&(stream("a", "m", "") + &stream("b", "m", "")));
    let actions = bench.apply(&(stream("a", "m", "") + &stream("b", "m", ", fps: 5")));
    assert_eq!(names(&actions), ["stop b", "start b"]);
}

#[test]
fn a_paused_stream_stops_and_stays_stopped_until_it_is_resumed() {
    let mut bench = Bench::new();
    bench.apply(&stream("s", "m", ""));
    assert!(bench.core.pause("s") && bench.core.pause("s"), "twice is as good");
    assert_eq!(names(&bench.poll()), ["stop s"]);
    assert!(bench.apply(&stream("s", "m", ", fps: 5")).is_empty());
    assert!(bench.streams()[0].is_paused);
    assert_eq!(bench.core.paused(), ["s"]);
    assert!(bench.core.resume("s"));
    assert_eq!(names(&bench.poll()), ["start s"]);
    assert!(bench.core.paused().is_empty());
}

#[test]
fn streams_that_do_not_exist_cannot_be_paused_or_resumed() {
    let mut bench = Bench::new();
    bench.apply(&stream("s", "m", ""));
    assert!(!bench.core.pause("x") && !bench.core.resume("x"));
    assert!(bench.core.resume("s"), "a stream that runs is resumed already");
    assert_eq!(bench.core.stream_names(), ["s"]);
}

#[test]
fn a_pause_does_not_outlast_a_restart() {
    let mut bench = Bench::new();
    bench.apply(&stream("s", "m", ""));
    bench.core.pause("s");
    let mut bench = bench.restart(true);
    assert_eq!(names(&bench.apply(&stream("s", "m", ""))), ["start s"]);
}

#[test]
fn objects_of_other_nodes_are_left_out() {
    let mut bench = Bench::new();
    let text = model("m", 1, ", nodeSelector: {line: b}")
        + &stream("here", "m", ", nodeName: edge-3")
        + &stream("there", "m", ", nodeName: edge-4");
    assert_eq!(names(&bench.apply(&text)), ["start here"]);
    assert!(!bench.streams()[0].has_model);
}

#[test]
fn labels_of_the_cluster_select_and_those_of_the_configuration_override_them() {
    let mut bench = Bench::new();
    let text = model("m", 1, ", nodeSelector: {zone: east}");
    let with = |zone: &str, line: &str| DesiredState {
        labels: BTreeMap::from([("zone".into(), zone.into()), ("line".into(), line.into())]),
        ..desired(&text)
    };
    assert!(bench.apply_state(with("west", "b")).is_empty());
    assert_eq!(bench.core.snapshot().labels["line"], "a");
    bench.now += Duration::from_secs(1);
    let request = only_load(bench.apply_state(with("east", "b")));
    bench.finish(&request.manifest, false, Ok(Some(loaded(1))));
    assert_eq!(names(&bench.apply_state(with("west", "b"))), ["unload m"]);
}

#[test]
fn of_two_objects_with_one_name_the_first_counts() {
    let mut bench = Bench::new();
    let mut state = desired(&model("m", 1, ""));
    state.objects.extend(desired(&model("m", 2, "")).objects);
    assert_eq!(names(&bench.apply_state(state)), ["load 1"]);
}

#[test]
fn a_recreated_object_has_its_own_identity() {
    let mut bench = Bench::new();
    let with = |uid: &str, generation| {
        let mut state = desired(&model("m", 1, ""));
        state.objects[0].identity = Identity { uid: Some(uid.into()), generation: Some(generation) };
        state
    };
    let request = only_load(bench.apply_state(with("u1", 4)));
    bench.finish(&request.manifest, false, Ok(Some(loaded(1))));
    assert!(bench.apply_state(with("u2", 1)).is_empty(), "the same content serves on");
    assert_eq!(bench.model().identity, Identity { uid: Some("u2".into()), generation: Some(1) });
}

#[test]
fn refused_objects_of_this_node_are_shown() {
    let mut bench = Bench::new();
    let refused = |name: &str, node: &str| {
        let document = json!({"spec": {"nodeName": node}});
        Refused::new("CameraStream", name, Identity::default(), &document, vec!["spec.model: is missing".into()])
    };
    let refused = vec![refused("here", "edge-3"), refused("there", "edge-4")];
    bench.apply_state(DesiredState { refused, is_complete: true, ..DesiredState::default() });
    let shown: Vec<String> = bench.core.snapshot().refused.into_iter().map(|refused| refused.name).collect();
    assert_eq!(shown, ["here"]);
}

#[test]
fn files_that_serve_or_are_wanted_are_protected_from_eviction() {
    let mut bench = Bench::new();
    bench.serve(&model("m", 1, ""));
    let wanted = digest(7).to_string();
    let text = format!(
        "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: other}}\n\
         spec: {{version: 1, source: {{uri: 'https://models/n.onnx', digest: '{wanted}'}}}}\n"
    );
    bench.apply(&(model("m", 1, "") + &text));
    let protected = bench.core.protected();
    assert!(protected.contains(&digest(1)) && protected.contains(&digest(7)));
}

#[test]
fn stopping_cancels_all_loads() {
    let mut bench = Bench::new();
    let actions = bench.apply(&(model("a", 1, "") + &model("b", 1, "")));
    bench.core.cancel_loads();
    assert!(loads(&actions).iter().all(|request| request.superseded.is_cancelled()) && actions.len() == 2);
}

#[test]
fn a_deployment_is_needed_while_a_model_or_a_stream_uses_it() {
    let mut bench = Bench::new();
    bench.apply(&stream("s", "m", ""));
    assert!(bench.core.needs_deployment("m") && !bench.core.needs_deployment("x"));
    bench.apply_state(DesiredState { is_complete: true, ..DesiredState::default() });
    assert!(!bench.core.needs_deployment("m"));
}

#[test]
fn an_expiry_of_the_signature_is_shown_with_the_version_that_serves() {
    let mut bench = Bench::new();
    let request = only_load(bench.apply(&model("m", 1, "")));
    let expires = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(9));
    bench.finish(&request.manifest, false, Ok(Some(LoadedVersion { expires, ..loaded(1) })));
    assert_eq!(bench.core.snapshot().serving["m"].expires, expires);
}
