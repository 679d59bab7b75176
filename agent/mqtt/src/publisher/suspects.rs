//! Finds out which record the broker does not take, so that one record never stops the others. Pure, except for loading and
//! saving.
//!
//! ```text
//!  unacknowledged at 3 losses       sent alone, the connection is lost 3 times
//!  (any) ----------------> isolated ------------------------------------------> set aside
//!            ^                |
//!            +----------------+ acknowledged
//! ```
//!
//! A lost connection says nothing about which of the unacknowledged records was its cause. So a record that was unacknowledged
//! at [`LOSSES_MAX`] losses is **isolated**: it is sent while no other record is unacknowledged. The connection that is lost then
//! counts against this record alone.
//!
//! A link that breaks all the time also takes connections from a record that is sent alone. A loss is **unexplained** when no
//! record was sent alone, and each unacknowledged record is of a size that the broker has acknowledged before. Each unexplained
//! loss, recent or since the record was isolated, raises the number of losses that it takes to set the record aside. Losses because the link is silent count for
//! nothing.
//!
//! The counts are saved when a connection is lost and not otherwise, so normal operation writes nothing, and a restart of the
//! agent does not start from zero. Lost counts only cost further attempts.
//!
//! When two records were set aside that are larger than every record that the broker acknowledged, their smaller size is the
//! **learnt limit**: records of at least this size are set aside without an attempt for [`LEARNT_FOR`], and then tried again.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use lineside_common::files;
use lineside_spool::{RecordId, RecordKind, SetAsideReason};

/// A record that was unacknowledged at this many losses is sent alone.
const LOSSES_MAX: u32 = 3;
/// A record that was sent alone is set aside after this many losses.
const ALONE_LOSSES_MAX: u32 = 3;
/// Every unexplained loss adds this many to [`ALONE_LOSSES_MAX`].
const PER_UNEXPLAINED_LOSS: u32 = 2;
/// Unexplained losses count for this long after the last one, and up to this many, for records that are isolated later.
const RECENTLY: Duration = Duration::from_secs(600);
const UNEXPLAINED_MAX: u32 = 12;
/// Maximum number of records that are counted. Further records are counted once others are acknowledged or set aside.
const SUSPECTS_MAX: usize = 128;
/// How long a learnt limit is respected.
const LEARNT_FOR: Duration = Duration::from_secs(3600);
/// The file in the data folder that holds the counts.
const FILE: &str = "mqtt-suspects.json";
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LossCause {
    /// The connection was closed.
    Closed,
    /// The broker answered keep-alive requests and did not acknowledge a record in time.
    Unacknowledged,
    /// Nothing that says anything about a record: an orderly end, or a silent link.
    Other,
}

/// A record that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) id: RecordId,
    /// Size of the packet in bytes.
    pub(super) bytes: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Suspect {
    losses: u32,
    alone_losses: u32,
    /// Unexplained losses since the record was isolated.
    unexplained: u32,
}

impl Suspect {
    fn is_isolated(self) -> bool {
        self.losses >= LOSSES_MAX
    }

    /// Whether the record was lost alone often enough, on a link with this many recent unexplained losses.
    fn is_guilty(self, recently_unexplained: u32) -> bool {
        let link = recently_unexplained.saturating_add(PER_UNEXPLAINED_LOSS.saturating_mul(self.unexplained));
        self.alone_losses >= ALONE_LOSSES_MAX.saturating_add(link)
    }
}

/// What is known about one broker: the sizes that it takes, and the link to it.
#[derive(Debug, Clone, Copy, Default)]
struct Sizes {
    largest_acknowledged: u64,
    /// The smallest record that was set aside and is larger than every acknowledged one, and how many there were.
    smallest_refused: Option<u64>,
    refused: u32,
    learnt_at: Option<Instant>,
    /// Unexplained losses, and when the last one was.
    unexplained: u32,
    unexplained_at: Option<Instant>,
}

impl Sizes {
    fn recently_unexplained(&self, now: Instant) -> u32 {
        let is_recent = self.unexplained_at.is_some_and(|at| now.saturating_duration_since(at) < RECENTLY);
        if is_recent { self.unexplained } else { 0 }
    }
}

/// The records that the broker may not take.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    records: BTreeMap<RecordId, Suspect>,
    /// By the index of the broker.
    sizes: BTreeMap<usize, Sizes>,
    /// Whether the last connection was lost with several records unacknowledged, so that the next one starts with an isolated one.
    starts_alone: bool,
    is_saved: bool,
}

impl Suspects {
    /// Reads the counts of an earlier process. A file that cannot be read counts nothing.
    pub(super) fn load(data_dir: &Path) -> Self {
        let text = files::read_bounded(&data_dir.join(FILE), FILE_BYTES_MAX).unwrap_or_default();
        let list: Vec<(String, u64, u32, u32, u32)> = serde_json::from_slice(&text).unwrap_or_default();
        let suspect = |(kind, position, losses, alone_losses, unexplained): (String, u64, u32, u32, u32)| {
            let kind = RecordKind::ALL.into_iter().find(|known| known.name() == kind)?;
            Some((RecordId { kind, position }, Suspect { losses, alone_losses, unexplained }))
        };
        let records = list.into_iter().filter_map(suspect).take(SUSPECTS_MAX).collect();
        Self { records, is_saved: true, ..Self::default() }
    }

    /// Saves the counts when a loss has changed them.
    pub(super) fn save(&mut self, data_dir: &Path) {
        if std::mem::replace(&mut self.is_saved, true) {
            return;
        }
        let entry = |(id, suspect): (&RecordId, &Suspect)| {
            json!([id.kind.name(), id.position, suspect.losses, suspect.alone_losses, suspect.unexplained])
        };
        let list: Vec<Value> = self.records.iter().map(entry).collect();
        if let Err(error) = files::replace(&data_dir.join(FILE), Value::from(list).to_string().as_bytes()) {
            tracing::debug!(%error, "Cannot save which records the broker may not take");
        }
    }

    /// Whether a record must be sent alone.
    pub(super) fn is_isolated(&self, id: RecordId) -> bool {
        self.records.get(&id).is_some_and(|suspect| suspect.is_isolated())
    }

    /// Whether the next connection starts with an isolated record.
    pub(super) fn starts_alone(&self) -> bool {
        self.starts_alone
    }

    /// The size from which on records are not sent to a broker, because it closed the connection on records of this size.
    pub(super) fn learnt_limit(&self, broker: usize, now: Instant) -> Option<u64> {
        let sizes = self.sizes.get(&broker)?;
        let is_learnt = sizes.learnt_at.is_some_and(|at| now.saturating_duration_since(at) < LEARNT_FOR);
        sizes.smallest_refused.filter(|_| is_learnt)
    }

    /// Registers an acknowledgement.
    pub(super) fn acknowledged(&mut self, broker: usize, sent: Sent) {
        self.records.remove(&sent.id);
        let sizes = self.sizes.entry(broker).or_default();
        if sizes.smallest_refused.is_some_and(|refused| refused <= sent.bytes) {
            (sizes.smallest_refused, sizes.refused, sizes.learnt_at) = (None, 0, None);
        }
        sizes.largest_acknowledged = sizes.largest_acknowledged.max(sent.bytes);
    }

    /// Registers the loss of a connection on which `sent` was unacknowledged.
    pub(super) fn lost(&mut self, broker: usize, sent: &[Sent], now: Instant) {
        self.starts_alone = true;
        let sizes = self.sizes.entry(broker).or_default();
        if sent.iter().all(|sent| sent.bytes <= sizes.largest_acknowledged) {
            sizes.unexplained = (sizes.recently_unexplained(now) + 1).min(UNEXPLAINED_MAX);
            sizes.unexplained_at = Some(now);
            let isolated = self.records.values_mut().filter(|suspect| suspect.is_isolated());
            isolated.for_each(|suspect| suspect.unexplained = suspect.unexplained.saturating_add(1));
        }
        sent.iter().for_each(|sent| self.count_loss(sent.id));
        self.is_saved &= sent.is_empty() && self.records.is_empty();
    }

    /// Registers the loss of a connection on which a record was sent alone. Returns why to set it aside, if it is to be.
    pub(super) fn lost_alone(
        &mut self,
        broker: usize,
        sent: Sent,
        cause: LossCause,
        now: Instant,
    ) -> Option<SetAsideReason> {
        self.starts_alone = false;
        self.is_saved = false;
        let recently_unexplained = self.sizes.get(&broker).map_or(0, |sizes| sizes.recently_unexplained(now));
        let suspect = self.records.get_mut(&sent.id)?;
        suspect.alone_losses += 1;
        if !suspect.is_guilty(recently_unexplained) {
            return None;
        }
        self.records.remove(&sent.id);
        if cause == LossCause::Unacknowledged {
            return Some(SetAsideReason::Unacknowledged);
        }
        let sizes = self.sizes.entry(broker).or_default();
        if sent.bytes > sizes.largest_acknowledged {
            sizes.refused += 1;
            sizes.smallest_refused = Some(sizes.smallest_refused.map_or(sent.bytes, |known| known.min(sent.bytes)));
            sizes.learnt_at = (sizes.refused >= 2).then_some(now);
        }
        Some(SetAsideReason::ConnectionLost)
    }

    fn count_loss(&mut self, id: RecordId) {
        if !self.records.contains_key(&id) && self.records.len() >= SUSPECTS_MAX {
            // A record that expired or was dropped is never sent again, so the oldest one makes room.
            let innocent = self.records.iter().find(|(_, suspect)| !suspect.is_isolated()).map(|(id, _)| *id);
            if let Some(oldest) = innocent.or_else(|| self.records.keys().next().copied()) {
                self.records.remove(&oldest);
            }
        }
        let suspect = self.records.entry(id).or_default();
        suspect.losses = suspect.losses.saturating_add(1);
        self.is_saved = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(position: u64, bytes: u64) -> Sent {
        Sent { id: RecordId { kind: RecordKind::Result, position }, bytes }
    }

    fn isolated(position: u64, bytes: u64) -> Suspects {
        let mut suspects = Suspects::default();
        (0..LOSSES_MAX)
            .for_each(|_| suspects.lost(0, &[sent(position, bytes), sent(position + 1, 10)], Instant::now()));
        suspects.acknowledged(0, sent(position + 1, 10));
        suspects
    }

    #[test]
    fn a_record_is_set_aside_when_connections_are_lost_on_it_alone() {
        let (mut suspects, now) = (isolated(1, 50), Instant::now());
        assert!(suspects.is_isolated(sent(1, 50).id) && !suspects.is_isolated(sent(2, 10).id));
        let outcomes: Vec<_> = (0..3).map(|_| suspects.lost_alone(0, sent(1, 50), LossCause::Closed, now)).collect();
        assert_eq!(outcomes, [None, None, Some(SetAsideReason::ConnectionLost)]);
        let (mut suspects, cause) = (isolated(1, 50), LossCause::Unacknowledged);
        let outcomes: Vec<_> = (0..3).map(|_| suspects.lost_alone(0, sent(1, 50), cause, now)).collect();
        assert_eq!(outcomes[2], Some(SetAsideReason::Unacknowledged));
    }

    #[test]
    fn losses_of_the_link_do_not_count_against_a_record() {
        let (mut suspects, now) = (isolated(1, 50), Instant::now());
        for _ in 0..100 {
            // Each time the record is tried, the link has also broken under a record of a size that passes.
            suspects.lost(0, &[sent(9, 10)], now);
            suspects.acknowledged(0, sent(9, 10));
            assert_eq!(suspects.lost_alone(0, sent(1, 50), LossCause::Closed, now), None);
        }
    }

    #[test]
    fn a_limit_is_learnt_from_two_records_and_forgotten_when_it_is_wrong() {
        let (mut suspects, now) = (Suspects::default(), Instant::now());
        suspects.acknowledged(0, sent(9, 40));
        for (position, bytes) in [(1, 60), (2, 50)] {
            assert_eq!(suspects.learnt_limit(0, now), None);
            (0..3).for_each(|_| suspects.lost(0, &[sent(position, bytes)], now));
            (0..3).for_each(|_| {
                suspects.lost_alone(0, sent(position, bytes), LossCause::Closed, now);
            });
        }
        assert_eq!((suspects.learnt_limit(0, now), suspects.learnt_limit(1, now)), (Some(50), None));
        assert_eq!(suspects.learnt_limit(0, now + LEARNT_FOR), None, "the broker is tried again");
        suspects.acknowledged(0, sent(3, 55));
        assert_eq!(suspects.learnt_limit(0, now), None);
    }

    #[test]
    fn the_counts_survive_a_restart_and_a_damaged_file_counts_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut suspects = isolated(1, 50);
        suspects.save(folder.path());
        assert!(Suspects::load(folder.path()).is_isolated(sent(1, 50).id));
        std::fs::write(folder.path().join(FILE), "[[").unwrap();
        assert!(Suspects::load(folder.path()).records.is_empty());
        let mut unchanged = Suspects::load(folder.path());
        std::fs::remove_file(folder.path().join(FILE)).unwrap();
        unchanged.acknowledged(0, sent(1, 1));
        unchanged.save(folder.path());
        assert!(!folder.path().join(FILE).exists(), "normal operation writes nothing");
    }
}
