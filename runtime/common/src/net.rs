//! The address policy: what an address leads to, and which hosts are allowed.
//!
//! The author of a manifest chooses addresses and must not be able to make the agent connect to what only the node can
//! reach. [`classify`] separates the addresses of this node, and those that are never a source of models or frames (cloud
//! metadata services, link-local, multicast), from all others. Several IPv6 address formats contain an IPv4 address, and a
//! gateway or the kernel may connect to that one; therefore the embedded address is classified too.
//!
//! | format | IPv4 address in |
//! | --- | --- |
//! | IPv4-mapped `::ffff:0:0/96`, IPv4-compatible `::/96`, IPv4-translated `::ffff:0:0:0/96` | the last 4 bytes |
//! | NAT64 `64:ff9b::/96` (RFC 6052) | the last 4 bytes |
//! | NAT64 for local use `64:ff9b:1::/48` (RFC 8215) | every place that RFC 6052 defines for a prefix of 48 bits or more |
//! | 6to4 `2002::/16` (RFC 3056) | bytes 2 to 5 |
//! | Teredo `2001::/32` (RFC 4380) | bytes 4 to 7 (server), and the last 4 bytes inverted (client) |
//! | ISATAP, interface id `::5efe:0:0` (RFC 5214) | the last 4 bytes |
//!
//! Not detected: a NAT64 prefix that a site chose itself.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// IPv4 addresses of cloud metadata services that are not link-local: Alibaba Cloud, Azure, Oracle Cloud.
const METADATA_V4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(192, 0, 0, 192)];
/// IPv6 addresses of cloud metadata services that are not link-local: AWS, Google Cloud.
const METADATA_V6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x0254), Ipv6Addr::new(0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x0254)];

/// What an address leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressClass {
    /// Another machine.
    Remote,
    /// This node: a loopback address or an address of one of its interfaces.
    ThisNode,
    /// An address that is never a source of models or frames.
    Forbidden(ForbiddenAddress),
}

/// Why an address is never allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForbiddenAddress {
    /// `0.0.0.0/8` or `::`.
    Unspecified,
    /// `169.254.0.0/16` or `fe80::/10`.
    LinkLocal,
    /// `224.0.0.0/4` or `ff00::/8`.
    Multicast,
    /// `255.255.255.255`.
    Broadcast,
    /// The metadata service of a cloud provider, which issues credentials of the node.
    Metadata,
}

impl ForbiddenAddress {
    /// The kind of address, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::LinkLocal => "link-local",
            Self::Multicast => "multicast",
            Self::Broadcast => "broadcast",
            Self::Metadata => "cloud metadata",
        }
    }
}

impl std::fmt::Display for ForbiddenAddress {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Classifies an address and the IPv4 addresses that it contains. `is_own` states whether an address belongs to an
/// interface of this node; see [`is_own_address`].
pub fn classify(address: IpAddr, is_own: impl Fn(IpAddr) -> bool) -> AddressClass {
    let mut is_this_node = false;
    for address in std::iter::once(address).chain(embedded(address).into_iter().map(IpAddr::V4)) {
        if let Some(reason) = forbidden(address) {
            return AddressClass::Forbidden(reason);
        }
        is_this_node |= address.is_loopback() || is_own(address);
    }
    if is_this_node { AddressClass::ThisNode } else { AddressClass::Remote }
}

/// Whether an address belongs to an interface of this node, in the network namespace of this process.
///
/// The kernel answers: it selects the source address of a connection to this address. The source equals the destination
/// only when the destination is local. Connecting a UDP socket sends no packet.
pub fn is_own_address(address: IpAddr) -> bool {
    // The discard port. The port has no effect on the selection, but must not be 0.
    const PORT: u16 = 9;
    let unspecified: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = || {
        let socket = UdpSocket::bind((unspecified, 0))?;
        socket.connect((address, PORT))?;
        socket.local_addr()
    };
    // Without a route to it, the address does not belong to this node.
    source().is_ok_and(|source| source.ip() == address)
}

fn forbidden(address: IpAddr) -> Option<ForbiddenAddress> {
    let (is_unspecified, is_link_local, is_broadcast, is_metadata) = match address {
        IpAddr::V4(v4) => (v4.octets()[0] == 0, v4.is_link_local(), v4.is_broadcast(), METADATA_V4.contains(&v4)),
        IpAddr::V6(v6) => (v6.is_unspecified(), v6.is_unicast_link_local(), false, METADATA_V6.contains(&v6)),
    };
    match () {
        () if is_metadata => Some(ForbiddenAddress::Metadata),
        () if is_unspecified => Some(ForbiddenAddress::Unspecified),
        () if is_link_local => Some(ForbiddenAddress::LinkLocal),
        () if is_broadcast => Some(ForbiddenAddress::Broadcast),
        () if address.is_multicast() => Some(ForbiddenAddress::Multicast),
        () => None,
    }
}

/// The IPv4 addresses that an address contains.
fn embedded(address: IpAddr) -> Vec<Ipv4Addr> {
    let IpAddr::V6(v6) = address else { return Vec::new() };
    if v6.is_loopback() || v6.is_unspecified() {
        return Vec::new();
    }
    let bytes = v6.octets();
    let at = |places: [usize; 4]| Ipv4Addr::from(places.map(|place| bytes[place]));
    let last = at([12, 13, 14, 15]);
    match v6.segments() {
        // IPv4-mapped, IPv4-compatible, IPv4-translated, NAT64.
        [0, 0, 0, 0, 0, 0xffff | 0, _, _] | [0, 0, 0, 0, 0xffff, 0, _, _] | [0x64, 0xff9b, 0, 0, 0, 0, _, _] => {
            vec![last]
        }
        // RFC 6052 leaves byte 8 out. The places are those of prefixes of 48, 56, 64 and 96 bits. A place that is not used
        // is filled with zeros.
        [0x64, 0xff9b, 1, ..] => {
            let places = [at([6, 7, 9, 10]), at([7, 9, 10, 11]), at([9, 10, 11, 12]), last];
            let used: Vec<Ipv4Addr> = places.into_iter().filter(|v4| v4.octets()[0] != 0).collect();
            if used.is_empty() { vec![last] } else { used }
        }
        [0x2002, ..] => vec![at([2, 3, 4, 5])],
        [0x2001, 0, ..] => vec![at([4, 5, 6, 7]), Ipv4Addr::from(last.octets().map(|byte| !byte))],
        [_, _, _, _, 0 | 0x200, 0x5efe, _, _] => vec![last],
        _ => Vec::new(),
    }
}

/// The hosts that are allowed: all, or those that are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedHosts {
    /// Whether a host is allowed that is not listed. Default: false.
    pub is_any: bool,
    /// The listed hosts: `host` for all ports, or `host:port`.
    pub listed: BTreeSet<String>,
}

impl AllowedHosts {
    /// The entry of a list that stands for every host.
    pub const ANY: &str = "*";

    /// Every host.
    pub fn any() -> Self {
        Self { is_any: true, ..Self::default() }
    }

    /// Whether a host is allowed, listed or not. Without a port this matches a host of any port.
    pub fn allows(&self, host: &str, port: Option<u16>) -> bool {
        self.is_any || self.lists(host, port)
    }

    /// Whether a host is listed itself. Without a port this matches a host of any port.
    pub fn lists(&self, host: &str, port: Option<u16>) -> bool {
        self.listed.iter().any(|listed| {
            let (name, listed_port) = split_host_port(listed);
            is_same_host(name, host) && (port.is_none() || listed_port.is_none() || listed_port == port)
        })
    }
}

impl<T: Into<String>> FromIterator<T> for AllowedHosts {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut listed: BTreeSet<String> = items.into_iter().map(Into::into).collect();
        Self { is_any: listed.remove(Self::ANY), listed }
    }
}

/// Whether two host names are equal. Addresses are compared as addresses, because they have several spellings.
fn is_same_host(one: &str, other: &str) -> bool {
    match (one.parse::<IpAddr>(), other.parse::<IpAddr>()) {
        (Ok(one), Ok(other)) => one == other,
        _ => one.trim_end_matches('.').eq_ignore_ascii_case(other.trim_end_matches('.')),
    }
}

/// Splits `host:port`, `host`, `[v6]:port` or `v6`.
fn split_host_port(listed: &str) -> (&str, Option<u16>) {
    if let Some((host, port)) = listed.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (host, port.strip_prefix(':').and_then(|port| port.parse().ok()));
    }
    match listed.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') => (host, port.parse().ok()),
        _ => (listed, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(address: IpAddr) -> bool {
        ["192.0.2.2", "fd00::2", "2001:db8::7"].iter().any(|own| address == own.parse::<IpAddr>().unwrap())
    }

    fn class(text: &str) -> AddressClass {
        classify(text.parse().unwrap_or_else(|_| panic!("{text} is not an address")), own)
    }

    #[test]
    fn every_spelling_of_an_address_of_this_node_or_of_a_metadata_service_is_recognised() {
        use AddressClass::{Forbidden, Remote, ThisNode};
        use ForbiddenAddress::{Broadcast, LinkLocal, Metadata, Multicast, Unspecified};
        let cases: [(AddressClass, &[&str]); 7] = [
            (
                Remote,
                &[
                    "10.1.2.3",
                    "192.168.1.4",
                    "172.16.0.1",
                    "192.0.2.3",
                    "100.64.0.1",
                    "168.63.129.17",
                    "8.8.8.8",
                    "fd12::1",
                    "fd00::3",
                    "2001:db8::8",
                    "2a00:1450::1",
                    "::ffff:10.1.2.3",
                    "64:ff9b::10.1.2.3",
                    "64:ff9b:1::10.1.2.3",
                    "2002:a01:203::1",
                    "::10.1.2.3",
                ],
            ),
            (
                ThisNode,
                &[
                    "127.0.0.1",
                    "127.1.2.3",
                    "127.255.255.254",
                    "::1",
                    "192.0.2.2",
                    "fd00::2",
                    "2001:db8::7",
                    "::ffff:127.0.0.1",
                    "::ffff:192.0.2.2",
                    "::ffff:0:192.0.2.2",
                    "::127.0.0.1",
                    "::192.0.2.2",
                    "64:ff9b::127.0.0.1",
                    "64:ff9b::192.0.2.2",
                    "64:ff9b:1::192.0.2.2",
                    "64:ff9b:1:c000:2:200::",
                    "64:ff9b:1:c0:0:202::",
                    "64:ff9b:1:0:c0:2:200:0",
                    "2002:7f00:1::1",
                    "2002:c000:202::1",
                    "2001:0:c000:202::f5fe:fdfc",
                    "2001:0:a01:203::3fff:fdfd",
                    "2001:db8::5efe:192.0.2.2",
                    "fd12::200:5efe:127.0.0.1",
                ],
            ),
            (
                Forbidden(Metadata),
                &[
                    "100.100.100.200",
                    "168.63.129.16",
                    "192.0.0.192",
                    "fd00:ec2::254",
                    "fd20:ce::254",
                    "::ffff:100.100.100.200",
                    "64:ff9b::100.100.100.200",
                    "64:ff9b::168.63.129.16",
                    "2002:a83f:8110::1",
                    "::192.0.0.192",
                ],
            ),
            (
                Forbidden(LinkLocal),
                &[
                    "169.254.169.254",
                    "169.254.170.2",
                    "169.254.0.1",
                    "fe80::1",
                    "febf::1",
                    "::ffff:169.254.169.254",
                    "::169.254.169.254",
                    "64:ff9b::a9fe:a9fe",
                    "64:ff9b:1::169.254.169.254",
                    "64:ff9b:1:a9fe:a9:fe00::",
                    "2002:a9fe:a9fe::",
                    "2001:0:a01:203::5601:5601",
                ],
            ),
            (
                Forbidden(Unspecified),
                &["0.0.0.0", "0.0.0.1", "0.255.255.255", "::", "::2", "::ffff:0.0.0.0", "64:ff9b::", "2002::1"],
            ),
            (Forbidden(Multicast), &["224.0.0.1", "239.255.255.255", "ff02::1", "::ffff:224.0.0.1", "2002:e000:1::"]),
            (Forbidden(Broadcast), &["255.255.255.255", "::ffff:255.255.255.255", "64:ff9b::255.255.255.255"]),
        ];
        for (expected, addresses) in cases {
            for address in addresses {
                assert_eq!(class(address), expected, "{address}");
            }
        }
    }

    #[test]
    fn the_kernel_knows_the_addresses_of_this_node() {
        assert!(is_own_address("127.0.0.1".parse().unwrap()));
        assert!(!is_own_address("203.0.113.77".parse().unwrap()));
        assert!(!is_own_address("2001:db8:ffff::77".parse().unwrap()));
        // A machine with a route to other networks has an address of its own there.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        if socket.connect("203.0.113.77:9").is_ok() {
            let address = socket.local_addr().unwrap().ip();
            assert!(is_own_address(address), "{address}");
        }
    }

    #[test]
    fn a_listed_host_matches_in_every_spelling() {
        let hosts: AllowedHosts = ["models.plant", "127.0.0.1:8443", "[::1]:9", "fd00::5"].into_iter().collect();
        for (host, port) in [
            ("models.plant", Some(1)),
            ("MODELS.plant", Some(443)),
            ("models.plant.", None),
            ("127.0.0.1", Some(8443)),
            ("127.0.0.1", None),
            ("::1", Some(9)),
            ("fd00:0::5", Some(443)),
        ] {
            assert!(hosts.lists(host, port) && hosts.allows(host, port), "{host} {port:?}");
        }
        for (host, port) in
            [("other.plant", None), ("x.models.plant", None), ("127.0.0.1", Some(1)), ("::1", Some(10)), ("*", None)]
        {
            assert!(!hosts.allows(host, port), "{host} {port:?}");
        }
        let any: AllowedHosts = ["*", "localhost:1"].into_iter().collect();
        assert!(any.allows("anywhere", None) && !any.lists("anywhere", None) && any.lists("localhost", Some(1)));
        assert!(!AllowedHosts::default().allows("anywhere", None));
    }
}
