//! Benchmarks many agents against one real API server, in one process. Each agent runs the cluster synchronization and the status
//! writer of the program, with its own connections, token, labels and data folder. A simulated reconciler reports each desired
//! model as serving immediately. The benchmark prints the load on the API server when idle and during a rollout. Before that, it
//! measures how one agent follows a thousand objects with a hundred updates per second.
//!
//! `make fleet` runs it in the lab (AGENTS=1000). It creates Node objects with the names sim-N, and deletes them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a benchmark reports failures as panics"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Node as KubeNode, ServiceAccount};
use kube::api::{DeleteParams, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, Config};
use lineside::desired::cluster::ClusterSync;
use lineside::desired::{DesiredState, Node};
use lineside::http::status_store::{NodeState, StatusStore};
use lineside::rules_child::RuleChecker;
use lineside_api::condition::{Condition, ConditionType, Reason};
use lineside_api::kinds::manifest::Object;
use lineside_api::state::ModelState;
use lineside_api::status::{ModelStatus, Serving};
use lineside_common::metrics::Registrar;
use lineside_common::supervisor::Supervisor;
use lineside_kube::{ClusterClient, ClusterConfig, ClusterStatePublisher, KubeMetrics};
use lineside_models::store::{Index, Store};
use tokio::sync::{Notify, watch};

const NAMESPACE: &str = "lineside";
const LABEL: &str = "lineside.dev/sim";

fn supervisor() -> Supervisor {
    Supervisor::new(Registrar::default().counters("task_restarts_total", "Tasks that failed.", &["task"]).unwrap())
}

/// Counters of the API server at one moment.
#[derive(Clone, Copy)]
struct ServerLoad {
    /// Writes of EdgeNodes.
    writes: f64,
    /// CPU time, in seconds.
    cpu: f64,
    at: Instant,
}

async fn server_load(client: &Client) -> ServerLoad {
    let request = axum::http::Request::get("/metrics").body(Vec::new()).unwrap();
    let text = client.request_text(request).await.unwrap();
    let value = |line: &str| line.rsplit(' ').next().and_then(|number| number.parse::<f64>().ok()).unwrap_or(0.0);
    let is_write = |line: &&str| {
        line.starts_with("apiserver_request_total")
            && line.contains("resource=\"edgenodes\"")
            && line.contains("verb=\"APPLY\"")
    };
    ServerLoad {
        writes: text.lines().filter(is_write).map(value).sum(),
        cpu: text.lines().filter(|line| line.starts_with("process_cpu_seconds_total")).map(value).sum(),
        at: Instant::now(),
    }
}

fn print_load(phase: &str, before: ServerLoad, after: ServerLoad, agents: usize) {
    let seconds = after.at.duration_since(before.at).as_secs_f64();
    let writes = after.writes - before.writes;
    println!(
        "{phase}: {seconds:.0} s, {:.1} writes/s ({:.2} per node in 10 s), API server {:.2} CPU cores",
        writes / seconds,
        writes / seconds * 10.0 / agents as f64,
        (after.cpu - before.cpu) / seconds
    );
}

/// Simulates the reconciler: reports each desired model as serving.
async fn simulate_reconciler(
    mut desired_state: watch::Receiver<Option<Arc<DesiredState>>>,
    status_store: Arc<StatusStore>,
) {
    while desired_state.changed().await.is_ok() {
        let Some(state) = desired_state.borrow_and_update().clone() else { continue };
        let models = state.objects.iter().filter_map(|desired| match &desired.object {
            Object::Model(model) => Some(ModelStatus {
                name: model.name.clone(),
                version: model.version,
                uid: desired.identity.uid.clone(),
                observed_generation: desired.identity.generation,
                state: ModelState::Ready,
                serving: Some(Serving {
                    version: model.version,
                    engine: "tract".to_owned(),
                    device: "cpu".to_owned(),
                    ..Serving::default()
                }),
                ..ModelStatus::default()
            }),
            Object::Stream(_) => None,
        });
        status_store.set(NodeState {
            labels: state.labels.clone(),
            models: models.collect(),
            conditions: vec![Condition::new(ConditionType::Ready, true, Reason::ModelsReady, "")],
            ..NodeState::default()
        });
    }
}

fn models(client: &Client) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("lineside.dev", "v1alpha1", "EdgeModel");
    Api::namespaced_with(client.clone(), NAMESPACE, &ApiResource::from_gvk_with_plural(&kind, "edgemodels"))
}

async fn roll_out(client: &Client, version: u64, agents: usize) {
    let before = server_load(client).await;
    let object = serde_json::json!({
        "apiVersion": "lineside.dev/v1alpha1", "kind": "EdgeModel", "metadata": {"name": "sim"},
        "spec": {"version": version, "source": {"uri": "file:///sim.onnx"}, "nodeSelector": {LABEL: "true"}},
    });
    let applied =
        models(client).patch("sim", &PatchParams::apply("fleet").force(), &Patch::Apply(&object)).await.unwrap();
    let generation = applied.metadata.generation;
    loop {
        let status = models(client).get("sim").await.unwrap().data["status"].take();
        if status["observedGeneration"].as_i64() == generation && status["nodes"]["ready"] == agents {
            break;
        }
        assert!(before.at.elapsed() < Duration::from_secs(300), "the fleet does not converge: {status}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    println!(
        "version {version} is ready on all {agents} nodes in the status of the EdgeModel after {:.1} s",
        before.at.elapsed().as_secs_f64()
    );
    print_load("  during the rollout", before, server_load(client).await, agents);
}

async fn token(client: &Client, node: &KubeNode) -> String {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
    let bound = BoundObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: node.metadata.name.clone(),
        uid: node.metadata.uid.clone(),
    };
    let request = TokenRequest {
        spec: TokenRequestSpec { bound_object_ref: Some(bound), ..TokenRequestSpec::default() },
        ..TokenRequest::default()
    };
    let response = accounts.create_token_request("lineside-agent", &PostParams::default(), &request).await.unwrap();
    response.status.unwrap().token
}

fn own_rss_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

async fn run(kubeconfig: &Path, agents: usize, idle_time: Duration) {
    let loaded = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(loaded.clone(), &KubeConfigOptions::default()).await.unwrap();
    let client = Client::try_from(config).unwrap();
    let nodes: Api<KubeNode> = Api::all(client.clone());
    let folder = tempfile::tempdir().unwrap();
    let (index, _) = Index::open(&Store::index_folder(folder.path()), |_| Ok::<(), String>(()));
    let store = Arc::new(Store::open(&folder.path().join("store"), 1 << 30, index).unwrap());
    let started = Instant::now();
    let supervisor = supervisor();
    let (mut tasks, mut supervised) = (Vec::new(), Vec::new());
    for number in 0..agents {
        let name = format!("sim-{number}");
        let labels = Some(BTreeMap::from([(LABEL.to_owned(), "true".to_owned())]));
        let node = KubeNode {
            metadata: ObjectMeta { name: Some(name.clone()), labels, ..ObjectMeta::default() },
            ..KubeNode::default()
        };
        let node = nodes.create(&PostParams::default(), &node).await.unwrap();
        let token = token(&client, &node).await;
        let data_dir = folder.path().join(&name);
        std::fs::create_dir(&data_dir).unwrap();
        let mut node_kubeconfig = serde_json::to_value(&loaded).unwrap();
        node_kubeconfig["users"][0]["user"] = serde_json::json!({"token": token});
        std::fs::write(data_dir.join("kubeconfig"), node_kubeconfig.to_string()).unwrap();
        let cluster_config = ClusterConfig {
            kubeconfig: Some(data_dir.join("kubeconfig")),
            namespace: Some(NAMESPACE.to_owned()),
            ..ClusterConfig::default()
        };
        let (sender, desired_state) = watch::channel(None);
        let metrics = KubeMetrics::register(&Registrar::default()).unwrap();
        let status_store = Arc::new(StatusStore::new(&name, "sim", 1, store.clone()));
        tasks.push(tokio::spawn(simulate_reconciler(desired_state, status_store.clone())));
        let sync = ClusterSync {
            cluster: Arc::new(ClusterClient::new(cluster_config, "lineside-agent", &name).await.unwrap()),
            node: Node { name, labels: BTreeMap::new() },
            data_dir,
            desired: sender,
            reread: Arc::new(Notify::new()),
            status: status_store,
            watch_failures: metrics.cluster_watch_failures,
            state: ClusterStatePublisher::new(std::time::Instant::now()),
            rules: Arc::new(RuleChecker::new(|| Err(std::io::Error::other("the simulated agents have no rules")))),
        };
        supervised.extend(sync.start(&supervisor));
    }
    println!(
        "{agents} agents started within {:.0} s; RSS of this process: {} MiB",
        started.elapsed().as_secs_f64(),
        own_rss_mib()
    );
    roll_out(&client, 1, agents).await;
    let before = server_load(&client).await;
    tokio::time::sleep(idle_time).await;
    print_load("idle", before, server_load(&client).await, agents);
    roll_out(&client, 2, agents).await;
    println!("RSS of this process: {} MiB", own_rss_mib());
    for task in supervised {
        task.stop().await;
    }
    models(&client).delete("sim", &DeleteParams::default()).await.unwrap();
    nodes.delete_collection(&DeleteParams::default(), &ListParams::default().labels(LABEL)).await.unwrap();
    let kind = GroupVersionKind::gvk("lineside.dev", "v1alpha1", "EdgeNode");
    let edge_nodes: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), NAMESPACE, &ApiResource::from_gvk_with_plural(&kind, "edgenodes"));
    for number in 0..agents {
        drop(edge_nodes.delete(&format!("sim-{number}"), &DeleteParams::default()).await);
    }
}

/// Measures one agent that watches many objects with continuous updates: the latency of the last update, and the memory.
async fn watch_many_objects(kubeconfig: &Path, objects: usize, updates_per_second: u32) {
    let loaded = Kubeconfig::read_from(kubeconfig).unwrap();
    let client =
        Client::try_from(Config::from_custom_kubeconfig(loaded, &KubeConfigOptions::default()).await.unwrap()).unwrap();
    let kind = GroupVersionKind::gvk("lineside.dev", "v1alpha1", "CameraStream");
    let streams: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), NAMESPACE, &ApiResource::from_gvk_with_plural(&kind, "camerastreams"));
    let apply = async |number: usize, fps: u32| {
        // One object in ten selects the node of this agent.
        let object = serde_json::json!({
            "apiVersion": "lineside.dev/v1alpha1", "kind": "CameraStream", "metadata": {"name": format!("sim-{number}")},
            "spec": {"source": {"uri": "http://10.0.0.7/a.jpg"}, "model": "m", "nodeName": format!("sim-{}", number % 10), "fps": fps},
        });
        streams
            .patch(&format!("sim-{number}"), &PatchParams::apply("fleet").force(), &Patch::Apply(&object))
            .await
            .unwrap();
    };
    let folder = tempfile::tempdir().unwrap();
    let (index, _) = Index::open(&Store::index_folder(folder.path()), |_| Ok::<(), String>(()));
    let store = Arc::new(Store::open(&folder.path().join("store"), 1 << 30, index).unwrap());
    let cluster_config = ClusterConfig {
        kubeconfig: Some(kubeconfig.to_owned()),
        namespace: Some(NAMESPACE.to_owned()),
        ..ClusterConfig::default()
    };
    let (sender, mut desired_state) = watch::channel(None);
    let metrics = KubeMetrics::register(&Registrar::default()).unwrap();
    let sync = ClusterSync {
        cluster: Arc::new(ClusterClient::new(cluster_config, "lineside-agent", "sim-0").await.unwrap()),
        node: Node { name: "sim-0".to_owned(), labels: BTreeMap::new() },
        data_dir: folder.path().to_owned(),
        desired: sender,
        reread: Arc::new(Notify::new()),
        status: Arc::new(StatusStore::new("sim-0", "sim", 1, store)),
        watch_failures: metrics.cluster_watch_failures,
        state: ClusterStatePublisher::new(std::time::Instant::now()),
        rules: Arc::new(RuleChecker::new(|| Err(std::io::Error::other("the simulated agents have no rules")))),
    };
    let tasks = sync.start(&supervisor());
    desired_state
        .wait_for(|desired_state: &Option<Arc<DesiredState>>| {
            desired_state.as_ref().is_some_and(|desired_state| desired_state.is_complete)
        })
        .await
        .unwrap();
    let before = own_rss_mib();
    for number in 0..objects {
        apply(number, 1).await;
    }
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / updates_per_second);
    let (started, updates) = (Instant::now(), updates_per_second as usize * 20);
    for number in 0..updates {
        ticks.tick().await;
        apply(number % objects, 2 + u32::try_from(number / objects).unwrap()).await;
    }
    let rate = updates as f64 / started.elapsed().as_secs_f64();
    let last = Instant::now();
    apply(0, 500).await;
    let has_last_update = |desired_state: &Option<Arc<DesiredState>>| {
        desired_state.as_ref().is_some_and(|desired_state| {
            desired_state.objects.iter().any(
                |desired| matches!(&desired.object, Object::Stream(stream) if stream.name == "sim-0" && stream.frame_interval == Some(Duration::from_millis(2))),
            )
        })
    };
    desired_state.wait_for(has_last_update).await.unwrap();
    println!(
        "{objects} objects at {rate:.0} updates/s: latency of the last update {:.2} s; {} MiB more memory than without objects, \
         including the client that writes the updates",
        last.elapsed().as_secs_f64(),
        own_rss_mib() - before
    );
    for task in tasks {
        task.stop().await;
    }
    for number in 0..objects {
        drop(streams.delete(&format!("sim-{number}"), &DeleteParams::default()).await);
    }
}

fn main() {
    let argument = |name: &str| std::env::var(name).ok();
    let Some(kubeconfig) = argument("FLEET_KUBECONFIG") else {
        // `cargo bench` and `cargo test --benches` run without a cluster.
        println!("the fleet benchmark needs a cluster: run `make fleet`");
        return;
    };
    let agents = argument("AGENTS").and_then(|text| text.parse().ok()).unwrap_or(100);
    let idle_time = argument("REST_SECONDS")
        .and_then(|text| text.parse().ok())
        .map_or(Duration::from_secs(120), Duration::from_secs);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(watch_many_objects(Path::new(&kubeconfig), 1000, 100));
    runtime.block_on(run(Path::new(&kubeconfig), agents, idle_time));
}
