//! `lineside spool`: the results that wait for the broker, looked at, saved or thrown away by hand.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::progress::of_messages;
use super::{Failure, write_out};

use lineside_spool::{Record, RecordKind, SpoolView, purge};

#[derive(Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// The agent's own folder.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lineside", env = "LINESIDE_DATA_DIR", global = true)]
    data_dir: PathBuf,
    /// Print JSON for scripts.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Say how much waits, by kind.
    Stat,
    /// List the messages that wait, oldest first.
    Ls {
        /// How many at most; 0 is all.
        #[arg(long, value_name = "N", default_value_t = 20)]
        limit: usize,
    },
    /// Write the messages that wait as JSON lines. They stay in the spool.
    #[command(
        after_help = "Each line is {\"topic\": ..., \"payload\": ...}. They can be loaded to a broker by other means:\n  \
        lineside spool export - | jq -rc '[.topic, (.payload|tojson)] | @tsv' |\n    \
        while IFS=$'\\t' read -r topic payload; do mosquitto_pub -q 1 -t \"$topic\" -m \"$payload\"; done"
    )]
    Export {
        /// A file, or - for stdout.
        #[arg(value_name = "FILE")]
        output: PathBuf,
    },
    /// Throw away what waits. The agent must have ended.
    Purge {
        /// Only messages of this kind.
        #[arg(long, value_enum)]
        kind: Option<Partition>,
        /// Really do it. What is thrown away is lost.
        #[arg(long)]
        yes: bool,
    },
}

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
    let root = lineside_spool::folder(&arguments.data_dir);
    let view = SpoolView::open(&root).with_context(|| format!("--data-dir {}", arguments.data_dir.display()))?;
    match arguments.command {
        Command::Stat => stat(&view, arguments.json),
        Command::Ls { limit } => list(&view, limit, arguments.json)?,
        Command::Export { output } => export(&view, &output, arguments.json)?,
        Command::Purge { yes: false, .. } => {
            let waiting: u64 = view.partitions().map(|partition| partition.records).sum();
            let why =
                format!("{waiting} messages wait; --yes throws them away for good, `spool export` saves them first");
            return Err(Failure::Usage(vec![why]));
        }
        Command::Purge { kind, .. } => {
            let kind = kind.map(RecordKind::from);
            let purged =
                purge(&root, |other| kind.is_none_or(|kind| kind == other)).context("nothing more was purged")?;
            match arguments.json {
                true => write_out(&json!({"purged": purged}).to_string()),
                false => write_out(&format!("{purged} messages thrown away")),
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
    write_out(&format!("{:<8}  {:>10}  {:>12}  {:>8}", "KIND", "WAITING", "BYTES", "FILES"));
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
        write_out(&format!("{:<24}  {:<26}  {:>8}  {}", "MADE", "ID", "BYTES", "TOPIC"));
    }
    for record in view.records().take(limit) {
        let record = record.context("the spool cannot be read")?;
        let payload = payload(&record);
        match json {
            true => write_out(
                &json!({"kind": record.id.kind.name(), "id": payload["id"], "ts": payload["ts"],
                        "topic": *record.topic, "bytes": record.payload.len()})
                .to_string(),
            ),
            false => write_out(&format!(
                "{:<24}  {:<26}  {:>8}  {}",
                payload["ts"].as_str().unwrap_or("?"),
                payload["id"].as_str().unwrap_or("?"),
                record.payload.len(),
                record.topic
            )),
        }
    }
    Ok(())
}

fn export(view: &SpoolView, output: &PathBuf, json: bool) -> anyhow::Result<()> {
    let is_stdout = output.as_os_str() == "-";
    let mut out: Box<dyn Write> = match is_stdout {
        true => Box::new(BufWriter::new(io::stdout())),
        false => {
            let file = File::create(output).with_context(|| output.display().to_string())?;
            Box::new(BufWriter::new(file))
        }
    };
    let total = view.partitions().map(|partition| partition.records).sum();
    let bar = of_messages("exporting");
    bar.set_length(total);
    let mut exported = 0u64;
    for record in view.records() {
        let record = record.context("the spool cannot be read")?;
        let line = json!({"topic": *record.topic, "payload": payload(&record)});
        match writeln!(out, "{line}") {
            // Whoever reads our output may leave at any time, as `head` does.
            Err(error) if is_stdout && error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.with_context(|| output.display().to_string())?,
        }
        exported += 1;
        bar.inc(1);
    }
    out.flush().with_context(|| output.display().to_string())?;
    bar.finish_and_clear();
    if !is_stdout {
        match json {
            true => write_out(&json!({"exported": exported}).to_string()),
            false => write_out(&format!("{exported} messages written to {}", output.display())),
        }
    }
    Ok(())
}

fn payload(record: &Record) -> Value {
    serde_json::from_slice(&record.payload).unwrap_or_default()
}
