//! `lineside controller`: aggregates the status of all nodes of a cluster, until a signal arrives or a task fails.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::Failure;
use crate::config::probes::ProbesSetting;
use crate::http::controller::router;
use crate::http::server::{HttpMetrics, Server};
use lineside_common::metrics::Registrar;
use lineside_common::shutdown;
use lineside_common::supervisor::Supervisor;
use lineside_controller::Heartbeat;
use lineside_controller::{Controller, ControllerMetrics, Timeouts};
use lineside_kube::ClusterClient;
use lineside_kube::ClusterConfig;

#[derive(Args)]
#[command(after_help = "\
The controller aggregates the EdgeNode status that each agent reports into the status of EdgeModels and CameraStreams. It
marks nodes without a recent report as unreachable, and deletes the EdgeNodes of nodes that are no longer in the cluster.
Run two replicas; leader election selects the active one.

Every flag can also be set by an environment variable (--http as LINESIDE_HTTP).

Example, with the current context of a kubeconfig:
  lineside controller --kubeconfig ~/.kube/config --http 127.0.0.1:0")]
pub(super) struct Arguments {
    /// Kubeconfig of the cluster [default: the service account of the pod].
    #[arg(long, value_name = "FILE", env = "LINESIDE_KUBECONFIG", hide_env = true)]
    kubeconfig: Option<PathBuf>,
    /// Contexts of the kubeconfig that lead to the same cluster, separated by commas, in order of preference
    /// [default: the current context].
    #[arg(long, value_name = "NAMES", value_delimiter = ',', env = "LINESIDE_KUBE_CONTEXTS", hide_env = true)]
    kube_contexts: Vec<String>,
    /// Namespace of the objects [default: that of the pod or context, otherwise lineside].
    #[arg(long, value_name = "NAME", env = "LINESIDE_KUBE_NAMESPACE", hide_env = true)]
    kube_namespace: Option<String>,
    /// Identity in the leader election, unique among the replicas [default: the name of the pod; with --kubeconfig, the host
    /// name and the process id].
    #[arg(long, value_name = "NAME", env = "LINESIDE_IDENTITY", hide_env = true)]
    identity: Option<String>,
    /// Address of the HTTP server for /livez, /readyz and /metrics. Port 0 selects a free port, which is logged.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", env = "LINESIDE_HTTP", hide_env = true)]
    http: SocketAddr,
    /// Address of a listener for /livez, /readyz and /metrics only, which other machines may reach; `off` for none. Port 0
    /// selects a free port, which is logged [default: 127.0.0.1:8082 if it is free].
    #[arg(long, value_name = "ADDRESS", env = "LINESIDE_PROBES", hide_env = true)]
    probes: Option<ProbesSetting>,
    /// Allow --http to bind an address that is not a loopback address.
    #[arg(long, env = "LINESIDE_INSECURE_BIND", hide_env = true)]
    insecure_bind: bool,
    /// Time without a report, in seconds, after which a node is marked as unreachable. Agents report at least once a minute.
    #[arg(long, value_name = "SECONDS", default_value_t = 180, value_parser = clap::value_parser!(u64).range(1..=86_400),
          env = "LINESIDE_UNREACHABLE_AFTER_SECONDS", hide_env = true)]
    unreachable_after_seconds: u64,
    /// Time without a report, in seconds, after which the EdgeNode of a node that is no longer in the cluster is deleted. At
    /// least --unreachable-after-seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=2_592_000),
          env = "LINESIDE_REMOVE_AFTER_SECONDS", hide_env = true)]
    remove_after_seconds: u64,
    /// Persistent volume of the agents' data folders, which is kept available to the claim of the same name: a namespace that is
    /// deleted and created again gets its data back [default: none].
    #[arg(long, value_name = "NAME", env = "LINESIDE_DATA_VOLUME", hide_env = true)]
    data_volume: Option<String>,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    if !arguments.http.ip().is_loopback() && !arguments.insecure_bind {
        let error = format!(
            "--http {} can be reached from other machines; use a loopback address, or --insecure-bind if the network is \
             trusted",
            arguments.http
        );
        return Err(Failure::Usage(vec![error]));
    }
    let host_name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    // In a pod the host name is the name of the pod, which is unique.
    let identity = arguments.identity.unwrap_or_else(|| match &arguments.kubeconfig {
        None => host_name.trim().to_owned(),
        Some(_) => format!("{}_{}", host_name.trim(), std::process::id()),
    });
    let cluster_config = ClusterConfig {
        kubeconfig: arguments.kubeconfig,
        contexts: arguments.kube_contexts,
        namespace: arguments.kube_namespace,
    };
    let timeouts = Timeouts {
        unreachable_after: Duration::from_secs(arguments.unreachable_after_seconds),
        remove_after: Duration::from_secs(arguments.remove_after_seconds.max(arguments.unreachable_after_seconds)),
    };
    let runtime = super::runtime()?;
    let outcome = runtime.block_on(async {
        let stop = CancellationToken::new();
        shutdown::on_signals(stop.clone()).context("cannot install the signal handlers")?;
        let cluster = Arc::new(ClusterClient::new(cluster_config, "lineside-controller", &identity).await?);
        let registrar = Registrar::default();
        let metrics = ControllerMetrics::register(&registrar)?;
        let http_metrics = HttpMetrics::register(&registrar)?;
        let restarts = registrar.counters("task_restarts_total", "Tasks that failed, by name.", &["task"])?;
        registrar
            .gauges("build_info", "Always 1; the labels identify the build.", &["version"])?
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        let supervisor = Supervisor::new(restarts);
        let heartbeat = Arc::new(Heartbeat::new(Instant::now()));
        let server = Server::bind(arguments.http)?;
        let probes = Server::bind_probes(arguments.probes.unwrap_or_default())?;
        tracing::info!(
            event = "controller_started",
            version = env!("CARGO_PKG_VERSION"),
            identity,
            namespace = cluster.namespace(),
            http = %server.address(),
            probes = probes.as_ref().map(|probes| probes.address().to_string()),
            "Controller started"
        );
        let serving = (router(heartbeat.clone(), registrar), stop.clone());
        let mut serve = tokio::spawn(async move {
            let (router, stop) = serving;
            let main = server.run(router.clone(), http_metrics.clone(), stop.clone());
            match probes {
                Some(probes) => drop(tokio::join!(main, probes.run(router, http_metrics, stop))),
                None => main.await,
            }
        });
        let controller = Controller::new(cluster, &identity, timeouts, heartbeat, metrics)
            .with_data_volume(arguments.data_volume)
            .run(&supervisor, stop.clone());
        tokio::pin!(controller);
        tokio::select! {
            () = &mut controller => serve.await.context("the HTTP server panicked")?,
            joined = &mut serve => {
                joined.context("the HTTP server panicked")?;
                anyhow::ensure!(stop.is_cancelled(), "the HTTP server ended unexpectedly");
                controller.await;
            }
        }
        tracing::info!(event = "controller_stopped", "Controller stopped");
        Ok(())
    });
    runtime.shutdown_background();
    outcome.map_err(Failure::Failed)
}
