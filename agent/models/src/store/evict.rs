//! Which blobs go when there is no room. Pure: facts in, decision out.
//!
//! Nothing is evicted until the store would exceed its high mark; then the least recently used blobs go until it would be
//! at its low mark, so that not every download has to evict something. Above the low mark that is a wish; what has to fit
//! are the quota and the disk.

use std::collections::BTreeSet;
use std::time::SystemTime;

use super::VersionRecord;
use lineside_common::digest::Digest;

const HIGH_PERCENT: u64 = 85;
const LOW_PERCENT: u64 = 80;

/// A blob and who needs it.
#[derive(Debug, Clone, PartialEq)]
pub struct Blob {
    /// What it is called.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
    /// When a model was last loaded from it.
    pub last_used: SystemTime,
    /// The versions it belongs to.
    pub versions: Vec<VersionRecord>,
}

impl Blob {
    /// Whether a version of it is pinned.
    pub fn is_pinned(&self) -> bool {
        self.versions.iter().any(|version| version.pinned)
    }
}

/// Levels of the store, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    quota: u64,
    high: u64,
    low: u64,
}

impl Marks {
    pub(super) fn of(quota: u64) -> Self {
        Self { quota, high: quota / 100 * HIGH_PERCENT, low: quota / 100 * LOW_PERCENT }
    }
}

/// What goes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EvictionPlan {
    /// Least recently used first.
    pub evicted: Vec<Blob>,
}

/// Decides for `incoming` more bytes on a disk with `free` bytes, `used` of which the store takes already.
pub(super) fn plan(
    blobs: Vec<Blob>,
    used: u64,
    incoming: u64,
    free: u64,
    marks: Marks,
    protected: &BTreeSet<Digest>,
) -> Result<EvictionPlan, String> {
    let mut after = used.saturating_add(incoming);
    let mut missing_on_disk = incoming.saturating_sub(free);
    let (kept, mut idle): (Vec<Blob>, Vec<Blob>) =
        blobs.into_iter().partition(|blob| blob.is_pinned() || protected.contains(&blob.digest));
    idle.sort_by_key(|blob| (blob.last_used, blob.digest));
    let mut evicted = Vec::new();
    let aim = if after > marks.high { marks.low } else { u64::MAX };
    for blob in idle {
        if after <= aim && missing_on_disk == 0 {
            break;
        }
        after = after.saturating_sub(blob.bytes);
        missing_on_disk = missing_on_disk.saturating_sub(blob.bytes);
        evicted.push(blob);
    }
    let kept_bytes: u64 = kept.iter().map(|blob| blob.bytes).sum();
    if after > marks.quota {
        return Err(format!(
            "{} more do not fit into the store's quota of {}: {} are held by {} files that are active, last good, wanted or \
             pinned; raise --store-mib-max, or unpin a version",
            mib(incoming),
            mib(marks.quota),
            mib(kept_bytes),
            kept.len()
        ));
    }
    if missing_on_disk > 0 {
        return Err(format!(
            "{} more do not fit on the disk of the store: there is space for {}, and evicting all that may go would not \
             be enough; free some space",
            mib(incoming),
            mib(free)
        ));
    }
    Ok(EvictionPlan { evicted })
}

/// A size for people.
pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn blob(name: &str, mib: u64, used_at: u64, pinned: bool) -> Blob {
        let digest = Digest::of(name.as_bytes());
        let version = VersionRecord {
            name: name.into(),
            version: 1,
            digest,
            size: mib * MIB,
            source: String::new(),
            fetched: String::new(),
            pinned,
            signature: None,
        };
        Blob { digest, bytes: mib * MIB, last_used: UNIX_EPOCH + Duration::from_secs(used_at), versions: vec![version] }
    }

    fn names(plan: &EvictionPlan) -> Vec<&str> {
        plan.evicted.iter().map(|blob| blob.versions[0].name.as_str()).collect()
    }

    fn decide(blobs: &[Blob], incoming: u64, free: u64, protected: &[&str]) -> Result<EvictionPlan, String> {
        let used = blobs.iter().map(|blob| blob.bytes).sum();
        let protected = protected.iter().map(|name| Digest::of(name.as_bytes())).collect();
        plan(blobs.to_vec(), used, incoming * MIB, free * MIB, Marks::of(100 * MIB), &protected)
    }

    #[test]
    fn the_least_recently_used_go_first_down_to_the_low_mark() {
        let blobs = [blob("new", 30, 9, false), blob("old", 20, 1, false), blob("older", 10, 0, false)];
        assert_eq!(names(&decide(&blobs, 25, 999, &[]).unwrap()), [""; 0], "85 is the high mark");
        assert_eq!(names(&decide(&blobs, 26, 999, &[]).unwrap()), ["older"]);
        assert_eq!(names(&decide(&blobs, 40, 999, &[]).unwrap()), ["older", "old"]);
    }

    #[test]
    fn what_is_protected_or_pinned_stays_whatever_happens() {
        let blobs = [blob("pinned", 40, 0, true), blob("active", 40, 1, false), blob("idle", 10, 9, false)];
        assert_eq!(names(&decide(&blobs, 10, 999, &["active"]).unwrap()), ["idle"]);
        let full = decide(&blobs, 30, 999, &["active"]).unwrap_err();
        assert!(full.contains("80.0 MiB") && full.contains("--store-mib-max"), "{full}");
    }

    #[test]
    fn a_full_disk_evicts_too_and_is_named_when_that_is_not_enough() {
        let blobs = [blob("idle", 10, 0, false)];
        assert_eq!(names(&decide(&blobs, 5, 5, &[]).unwrap()), [""; 0]);
        assert_eq!(names(&decide(&blobs, 12, 5, &[]).unwrap()), ["idle"]);
        assert!(decide(&blobs, 20, 5, &[]).unwrap_err().contains("disk"));
    }
}
