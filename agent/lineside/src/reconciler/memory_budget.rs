//! The memory of this node that the workers of all versions share.
//!
//! A version reserves what admission measured before its worker starts, and gives it back when the worker is gone. A version that
//! does not fit is refused with the figures, so that one model too many never makes the system kill what serves.
//!
//! A worker may allocate more than it reserved, as long as nothing else has reserved it: pictures are larger than expected, and a
//! model may need more on some of them. When all workers together use more than the budget, the one that exceeds its own
//! reservation most is killed, before the system kills the agent (a container with `memory.oom.group` ends as a whole).

use std::sync::{Arc, Weak};
use std::time::Duration;

use lineside_common::node_memory;
use lineside_common::supervisor::{OnFailure, SupervisedTask, Supervisor};
use lineside_worker::ProcessHandle;
use parking_lot::Mutex;

/// Memory that is left to the agent itself, the broker connection, the spool and the page cache, in bytes.
const RESERVE_BYTES: u64 = 160 << 20;
/// A worker process without its model, in bytes.
const PROCESS_BYTES: u64 = 16 << 20;
/// What a process may allocate without using it, in bytes: stacks of threads, and heaps that were freed in part.
const UNUSED_BYTES: u64 = 64 << 20;
/// Time between two looks at the memory of all workers.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The budget.
pub struct MemoryBudget {
    total_bytes: Option<u64>,
    reservations: Mutex<Vec<Weak<Reserved>>>,
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
    reserved: Arc<Reserved>,
}

struct Reserved {
    bytes: u64,
    /// The process that uses it now.
    process: Mutex<Option<ProcessHandle>>,
}

impl Reservation {
    /// The memory that a worker may allocate, in bytes: what it wants, if neither another reservation nor the agent needs it.
    pub fn limit_bytes(&self, wanted: u64) -> u64 {
        let own = self.reserved.bytes;
        let free = self.budget.free_bytes().unwrap_or(u64::MAX);
        wanted.min(own.saturating_add(free.max(UNUSED_BYTES)))
    }

    /// States which process uses the memory from now on.
    pub fn set_process(&self, process: ProcessHandle) {
        *self.reserved.process.lock() = Some(process);
    }
}

impl MemoryBudget {
    /// The budget of this node, or of the control group in which the agent runs.
    pub fn of_node() -> Arc<Self> {
        Self::new(node_memory::limit_bytes().map(|limit| limit.saturating_sub(RESERVE_BYTES)))
    }

    /// A budget of so many bytes; `None` has no limit.
    pub fn new(total_bytes: Option<u64>) -> Arc<Self> {
        Arc::new(Self { total_bytes, reservations: Mutex::default() })
    }

    /// Bytes that are not reserved; `None` without a limit.
    pub fn free_bytes(&self) -> Option<u64> {
        self.total_bytes.map(|total| total.saturating_sub(self.reserved_bytes()))
    }

    fn reserved_bytes(&self) -> u64 {
        sum(self.live().iter().map(|reserved| reserved.bytes))
    }

    fn live(&self) -> Vec<Arc<Reserved>> {
        let mut reservations = self.reservations.lock();
        reservations.retain(|reserved| reserved.strong_count() > 0);
        reservations.iter().filter_map(Weak::upgrade).collect()
    }

    /// Reserves memory for a version of which admission measured `peak_bytes`, with so many instances.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn reserve(self: &Arc<Self>, peak_bytes: u64, instances: u32) -> Result<Reservation, MemoryExceeded> {
        let bytes = PROCESS_BYTES.saturating_add(peak_bytes.saturating_mul(u64::from(instances.max(1))));
        let mut reservations = self.reservations.lock();
        let reserved_bytes = sum(reservations.iter().filter_map(Weak::upgrade).map(|reserved| reserved.bytes));
        if let Some(total_bytes) = self.total_bytes.filter(|total| reserved_bytes.saturating_add(bytes) > *total) {
            return Err(MemoryExceeded { needed_bytes: bytes, reserved_bytes, total_bytes });
        }
        let reserved = Arc::new(Reserved { bytes, process: Mutex::new(None) });
        reservations.push(Arc::downgrade(&reserved));
        Ok(Reservation { budget: self.clone(), reserved })
    }

    /// Looks at the memory of all workers from now on, where there is a limit.
    pub fn enforce(self: &Arc<Self>, supervisor: &Supervisor) -> Option<SupervisedTask> {
        self.total_bytes?;
        let budget = self.clone();
        Some(supervisor.spawn("memory-budget", OnFailure::Restart, move |stop| {
            let budget = budget.clone();
            async move {
                let mut looks = tokio::time::interval(LOOK_INTERVAL);
                looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                while stop.run_until_cancelled(looks.tick()).await.is_some() {
                    budget.look();
                }
            }
        }))
    }

    fn look(&self) {
        let uses: Vec<(Usage, ProcessHandle)> = self.live().iter().filter_map(|reserved| reserved.usage()).collect();
        let usages: Vec<Usage> = uses.iter().map(|(usage, _)| *usage).collect();
        let Some(total) = self.total_bytes else { return };
        let Some((usage, process)) = choose(&usages, total).and_then(|chosen| uses.get(chosen)) else { return };
        process.kill(format!(
            "it used {} MiB of memory, of which {} MiB were reserved for it, when all workers together used more than the {} MiB \
             for models on this node",
            usage.used >> 20,
            usage.reserved >> 20,
            total >> 20
        ));
    }
}

/// The memory of one worker, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Usage {
    used: u64,
    reserved: u64,
}

impl Reserved {
    fn usage(&self) -> Option<(Usage, ProcessHandle)> {
        let process = self.process.lock().clone()?;
        let used = process.memory_bytes()?;
        Some((Usage { used, reserved: self.bytes }, process))
    }
}

/// The worker that has to end, where all together use more than the budget: the one that exceeds its reservation most.
fn choose(workers: &[Usage], total: u64) -> Option<usize> {
    if sum(workers.iter().map(|worker| worker.used)) <= total {
        return None;
    }
    let excess = |worker: &Usage| worker.used.saturating_sub(worker.reserved);
    workers.iter().enumerate().max_by_key(|(_, worker)| excess(worker)).map(|(index, _)| index)
}

fn sum(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
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
    fn a_worker_may_allocate_what_nothing_else_has_reserved() {
        let budget = MemoryBudget::new(Some(1000 * MIB));
        let first = budget.reserve(84 * MIB, 1).unwrap();
        assert_eq!(first.limit_bytes(300 * MIB), 300 * MIB);
        assert_eq!(first.limit_bytes(8192 * MIB), 1000 * MIB);
        let second = budget.reserve(884 * MIB, 1).unwrap();
        assert_eq!(first.limit_bytes(8192 * MIB), 164 * MIB, "stacks and freed heaps remain possible");
        drop(second);
        assert_eq!(first.limit_bytes(8192 * MIB), 1000 * MIB);
        let unlimited = MemoryBudget::new(None).reserve(1, 1).unwrap();
        assert_eq!(unlimited.limit_bytes(u64::MAX), u64::MAX);
    }

    #[test]
    fn the_worker_that_exceeds_its_reservation_most_has_to_end() {
        let usage = |used, reserved| Usage { used, reserved };
        let workers = [usage(500, 490), usage(90, 20), usage(10, 60)];
        assert_eq!(choose(&workers, 600), None);
        assert_eq!(choose(&workers, 599), Some(1));
        assert_eq!(choose(&[], 0), None);
        assert_eq!(choose(&[usage(u64::MAX, 1), usage(u64::MAX, 0)], u64::MAX - 1), Some(1));
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
