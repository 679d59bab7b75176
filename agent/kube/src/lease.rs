//! The lease by which one of several controllers leads.
//!
//! A Lease object names its holder, and how long the holder may be silent. Clocks of different machines are never compared:
//! a lease has run out when *we* have seen it unchanged for its whole duration by our own clock, which is how client-go's
//! `leaderelection` does it too. A holder that could not renew for less than that stops leading by itself, before anyone
//! else may begin.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease as Object, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};

use super::{ClusterClient, ClusterError, ClusterErrorKind, DEADLINE};

/// How long a holder may be silent.
const DURATION: Duration = Duration::from_secs(15);
/// A holder that could not renew for this long begins no more writes. The one under way is cut off before the lease runs out.
const RENEW_WITHIN: Duration = Duration::from_secs(5);

/// Whether we lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leadership {
    /// We do.
    Leads,
    /// Somebody else does, or nobody yet.
    Waits,
}

/// Our part in a lease.
pub struct Lease {
    name: String,
    identity: String,
    /// The lease as seen last, and since when it has stood so.
    seen: Option<(LeaseSpec, Instant)>,
    renewed: Option<Instant>,
}

impl Lease {
    /// The lease of this name, for a controller with this identity.
    pub fn new(name: &str, identity: &str) -> Self {
        Self { name: name.to_owned(), identity: identity.to_owned(), seen: None, renewed: None }
    }

    /// Whether what was renewed last still holds.
    pub fn leads(&self) -> bool {
        self.renewed.is_some_and(|renewed| renewed.elapsed() < RENEW_WITHIN)
    }

    /// When what was renewed last holds no more.
    pub fn ends(&self) -> tokio::time::Instant {
        self.renewed.map_or_else(Instant::now, |renewed| renewed + RENEW_WITHIN).into()
    }

    /// Takes, renews, or waits. To be called every two seconds or so.
    ///
    /// # Errors
    /// When the cluster cannot be asked; whether we still lead is then told by [`Lease::leads`].
    pub async fn attend(&mut self, cluster: &ClusterClient) -> Result<Leadership, ClusterError> {
        let api: Api<Object> = Api::namespaced(cluster.client().await?, cluster.namespace());
        let asked = Instant::now();
        let found = cluster.ask(DEADLINE, api.get_opt(&self.name)).await?;
        let Some(mut object) = found else {
            let spec = self.claim(None);
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let object = Object { metadata, spec: Some(spec) };
            let made = cluster.ask(DEADLINE, api.create(&PostParams::default(), &object)).await;
            return self.outcome(made, asked);
        };
        let spec = object.spec.take().unwrap_or_default();
        let is_ours = spec.holder_identity.as_deref() == Some(&self.identity);
        if !is_ours {
            self.renewed = None;
        }
        if !is_ours && !self.has_run_out(&spec) {
            return Ok(Leadership::Waits);
        }
        object.spec = Some(self.claim(Some(&spec)));
        // The object bears the version we read, so that of two that claim at once one is told of the conflict.
        let written = cluster.ask(DEADLINE, api.replace(&self.name, &PostParams::default(), &object)).await;
        self.outcome(written, asked)
    }

    /// Lets go, so that another can begin at once.
    ///
    /// # Errors
    /// When the cluster cannot be asked; the lease then runs out by itself.
    pub async fn release(&mut self, cluster: &ClusterClient) -> Result<(), ClusterError> {
        if !self.leads() {
            return Ok(());
        }
        self.renewed = None;
        let api: Api<Object> = Api::namespaced(cluster.client().await?, cluster.namespace());
        let Some(mut object) = cluster.ask(DEADLINE, api.get_opt(&self.name)).await? else { return Ok(()) };
        if let Some(spec) = object.spec.as_mut().filter(|spec| spec.holder_identity.as_deref() == Some(&self.identity))
        {
            spec.holder_identity = None;
            cluster.ask(DEADLINE, api.replace(&self.name, &PostParams::default(), &object)).await?;
        }
        Ok(())
    }

    fn has_run_out(&mut self, spec: &LeaseSpec) -> bool {
        if spec.holder_identity.as_deref().unwrap_or_default().is_empty() {
            return true;
        }
        let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let lasts = seconds.map_or(DURATION, Duration::from_secs);
        match &self.seen {
            Some((seen, since)) if seen == spec => since.elapsed() >= lasts,
            _ => {
                self.seen = Some((spec.clone(), Instant::now()));
                false
            }
        }
    }

    fn claim(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let is_ours = before.is_some_and(|spec| spec.holder_identity.as_deref() == Some(&self.identity));
        let transitions = before.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: match before {
                Some(spec) if is_ours => spec.acquire_time.clone(),
                _ => Some(now.clone()),
            },
            renew_time: Some(now),
            lease_transitions: Some(if is_ours || before.is_none() {
                transitions
            } else {
                transitions.saturating_add(1)
            }),
            ..LeaseSpec::default()
        }
    }

    /// The term counts from when the claim was sent.
    fn outcome<T>(&mut self, written: Result<T, ClusterError>, asked: Instant) -> Result<Leadership, ClusterError> {
        match written {
            Ok(_) => {
                self.renewed = Some(asked);
                Ok(Leadership::Leads)
            }
            Err(trouble) if trouble.kind == ClusterErrorKind::Conflict => {
                self.renewed = None;
                Ok(Leadership::Waits)
            }
            Err(trouble) => Err(trouble),
        }
    }
}
