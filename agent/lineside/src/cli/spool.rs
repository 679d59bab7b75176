//! `lineside spool`: lists, exports and deletes the messages that wait for the broker. All commands but `purge` also work while the
//! agent runs; `purge` takes the lock of the data folder, and changes nothing while an agent holds it. `tests/suite/spool.rs` tests it as a whole process.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::progress::message_bar;
use super::{DataDir, Failure, write_out};

use lineside_common::folder_lock::FolderLock;
use lineside_spool::{Record, RecordKind, SpoolView, purge};

/// How long purging waits for the lock. A process that is being started shares the files of its parent for a moment, and so
/// a lock that was just released.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

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
    },
    /// Delete the pending messages. Stop the agent first.
    Purge {
        /// Delete only the messages of this kind [default: all kinds].
        #[arg(long, value_enum)]
        kind: Option<Partition>,
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
        Command::Ls { limit } => list(&view, limit, arguments.json)?,
        Command::Export { output } => export(&view, &output, arguments.json)?,
        Command::Purge { yes: false, .. } => {
            let pending: u64 = view.partitions().map(|partition| partition.records).sum();
            let message =
                format!("{pending} messages are pending; --yes deletes them, `lineside spool export` saves them first");
            return Err(Failure::Usage(vec![message]));
        }
        Command::Purge { kind, .. } => {
            let kind = kind.map(RecordKind::from);
            let _lock = FolderLock::acquire(&arguments.data.data_dir, "lineside spool purge", LOCK_TIMEOUT)
                .context("cannot purge the spool")?;
            let purged =
                purge(&root, |other| kind.is_none_or(|kind| kind == other)).context("cannot purge the spool")?;
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

fn export(view: &SpoolView, output: &PathBuf, json: bool) -> anyhow::Result<()> {
    let is_stdout = output.as_os_str() == "-";
    let mut out: Box<dyn Write> = if is_stdout {
        Box::new(BufWriter::new(io::stdout()))
    } else {
        let file = File::create(output).with_context(|| output.display().to_string())?;
        Box::new(BufWriter::new(file))
    };
    let total = view.partitions().map(|partition| partition.records).sum();
    let bar = message_bar("exporting");
    bar.set_length(total);
    let mut exported = 0u64;
    for record in view.records() {
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
