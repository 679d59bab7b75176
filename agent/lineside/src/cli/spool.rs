//! `lineside spool`: lists, exports and deletes the messages that wait for the broker. All commands but `purge` and `retry`
//! also work while the agent runs; these two take the lock of the data folder, and change nothing while an agent holds it. `tests/suite/spool.rs` tests it as a whole process.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::progress::message_bar;
use super::{DataDir, Failure, write_out};

use lineside_common::folder_lock::FolderLock;
use lineside_common::metrics::Registrar;
use lineside_spool::{
    AppendOutcome, NewRecord, Options, Record, RecordKind, SET_ASIDE_BYTES_MAX, SetAsideRecord, Spool, SpoolConfig,
    SpoolError, SpoolMetrics, SpoolView, WhenFull, drop_set_aside, purge, set_aside_records,
};

/// How long purging waits for the lock. A process that is being started shares the files of its parent for a moment, and so
/// a lock that was just released.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// Bound on the spool while messages are moved back to it.
const RETRY_BYTES_MAX: u64 = 1 << 50;

#[derive(Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    data: DataDir,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Print the number and size of the pending messages by kind.
    Stat,
    /// List the pending messages, oldest first.
    Ls {
        /// Maximum number of messages; 0 means no limit.
        #[arg(long, value_name = "N", default_value_t = 20)]
        limit: usize,
        /// List the messages that the broker did not take, with the reason.
        #[arg(long)]
        set_aside: bool,
    },
    /// Write the pending messages as JSON lines. They stay in the spool.
    #[command(
        after_help = "Each line is {\"topic\": ..., \"payload\": ...}. To publish an export with mosquitto_pub:\n  \
        lineside spool export - | jq -rc '[.topic, (.payload|tojson)] | @tsv' |\n    \
        while IFS=$'\\t' read -r topic payload; do mosquitto_pub -q 1 -t \"$topic\" -m \"$payload\"; done"
    )]
    Export {
        /// Output file, or - for stdout. An existing file is overwritten.
        #[arg(value_name = "FILE")]
        output: PathBuf,
        /// Write the messages that the broker did not take.
        #[arg(long)]
        set_aside: bool,
    },
    /// Move the messages that the broker did not take back to the pending ones. Stop the agent first.
    Retry,
    /// Delete the pending messages. Stop the agent first.
    Purge {
        /// Delete only the messages of this kind [default: all kinds].
        #[arg(long, value_enum)]
        kind: Option<Partition>,
        /// Delete the messages that the broker did not take, and no pending ones.
        #[arg(long)]
        set_aside: bool,
        /// Confirm the deletion. Deleted messages cannot be restored.
        #[arg(long)]
        yes: bool,
    },
}

/// The kinds of messages in the spool.
#[derive(Clone, Copy, ValueEnum)]
enum Partition {
    Result,
    Event,
    Metrics,
}

impl From<Partition> for RecordKind {
    fn from(partition: Partition) -> Self {
        match partition {
            Partition::Result => Self::Result,
            Partition::Event => Self::Event,
            Partition::Metrics => Self::Metrics,
        }
    }
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let root = lineside_spool::folder(&arguments.data.data_dir);
    let view = SpoolView::open(&root).with_context(|| format!("--data-dir {}", arguments.data.data_dir.display()))?;
    match arguments.command {
        Command::Stat => stat(&view, arguments.json),
        Command::Ls { limit, set_aside: true } => list_set_aside(&root, limit, arguments.json)?,
        Command::Ls { limit, .. } => list(&view, limit, arguments.json)?,
        Command::Export { output, set_aside: true } => {
            let records = set_aside_records(&root).context("cannot read the spool")?;
            let total = records.len() as u64;
            export(records.into_iter().map(|set_aside| Ok(set_aside.record)), total, &output, arguments.json)?;
        }
        Command::Export { output, .. } => {
            let total = view.partitions().map(|partition| partition.records).sum();
            export(view.records(), total, &output, arguments.json)?;
        }
        Command::Retry => retry(&arguments.data.data_dir, arguments.json)?,
        Command::Purge { yes: false, set_aside: true, .. } => {
            let records = set_aside_records(&root).context("cannot read the spool")?.len();
            let message = format!(
                "{records} messages are set aside; --yes deletes them, `lineside spool export --set-aside` saves them first"
            );
            return Err(Failure::Usage(vec![message]));
        }
        Command::Purge { yes: false, .. } => {
            let pending: u64 = view.partitions().map(|partition| partition.records).sum();
            let message =
                format!("{pending} messages are pending; --yes deletes them, `lineside spool export` saves them first");
            return Err(Failure::Usage(vec![message]));
        }
        Command::Purge { kind, set_aside, .. } => {
            let kind = kind.map(RecordKind::from);
            let is_selected = |other| kind.is_none_or(|kind| kind == other);
            let _lock = FolderLock::acquire(&arguments.data.data_dir, "lineside spool purge", LOCK_TIMEOUT)
                .context("cannot purge the spool")?;
            let purged = if set_aside { purge_set_aside(&root, is_selected) } else { purge(&root, is_selected) };
            let purged = purged.context("cannot purge the spool")?;
            if arguments.json {
                write_out(&json!({"purged": purged}).to_string());
            } else {
                write_out(&format!("{purged} messages deleted"));
            }
        }
    }
    Ok(())
}

fn stat(view: &SpoolView, json: bool) {
    let partitions: Vec<Value> = view
        .partitions()
        .map(|partition| {
            json!({"kind": partition.kind.name(), "records": partition.records, "bytes": partition.bytes, "segments": partition.segments})
        })
        .collect();
    if json {
        return write_out(&json!({"partitions": partitions}).to_string());
    }
    write_out(&format!("{:<8}  {:>10}  {:>12}  {:>8}", "KIND", "PENDING", "BYTES", "FILES"));
    for partition in view.partitions() {
        write_out(&format!(
            "{:<8}  {:>10}  {:>12}  {:>8}",
            partition.kind.name(),
            partition.records,
            partition.bytes,
            partition.segments
        ));
    }
}

fn list(view: &SpoolView, limit: usize, json: bool) -> anyhow::Result<()> {
    let limit = if limit == 0 { usize::MAX } else { limit };
    if !json {
        write_out(&format!("{:<24}  {:<26}  {:>8}  {}", "CREATED", "ID", "BYTES", "TOPIC"));
    }
    for record in view.records().take(limit) {
        let record = record.context("cannot read the spool")?;
        let payload = payload(&record);
        if json {
            write_out(
                &json!({"kind": record.id.kind.name(), "id": payload["id"], "ts": payload["ts"],
                        "topic": *record.topic, "bytes": record.payload.len()})
                .to_string(),
            );
        } else {
            write_out(&format!(
                "{:<24}  {:<26}  {:>8}  {}",
                payload["ts"].as_str().unwrap_or("?"),
                payload["id"].as_str().unwrap_or("?"),
                record.payload.len(),
                record.topic
            ));
        }
    }
    Ok(())
}

fn list_set_aside(root: &Path, limit: usize, json: bool) -> anyhow::Result<()> {
    let limit = if limit == 0 { usize::MAX } else { limit };
    let records = set_aside_records(root).context("cannot read the spool")?;
    if !json {
        write_out(&format!("{:<16}  {:<26}  {:>8}  {}", "REASON", "ID", "BYTES", "TOPIC"));
    }
    for SetAsideRecord { record, reason } in records.into_iter().take(limit) {
        let (payload, bytes, reason) = (payload(&record), record.payload.len(), reason.as_str());
        let line = if json {
            json!({"kind": record.id.kind.name(), "id": payload["id"], "ts": payload["ts"], "topic": *record.topic,
                   "bytes": bytes, "reason": reason})
            .to_string()
        } else {
            format!("{reason:<16}  {:<26}  {bytes:>8}  {}", payload["id"].as_str().unwrap_or("?"), record.topic)
        };
        write_out(&line);
    }
    Ok(())
}

/// Appends what was set aside to the pending messages. A message is deleted from what was set aside once the spool is closed,
/// which syncs it; when the process ends before, the message is in both, with the same id.
fn retry(data_dir: &Path, json: bool) -> anyhow::Result<()> {
    let root = lineside_spool::folder(data_dir);
    let _lock =
        FolderLock::acquire(data_dir, "lineside spool retry", LOCK_TIMEOUT).context("cannot change the spool")?;
    let records = set_aside_records(&root).context("cannot read the spool")?;
    let metrics = SpoolMetrics::register(&Registrar::default()).context("cannot open the spool")?;
    // Nothing is dropped for room here: the agent applies its own bounds when it starts. What was set aside fits into memory.
    let memory_bytes_max = 2 * SET_ASIDE_BYTES_MAX;
    let options =
        Options { bytes_max: RETRY_BYTES_MAX, memory_bytes_max, ..Options::new(&SpoolConfig::default(), metrics) };
    let spool = Spool::open(&root, options).context("cannot open the spool")?;
    let mut appended = Vec::new();
    for set_aside in records {
        let record = &set_aside.record;
        let outcome = spool.append(NewRecord {
            kind: record.id.kind,
            topic: record.topic.clone(),
            ttl_seconds: record.ttl_seconds,
            when_full: WhenFull::DropNewest,
            build_payload: |_| record.payload.clone(),
        });
        if matches!(outcome, AppendOutcome::Appended(_)) {
            appended.push(set_aside);
        }
    }
    spool.close();
    let stats = spool.stats();
    anyhow::ensure!(stats.degraded.is_none(), "the disk refuses writes of the spool; nothing was changed");
    for set_aside in &appended {
        drop_set_aside(&root, set_aside).context("cannot change the spool")?;
    }
    write_out(&if json {
        json!({"retried": appended.len()}).to_string()
    } else {
        format!("{} messages are pending again", appended.len())
    });
    Ok(())
}

fn purge_set_aside(root: &Path, is_selected: impl Fn(RecordKind) -> bool) -> Result<u64, SpoolError> {
    let records = set_aside_records(root)?;
    let selected: Vec<_> = records.iter().filter(|set_aside| is_selected(set_aside.record.id.kind)).collect();
    selected.iter().try_for_each(|set_aside| drop_set_aside(root, set_aside))?;
    Ok(selected.len() as u64)
}

fn export(
    records: impl Iterator<Item = Result<Record, SpoolError>>,
    total: u64,
    output: &PathBuf,
    json: bool,
) -> anyhow::Result<()> {
    let is_stdout = output.as_os_str() == "-";
    let mut out: Box<dyn Write> = if is_stdout {
        Box::new(BufWriter::new(io::stdout()))
    } else {
        let file = File::create(output).with_context(|| output.display().to_string())?;
        Box::new(BufWriter::new(file))
    };
    let bar = message_bar("exporting");
    bar.set_length(total);
    let mut exported = 0u64;
    for record in records {
        let record = record.context("cannot read the spool")?;
        let line = json!({"topic": *record.topic, "payload": payload(&record)});
        match writeln!(out, "{line}") {
            // The reader may close the pipe at any time, as `head` does.
            Err(error) if is_stdout && error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.with_context(|| output.display().to_string())?,
        }
        exported += 1;
        bar.inc(1);
    }
    out.flush().with_context(|| output.display().to_string())?;
    bar.finish_and_clear();
    if !is_stdout {
        if json {
            write_out(&json!({"exported": exported}).to_string());
        } else {
            write_out(&format!("{exported} messages written to {}", output.display()));
        }
    }
    Ok(())
}

/// The payload as JSON; null if it is not valid JSON.
fn payload(record: &Record) -> Value {
    serde_json::from_slice(&record.payload).unwrap_or_default()
}
