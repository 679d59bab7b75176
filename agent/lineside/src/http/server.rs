//! The HTTP/1.1 server, with its own accept loop: it bounds the connections of all clients and of each address, the time in which
//! a client must send its headers, and the lifetime of a connection. The server of axum has none of these limits.
//!
//! At a bound, a new connection takes the place of the one that has been idle for the longest time, so that the queue of the kernel
//! never fills up. `tests/suite/attack/http.rs` tests it with 2,000 slow clients.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use prometheus::IntCounter;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection_table::{Admission, Connection, ConnectionLimits, ConnectionTable};
use super::tracked::{RequestGuard, TrackedBody, TrackedStream};
use crate::config::probes::ProbesSetting;
use lineside_common::metrics::Registrar;

/// The bounds of the main server.
const MAIN_LIMITS: ConnectionLimits = ConnectionLimits { total: 512, per_address: 256 };
/// The bounds of the probe server, whose clients are the kubelet and scrapers.
const PROBE_LIMITS: ConnectionLimits = ConnectionLimits { total: 160, per_address: 128 };
/// Time limit for the headers of a request, including the next request on a kept-alive connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of the headers and of the read buffer of a connection, in bytes.
const BUFFER_BYTES_MAX: usize = 16 << 10;
/// Maximum lifetime of a connection, so that a client that reads its responses too slowly does not hold a connection forever.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);
/// Time limit for requests in progress at shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after a failed accept, which happens when the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Connections that the kernel keeps until they are accepted; the kernel may reduce it (`net.core.somaxconn`). A client that finds
/// the queue full tries again after a second or later.
const BACKLOG: u32 = 4096;
/// Connections that are accepted before the tasks of the accepted ones run.
const ACCEPT_BURST: u32 = 16;
/// Evicted connections whose tasks have not ended yet. With more of them, the accept loop pauses.
const EVICTED_OPEN_MAX: usize = 64;
/// Pause of the accept loop while no connection can be closed, or too many evicted ones are still open.
const FULL_PAUSE: Duration = Duration::from_millis(1);

/// The metrics of the HTTP servers of a process.
#[derive(Clone)]
pub struct HttpMetrics {
    refused: IntCounter,
    evicted: IntCounter,
}

impl HttpMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, prometheus::Error> {
        Ok(Self {
            refused: registrar.counter(
                "http_connections_refused_total",
                "Connections that were closed because all others were being answered.",
            )?,
            evicted: registrar.counter(
                "http_connections_evicted_total",
                "Idle connections that were closed because there were too many.",
            )?,
        })
    }
}

/// A bound listener. It accepts connections once [`Server::run`] is called.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    limits: ConnectionLimits,
}

impl Server {
    /// Binds the address of `--http`. Port 0 selects a free port.
    ///
    /// # Errors
    /// When the address cannot be bound. The message names it.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        Self::bind_for("--http", address, MAIN_LIMITS)
    }

    /// Binds the address of `--probes`. `None` when the probe server is switched off, or when no address is configured and the
    /// default is in use, which is logged.
    ///
    /// # Errors
    /// When the configured address cannot be bound. The message names it.
    pub fn bind_probes(setting: ProbesSetting) -> io::Result<Option<Self>> {
        match setting {
            ProbesSetting::Off => Ok(None),
            ProbesSetting::Address(address) => Self::bind_for("--probes", address, PROBE_LIMITS).map(Some),
            ProbesSetting::Default => {
                let bound = Self::bind_for("--probes", ProbesSetting::DEFAULT, PROBE_LIMITS);
                if let Err(error) = &bound {
                    let reason = error.to_string();
                    tracing::info!(
                        event = "probes_not_bound",
                        reason,
                        "No probe server: its default address is in use; the HTTP server answers the probes"
                    );
                }
                Ok(bound.ok())
            }
        }
    }

    fn bind_for(flag: &str, address: SocketAddr, limits: ConnectionLimits) -> io::Result<Self> {
        let listener = listen(address).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("{flag} {address} cannot be bound: {error}; use another address, or port 0 for a free port"),
            )
        })?;
        Ok(Self { address: listener.local_addr()?, listener, limits })
    }

    /// The bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves `router` until `stop`, then completes the requests in progress within a time limit.
    pub async fn run(&self, router: Router, metrics: HttpMetrics, stop: CancellationToken) {
        let table = Arc::new(Mutex::new(ConnectionTable::new(self.limits)));
        let connections = TaskTracker::new();
        let open_max = self.limits.total + EVICTED_OPEN_MAX;
        let mut burst = 0;
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors: the idlest connection returns its own.
                    if table.lock().evict_idlest(None, Instant::now()) {
                        metrics.evicted.inc();
                    }
                    tracing::debug!(%error, "Cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let admission = loop {
                let admission = table.lock().admit(address.ip().to_canonical(), Instant::now());
                if stop.is_cancelled() || !matches!(admission, Admission::Wait) {
                    break admission;
                }
                tokio::time::sleep(FULL_PAUSE).await;
            };
            match admission {
                Admission::Refused | Admission::Wait => metrics.refused.inc(),
                Admission::Admitted { id, connection, has_evicted } => {
                    if has_evicted {
                        metrics.evicted.inc();
                    }
                    let serving = serve(stream, router.clone(), connection, stop.clone());
                    let entry = TableEntry { table: table.clone(), id };
                    connections.spawn(async move {
                        serving.await;
                        drop(entry);
                    });
                }
            }
            burst += 1;
            if burst >= ACCEPT_BURST {
                burst = 0;
                tokio::task::yield_now().await;
            }
            // The tasks of evicted connections end as soon as they run.
            while connections.len() > open_max && !stop.is_cancelled() {
                tokio::time::sleep(FULL_PAUSE).await;
            }
        }
        connections.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, connections.wait()).await.is_err() {
            tracing::debug!(open = connections.len(), "Open connections are closed at shutdown");
        }
    }
}

/// Listens on the address. The unspecified IPv6 address, `[::]`, accepts IPv4 as well; where the kernel has no IPv6, the
/// unspecified IPv4 address takes its place, so that one setting fits all nodes.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    listen_on(address).or_else(|error| ipv4_instead(address, &error).map_or(Err(error), listen_on))
}

/// The address to use where `address` cannot be bound because the kernel has no IPv6.
fn ipv4_instead(address: SocketAddr, error: &io::Error) -> Option<SocketAddr> {
    /// `EAFNOSUPPORT` and `EADDRNOTAVAIL` of Linux.
    const NO_IPV6: [i32; 2] = [97, 99];
    let is_any = address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let is_without_ipv6 = error.raw_os_error().is_some_and(|code| NO_IPV6.contains(&code));
    (is_any && is_without_ipv6).then(|| SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
}

fn listen_on(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The place of a connection in the table; released also when its task panics.
struct TableEntry {
    table: Arc<Mutex<ConnectionTable>>,
    id: u64,
}

impl Drop for TableEntry {
    fn drop(&mut self) {
        self.table.lock().remove(self.id);
    }
}

/// Serves one connection until the client or a time limit ends it, it is evicted, or the server stops.
async fn serve(stream: TcpStream, router: Router, state: Arc<Connection>, stop: CancellationToken) {
    let router = TowerToHyperService::new(router);
    let owner = state.clone();
    let service = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let guard = RequestGuard::new(owner.clone());
        let response = hyper::service::Service::call(&router, request);
        async move { Ok::<_, Infallible>(response.await?.map(|body| TrackedBody::new(body, guard))) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(TrackedStream::new(stream, state.clone())), service);
    tokio::pin!(connection);
    let lifetime = tokio::time::sleep(CONNECTION_LIFETIME);
    tokio::pin!(lifetime);
    let outcome = tokio::select! {
        biased;
        // First, so that a request that has arrived completely is answered even if its connection is evicted meanwhile.
        outcome = connection.as_mut() => outcome,
        () = state.evicted.cancelled() => {
            if state.can_be_evicted(Instant::now()) {
                Ok(())
            } else {
                // Its request has arrived since it was chosen.
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    outcome = connection => outcome,
                    () = lifetime => Ok(()),
                }
            }
        }
        () = &mut lifetime => Ok(()),
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "A connection failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_unspecified_address_of_ipv6_accepts_both_families() {
        let listener = listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let v4 = TcpStream::connect((Ipv4Addr::LOCALHOST, address.port())).await.unwrap();
        let (_, peer) = listener.accept().await.unwrap();
        assert_eq!(
            (peer.ip().to_canonical(), peer.port()),
            (Ipv4Addr::LOCALHOST.into(), v4.local_addr().unwrap().port())
        );
        // A machine without IPv6 listens on IPv4 alone.
        if address.is_ipv6() {
            let v6 = TcpStream::connect((Ipv6Addr::LOCALHOST, address.port())).await;
            assert!(v6.is_ok() || v6.is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable));
        }
    }

    #[test]
    fn only_the_unspecified_address_is_replaced_where_the_kernel_has_no_ipv6() {
        let replaced =
            |address: &str, code| ipv4_instead(address.parse().unwrap(), &io::Error::from_raw_os_error(code));
        assert_eq!(replaced("[::]:8082", 97), Some(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8082))));
        assert_eq!(replaced("[::]:8082", 99), Some(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8082))));
        // EADDRINUSE.
        assert_eq!(replaced("[::]:8082", 98), None);
        for address in ["[::1]:8082", "[2001:db8::7]:8082", "0.0.0.0:8082"] {
            assert_eq!(replaced(address, 97), None, "{address}");
        }
    }
}
