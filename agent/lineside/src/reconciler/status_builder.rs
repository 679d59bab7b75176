//! Builds the node's status from a snapshot of the reconciler and the states of everything around it. Pure functions.

use std::collections::BTreeMap;
use std::time::SystemTime;

use lineside_api::condition::{Condition, ConditionType, Reason, add_degraded};
use lineside_api::state::{ModelState, StreamStates};
use lineside_api::status::{ITEMS_MAX, ModelStatus, Serving, SpoolStatus, StreamStatus, truncated};
use lineside_common::clock;
use lineside_common::supervisor::TaskFailure;
use lineside_models::signing::has_expired;
use lineside_mqtt::broker_state::BrokerState;
use lineside_mqtt::node_clash::NodeClash;
use lineside_spool::Stats;

use super::load_task::LoadedVersion;
use super::snapshot::{ModelSnapshot, Snapshot, StreamSnapshot};
use crate::desired::{Identity, Refused};
use crate::http::status_store::NodeState;

/// Most failed models, and most streams that are down, in the message of the condition `Degraded`.
const LISTED_MAX: usize = 10;

/// The states around the reconciler.
pub(super) struct Surroundings<'a> {
    /// The running streams.
    pub(super) streams: &'a StreamStates,
    /// The connection to the broker.
    pub(super) broker: &'a BrokerState,
    /// Whether the cluster is connected; `None` for an agent that follows no cluster.
    pub(super) is_cluster_connected: Option<bool>,
    /// Another agent with the node's name on the broker.
    pub(super) node_clash: Option<&'a NodeClash>,
    /// Why the data folder accepted no writes at the start; `None` if it did.
    pub(super) data_folder_problem: Option<&'a str>,
    /// The spool.
    pub(super) spool: &'a Stats,
    /// Tasks that failed within the last minute and were restarted, with the reason.
    pub(super) failed_tasks: Vec<TaskFailure>,
    /// Wall-clock time, to compare with the expiry of signatures.
    pub(super) now: SystemTime,
}

/// The node's status.
pub(super) fn build(snapshot: &Snapshot, around: &Surroundings<'_>) -> NodeState {
    let mut models = model_statuses(snapshot);
    let mut streams = stream_statuses(snapshot, around.streams);
    let mut conditions = vec![ready(snapshot, &models), broker(around.broker)];
    conditions.extend(around.is_cluster_connected.map(cluster));
    conditions.push(Condition::new(ConditionType::Degraded, false, Reason::AsExpected, ""));
    for (reason, message) in problems(snapshot, &models, &streams, around) {
        add_degraded(&mut conditions, reason, &message);
    }
    if let Some(degraded) = conditions.last_mut() {
        degraded.message = truncated(&degraded.message);
    }
    models.truncate(ITEMS_MAX);
    streams.truncate(ITEMS_MAX);
    let spool = SpoolStatus {
        records: around.spool.records,
        bytes: around.spool.bytes,
        bytes_max: around.spool.bytes_max,
        oldest_seconds: around.spool.oldest.unwrap_or_default().as_secs(),
    };
    NodeState { labels: snapshot.labels.clone(), models, streams, spool, conditions }
}

fn model_status(model: &ModelSnapshot, serving: Option<&LoadedVersion>) -> ModelStatus {
    let Identity { uid, generation } = model.identity.clone();
    let benchmark = serving.map(|serving| &serving.benchmark);
    ModelStatus {
        name: model.name.clone(),
        version: model.version,
        failed_phase: model.failed_phase,
        digest: match (model.digest, serving) {
            (None, Some(serving)) if model.state == ModelState::Ready => Some(serving.digest.to_string()),
            (digest, _) => digest.map(|digest| digest.to_string()),
        },
        state: model.state,
        uid,
        observed_generation: generation,
        serving: serving.map(|serving| Serving {
            version: serving.info.version,
            digest: serving.info.digest.clone(),
            engine: serving.info.engine.clone(),
            device: serving.info.device.clone(),
        }),
        p50_ms: benchmark.map(|benchmark| benchmark.p50_ms),
        p99_ms: benchmark.map(|benchmark| benchmark.p99_ms),
        peak_memory_mib: benchmark.map(|benchmark| (benchmark.peak_memory_bytes as f64 / 1048.576).round() / 1e3),
        reason: model.reason.as_deref().map(truncated),
        progress: model.download.clone(),
        signature_expires: serving.and_then(|serving| serving.expires).map(clock::rfc3339),
    }
}

/// The statuses of the models by name, with those whose object is invalid.
fn model_statuses(snapshot: &Snapshot) -> Vec<ModelStatus> {
    let own = snapshot.models.iter().map(|model| model_status(model, snapshot.serving.get(&model.name)));
    let mut models: BTreeMap<String, ModelStatus> = own.map(|model| (model.name.clone(), model)).collect();
    for refused in snapshot.refused.iter().filter(|refused| refused.kind == "EdgeModel") {
        let new = || ModelStatus { name: refused.name.clone(), ..ModelStatus::default() };
        mark_refused(models.entry(refused.name.clone()).or_insert_with(new), refused);
    }
    models.into_values().collect()
}

/// The status of a model whose object is invalid: it describes the invalid object, not the content that stays in force.
fn mark_refused(model: &mut ModelStatus, refused: &Refused) {
    let Identity { uid, generation } = refused.identity.clone();
    model.state = ModelState::Failed;
    model.version = refused.version.unwrap_or(model.version);
    (model.uid, model.observed_generation) = (uid, generation);
    (model.digest, model.failed_phase) = (None, None);
    model.reason = Some(refusal(refused));
}

fn refusal(refused: &Refused) -> String {
    truncated(&format!("refused: {}", refused.reasons.join("; ")))
}

/// The statuses of the streams by name, with those whose object is invalid.
fn stream_statuses(snapshot: &Snapshot, states: &StreamStates) -> Vec<StreamStatus> {
    let own = snapshot.streams.iter().map(|stream| stream_status(stream, states));
    let mut streams: BTreeMap<String, StreamStatus> = own.map(|stream| (stream.name.clone(), stream)).collect();
    for refused in snapshot.refused.iter().filter(|refused| refused.kind == "CameraStream") {
        let new = || StreamStatus { name: refused.name.clone(), ..StreamStatus::default() };
        let stream = streams.entry(refused.name.clone()).or_insert_with(new);
        let Identity { uid, generation } = refused.identity.clone();
        (stream.reason, stream.uid, stream.observed_generation) = (Some(refusal(refused)), uid, generation);
    }
    streams.into_values().collect()
}

fn stream_status(stream: &StreamSnapshot, states: &StreamStates) -> StreamStatus {
    let state = states.get(&stream.name).filter(|_| !stream.is_paused);
    let up = state.is_some_and(|state| state.up);
    let model = stream.model.clone().unwrap_or_default();
    let reason = if stream.is_paused {
        Some("paused by an operator".to_owned())
    } else if !stream.has_model {
        Some(format!("the model {model} is not assigned to this node"))
    } else {
        state.filter(|_| !up).and_then(|state| state.reason.clone())
    };
    let Identity { uid, generation } = stream.identity.clone();
    StreamStatus {
        name: stream.name.clone(),
        model,
        uid,
        observed_generation: generation,
        up,
        reason: reason.as_deref().map(truncated),
    }
}

/// Whether every desired model has a version that serves.
fn ready(snapshot: &Snapshot, models: &[ModelStatus]) -> Condition {
    let missing: Vec<&str> =
        models.iter().filter(|model| model.serving.is_none()).map(|model| model.name.as_str()).collect();
    if let Some(error) = snapshot.config_error().filter(|_| !snapshot.is_configured) {
        Condition::new(ConditionType::Ready, false, Reason::ConfigPending, truncated(&error))
    } else if missing.is_empty() {
        let message = format!("{} models are serving", models.len());
        Condition::new(ConditionType::Ready, true, Reason::ModelsReady, message)
    } else {
        let message = format!("no version is serving of: {}", missing.join(", "));
        Condition::new(ConditionType::Ready, false, Reason::ModelsNotReady, truncated(&message))
    }
}

fn broker(state: &BrokerState) -> Condition {
    match state {
        BrokerState::Connected { broker, .. } => {
            Condition::new(ConditionType::BrokerConnected, true, Reason::Connected, broker.clone())
        }
        BrokerState::Disconnected { reason, .. } => {
            let reason = reason.as_deref().unwrap_or("not connected yet");
            let message = truncated(&format!("{reason}; results wait on disk"));
            Condition::new(ConditionType::BrokerConnected, false, Reason::Disconnected, message)
        }
    }
}

/// Whether the cluster is connected. Within the cluster this always reads True, since it could not be written otherwise; it
/// matters to those who ask the node itself.
fn cluster(is_connected: bool) -> Condition {
    if is_connected {
        Condition::new(ConditionType::ClusterConnected, true, Reason::Connected, "")
    } else {
        let message = "the last known desired state stays in force";
        Condition::new(ConditionType::ClusterConnected, false, Reason::Disconnected, message)
    }
}

/// What works less well than it should.
fn problems(
    snapshot: &Snapshot,
    models: &[ModelStatus],
    streams: &[StreamStatus],
    around: &Surroundings<'_>,
) -> Vec<(Reason, String)> {
    let mut problems = Vec::new();
    if let Some(error) = snapshot.config_error().filter(|_| snapshot.unreadable.is_some()) {
        problems.push((Reason::ConfigUnreadable, error));
    }
    if snapshot.rejected_files.count > 0 {
        let message = format!("{}; their last valid content applies", snapshot.rejected_files);
        problems.push((Reason::ConfigRejected, message));
    }
    for (name, serving) in &snapshot.serving {
        if let Some(expires) = serving.expires.filter(|expires| has_expired(*expires, around.now)) {
            let (version, expires) = (serving.info.version, clock::rfc3339(expires));
            let message = format!("the signature of {name} version {version} expired at {expires}; sign it again");
            problems.push((Reason::SignatureExpired, message));
        }
    }
    if let Some(clash) = around.node_clash {
        let message = format!(
            "another agent (data folder {}) uses the same site and node name on the broker, and each disconnects the other; \
             rename one of them",
            clash.folder
        );
        problems.push((Reason::NodeNameClash, message));
    }
    if let Some(problem) = around.data_folder_problem {
        let message = format!(
            "the data folder accepted no writes when the agent started ({problem}); ids are of this run, new models cannot be \
             stored; restart the agent when the disk is repaired"
        );
        problems.push((Reason::DataFolderUnwritable, message));
    }
    if let Some(failure) = &around.spool.degraded {
        let message = format!("the disk rejects results ({failure}); a few are kept in memory");
        problems.push((Reason::SpoolDegraded, message));
    }
    if around.spool.is_overflowing {
        let message = format!(
            "results were dropped within the last minute: the spool is full ({} bytes); check the broker",
            around.spool.bytes_max
        );
        problems.push((Reason::SpoolFull, message));
    }
    if around.spool.set_aside.records > 0 {
        let message = format!(
            "{} messages that the broker does not take are set aside; see `lineside spool ls --set-aside`",
            around.spool.set_aside.records
        );
        problems.push((Reason::MessagesSetAside, message));
    }
    problems.extend(around.failed_tasks.iter().map(|failure| (Reason::TaskRestarted, failure.to_string())));
    let failed = models.iter().filter(|model| model.state.has_failed()).map(|model| {
        let is_quarantined = model.state == ModelState::Quarantined;
        let reason = if is_quarantined { Reason::ModelQuarantined } else { Reason::ModelFailed };
        let why = model.reason.as_deref().unwrap_or_default();
        (reason, format!("{} version {}: {why}", model.name, model.version))
    });
    add_first(&mut problems, failed, "models have failed");
    let down = streams.iter().filter(|stream| !stream.up).map(|stream| {
        let why = stream.reason.as_deref().unwrap_or("no frames are received");
        (Reason::StreamDown, format!("{}: {why}", stream.name))
    });
    add_first(&mut problems, down, "streams are down");
    let failing = around.streams.iter().filter_map(|(name, state)| Some((name, state.rule_failure.as_ref()?)));
    let failing = failing.map(|(name, why)| (Reason::RuleFailed, format!("{name}: {why}")));
    add_first(&mut problems, failing, "verdict rules fail");
    if models.len() > ITEMS_MAX || streams.len() > ITEMS_MAX {
        problems.push((Reason::LimitExceeded, format!("only {ITEMS_MAX} models and streams of a node are listed")));
    }
    problems
}

/// Adds the first problems of one sort. Where there are more of them, their number comes first, because the message is cut.
fn add_first(problems: &mut Vec<(Reason, String)>, mut all: impl Iterator<Item = (Reason, String)>, what: &str) {
    let first: Vec<(Reason, String)> = all.by_ref().take(LISTED_MAX).collect();
    let rest = all.count();
    if let Some((reason, _)) = first.first().filter(|_| rest > 0) {
        problems.push((reason.clone(), format!("{} {what}, among them", first.len().saturating_add(rest))));
    }
    problems.extend(first);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lineside_api::condition::ConditionStatus;
    use lineside_api::state::StreamState;

    use super::*;
    use crate::desired::RejectedFiles;

    fn stream(name: &str) -> StreamSnapshot {
        StreamSnapshot {
            name: name.into(),
            model: Some("m".into()),
            identity: Identity::default(),
            has_model: true,
            is_paused: false,
        }
    }

    fn model(state: ModelState, reason: Option<&str>) -> ModelSnapshot {
        ModelSnapshot {
            name: "m".into(),
            version: 2,
            digest: None,
            identity: Identity::default(),
            state,
            reason: reason.map(str::to_owned),
            failed_phase: None,
            download: None,
        }
    }

    fn disconnected(reason: Option<&str>) -> BrokerState {
        BrokerState::Disconnected { reason: reason.map(str::to_owned), since: SystemTime::UNIX_EPOCH }
    }

    fn built(snapshot: &Snapshot, streams: &StreamStates, broker: &BrokerState, spool: &Stats) -> NodeState {
        let around = Surroundings {
            streams,
            broker,
            is_cluster_connected: Some(false),
            node_clash: None,
            data_folder_problem: None,
            spool,
            failed_tasks: Vec::new(),
            now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
        };
        build(snapshot, &around)
    }

    fn condition(state: &NodeState, kind: ConditionType) -> &Condition {
        state.conditions.iter().find(|condition| condition.kind == kind).unwrap()
    }

    #[test]
    fn a_node_without_a_desired_state_is_not_ready() {
        let state = built(&Snapshot::default(), &StreamStates::new(), &disconnected(None), &Stats::default());
        let ready = condition(&state, ConditionType::Ready);
        assert_eq!((ready.status, &ready.reason), (ConditionStatus::False, &Reason::ConfigPending));
        let broker = condition(&state, ConditionType::BrokerConnected);
        assert!(broker.message.contains("not connected yet"), "{}", broker.message);
        assert_eq!(condition(&state, ConditionType::ClusterConnected).reason, Reason::Disconnected);
    }

    #[test]
    fn a_failed_model_is_degraded_and_not_ready() {
        let snapshot = Snapshot {
            is_configured: true,
            models: vec![model(ModelState::Quarantined, Some("it failed 3 times"))],
            ..Snapshot::default()
        };
        let state = built(&snapshot, &StreamStates::new(), &disconnected(None), &Stats::default());
        assert_eq!(condition(&state, ConditionType::Ready).reason, Reason::ModelsNotReady);
        let degraded = condition(&state, ConditionType::Degraded);
        assert_eq!(degraded.reason, Reason::ModelQuarantined);
        assert!(degraded.message.contains("m version 2: it failed 3 times"), "{}", degraded.message);
    }

    #[test]
    fn streams_state_why_they_are_down() {
        let paused = StreamSnapshot { is_paused: true, model: None, ..stream("paused") };
        let orphan = StreamSnapshot { has_model: false, ..stream("orphan") };
        let snapshot = Snapshot {
            is_configured: true,
            streams: vec![stream("up"), stream("down"), paused, orphan],
            ..Snapshot::default()
        };
        let state = |up, reason: Option<&str>| StreamState {
            model: "m".into(),
            up,
            reason: reason.map(str::to_owned),
            rule_failure: None,
        };
        let states: StreamStates = BTreeMap::from([
            ("up".into(), state(true, None)),
            ("down".into(), state(false, Some("connection refused"))),
            ("orphan".into(), state(true, None)),
        ]);
        let state = built(&snapshot, &states, &disconnected(None), &Stats::default());
        let reasons: Vec<(&str, bool, Option<&str>)> =
            state.streams.iter().map(|one| (one.name.as_str(), one.up, one.reason.as_deref())).collect();
        assert_eq!(
            reasons,
            [
                ("down", false, Some("connection refused")),
                ("orphan", true, Some("the model m is not assigned to this node")),
                ("paused", false, Some("paused by an operator")),
                ("up", true, None),
            ]
        );
        let degraded = condition(&state, ConditionType::Degraded);
        assert!(degraded.message.contains("down: connection refused") && degraded.message.contains("paused:"));
    }

    #[test]
    fn an_invalid_object_is_shown_as_failed() {
        let identity = Identity { uid: Some("u2".into()), generation: Some(7) };
        let document = serde_json::json!({"spec": {"version": 3}});
        let reasons = vec!["spec.version: is wrong".to_owned()];
        let refused = Refused::new("EdgeModel", "m", identity, &document, reasons);
        let snapshot = Snapshot {
            is_configured: true,
            models: vec![model(ModelState::Ready, None)],
            refused: vec![refused],
            ..Snapshot::default()
        };
        let state = built(&snapshot, &StreamStates::new(), &disconnected(None), &Stats::default());
        let model = &state.models[0];
        assert_eq!((model.version, model.state, model.observed_generation), (3, ModelState::Failed, Some(7)));
        assert_eq!(model.reason.as_deref(), Some("refused: spec.version: is wrong"));
    }

    #[test]
    fn a_source_that_cannot_be_read_is_degraded_before_and_after_its_first_reading() {
        for is_configured in [false, true] {
            let unreadable = Some("the folder of manifests cannot be read: stale".to_owned());
            let snapshot = Snapshot { is_configured, unreadable, ..Snapshot::default() };
            let state = built(&snapshot, &StreamStates::new(), &disconnected(None), &Stats::default());
            let degraded = condition(&state, ConditionType::Degraded);
            assert_eq!((degraded.status, &degraded.reason), (ConditionStatus::True, &Reason::ConfigUnreadable));
            assert!(degraded.message.contains("cannot be read: stale"), "{}", degraded.message);
            let ready = condition(&state, ConditionType::Ready);
            let expected = if is_configured { Reason::ModelsReady } else { Reason::ConfigPending };
            assert_eq!(ready.reason, expected);
            assert_eq!(ready.message.contains("stale"), !is_configured, "{}", ready.message);
        }
    }

    #[test]
    fn rejected_files_are_degraded_with_their_number() {
        let first = vec!["a.yaml".to_owned(), "b.yaml".to_owned()];
        let rejected_files = RejectedFiles { count: 10_000, first };
        let snapshot = Snapshot { is_configured: true, rejected_files, ..Snapshot::default() };
        let state = built(&snapshot, &StreamStates::new(), &disconnected(None), &Stats::default());
        let degraded = condition(&state, ConditionType::Degraded);
        assert_eq!((degraded.status, &degraded.reason), (ConditionStatus::True, &Reason::ConfigRejected));
        assert!(degraded.message.starts_with("10000 manifest files are rejected: a.yaml, b.yaml, ...;"));
        assert_eq!(condition(&state, ConditionType::Ready).reason, Reason::ModelsReady);
    }

    #[test]
    fn many_streams_that_are_down_are_counted() {
        let streams = (0..10_000).map(|number| stream(&format!("cam-{number}"))).collect();
        let refused = (0..5000).map(|number| {
            let name = format!("cam-{}", number * 3);
            Refused::new("CameraStream", &name, Identity::default(), &serde_json::Value::Null, vec!["x".into()])
        });
        let snapshot = Snapshot { is_configured: true, streams, refused: refused.collect(), ..Snapshot::default() };
        let state = built(&snapshot, &StreamStates::new(), &disconnected(None), &Stats::default());
        let degraded = condition(&state, ConditionType::Degraded);
        assert!(degraded.message.starts_with("11666 streams are down, among them; StreamDown: cam-0: refused: x"));
        assert_eq!(degraded.message.matches("StreamDown").count(), LISTED_MAX);
        assert!(degraded.message.contains("LimitExceeded"), "{}", degraded.message);
        assert_eq!(state.streams.len(), ITEMS_MAX);
    }

    #[test]
    fn a_clash_of_names_and_an_unwritable_folder_are_degraded() {
        let clash = NodeClash { folder: "bbbbbbbb".into(), since: SystemTime::UNIX_EPOCH };
        let around = Surroundings {
            streams: &StreamStates::new(),
            broker: &disconnected(None),
            is_cluster_connected: None,
            node_clash: Some(&clash),
            data_folder_problem: Some("read-only filesystem"),
            spool: &Stats::default(),
            failed_tasks: Vec::new(),
            now: SystemTime::UNIX_EPOCH,
        };
        let state = build(&Snapshot::default(), &around);
        let degraded = condition(&state, ConditionType::Degraded);
        assert_eq!(degraded.reason, Reason::NodeNameClash);
        assert!(
            degraded.message.contains("bbbbbbbb") && degraded.message.contains("DataFolderUnwritable"),
            "{degraded:?}"
        );
    }

    #[test]
    fn spool_problems_are_degraded() {
        let failure =
            lineside_spool::DiskFailure { kind: std::io::ErrorKind::StorageFull, message: "disk full".into() };
        let spool = Stats { degraded: Some(failure), is_overflowing: true, bytes_max: 7, ..Stats::default() };
        let state = built(&Snapshot::default(), &StreamStates::new(), &disconnected(Some("refused")), &spool);
        let degraded = condition(&state, ConditionType::Degraded);
        assert_eq!(degraded.reason, Reason::SpoolDegraded);
        assert!(
            degraded.message.contains("disk full") && degraded.message.contains("SpoolFull"),
            "{}",
            degraded.message
        );
        assert!(condition(&state, ConditionType::BrokerConnected).message.starts_with("refused"));
    }
}
