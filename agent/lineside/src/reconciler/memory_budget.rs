//! The memory of this node that the workers of all versions share.
//!
//! A version reserves what it is expected to use before its worker starts, and gives it back when the worker is gone. A version
//! that does not fit is refused with the figures, so that one model too many never makes the system kill what serves.

use std::sync::Arc;

use lineside_common::node_memory;
use parking_lot::Mutex;

/// Memory that is left to the agent itself, the broker connection, the spool and the page cache, in bytes.
const RESERVE_BYTES: u64 = 160 << 20;
/// A worker process without its model, in bytes.
const PROCESS_BYTES: u64 = 16 << 20;

/// The budget.
pub struct MemoryBudget {
    total_bytes: Option<u64>,
    reserved_bytes: Mutex<u64>,
}

/// A version does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "it needs about {} MiB of memory, but {} of the {} MiB for models on this node are in use; unload another model, raise the \
     memory limit, or set spec.runtime.stopFirst: true where the version before it is in the way",
    needed_bytes >> 20, reserved_bytes >> 20, total_bytes >> 20
)]
pub struct MemoryExceeded {
    needed_bytes: u64,
    reserved_bytes: u64,
    total_bytes: u64,
}

/// Memory that is reserved until this is dropped.
pub struct Reservation {
    budget: Arc<MemoryBudget>,
    bytes: u64,
}

impl MemoryBudget {
    /// The budget of this node, or of the control group in which the agent runs.
    pub fn of_node() -> Arc<Self> {
        Self::new(node_memory::limit_bytes().map(|limit| limit.saturating_sub(RESERVE_BYTES)))
    }

    /// A budget of so many bytes; `None` has no limit.
    pub fn new(total_bytes: Option<u64>) -> Arc<Self> {
        Arc::new(Self { total_bytes, reserved_bytes: Mutex::new(0) })
    }

    /// Bytes that are not reserved; `None` without a limit.
    pub fn free_bytes(&self) -> Option<u64> {
        self.total_bytes.map(|total| total.saturating_sub(*self.reserved_bytes.lock()))
    }

    /// Reserves memory for a version of which admission measured `peak_bytes`, with so many instances.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn reserve(self: &Arc<Self>, peak_bytes: u64, instances: u32) -> Result<Reservation, MemoryExceeded> {
        let bytes = PROCESS_BYTES.saturating_add(peak_bytes.saturating_mul(u64::from(instances.max(1))));
        let mut reserved = self.reserved_bytes.lock();
        let sum = reserved.saturating_add(bytes);
        if let Some(total_bytes) = self.total_bytes.filter(|total| sum > *total) {
            return Err(MemoryExceeded { needed_bytes: bytes, reserved_bytes: *reserved, total_bytes });
        }
        *reserved = sum;
        Ok(Reservation { budget: self.clone(), bytes })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut reserved = self.budget.reserved_bytes.lock();
        *reserved = reserved.saturating_sub(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn versions_that_do_not_fit_are_refused_with_the_figures() {
        let budget = MemoryBudget::new(Some(300 * MIB));
        let first = budget.reserve(50 * MIB, 2).unwrap();
        assert_eq!(budget.free_bytes(), Some(184 * MIB));
        let reason = budget.reserve(200 * MIB, 1).err().unwrap().to_string();
        assert!(reason.contains("about 216 MiB") && reason.contains("116 of the 300 MiB"), "{reason}");
        drop(first);
        assert!(budget.reserve(200 * MIB, 1).is_ok());
        assert_eq!(budget.free_bytes(), Some(300 * MIB), "everything was given back");
    }

    #[test]
    fn no_figure_overflows() {
        let budget = MemoryBudget::new(None);
        let all = budget.reserve(u64::MAX, u32::MAX).unwrap();
        assert!(budget.reserve(u64::MAX, 1).is_ok());
        drop(all);
        assert!(MemoryBudget::new(Some(0)).reserve(0, 0).is_err());
    }
}
