//! The address policy: which addresses models may be fetched from, and the HTTP client that enforces it.
//!
//! The author of a manifest chooses addresses and must not be able to make the agent connect to what only the node can
//! reach. Therefore:
//! - `https:` only, unless `http:` is allowed for all sources;
//! - only hosts that [`AllowedHosts`] allows;
//! - never a link-local, unspecified, multicast or broadcast address, or one of a cloud metadata service; an address of
//!   this node, loopback or of an interface, only when its host is listed; [`net::classify`] also unwraps embedded IPv4
//!   addresses;
//! - names are resolved here, every address is checked, and the connection goes to an address that was checked, so that
//!   a name cannot resolve to one address when it is checked and to another when it is used;
//! - redirects are followed to the same host or to a listed one, with the same checks, and never from https to http.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect;
use reqwest::{Certificate, Client, Url};

use lineside_common::net::{self, AddressClass, AllowedHosts, ForbiddenAddress};

/// Upper bound of the time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Redirects that are followed.
const REDIRECTS_MAX: usize = 5;

/// Which hosts may be connected to, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddressPolicy {
    /// The hosts that may be connected to.
    pub hosts: AllowedHosts,
    /// Whether unencrypted HTTP is allowed.
    pub allow_http: bool,
}

/// Why an address is not allowed. The message names the host and the setting that allows it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Unencrypted HTTP is not allowed.
    #[error("http: is not encrypted and not allowed; use https or set --source-http")]
    UnencryptedHttp,
    /// Another scheme than `https:` and `http:`.
    #[error("{scheme}: is not allowed; use https")]
    Scheme {
        /// The scheme of the address.
        scheme: String,
    },
    /// The host is not listed.
    #[error("the host {host} is not listed in --source-hosts, without which an agent of a cluster downloads nothing")]
    HostNotListed {
        /// The host, with its port where it is known.
        host: String,
    },
    /// The host has an address that is never allowed.
    #[error("{host} has the address {address}; {reason} addresses are never allowed")]
    ForbiddenAddress {
        /// The host.
        host: String,
        /// Its address.
        address: IpAddr,
        /// The kind of address.
        reason: ForbiddenAddress,
    },
    /// The host is this node and is not listed.
    #[error(
        "{host} has the address {address}, which belongs to this node (loopback or an interface); list the host in \
         --source-hosts to allow it"
    )]
    ThisNode {
        /// The host.
        host: String,
        /// Its address.
        address: IpAddr,
    },
    /// The server redirects more often than allowed.
    #[error("the server redirects more than {REDIRECTS_MAX} times")]
    TooManyRedirects,
    /// The server redirects from https to another scheme.
    #[error("the server redirects from https to {scheme}: at {host}, which is not allowed")]
    InsecureRedirect {
        /// The scheme of the new address.
        scheme: String,
        /// Its host.
        host: String,
    },
    /// The server redirects to another host that is not listed.
    #[error("the server redirects to {host}, which is not listed in --source-hosts")]
    RedirectHost {
        /// The new host, with its port.
        host: String,
    },
    /// The server redirects to an address that is not allowed.
    #[error("the server redirects to an address that is not allowed")]
    Redirect(#[source] Box<Self>),
}

impl AddressPolicy {
    /// Checks an address before a request. Names are resolved, and their addresses checked, on connecting.
    ///
    /// # Errors
    /// When the scheme, the host or a literal address is not allowed.
    pub fn check(&self, url: &Url) -> Result<(), PolicyError> {
        match url.scheme() {
            "https" => {}
            "http" if self.allow_http => {}
            "http" => return Err(PolicyError::UnencryptedHttp),
            other => return Err(PolicyError::Scheme { scheme: other.to_owned() }),
        }
        let host = bare_host(url);
        let port = url.port_or_known_default().unwrap_or_default();
        self.check_host(&host, Some(port))?;
        match host.parse::<IpAddr>() {
            Ok(address) => self.check_address(&host, Some(port), address),
            Err(_) => Ok(()),
        }
    }

    fn check_host(&self, host: &str, port: Option<u16>) -> Result<(), PolicyError> {
        // Without a port this matches any port of the host, because the port was checked before.
        if self.hosts.allows(host, port) {
            Ok(())
        } else {
            Err(PolicyError::HostNotListed { host: with_port(host, port) })
        }
    }

    fn check_address(&self, host: &str, port: Option<u16>, address: IpAddr) -> Result<(), PolicyError> {
        match net::classify(address, net::is_own_address) {
            AddressClass::Remote => Ok(()),
            AddressClass::ThisNode if self.hosts.lists(host, port) => Ok(()),
            AddressClass::ThisNode => Err(PolicyError::ThisNode { host: host.to_owned(), address }),
            AddressClass::Forbidden(reason) => {
                Err(PolicyError::ForbiddenAddress { host: host.to_owned(), address, reason })
            }
        }
    }

    /// An HTTP client that enforces this policy. It abandons a server that sends nothing for `stall`.
    ///
    /// # Errors
    /// When the TLS configuration of the system is not usable.
    pub fn client(&self, roots: &[Certificate], stall: Duration) -> reqwest::Result<Client> {
        // A second call fails because the provider is installed already, which is the wanted state.
        drop(rustls::crypto::ring::default_provider().install_default());
        let policy = Arc::new(self.clone());
        let redirect_policy = policy.clone();
        Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(stall)
            .redirect(redirect::Policy::custom(move |attempt| {
                match redirect_policy.check_redirect(attempt.previous(), attempt.url()) {
                    Ok(()) => attempt.follow(),
                    Err(error) => attempt.error(error),
                }
            }))
            .dns_resolver(Arc::new(CheckedResolver(policy)))
            .tls_certs_merge(roots.iter().cloned())
            .no_proxy()
            .user_agent(concat!("lineside/", env!("CARGO_PKG_VERSION")))
            .build()
    }

    fn check_redirect(&self, previous: &[Url], next: &Url) -> Result<(), PolicyError> {
        let host = bare_host(next);
        if previous.len() > REDIRECTS_MAX {
            return Err(PolicyError::TooManyRedirects);
        }
        let is_same_host = previous.last().is_some_and(|last| {
            last.host() == next.host() && last.port_or_known_default() == next.port_or_known_default()
        });
        if previous.iter().any(|url| url.scheme() == "https") && next.scheme() != "https" {
            return Err(PolicyError::InsecureRedirect { scheme: next.scheme().to_owned(), host });
        }
        let port = next.port_or_known_default();
        if !is_same_host && !self.hosts.lists(&host, port) {
            return Err(PolicyError::RedirectHost { host: with_port(&host, port) });
        }
        self.check(next).map_err(|error| PolicyError::Redirect(Box::new(error)))
    }
}

/// Resolves names and returns only addresses that the policy allows.
struct CheckedResolver(Arc<AddressPolicy>);

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = self.0.clone();
        Box::pin(async move {
            let host = name.as_str().to_owned();
            policy.check_host(&host, None)?;
            let resolved: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            for address in &resolved {
                policy.check_address(&host, None, address.ip())?;
            }
            Ok(Box::new(resolved.into_iter()) as Addrs)
        })
    }
}

fn with_port(host: &str, port: Option<u16>) -> String {
    port.map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The host without the brackets of an IPv6 address.
fn bare_host(url: &Url) -> String {
    url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(hosts: &[&str], allow_http: bool) -> AddressPolicy {
        AddressPolicy { hosts: hosts.iter().copied().collect(), allow_http }
    }

    fn check(policy: &AddressPolicy, url: &str) -> Result<(), PolicyError> {
        policy.check(&Url::parse(url).unwrap())
    }

    #[test]
    fn addresses_that_only_the_node_can_reach_are_rejected() {
        let any = policy(&["*"], true);
        for allowed in
            ["https://models.plant/m", "https://10.1.2.3/m", "http://192.168.1.4:8080/m", "https://[fd12::1]/m"]
        {
            assert_eq!(check(&any, allowed), Ok(()), "{allowed}");
        }
        for rejected in [
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
            "http://[64:ff9b::a9fe:a9fe]/m",
            "http://[2002:7f00:1::]/m",
            "http://[::127.0.0.1]/m",
            "http://100.100.100.200/m",
            "http://168.63.129.16/m",
            "http://0.1.2.3/m",
            "ftp://models.plant/m",
        ] {
            assert!(check(&any, rejected).is_err(), "{rejected}");
        }
        assert_eq!(check(&policy(&["*"], false), "http://models.plant/m"), Err(PolicyError::UnencryptedHttp));
        // An address of an interface of this node is rejected like a loopback address, unless it is listed.
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        if socket.connect("203.0.113.77:9").is_ok() {
            let own = socket.local_addr().unwrap().ip();
            let url = format!("http://{own}/m");
            assert!(matches!(check(&any, &url), Err(PolicyError::ThisNode { .. })), "{url}");
            assert_eq!(check(&policy(&[&own.to_string()], true), &url), Ok(()), "{url}");
        }
        // Without a list nothing is allowed.
        assert!(matches!(check(&policy(&[], true), "http://models.plant/m"), Err(PolicyError::HostNotListed { .. })));
        // Listing a metadata service does not allow it.
        assert!(check(&policy(&["169.254.169.254"], true), "http://169.254.169.254/m").is_err());
    }

    #[test]
    fn only_listed_hosts_are_allowed_and_may_be_loopback() {
        let listed = policy(&["models.plant", "127.0.0.1:8443", "[::1]:9"], false);
        for allowed in
            ["https://models.plant:1/m", "https://MODELS.plant/m", "https://127.0.0.1:8443/m", "https://[::1]:9/m"]
        {
            assert_eq!(check(&listed, allowed), Ok(()), "{allowed}");
        }
        for rejected in
            ["https://other.plant/m", "https://127.0.0.1:8444/m", "https://[::1]:10/m", "https://x.models.plant/m"]
        {
            assert!(matches!(check(&listed, rejected), Err(PolicyError::HostNotListed { .. })), "{rejected}");
        }
        assert!(listed.check_address("evil.plant", None, "127.0.0.1".parse().unwrap()).is_err());
    }

    #[test]
    fn redirects_stay_on_the_host_or_lead_to_a_listed_one() {
        let urls = |texts: &[&str]| texts.iter().map(|text| Url::parse(text).unwrap()).collect::<Vec<_>>();
        let any = policy(&["*"], true);
        let next = |text: &str| Url::parse(text).unwrap();
        let from = urls(&["https://a.plant/1"]);
        assert_eq!(any.check_redirect(&from, &next("https://a.plant/2")), Ok(()));
        let error = any.check_redirect(&from, &next("https://b.plant/2")).unwrap_err();
        assert_eq!(error, PolicyError::RedirectHost { host: "b.plant:443".into() });
        let error = any.check_redirect(&from, &next("http://a.plant/2")).unwrap_err();
        assert!(matches!(error, PolicyError::InsecureRedirect { .. }), "{error}");
        let error = any.check_redirect(&urls(&["https://a.plant/1"; 6]), &next("https://a.plant/2")).unwrap_err();
        assert_eq!(error, PolicyError::TooManyRedirects);
        let listed = policy(&["a.plant", "b.plant"], true);
        assert_eq!(listed.check_redirect(&from, &next("https://b.plant/2")), Ok(()));
        assert!(listed.check_redirect(&from, &next("https://c.plant/2")).is_err());
    }
}
