//! Leader election among several controllers, with a `Lease` object.
//!
//! A lease names its holder and how long the holder may go without a renewal. The clocks of different machines are
//! never compared: a lease has expired when *this* process has seen it unchanged for its whole duration by its own
//! clock, as in client-go's `leaderelection`. A leader that could not renew for a shorter time stops leading by itself,
//! before another controller may take the lease.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease as LeaseObject, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};

use crate::client::ClusterClient;
use crate::connection::CALL_TIMEOUT;
use crate::error::{ClusterError, ClusterErrorKind};

/// How long a holder may go without a renewal.
const LEASE_DURATION: Duration = Duration::from_secs(15);
/// A leader that could not renew for this long starts no more writes. A write in progress is cut off by
/// [`CALL_TIMEOUT`], before the lease expires.
const RENEW_DEADLINE: Duration = Duration::from_secs(5);

/// The outcome of an attempt to acquire or renew the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leadership {
    /// This process holds the lease.
    Leader,
    /// Another process holds the lease, or took it first.
    Follower,
}

/// This process's view of the lease.
pub struct Lease {
    name: String,
    identity: String,
    /// The lease of another holder as last seen, and since when it has been unchanged.
    observed: Option<(LeaseSpec, Instant)>,
    /// When the last successful renewal was sent.
    renewed: Option<Instant>,
}

impl Lease {
    /// The lease `name`, for the process `identity`, which must be unique among the controllers.
    pub fn new(name: &str, identity: &str) -> Self {
        Self { name: name.to_owned(), identity: identity.to_owned(), observed: None, renewed: None }
    }

    /// Whether this process leads: its last renewal is recent enough.
    pub fn is_leader(&self) -> bool {
        self.renewed.is_some_and(|renewed| renewed.elapsed() < RENEW_DEADLINE)
    }

    /// When this process stops leading unless it renews; now when it does not lead.
    pub fn leads_until(&self) -> Instant {
        self.renewed.map_or_else(Instant::now, |renewed| renewed + RENEW_DEADLINE)
    }

    /// Acquires or renews the lease, if it is this process's, has no holder, or has expired. Call it every two seconds.
    ///
    /// # Errors
    /// When the API server does not answer or refuses. [`Lease::is_leader`] stays true until the renewal deadline.
    pub async fn renew(&mut self, client: &ClusterClient) -> Result<Leadership, ClusterError> {
        let api: Api<LeaseObject> = Api::namespaced(client.client().await?, client.namespace());
        let sent = Instant::now();
        let Some(mut object) = client.call(CALL_TIMEOUT, api.get_opt(&self.name)).await? else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let object = LeaseObject { metadata, spec: Some(self.claim(None)) };
            let created = client.call(CALL_TIMEOUT, api.create(&PostParams::default(), &object)).await;
            return self.record(created, sent);
        };
        let spec = object.spec.take().unwrap_or_default();
        if !self.may_claim(&spec, Instant::now()) {
            return Ok(Leadership::Follower);
        }
        object.spec = Some(self.claim(Some(&spec)));
        // The object carries the resource version that was read, so that one of two simultaneous claims is a conflict.
        let replaced = client.call(CALL_TIMEOUT, api.replace(&self.name, &PostParams::default(), &object)).await;
        self.record(replaced, sent)
    }

    /// Gives up the lease, so that another process can take it at once.
    ///
    /// # Errors
    /// When the API server does not answer or refuses; the lease then expires.
    pub async fn release(&mut self, client: &ClusterClient) -> Result<(), ClusterError> {
        if !self.is_leader() {
            return Ok(());
        }
        self.renewed = None;
        let api: Api<LeaseObject> = Api::namespaced(client.client().await?, client.namespace());
        let Some(mut object) = client.call(CALL_TIMEOUT, api.get_opt(&self.name)).await? else { return Ok(()) };
        if let Some(spec) = object.spec.as_mut().filter(|spec| self.is_held_by_us(spec)) {
            spec.holder_identity = None;
            client.call(CALL_TIMEOUT, api.replace(&self.name, &PostParams::default(), &object)).await?;
        }
        Ok(())
    }

    fn is_held_by_us(&self, spec: &LeaseSpec) -> bool {
        spec.holder_identity.as_deref() == Some(&self.identity)
    }

    /// Whether the lease can be claimed. A lease of another holder ends this process's leadership.
    fn may_claim(&mut self, spec: &LeaseSpec, now: Instant) -> bool {
        if self.is_held_by_us(spec) {
            return true;
        }
        self.renewed = None;
        self.has_expired(spec, now)
    }

    fn has_expired(&mut self, spec: &LeaseSpec, now: Instant) -> bool {
        if spec.holder_identity.as_deref().unwrap_or_default().is_empty() {
            return true;
        }
        let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let duration = seconds.map_or(LEASE_DURATION, Duration::from_secs);
        match &self.observed {
            Some((observed, since)) if observed == spec => now.saturating_duration_since(*since) >= duration,
            _ => {
                self.observed = Some((spec.clone(), now));
                false
            }
        }
    }

    /// The lease with this process as its holder.
    fn claim(&self, current: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let held = current.filter(|spec| self.is_held_by_us(spec));
        let transitions = current.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        let is_transition = current.is_some() && held.is_none();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(LEASE_DURATION.as_secs()).ok(),
            acquire_time: held.map_or_else(|| Some(now.clone()), |spec| spec.acquire_time.clone()),
            renew_time: Some(now),
            lease_transitions: Some(if is_transition { transitions.saturating_add(1) } else { transitions }),
            ..LeaseSpec::default()
        }
    }

    /// Records the outcome of a claim. The renewal deadline counts from when the claim was sent.
    fn record<T>(&mut self, outcome: Result<T, ClusterError>, sent: Instant) -> Result<Leadership, ClusterError> {
        match outcome {
            Ok(_) => {
                self.renewed = Some(sent);
                Ok(Leadership::Leader)
            }
            Err(error) if error.kind() == ClusterErrorKind::Conflict => {
                self.renewed = None;
                Ok(Leadership::Follower)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_of_another_holder_expires_by_our_clock_only() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut lease = Lease::new("l", "us");
        let other = Lease::new("l", "other").claim(None);
        assert!(!lease.may_claim(&other, after(0)), "seen for the first time, whatever its times say");
        assert!(!lease.may_claim(&other, after(14)) && lease.may_claim(&other, after(15)));
        let renewed = LeaseSpec { renew_time: Some(MicroTime(Timestamp::UNIX_EPOCH)), ..other.clone() };
        assert!(!lease.may_claim(&renewed, after(16)) && !lease.may_claim(&renewed, after(30)));
        assert!(lease.may_claim(&renewed, after(31)));
        let released = LeaseSpec { holder_identity: None, ..other };
        assert!(lease.may_claim(&released, after(32)));
    }

    #[test]
    fn leadership_ends_before_the_lease_and_with_another_holder() {
        let mut lease = Lease::new("l", "us");
        assert!(!lease.is_leader());
        assert_eq!(lease.record(Ok(()), Instant::now()).unwrap(), Leadership::Leader);
        assert!(lease.is_leader());
        let ours = lease.claim(None);
        assert!(lease.may_claim(&ours, Instant::now()) && lease.is_leader());
        let other = Lease::new("l", "other").claim(None);
        assert!(!lease.may_claim(&other, Instant::now()) && !lease.is_leader());
        let late = Instant::now().checked_sub(RENEW_DEADLINE).unwrap();
        lease.record(Ok(()), late).unwrap();
        assert!(!lease.is_leader(), "the deadline counts from when the claim was sent");
        let conflict = ClusterError::new(ClusterErrorKind::Conflict, "conflict");
        assert_eq!(lease.record::<()>(Err(conflict), Instant::now()).unwrap(), Leadership::Follower);
    }

    #[test]
    fn a_renewal_keeps_the_acquire_time_and_a_takeover_counts_a_transition() {
        let lease = Lease::new("l", "us");
        let first = lease.claim(None);
        assert_eq!(first.lease_transitions, Some(0));
        let renewal = lease.claim(Some(&first));
        assert_eq!((&renewal.acquire_time, renewal.lease_transitions), (&first.acquire_time, Some(0)));
        let takeover = Lease::new("l", "other").claim(Some(&first));
        assert_eq!((takeover.holder_identity.as_deref(), takeover.lease_transitions), (Some("other"), Some(1)));
    }
}
