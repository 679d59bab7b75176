//! `lineside controller`: adds up what the nodes say.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::Failure;
use crate::http::controller::router;
use crate::http::server::Server;
use lineside_common::metrics::Registrar;
use lineside_common::supervisor::Supervisor;
use lineside_common::{allocator, shutdown};
use lineside_controller::Heartbeat;
use lineside_controller::{Controller, ControllerMetrics, Timeouts};
use lineside_kube::ClusterClient;
use lineside_kube::ClusterConfig;

#[derive(Args)]
#[command(after_help = "\
The controller reads what every node's agent says of itself, writes the status of EdgeModels and CameraStreams, marks
nodes that have fallen silent, and removes the EdgeNodes of nodes that are gone. Run two; one leads.

Every option can also be given as a variable: --http as LINESIDE_HTTP.

Example, with the current context of a kubeconfig:
  lineside controller --kubeconfig ~/.kube/config --http 127.0.0.1:0")]
pub(super) struct Arguments {
    /// A kubeconfig [default: the service account of the pod this runs in].
    #[arg(long, value_name = "FILE", env = "LINESIDE_KUBECONFIG", hide_env = true)]
    kubeconfig: Option<PathBuf>,
    /// Contexts of the kubeconfig, tried in order, with commas [default: its current one].
    #[arg(long, value_name = "NAMES", value_delimiter = ',', env = "LINESIDE_KUBE_CONTEXTS", hide_env = true)]
    kube_contexts: Vec<String>,
    /// The namespace of our objects [default: the pod's or context's own, else lineside].
    #[arg(long, value_name = "NAME", env = "LINESIDE_KUBE_NAMESPACE", hide_env = true)]
    kube_namespace: Option<String>,
    /// Tells this controller from others [default: the pod's name, elsewhere the host name and the process].
    #[arg(long, value_name = "NAME", env = "LINESIDE_IDENTITY", hide_env = true)]
    identity: Option<String>,
    /// Where /livez, /readyz and /metrics are served; port 0 takes a free one and logs it.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", env = "LINESIDE_HTTP", hide_env = true)]
    http: SocketAddr,
    /// Allow --http to be an address that other machines can reach.
    #[arg(long, env = "LINESIDE_INSECURE_BIND", hide_env = true)]
    insecure_bind: bool,
    /// A node that has said nothing for this long is marked as silent. Agents speak once a minute at least.
    #[arg(long, value_name = "SECONDS", default_value_t = 180, value_parser = clap::value_parser!(u64).range(1..=86_400),
          env = "LINESIDE_SILENT_AFTER_SECONDS", hide_env = true)]
    unreachable_after_seconds: u64,
    /// A node that has said nothing for this long, and that the cluster has no more, is forgotten.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=2_592_000),
          env = "LINESIDE_GONE_AFTER_SECONDS", hide_env = true)]
    remove_after_seconds: u64,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    if !arguments.http.ip().is_loopback() && !arguments.insecure_bind {
        let error = format!(
            "--http {} can be reached from other machines; use a loopback address, or --insecure-bind where the network \
             is trusted",
            arguments.http
        );
        return Err(Failure::Usage(vec![error]));
    }
    allocator::share_one_heap();
    let host_name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    // In a pod the host name is the pod's, and no other has it.
    let identity = arguments.identity.unwrap_or_else(|| match &arguments.kubeconfig {
        None => host_name.trim().to_owned(),
        Some(_) => format!("{}_{}", host_name.trim(), std::process::id()),
    });
    let access = ClusterConfig {
        kubeconfig: arguments.kubeconfig,
        contexts: arguments.kube_contexts,
        namespace: arguments.kube_namespace,
    };
    let timeouts = Timeouts {
        unreachable_after: Duration::from_secs(arguments.unreachable_after_seconds),
        remove_after: Duration::from_secs(arguments.remove_after_seconds.max(arguments.unreachable_after_seconds)),
    };
    let runtime = super::runtime()?;
    let ended = runtime.block_on(async {
        let stop = CancellationToken::new();
        shutdown::on_signals(stop.clone()).context("signals cannot be listened to")?;
        let cluster = Arc::new(ClusterClient::new(access, "lineside-controller", &identity).await?);
        let registrar = Registrar::default();
        let metrics = ControllerMetrics::register(&registrar)?;
        let refused =
            registrar.counter("http_connections_refused_total", "Connections closed because there were too many.")?;
        let restarts =
            registrar.counters("task_restarts_total", "Tasks that ended when they should not have.", &["task"])?;
        registrar
            .gauges("build_info", "Always 1; the labels identify the build.", &["version"])?
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        let supervisor = Supervisor::new(restarts);
        let heartbeat = Arc::new(Heartbeat::new(Instant::now()));
        let server = Arc::new(Server::bind(arguments.http).await?);
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            identity,
            namespace = cluster.namespace(),
            http = %server.address(),
            "the controller starts"
        );
        let serving = (server.clone(), router(heartbeat.clone(), registrar), stop.clone());
        let mut serve = tokio::spawn(async move {
            let (server, router, stop) = serving;
            server.run(router, refused, stop).await;
        });
        let controller =
            Controller::new(cluster, &identity, timeouts, heartbeat, metrics).run(&supervisor, stop.clone());
        tokio::pin!(controller);
        tokio::select! {
            () = &mut controller => serve.await.context("the HTTP server panicked")?,
            ended = &mut serve => {
                ended.context("the HTTP server panicked")?;
                anyhow::ensure!(stop.is_cancelled(), "the HTTP server ended unexpectedly");
                controller.await;
            }
        }
        tracing::info!("the controller ended");
        Ok(())
    });
    runtime.shutdown_background();
    ended.map_err(Failure::Failed)
}
