//! What sources may read: the folders of `file:` and `dir:`, and the hosts of `http:` and `https:`.
//!
//! The author of a manifest names files and addresses and must not be able to make the agent read what only the node can reach.
//! Files are read below allowed folders only ([`FileRoots`]). Cameras stand in private networks, so private addresses are
//! allowed; the addresses of this node are allowed only where they are listed, and link-local and cloud metadata addresses
//! never. Names are resolved here, every address is checked, and the connection goes to an address that was checked.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::str::FromStr;

use lineside_common::error_chain;
use lineside_common::file_roots::FileRoots;
use lineside_common::files::read_opened;
use lineside_common::net::{AddressClass, AllowedHosts, ForbiddenAddress, classify, is_own_address};
use url::Url;

/// What sources may read.
#[derive(Debug, Clone)]
pub struct SourcePolicy {
    /// The folders of `file:` and `dir:`.
    pub files: FileRoots,
    /// The hosts of `http:` and `https:`.
    pub cameras: CameraHosts,
}

impl SourcePolicy {
    /// Reads a regular file below an allowed folder, of at most `bytes_max` bytes.
    pub(crate) fn read(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        let file = self.files.open(path).map_err(|error| io::Error::other(error_chain(&error)))?;
        read_opened(file, bytes_max)
    }
}

/// The hosts that cameras may have: an entry is a host for all ports, `host:port`, a network such as `10.20.0.0/16`, or `*` for
/// every host except this node. This node is allowed only where it is listed as a host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CameraHosts {
    hosts: AllowedHosts,
    networks: Vec<Network>,
}

/// An entry is neither a host nor a network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a host, host:port, or a network such as 10.20.0.0/16")]
pub struct InvalidCameraHost(String);

/// Why a camera's address is not connected to. The message names the host and the setting that allows it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CameraHostError {
    /// The host is not listed.
    #[error("the host {host} is not listed in --camera-hosts")]
    NotListed {
        /// The host.
        host: String,
    },
    /// The host has an address that is never allowed.
    #[error("{host} has the {reason} address {address}, which is never allowed")]
    Forbidden {
        /// The host.
        host: String,
        /// Its address.
        address: IpAddr,
        /// The kind of address.
        reason: ForbiddenAddress,
    },
    /// The host is this node and is not listed.
    #[error("{host} has the address {address} of this node; list the host in --camera-hosts to allow it")]
    ThisNode {
        /// The host.
        host: String,
        /// Its address.
        address: IpAddr,
    },
}

impl CameraHosts {
    /// Every host except this node.
    pub fn any() -> Self {
        Self { hosts: AllowedHosts::any(), networks: Vec::new() }
    }

    /// Parses the entries of a list.
    ///
    /// # Errors
    /// The first entry that is neither a host nor a network.
    pub fn parse(entries: impl IntoIterator<Item = String>) -> Result<Self, InvalidCameraHost> {
        let (mut hosts, mut networks) = (Vec::new(), Vec::new());
        for entry in entries {
            if entry.contains('/') {
                networks.push(entry.parse()?);
            } else if entry == AllowedHosts::ANY || is_host(&entry) {
                hosts.push(entry);
            } else {
                return Err(InvalidCameraHost(entry));
            }
        }
        Ok(Self { hosts: hosts.into_iter().collect(), networks })
    }

    /// Checks one address of a host. `is_own` states whether an address belongs to this node.
    fn check(
        &self,
        host: &str,
        port: u16,
        address: IpAddr,
        is_own: impl Fn(IpAddr) -> bool,
    ) -> Result<(), CameraHostError> {
        let named = || host.to_owned();
        let is_listed = self.hosts.lists(host, Some(port));
        // A network of cameras often contains an address of this node, so that a network does not allow this node.
        let is_in_network = || self.networks.iter().any(|network| network.contains(address));
        match classify(address, is_own) {
            AddressClass::Forbidden(reason) => Err(CameraHostError::Forbidden { host: named(), address, reason }),
            AddressClass::ThisNode if is_listed => Ok(()),
            AddressClass::ThisNode => Err(CameraHostError::ThisNode { host: named(), address }),
            AddressClass::Remote if is_listed || self.hosts.is_any || is_in_network() => Ok(()),
            AddressClass::Remote => Err(CameraHostError::NotListed { host: named() }),
        }
    }

    /// The addresses of a camera, all of which are allowed.
    pub(crate) async fn resolve(&self, url: &Url) -> Result<Vec<SocketAddr>, ResolveError> {
        let (host, port) = host_and_port(url);
        let resolved: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), port)).await?.collect();
        for address in &resolved {
            self.check(&host, port, address.ip(), is_own_address)?;
        }
        Ok(resolved)
    }
}

/// Why a camera's name gives no address to connect to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    /// The name cannot be resolved.
    #[error(transparent)]
    Lookup(#[from] io::Error),
    /// An address is not allowed.
    #[error(transparent)]
    NotAllowed(#[from] CameraHostError),
}

/// Host without the brackets of an IPv6 address, and port.
fn host_and_port(url: &Url) -> (String, u16) {
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    (host.to_owned(), url.port_or_known_default().unwrap_or_default())
}

/// Whether an entry is a host or `host:port`; an IPv6 address may have brackets.
fn is_host(entry: &str) -> bool {
    let is_plain = !entry.is_empty() && !entry.contains(['@', '?', '#', ' ', '\\', '*']);
    is_plain && (entry.parse::<IpAddr>().is_ok() || Url::parse(&format!("http://{entry}/")).is_ok())
}

/// An IP network: an address with the length of its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    prefix: u8,
}

impl fmt::Display for Network {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Network {
    type Err = InvalidCameraHost;

    fn from_str(text: &str) -> Result<Self, InvalidCameraHost> {
        let invalid = || InvalidCameraHost(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(invalid)?;
        let address: IpAddr = address.parse().map_err(|_| invalid())?;
        let prefix: u8 = prefix.parse().map_err(|_| invalid())?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        if prefix > bits { Err(invalid()) } else { Ok(Self { address, prefix }) }
    }
}

impl Network {
    fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                network.to_bits() & mask == address.to_bits() & mask
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                network.to_bits() & mask == address.to_bits() & mask
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn hosts(entries: &[&str]) -> CameraHosts {
        CameraHosts::parse(entries.iter().map(|entry| (*entry).to_owned())).unwrap()
    }

    fn check(hosts: &CameraHosts, host: &str, port: u16, address: &str) -> Result<(), CameraHostError> {
        let own: IpAddr = "192.0.2.2".parse().unwrap();
        hosts.check(host, port, address.parse().unwrap(), |address| address == own)
    }

    #[test]
    fn private_networks_are_allowed_and_this_node_only_where_it_is_listed() {
        let any = CameraHosts::any();
        for address in ["10.0.0.7", "192.168.1.20", "172.16.3.4", "fd12::7", "203.0.113.9"] {
            assert_eq!(check(&any, "cam", 80, address), Ok(()), "{address}");
        }
        for address in ["127.0.0.1", "::1", "192.0.2.2", "::ffff:127.0.0.1", "64:ff9b::127.0.0.1"] {
            let refused = check(&any, "cam", 80, address);
            assert!(matches!(refused, Err(CameraHostError::ThisNode { .. })), "{address}: {refused:?}");
        }
        let gateway = hosts(&["*", "127.0.0.1:1984", "localhost"]);
        assert_eq!(check(&gateway, "127.0.0.1", 1984, "127.0.0.1"), Ok(()));
        assert_eq!(check(&gateway, "localhost", 80, "::1"), Ok(()));
        assert_eq!(check(&gateway, "10.0.0.7", 80, "10.0.0.7"), Ok(()));
        assert!(check(&gateway, "127.0.0.1", 8080, "127.0.0.1").is_err());
        // A name that leads to this node is not the listed host.
        assert!(check(&gateway, "evil.plant", 1984, "127.0.0.1").is_err());
    }

    #[test]
    fn metadata_and_link_local_addresses_are_never_allowed() {
        let listed = hosts(&["*", "169.254.169.254", "169.254.0.0/16", "100.100.100.200", "0.0.0.0/0", "::/0"]);
        for address in ["169.254.169.254", "fe80::1", "100.100.100.200", "fd00:ec2::254", "0.0.0.0", "224.0.0.1"] {
            let refused = check(&listed, address, 80, address);
            assert!(matches!(refused, Err(CameraHostError::Forbidden { .. })), "{address}: {refused:?}");
        }
    }

    #[test]
    fn only_listed_hosts_and_networks_are_allowed() {
        let listed = hosts(&["10.20.0.0/16", "fd12:3::/32", "cam7.plant:8080"]);
        for (host, port, address) in [
            ("10.20.255.1", 80, "10.20.255.1"),
            ("any.plant", 81, "10.20.0.9"),
            ("any.plant", 81, "::ffff:10.20.0.9"),
            ("fd12:3::9", 80, "fd12:3::9"),
            ("CAM7.plant", 8080, "10.99.0.1"),
        ] {
            assert_eq!(check(&listed, host, port, address), Ok(()), "{host}");
        }
        for (host, port, address) in
            [("10.21.0.1", 80, "10.21.0.1"), ("cam7.plant", 80, "10.99.0.1"), ("fd12:4::9", 80, "fd12:4::9")]
        {
            let refused = check(&listed, host, port, address);
            assert_eq!(refused, Err(CameraHostError::NotListed { host: host.to_owned() }));
        }
        assert_eq!(check(&hosts(&["0.0.0.0/0"]), "cam", 80, "10.1.1.1"), Ok(()));
        for (network, own) in [("127.0.0.0/8", "127.0.0.1"), ("192.0.2.0/24", "192.0.2.2")] {
            let refused = check(&hosts(&[network]), "cam", 80, own);
            assert!(matches!(refused, Err(CameraHostError::ThisNode { .. })), "{network}: {refused:?}");
        }
    }

    #[test]
    fn an_entry_that_is_no_host_is_an_error() {
        for entry in
            ["", "10.0.0.0/33", "10.0.0.0/", "fd00::/129", "a b", "user@host", "cam*", "http://cam", "cam:port"]
        {
            let error = CameraHosts::parse([entry.to_owned()]).unwrap_err();
            assert!(error.to_string().contains(&format!("`{entry}`")), "{error}");
        }
        assert!(CameraHosts::parse(["[::1]:80".to_owned(), "::1".to_owned(), "cam:80".to_owned()]).is_ok());
        assert_eq!(hosts(&["10.0.0.0/8"]).networks[0].to_string(), "10.0.0.0/8");
    }

    #[tokio::test]
    async fn a_name_that_leads_to_this_node_is_not_resolved() {
        let url = |text: &str| Url::parse(text).unwrap();
        let resolve = |hosts: CameraHosts| async move { hosts.resolve(&url("http://localhost:81/")).await.map(drop) };
        let error = resolve(CameraHosts::any()).await.unwrap_err();
        assert!(error.to_string().contains("--camera-hosts"), "{error}");
        assert!(resolve(hosts(&["localhost:81"])).await.is_ok());
        for refused in ["http://2130706433/", "http://0x7f.1/", "http://[::1]:80/", "http://[::ffff:7f00:1]/"] {
            assert!(CameraHosts::any().resolve(&url(refused)).await.is_err(), "{refused}");
        }
        let allowed = CameraHosts::any().resolve(&url("http://10.0.0.7/")).await.unwrap();
        assert_eq!(allowed, ["10.0.0.7:80".parse().unwrap()]);
    }

    #[test]
    fn files_are_read_below_allowed_folders_only() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.png"), b"123").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link.png")).unwrap();
        let policy =
            SourcePolicy { files: FileRoots::new([folder.path().to_owned()], []), cameras: CameraHosts::default() };
        assert_eq!(policy.read(&folder.path().join("a.png"), 3).unwrap(), b"123");
        assert!(policy.read(&folder.path().join("a.png"), 2).unwrap_err().to_string().contains("more than 2 bytes"));
        for path in [folder.path().join("link.png"), PathBuf::from("/etc/passwd"), folder.path().join("../x")] {
            let error = policy.read(&path, 100).unwrap_err().to_string();
            assert!(error.contains("--file-roots"), "{error}");
        }
    }
}
