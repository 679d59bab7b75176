//! Where models may be fetched from, and the HTTP client that keeps to it.
//!
//! A manifest's author chooses addresses, and must not be able to make the agent talk to what only the node can reach. So:
//! - `https:` only, unless `http:` is allowed for all sources;
//! - where hosts are listed, no others; where none are, any;
//! - never a link-local address (cloud metadata lives there), an unspecified or a multicast one; a loopback address only
//!   when its host is listed;
//! - names are resolved here, every address is checked, and the connection goes to an address that was checked, so that a
//!   name cannot mean one thing when it is checked and another when it is used;
//! - redirects are followed to the same host or to a listed one, with the same checks, and never from https to http.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect;
use reqwest::{Certificate, Client, Url};

/// Waiting for a connection at most.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Redirects that are followed at most.
const REDIRECTS_MAX: usize = 5;
/// The IPv6 address of a cloud's metadata service, which is not link-local.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x0254);

/// Which hosts may be talked to, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// `host` or `host:port`; empty allows any host.
    pub hosts: BTreeSet<String>,
    /// Whether unencrypted HTTP is allowed.
    pub allow_http: bool,
}

impl Policy {
    /// Whether an address may be asked at all. Names are resolved, and their addresses checked, when connecting.
    ///
    /// # Errors
    /// A message that names the host and says what to do.
    pub fn check(&self, url: &Url) -> Result<(), String> {
        match url.scheme() {
            "https" => {}
            "http" if self.allow_http => {}
            "http" => return Err("http: is not encrypted and not allowed; use https, or --source-http".to_owned()),
            other => return Err(format!("{other}: is not allowed; use https")),
        }
        let host = bare_host(url);
        let port = url.port_or_known_default().unwrap_or_default();
        self.check_host(&host, Some(port))?;
        match host.parse::<IpAddr>() {
            Ok(address) => self.check_address(&host, Some(port), address),
            Err(_) => Ok(()),
        }
    }

    fn is_listed(&self, host: &str, port: Option<u16>) -> bool {
        // Where the port is not known, any port of the host was checked before.
        self.hosts.iter().any(|listed| {
            let (name, listed_port) = split(listed);
            name.eq_ignore_ascii_case(host) && (port.is_none() || listed_port.is_none() || listed_port == port)
        })
    }

    fn check_host(&self, host: &str, port: Option<u16>) -> Result<(), String> {
        match self.hosts.is_empty() || self.is_listed(host, port) {
            true => Ok(()),
            false => {
                let port = port.map(|port| format!(":{port}")).unwrap_or_default();
                Err(format!("the host {host}{port} is not among --source-hosts"))
            }
        }
    }

    fn check_address(&self, host: &str, port: Option<u16>, address: IpAddr) -> Result<(), String> {
        let address = address.to_canonical();
        let never = match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast(),
            IpAddr::V6(v6) => {
                v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast() || v6 == METADATA_V6
            }
        };
        if never {
            return Err(format!(
                "{host} has the address {address}, which is unspecified, link-local or multicast and never fetched from"
            ));
        }
        match address.is_loopback() && !self.is_listed(host, port) {
            true => Err(format!(
                "{host} has the address {address} of this node itself; list it in --source-hosts to allow that"
            )),
            false => Ok(()),
        }
    }

    /// A client that keeps to this policy. A server that says nothing for `stall` is given up.
    ///
    /// # Errors
    /// When the certificates of this machine cannot be used.
    pub fn client(&self, roots: &[Certificate], stall: Duration) -> Result<Client, String> {
        // A second call finds the provider installed already, which is as good.
        drop(rustls::crypto::ring::default_provider().install_default());
        let policy = Arc::new(self.clone());
        let redirects = policy.clone();
        Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(stall)
            .redirect(redirect::Policy::custom(move |attempt| {
                match redirects.redirect(attempt.previous(), attempt.url()) {
                    Ok(()) => attempt.follow(),
                    Err(reason) => attempt.error(reason),
                }
            }))
            .dns_resolver(Arc::new(CheckedResolver(policy)))
            .tls_certs_merge(roots.iter().cloned())
            .no_proxy()
            .user_agent(concat!("lineside/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| format!("no HTTPS client can be made: {}", describe(&error)))
    }

    fn redirect(&self, previous: &[Url], next: &Url) -> Result<(), String> {
        let host = bare_host(next);
        if previous.len() > REDIRECTS_MAX {
            return Err(format!("more than {REDIRECTS_MAX} redirects"));
        }
        let is_same = previous.last().is_some_and(|last| {
            last.host() == next.host() && last.port_or_known_default() == next.port_or_known_default()
        });
        if previous.iter().any(|url| url.scheme() == "https") && next.scheme() != "https" {
            return Err(format!("it redirects from https to {}: at {host}, which is refused", next.scheme()));
        }
        let port = next.port_or_known_default();
        if !is_same && !self.is_listed(&host, port) {
            let port = port.map(|port| format!(":{port}")).unwrap_or_default();
            return Err(format!("it redirects to {host}{port}, which is not among --source-hosts"));
        }
        self.check(next).map_err(|reason| format!("it redirects: {reason}"))
    }
}

/// Resolves names and gives only addresses that may be connected to.
struct CheckedResolver(Arc<Policy>);

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = self.0.clone();
        Box::pin(async move {
            let host = name.as_str().to_owned();
            policy.check_host(&host, None)?;
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            for address in &found {
                policy.check_address(&host, None, address.ip())?;
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// The host without the brackets of an IPv6 address.
fn bare_host(url: &Url) -> String {
    url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned()
}

/// `host:port`, `host`, `[v6]:port` or `v6`.
fn split(listed: &str) -> (&str, Option<u16>) {
    if let Some((host, port)) = listed.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (host, port.strip_prefix(':').and_then(|port| port.parse().ok()));
    }
    match listed.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') => (host, port.parse().ok()),
        _ => (listed, None),
    }
}

/// The innermost reasons of an HTTP error; the outermost only repeats the address.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut reasons: Vec<String> = Vec::new();
    let mut next = error.source();
    while let Some(inner) = next {
        let text = inner.to_string();
        if !reasons.iter().any(|known| known.contains(&text)) {
            reasons.push(text);
        }
        next = inner.source();
    }
    match reasons.is_empty() {
        true => error.to_string(),
        false => reasons.join(": "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(hosts: &[&str], allow_http: bool) -> Policy {
        Policy { hosts: hosts.iter().map(|host| (*host).to_owned()).collect(), allow_http }
    }

    fn check(policy: &Policy, url: &str) -> Result<(), String> {
        policy.check(&Url::parse(url).unwrap())
    }

    #[test]
    fn what_only_the_node_can_reach_is_refused() {
        let any = policy(&[], true);
        for fine in ["https://models.plant/m", "https://10.1.2.3/m", "http://192.168.1.4:8080/m", "https://[fd12::1]/m"]
        {
            assert_eq!(check(&any, fine), Ok(()), "{fine}");
        }
        for wrong in [
            "http://169.254.169.254/latest",
            "http://[fe80::1]/m",
            "http://[fd00:ec2::254]/m",
            "http://127.0.0.1/m",
            "http://2130706433/m",
            "http://0x7f.1/m",
            "http://[::1]/m",
            "http://[::ffff:127.0.0.1]/m",
            "http://[::ffff:169.254.169.254]/m",
            "http://0.0.0.0/m",
            "http://224.0.0.1/m",
            "ftp://models.plant/m",
        ] {
            assert!(check(&any, wrong).is_err(), "{wrong}");
        }
        assert!(check(&policy(&[], false), "http://models.plant/m").unwrap_err().contains("--source-http"));
        // Listed or not, metadata is never fetched from.
        assert!(check(&policy(&["169.254.169.254"], true), "http://169.254.169.254/m").is_err());
    }

    #[test]
    fn listed_hosts_are_the_only_ones_and_may_be_this_node() {
        let listed = policy(&["models.plant", "127.0.0.1:8443", "[::1]:9"], false);
        for fine in
            ["https://models.plant:1/m", "https://MODELS.plant/m", "https://127.0.0.1:8443/m", "https://[::1]:9/m"]
        {
            assert_eq!(check(&listed, fine), Ok(()), "{fine}");
        }
        for wrong in
            ["https://other.plant/m", "https://127.0.0.1:8444/m", "https://[::1]:10/m", "https://x.models.plant/m"]
        {
            assert!(check(&listed, wrong).unwrap_err().contains("--source-hosts"), "{wrong}");
        }
        assert!(listed.check_address("evil.plant", None, "127.0.0.1".parse().unwrap()).is_err());
    }

    #[test]
    fn redirects_stay_on_the_host_or_go_to_a_listed_one() {
        let urls = |texts: &[&str]| texts.iter().map(|text| Url::parse(text).unwrap()).collect::<Vec<_>>();
        let any = policy(&[], true);
        let next = |text: &str| Url::parse(text).unwrap();
        let from = urls(&["https://a.plant/1"]);
        assert_eq!(any.redirect(&from, &next("https://a.plant/2")), Ok(()));
        assert!(any.redirect(&from, &next("https://b.plant/2")).unwrap_err().contains("b.plant"));
        assert!(any.redirect(&from, &next("http://a.plant/2")).is_err(), "never back to http");
        assert!(any.redirect(&urls(&["https://a.plant/1"; 6]), &next("https://a.plant/2")).is_err());
        let listed = policy(&["a.plant", "b.plant"], true);
        assert_eq!(listed.redirect(&from, &next("https://b.plant/2")), Ok(()));
        assert!(listed.redirect(&from, &next("https://c.plant/2")).is_err());
    }
}
