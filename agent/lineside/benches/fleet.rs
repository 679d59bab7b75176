//! Many agents against one real API server, in one process: the very loops that follow a cluster and report to it, each with
//! its own connections, token, labels and folder, and in the place of the deploy task one that serves whatever is asked for
//! at once. It prints what the fleet costs the API server at rest and during a change of a model; before that, how one agent
//! keeps up with a thousand objects that change a hundred times a second.
//!
//! `make fleet` runs it in the lab (AGENTS=1000). It makes its own Node objects, called sim-N, and removes them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "in a bench a panic is the message")]

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

/// What the API server has counted so far.
#[derive(Clone, Copy)]
struct Benchmark {
    writes: f64,
    cpu: f64,
    at: Instant,
}

async fn benchmark(client: &Client) -> Benchmark {
    let request = axum::http::Request::get("/metrics").body(Vec::new()).unwrap();
    let text = client.request_text(request).await.unwrap();
    let value = |line: &str| line.rsplit(' ').next().and_then(|number| number.parse::<f64>().ok()).unwrap_or(0.0);
    let is_write = |line: &&str| {
        line.starts_with("apiserver_request_total")
            && line.contains("resource=\"edgenodes\"")
            && line.contains("verb=\"APPLY\"")
    };
    Benchmark {
        writes: text.lines().filter(is_write).map(value).sum(),
        cpu: text.lines().filter(|line| line.starts_with("process_cpu_seconds_total")).map(value).sum(),
        at: Instant::now(),
    }
}

fn tell(what: &str, before: Benchmark, after: Benchmark, agents: usize) {
    let seconds = after.at.duration_since(before.at).as_secs_f64();
    let writes = after.writes - before.writes;
    println!(
        "{what}: {seconds:.0} s, {:.1} writes/s ({:.2} per node in 10 s), API server {:.2} CPU cores",
        writes / seconds,
        writes / seconds * 10.0 / agents as f64,
        (after.cpu - before.cpu) / seconds
    );
}

/// In the place of the deploy task.
async fn serve_at_once(mut desired_state: watch::Receiver<Option<Arc<DesiredState>>>, board: Arc<StatusStore>) {
    while desired_state.changed().await.is_ok() {
        let Some(asked) = desired_state.borrow_and_update().clone() else { continue };
        let models = asked.objects.iter().filter_map(|wish| match &wish.object {
            Object::Model(model) => Some(ModelStatus {
                name: model.name.clone(),
                version: model.version,
                uid: wish.identity.uid.clone(),
                observed_generation: wish.identity.generation,
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
        board.set(NodeState {
            labels: asked.labels.clone(),
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
    let before = benchmark(client).await;
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
        "version {version} on all {agents}, and added up by the controller, after {:.1} s",
        before.at.elapsed().as_secs_f64()
    );
    tell("  meanwhile", before, benchmark(client).await, agents);
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
    let made = accounts.create_token_request("lineside-agent", &PostParams::default(), &request).await.unwrap();
    made.status.unwrap().token
}

fn own_rss_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

async fn run(kubeconfig: &Path, agents: usize, rest: Duration) {
    let loaded = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(loaded.clone(), &KubeConfigOptions::default()).await.unwrap();
    let client = Client::try_from(config).unwrap();
    let nodes: Api<KubeNode> = Api::all(client.clone());
    let folder = tempfile::tempdir().unwrap();
    let (index, _) = Index::open(&Store::index_folder(folder.path()), |_| Ok::<(), String>(()));
    let store = Arc::new(Store::open(&folder.path().join("store"), 1 << 30, index).unwrap());
    let begun = Instant::now();
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
        let own = folder.path().join(&name);
        std::fs::create_dir(&own).unwrap();
        let mut access = serde_json::to_value(&loaded).unwrap();
        access["users"][0]["user"] = serde_json::json!({"token": token});
        std::fs::write(own.join("kubeconfig"), access.to_string()).unwrap();
        let access = ClusterConfig {
            kubeconfig: Some(own.join("kubeconfig")),
            namespace: Some(NAMESPACE.to_owned()),
            ..ClusterConfig::default()
        };
        let (say, desired_state) = watch::channel(None);
        let metrics = KubeMetrics::register(&Registrar::default()).unwrap();
        let board = Arc::new(StatusStore::new(&name, "sim", 1, store.clone()));
        tasks.push(tokio::spawn(serve_at_once(desired_state, board.clone())));
        let sync = ClusterSync {
            cluster: Arc::new(ClusterClient::new(access, "lineside-agent", &name).await.unwrap()),
            node: Node { name, labels: BTreeMap::new() },
            data_dir: own,
            desired: say,
            reread: Arc::new(Notify::new()),
            status: board,
            watch_failures: metrics.cluster_watch_failures.clone(),
            state: ClusterStatePublisher::new(metrics, std::time::Instant::now()),
        };
        supervised.extend(sync.start(&supervisor));
    }
    println!(
        "{agents} agents started within {:.0} s; this process holds {} MiB",
        begun.elapsed().as_secs_f64(),
        own_rss_mib()
    );
    roll_out(&client, 1, agents).await;
    let before = benchmark(&client).await;
    tokio::time::sleep(rest).await;
    tell("at rest", before, benchmark(&client).await, agents);
    roll_out(&client, 2, agents).await;
    println!("this process holds {} MiB", own_rss_mib());
    for task in supervised {
        task.stop().await;
    }
    models(&client).delete("sim", &DeleteParams::default()).await.unwrap();
    nodes.delete_collection(&DeleteParams::default(), &ListParams::default().labels(LABEL)).await.unwrap();
    let kind = GroupVersionKind::gvk("lineside.dev", "v1alpha1", "EdgeNode");
    let reported: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), NAMESPACE, &ApiResource::from_gvk_with_plural(&kind, "edgenodes"));
    for number in 0..agents {
        drop(reported.delete(&format!("sim-{number}"), &DeleteParams::default()).await);
    }
}

/// One agent among many objects that change all the time: how long until it knows the last change, and what it holds.
async fn follow_many(kubeconfig: &Path, objects: usize, updates_per_second: u32) {
    let loaded = Kubeconfig::read_from(kubeconfig).unwrap();
    let client =
        Client::try_from(Config::from_custom_kubeconfig(loaded, &KubeConfigOptions::default()).await.unwrap()).unwrap();
    let kind = GroupVersionKind::gvk("lineside.dev", "v1alpha1", "CameraStream");
    let streams: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), NAMESPACE, &ApiResource::from_gvk_with_plural(&kind, "camerastreams"));
    let apply = async |number: usize, fps: u32| {
        // One in ten is for our node.
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
    let access = ClusterConfig {
        kubeconfig: Some(kubeconfig.to_owned()),
        namespace: Some(NAMESPACE.to_owned()),
        ..ClusterConfig::default()
    };
    let (say, mut desired_state) = watch::channel(None);
    let metrics = KubeMetrics::register(&Registrar::default()).unwrap();
    let sync = ClusterSync {
        cluster: Arc::new(ClusterClient::new(access, "lineside-agent", "sim-0").await.unwrap()),
        node: Node { name: "sim-0".to_owned(), labels: BTreeMap::new() },
        data_dir: folder.path().to_owned(),
        desired: say,
        reread: Arc::new(Notify::new()),
        status: Arc::new(StatusStore::new("sim-0", "sim", 1, store)),
        watch_failures: metrics.cluster_watch_failures.clone(),
        state: ClusterStatePublisher::new(metrics, std::time::Instant::now()),
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
    let (begun, updates) = (Instant::now(), updates_per_second as usize * 20);
    for number in 0..updates {
        ticks.tick().await;
        apply(number % objects, 2 + u32::try_from(number / objects).unwrap()).await;
    }
    let rate = updates as f64 / begun.elapsed().as_secs_f64();
    let last = Instant::now();
    apply(0, 500).await;
    let knows = |desired_state: &Option<Arc<DesiredState>>| {
        desired_state.as_ref().is_some_and(|desired_state| {
            desired_state.objects.iter().any(
                |wish| matches!(&wish.object, Object::Stream(stream) if stream.name == "sim-0" && stream.frame_interval == Some(Duration::from_millis(2))),
            )
        })
    };
    desired_state.wait_for(knows).await.unwrap();
    println!(
        "{objects} objects at {rate:.0} updates/s: the last change known after {:.2} s; {} MiB more than without objects, of which the \
         updates' own client has its share",
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
        // `cargo bench` and `cargo test --benches` come by here too.
        println!("the fleet needs a cluster: run `make fleet`");
        return;
    };
    let agents = argument("AGENTS").and_then(|text| text.parse().ok()).unwrap_or(100);
    let rest = argument("REST_SECONDS")
        .and_then(|text| text.parse().ok())
        .map_or(Duration::from_secs(120), Duration::from_secs);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(follow_many(Path::new(&kubeconfig), 1000, 100));
    runtime.block_on(run(Path::new(&kubeconfig), agents, rest));
}
