//! Decides which blobs to evict. Pure: it takes the state of the store and returns a plan.
//!
//! Eviction starts when the store would exceed its high watermark, and removes the least recently used blobs down to
//! the low watermark, so that not every download has to evict. The watermarks are targets; the limits are the quota and
//! the disk.

use std::collections::BTreeSet;
use std::time::SystemTime;

use lineside_common::digest::Digest;

use super::records::VersionRecord;

const HIGH_WATERMARK_PERCENT: u64 = 85;
const LOW_WATERMARK_PERCENT: u64 = 80;

/// A blob and the model versions that use it.
#[derive(Debug, Clone, PartialEq)]
pub struct Blob {
    /// The digest of the content, and the name of the file.
    pub digest: Digest,
    /// Size in bytes.
    pub bytes: u64,
    /// When a model was last loaded from the blob.
    pub last_used: SystemTime,
    /// The versions that use the blob. Empty for a blob without a version record.
    pub versions: Vec<VersionRecord>,
}

impl Blob {
    /// Whether at least one version that uses the blob is pinned.
    pub fn is_pinned(&self) -> bool {
        self.versions.iter().any(|version| version.pinned)
    }
}

/// The space of the store, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capacity {
    /// Bytes the store may use.
    pub(super) quota: u64,
    /// Bytes the store uses now.
    pub(super) used: u64,
    /// Bytes the disk has free for the store.
    pub(super) disk_free: u64,
}

impl Capacity {
    fn high_watermark(self) -> u64 {
        self.quota / 100 * HIGH_WATERMARK_PERCENT
    }

    fn low_watermark(self) -> u64 {
        self.quota / 100 * LOW_WATERMARK_PERCENT
    }
}

/// The blobs to evict.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EvictionPlan {
    /// Least recently used first.
    pub evicted: Vec<Blob>,
}

/// Evicting every unprotected blob does not free enough space.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoSpaceError {
    /// The incoming file does not fit into the quota of the store.
    #[error(
        "{} more exceed the store quota of {}: {} are held by {retained_files} files that are active, last-good, desired or \
         pinned; raise --store-mib-max or unpin a version",
        format_mib(*.incoming), format_mib(*.quota), format_mib(*.retained_bytes)
    )]
    Quota {
        /// Bytes of the incoming file.
        incoming: u64,
        /// Bytes the store may use.
        quota: u64,
        /// Bytes of the blobs that must not be evicted.
        retained_bytes: u64,
        /// Number of blobs that must not be evicted.
        retained_files: usize,
    },
    /// The incoming file does not fit on the disk.
    #[error(
        "{} more do not fit on the disk of the store: {} are free, and evicting all unprotected files does not free enough \
         space; free space on the disk",
        format_mib(*.incoming), format_mib(*.disk_free)
    )]
    Disk {
        /// Bytes of the incoming file.
        incoming: u64,
        /// Bytes the disk has free for the store.
        disk_free: u64,
    },
}

/// Plans the eviction for `incoming` more bytes. `protected` blobs and pinned blobs stay.
pub(super) fn plan(
    blobs: Vec<Blob>,
    capacity: Capacity,
    incoming: u64,
    protected: &BTreeSet<Digest>,
) -> Result<EvictionPlan, NoSpaceError> {
    let mut used_after = capacity.used.saturating_add(incoming);
    let mut missing_on_disk = incoming.saturating_sub(capacity.disk_free);
    let (retained, mut evictable): (Vec<Blob>, Vec<Blob>) =
        blobs.into_iter().partition(|blob| blob.is_pinned() || protected.contains(&blob.digest));
    evictable.sort_by_key(|blob| (blob.last_used, blob.digest));
    let target = if used_after > capacity.high_watermark() { capacity.low_watermark() } else { u64::MAX };
    let mut evicted = Vec::new();
    for blob in evictable {
        if used_after <= target && missing_on_disk == 0 {
            break;
        }
        used_after = used_after.saturating_sub(blob.bytes);
        missing_on_disk = missing_on_disk.saturating_sub(blob.bytes);
        evicted.push(blob);
    }
    if used_after > capacity.quota {
        return Err(NoSpaceError::Quota {
            incoming,
            quota: capacity.quota,
            retained_bytes: retained.iter().map(|blob| blob.bytes).sum(),
            retained_files: retained.len(),
        });
    }
    if missing_on_disk > 0 {
        return Err(NoSpaceError::Disk { incoming, disk_free: capacity.disk_free });
    }
    Ok(EvictionPlan { evicted })
}

/// Formats a number of bytes in MiB with one decimal.
pub fn format_mib(bytes: u64) -> String {
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

    fn plan_mib(
        blobs: &[Blob],
        incoming: u64,
        disk_free: u64,
        protected: &[&str],
    ) -> Result<EvictionPlan, NoSpaceError> {
        let used = blobs.iter().map(|blob| blob.bytes).sum();
        let protected = protected.iter().map(|name| Digest::of(name.as_bytes())).collect();
        let capacity = Capacity { quota: 100 * MIB, used, disk_free: disk_free * MIB };
        plan(blobs.to_vec(), capacity, incoming * MIB, &protected)
    }

    #[test]
    fn least_recently_used_blobs_are_evicted_down_to_the_low_watermark() {
        let blobs = [blob("new", 30, 9, false), blob("old", 20, 1, false), blob("older", 10, 0, false)];
        assert_eq!(names(&plan_mib(&blobs, 25, 999, &[]).unwrap()), [""; 0], "the high watermark is 85 MiB");
        assert_eq!(names(&plan_mib(&blobs, 26, 999, &[]).unwrap()), ["older"]);
        assert_eq!(names(&plan_mib(&blobs, 40, 999, &[]).unwrap()), ["older", "old"]);
    }

    #[test]
    fn protected_and_pinned_blobs_are_never_evicted() {
        let blobs = [blob("pinned", 40, 0, true), blob("active", 40, 1, false), blob("idle", 10, 9, false)];
        assert_eq!(names(&plan_mib(&blobs, 10, 999, &["active"]).unwrap()), ["idle"]);
        let error = plan_mib(&blobs, 30, 999, &["active"]).unwrap_err();
        let expected =
            NoSpaceError::Quota { incoming: 30 * MIB, quota: 100 * MIB, retained_bytes: 80 * MIB, retained_files: 2 };
        assert_eq!(error, expected);
        let message = error.to_string();
        assert!(message.contains("80.0 MiB") && message.contains("--store-mib-max"), "{message}");
    }

    #[test]
    fn a_full_disk_evicts_below_the_watermarks_and_is_reported_when_eviction_does_not_suffice() {
        let blobs = [blob("idle", 10, 0, false)];
        assert_eq!(names(&plan_mib(&blobs, 5, 5, &[]).unwrap()), [""; 0]);
        assert_eq!(names(&plan_mib(&blobs, 12, 5, &[]).unwrap()), ["idle"]);
        let error = plan_mib(&blobs, 20, 5, &[]).unwrap_err();
        assert_eq!(error, NoSpaceError::Disk { incoming: 20 * MIB, disk_free: 5 * MIB });
    }
}
