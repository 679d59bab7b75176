//! The open connections of an HTTP server, with their bounds: which connection is closed when there are too many. Time is an
//! argument.
//!
//! A new connection is always preferred to one that waits: a client that opens many connections and completes no request loses
//! its own oldest ones, and a probe, which sends its request at once, is answered. Connections with an incomplete request are closed
//! first, then those without one that are older than [`GRACE`]: a request that has arrived may not have been read yet. While all are
//! younger, no connection is accepted. A connection whose request is being answered keeps its place while the response makes progress.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

/// Time without progress after which a response no longer protects its connection: the client does not read it.
const STALLED_AFTER: Duration = Duration::from_secs(5);

/// Age up to which a connection that has sent nothing is not closed.
const GRACE: Duration = Duration::from_millis(200);

/// The bounds of the connections of one server.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionLimits {
    /// Open connections of all clients together.
    pub(super) total: usize,
    /// Open connections of one client address.
    pub(super) per_address: usize,
}

/// What a connection does, shared by its task and the table.
#[derive(Debug)]
pub(super) struct Connection {
    address: IpAddr,
    created: Instant,
    /// Time of the last activity, in microseconds after `created`.
    active_at: AtomicU64,
    requests: AtomicU32,
    /// Whether bytes have arrived since the last request.
    has_partial_request: AtomicBool,
    /// Cancelled when another connection takes the place of this one.
    pub(super) evicted: CancellationToken,
}

impl Connection {
    fn new(address: IpAddr, now: Instant) -> Self {
        Self {
            address,
            created: now,
            active_at: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            has_partial_request: AtomicBool::new(false),
            evicted: CancellationToken::new(),
        }
    }

    /// Records activity of the server on the connection: a request that is complete, or a response that makes progress. Bytes of
    /// an incomplete request are none, because a client can send them forever.
    pub(super) fn record_activity(&self, now: Instant) {
        let micros = u64::try_from(now.saturating_duration_since(self.created).as_micros()).unwrap_or(u64::MAX);
        self.active_at.store(micros, Ordering::Relaxed);
    }

    /// Records that bytes of a request have arrived.
    pub(super) fn record_partial_request(&self) {
        self.has_partial_request.store(true, Ordering::Relaxed);
    }

    /// Records that a request is complete and is being answered.
    pub(super) fn begin_request(&self, now: Instant) {
        self.has_partial_request.store(false, Ordering::Relaxed);
        self.record_activity(now);
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that a response is complete.
    pub(super) fn end_request(&self, now: Instant) {
        self.has_partial_request.store(false, Ordering::Relaxed);
        self.record_activity(now);
        self.requests.fetch_sub(1, Ordering::Relaxed);
    }

    fn is_answering(&self) -> bool {
        self.requests.load(Ordering::Relaxed) > 0
    }

    fn active_at(&self) -> Instant {
        self.created + Duration::from_micros(self.active_at.load(Ordering::Relaxed))
    }

    fn has_partial_request(&self) -> bool {
        self.has_partial_request.load(Ordering::Relaxed)
    }

    /// Whether the response has stalled, or no request is being answered and none can be complete.
    pub(super) fn can_be_evicted(&self, now: Instant) -> bool {
        let idle = now.saturating_duration_since(self.active_at());
        if self.is_answering() { idle >= STALLED_AFTER } else { self.has_partial_request() || idle >= GRACE }
    }
}

/// What follows from a new connection.
#[derive(Debug)]
pub(super) enum Admission {
    /// The connection is served.
    Admitted {
        /// Its number, for [`ConnectionTable::remove`].
        id: u64,
        /// What its task shares with the table.
        connection: Arc<Connection>,
        /// Whether another connection was closed to make room.
        has_evicted: bool,
    },
    /// No connection can be closed yet; it is tried again.
    Wait,
    /// The connection is closed: all connections of the address, or of all addresses, are being answered.
    Refused,
}

/// The open connections.
pub(super) struct ConnectionTable {
    limits: ConnectionLimits,
    next_id: u64,
    connections: HashMap<u64, Arc<Connection>>,
    by_address: HashMap<IpAddr, usize>,
}

impl ConnectionTable {
    pub(super) fn new(limits: ConnectionLimits) -> Self {
        Self { limits, next_id: 0, connections: HashMap::new(), by_address: HashMap::new() }
    }

    /// Adds a connection. At a bound, the idlest connection of the address, or of all addresses, is removed and cancelled.
    pub(super) fn admit(&mut self, address: IpAddr, now: Instant) -> Admission {
        let of_address = self.by_address.get(&address).copied().unwrap_or(0);
        let has_evicted = if of_address >= self.limits.per_address {
            self.evict_idlest(Some(address), now)
        } else if self.connections.len() >= self.limits.total {
            self.evict_idlest(None, now)
        } else {
            false
        };
        let is_full = of_address >= self.limits.per_address || self.connections.len() >= self.limits.total;
        if is_full && !has_evicted {
            let mut others = self
                .connections
                .values()
                .filter(|other| of_address < self.limits.per_address || other.address == address);
            return if others.all(|other| other.is_answering()) { Admission::Refused } else { Admission::Wait };
        }
        let (id, connection) = (self.next_id, Arc::new(Connection::new(address, now)));
        self.next_id += 1;
        self.connections.insert(id, connection.clone());
        *self.by_address.entry(address).or_default() += 1;
        Admission::Admitted { id, connection, has_evicted }
    }

    /// Removes and cancels the connection that has been idle for the longest time, of one address or of all; first among those with
    /// an incomplete request. `false` when every connection is being answered.
    pub(super) fn evict_idlest(&mut self, address: Option<IpAddr>, now: Instant) -> bool {
        let candidates = self.connections.iter().filter(|(_, connection)| {
            address.is_none_or(|address| connection.address == address) && connection.can_be_evicted(now)
        });
        let rank = |id: u64, connection: &Connection| (!connection.has_partial_request(), connection.active_at(), id);
        let idlest = candidates.min_by_key(|(id, connection)| rank(**id, connection)).map(|(id, _)| *id);
        let Some(id) = idlest else { return false };
        if let Some(connection) = self.connections.get(&id) {
            connection.evicted.cancel();
        }
        self.remove(id);
        true
    }

    /// Removes a connection that has ended. One that was evicted is not in the table any more.
    pub(super) fn remove(&mut self, id: u64) {
        let Some(connection) = self.connections.remove(&id) else { return };
        if let Some(count) = self.by_address.get_mut(&connection.address) {
            *count -= 1;
            if *count == 0 {
                self.by_address.remove(&connection.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ConnectionLimits = ConnectionLimits { total: 4, per_address: 2 };

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    fn admit(table: &mut ConnectionTable, last: u8, now: Instant) -> (u64, Arc<Connection>, bool) {
        match table.admit(address(last), now) {
            Admission::Admitted { id, connection, has_evicted } => (id, connection, has_evicted),
            Admission::Refused | Admission::Wait => panic!("not admitted"),
        }
    }

    #[test]
    fn an_address_at_its_bound_loses_its_own_idlest_connection() {
        let (mut table, start) = (ConnectionTable::new(LIMITS), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let (_, other, _) = admit(&mut table, 9, at(0));
        let (_, first, _) = admit(&mut table, 1, at(1));
        let (_, second, _) = admit(&mut table, 1, at(2));
        first.record_activity(at(3));
        assert!(matches!(table.admit(address(1), at(199)), Admission::Wait), "its request may not have been read yet");
        let (_, third, has_evicted) = admit(&mut table, 1, at(202));
        assert!(has_evicted && second.evicted.is_cancelled());
        assert!([&other, &first, &third].iter().all(|connection| !connection.evicted.is_cancelled()));
        assert_eq!((table.connections.len(), table.by_address[&address(1)]), (3, 2));
    }

    #[test]
    fn an_incomplete_request_is_closed_before_a_connection_that_has_sent_nothing_yet() {
        let (mut table, start) = (ConnectionTable::new(LIMITS), Instant::now());
        let (_, probe, _) = admit(&mut table, 1, start);
        let (_, slow, _) = admit(&mut table, 1, start + Duration::from_millis(1));
        slow.record_partial_request();
        let (_, newest, _) = admit(&mut table, 1, start + Duration::from_millis(2));
        assert!(slow.evicted.is_cancelled() && !probe.evicted.is_cancelled());
        probe.record_partial_request();
        probe.begin_request(start + Duration::from_millis(3));
        probe.end_request(start + Duration::from_millis(4));
        assert!(admit(&mut table, 1, start + Duration::from_millis(203)).2);
        assert!(newest.evicted.is_cancelled() && !probe.evicted.is_cancelled(), "it was answered");
    }

    #[test]
    fn at_the_total_bound_the_idlest_connection_of_all_is_closed() {
        let (mut table, start) = (ConnectionTable::new(LIMITS), Instant::now());
        let open: Vec<_> =
            (1..=4_u8).map(|last| admit(&mut table, last, start + Duration::from_millis(last.into())).1).collect();
        assert!(admit(&mut table, 5, start + GRACE * 2).2);
        let closed: Vec<bool> = open.iter().map(|connection| connection.evicted.is_cancelled()).collect();
        assert_eq!(closed, [true, false, false, false]);
        assert_eq!((table.connections.len(), table.by_address.len()), (4, 4));
    }

    #[test]
    fn a_connection_that_is_being_answered_keeps_its_place_until_the_response_stalls() {
        let (mut table, start) = (ConnectionTable::new(LIMITS), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let (_, first, _) = admit(&mut table, 1, start);
        let (_, second, _) = admit(&mut table, 1, start);
        first.begin_request(start);
        second.begin_request(start);
        assert!(matches!(table.admit(address(1), at(4)), Admission::Refused));
        first.record_activity(at(4));
        assert!(admit(&mut table, 1, at(6)).2, "the second response has made no progress for 5 s");
        assert!(second.evicted.is_cancelled() && !first.evicted.is_cancelled());
        first.end_request(at(6));
        assert!(!first.is_answering());
    }

    #[test]
    fn a_removed_connection_makes_room() {
        let (mut table, now) = (ConnectionTable::new(LIMITS), Instant::now());
        let (id, first, _) = admit(&mut table, 1, now);
        admit(&mut table, 1, now);
        table.remove(id);
        table.remove(id);
        assert!(!admit(&mut table, 1, now).2 && !first.evicted.is_cancelled());
    }

    #[test]
    fn no_sequence_of_clients_exceeds_a_bound() {
        let (mut table, start) = (ConnectionTable::new(LIMITS), Instant::now());
        let mut open = Vec::new();
        for step in 0..2_000_u64 {
            let now = start + Duration::from_millis(step * 100);
            match table.admit(address((step * 7 % 5) as u8), now) {
                Admission::Admitted { id, connection, .. } => {
                    if step % 3 == 0 {
                        connection.begin_request(now);
                    }
                    open.push((id, connection));
                }
                Admission::Refused | Admission::Wait => {}
            }
            if step % 4 == 0 && !open.is_empty() {
                let (id, _) = open.remove((step as usize * 31) % open.len());
                table.remove(id);
            }
            assert!(table.connections.len() <= 4 && table.by_address.values().all(|count| (1..=2).contains(count)));
            assert_eq!(table.by_address.values().sum::<usize>(), table.connections.len());
        }
    }
}
