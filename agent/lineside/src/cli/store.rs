//! `lineside store`: the models this node keeps, looked at and put in order by hand. It works while the agent runs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::json;

use super::progress::of_bytes as bar;
use super::{Failure, write_out};
use crate::app::STORE_FOLDER;
use lineside_common::clock;
use lineside_common::digest::Digest;
use lineside_common::error_chain;
use lineside_models::bundle::{self, BundleProgress, VersionSelector};
use lineside_models::last_good::LastGoodVersions;
use lineside_models::signing::{Keyring, SigningKey};
use lineside_models::store::{Blob, DigestRecordKind, FailureRecord, Index, Store, VersionRecord, format_mib};

#[derive(Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// The agent's own folder.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lineside", env = "LINESIDE_DATA_DIR", global = true)]
    data_dir: PathBuf,
    /// What the store may take on disk; as the agent is told.
    #[arg(long, value_name = "MIB", default_value_t = 4096, env = "LINESIDE_STORE_MIB_MAX", global = true)]
    store_mib_max: u64,
    /// Print JSON for scripts.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// List the versions: what they take, whether they are pinned, when they were last used, what is in quarantine.
    Ls,
    /// Read every file and compare its digest. Damaged ones are removed, and the agent fetches them again.
    Verify,
    /// Evict the least recently used files down to the low mark. What served last or is pinned stays.
    Gc {
        /// Only say what would go.
        #[arg(long)]
        dry_run: bool,
        /// As if so many MiB more had to fit.
        #[arg(long, value_name = "MIB", default_value_t = 0)]
        room: u64,
    },
    /// Never evict a version.
    Pin {
        /// Such as surface-defects:3.
        #[arg(value_name = "NAME:VERSION")]
        version: String,
    },
    /// Let a version be evicted again.
    Unpin {
        /// Such as surface-defects:3.
        #[arg(value_name = "NAME:VERSION")]
        version: String,
    },
    /// Take a digest out of quarantine; the agent tries it again when it starts or the manifest changes.
    Release {
        /// sha256: and 64 hexadecimal digits.
        digest: String,
    },
    /// Write versions into a folder, such as a USB stick, signed, for nodes without a network.
    Export {
        /// surface-defects for all versions, surface-defects:3 for one.
        #[arg(value_name = "NAME[:VERSION]")]
        model: String,
        /// The folder; it is made where it is missing.
        #[arg(long, value_name = "FOLDER")]
        output: PathBuf,
        /// The private key to sign with; `lineside keygen` makes one.
        #[arg(long, value_name = "KEY")]
        key: PathBuf,
    },
    /// Take in what was exported. Nothing is taken of a bundle that is not signed by a trusted key, or is damaged.
    Import {
        /// The folder.
        folder: PathBuf,
        /// The public key that is believed, or a folder of them.
        #[arg(long, value_name = "PATH", env = "LINESIDE_TRUSTED_KEYS")]
        trusted_keys: PathBuf,
        /// How many of the keys have to sign.
        #[arg(long, value_name = "N", default_value_t = 1, env = "LINESIDE_SIGNATURE_THRESHOLD")]
        signature_threshold: usize,
    },
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let root = arguments.data_dir.join(STORE_FOLDER);
    // A mistyped folder is not made; only an import may be the first to come.
    if !root.is_dir() && !matches!(arguments.command, Command::Import { .. }) {
        let why = format!("--data-dir {} holds no store; is it the agent's?", arguments.data_dir.display());
        return Err(Failure::Failed(anyhow::anyhow!(why)));
    }
    let open = || -> anyhow::Result<Store> {
        Store::open(&root, arguments.store_mib_max << 20, Index::off()).context("the store cannot be opened")
    };
    let last_good = LastGoodVersions::read(&arguments.data_dir);
    let json = arguments.json;
    match arguments.command {
        Command::Ls => Ok(list(&open()?, &last_good, json)?),
        Command::Verify => Ok(verify(&open()?, json)?),
        Command::Gc { dry_run, room } => Ok(collect(&open()?, &last_good.digests(), room << 20, dry_run, json)?),
        Command::Pin { version } => pin(&open()?, &version, true),
        Command::Unpin { version } => pin(&open()?, &version, false),
        Command::Release { digest } => {
            let digest = Digest::parse(&digest).map_err(|error| Failure::Usage(vec![error.to_string()]))?;
            let was_there =
                open()?.delete_digest_record(DigestRecordKind::Failure, &digest).map_err(anyhow::Error::from)?;
            match was_there {
                true => say(json, &json!({"released": digest}), &format!("{digest} may be tried again")),
                false => return Err(Failure::Failed(anyhow::anyhow!("{digest} has not failed here"))),
            }
            Ok(())
        }
        Command::Export { model, output, key } => {
            let (name, version) = parse(&model, false)?;
            let key = SigningKey::read(&key).context("--key")?;
            let bar = bar("exporting");
            let selector = VersionSelector { name, version };
            let progress = |progress| match progress {
                BundleProgress::Total(bytes) => bar.set_length(bytes),
                BundleProgress::Advanced(bytes) => bar.inc(bytes),
            };
            let versions = bundle::export(&open()?, &selector, &output, &key, progress).map_err(anyhow::Error::from)?;
            bar.finish_and_clear();
            told(json, "exported", &versions, &output);
            Ok(())
        }
        Command::Import { folder, trusted_keys, signature_threshold } => {
            let keys = Keyring::read(&trusted_keys, signature_threshold)
                .map_err(|error| Failure::Usage(vec![format!("--trusted-keys: {}", error_chain(&error))]))?;
            let bar = bar("importing");
            let store = open()?;
            let progress = |progress| match progress {
                BundleProgress::Total(bytes) => bar.set_length(bytes),
                BundleProgress::Advanced(bytes) => bar.inc(bytes),
            };
            let versions =
                bundle::import(&store, &folder, &keys, &last_good.digests(), progress).map_err(anyhow::Error::from)?;
            bar.finish_and_clear();
            told(json, "imported", &versions, &folder);
            Ok(())
        }
    }
}

#[derive(Serialize)]
struct Row {
    name: String,
    version: u64,
    digest: Digest,
    bytes: u64,
    pinned: bool,
    last_good: bool,
    signed: bool,
    last_used: String,
    source: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    quarantine: Option<FailureRecord>,
}

fn list(store: &Store, last_good: &LastGoodVersions, json: bool) -> anyhow::Result<()> {
    let usage = store.usage()?;
    let mut rows = Vec::new();
    for blob in store.blobs()? {
        let failures_on_record: Option<FailureRecord> = store.read_digest_record(&blob.digest);
        for version in &blob.versions {
            rows.push(Row {
                name: version.name.clone(),
                version: version.version,
                digest: blob.digest,
                bytes: blob.bytes,
                pinned: version.pinned,
                last_good: last_good.get(&version.name).is_some_and(|good| good.digest == blob.digest),
                signed: version.signature.is_some(),
                last_used: clock::rfc3339(blob.last_used),
                source: version.source.clone(),
                quarantine: failures_on_record.clone().filter(|failures_on_record| failures_on_record.quarantined),
            });
        }
    }
    rows.sort_by(|a, b| (&a.name, a.version).cmp(&(&b.name, b.version)));
    if json {
        let report = json!({
            "versions": rows, "bytes": usage.bytes, "quotaBytes": usage.quota_bytes, "blobs": usage.blobs,
        });
        write_out(&report.to_string());
        return Ok(());
    }
    let mut lines = vec![format!(
        "{:<24} {:>7}  {:<12}  {:>10}  {:<20}  {:<20}  {}",
        "MODEL", "VERSION", "DIGEST", "SIZE", "LAST USED", "MARKS", "SOURCE"
    )];
    for row in &rows {
        let marks = [
            (row.last_good, "last-good"),
            (row.pinned, "pinned"),
            (row.signed, "signed"),
            (row.quarantine.is_some(), "quarantined"),
        ];
        let marks: Vec<&str> = marks.iter().filter(|(is_so, _)| *is_so).map(|(_, mark)| *mark).collect();
        lines.push(format!(
            "{:<24} {:>7}  {:<12}  {:>10}  {:<20}  {:<20}  {}",
            row.name,
            row.version,
            &row.digest.hex()[..12],
            format_mib(row.bytes),
            row.last_used.get(..19).unwrap_or_default(),
            marks.join(","),
            row.source
        ));
    }
    lines.push(format!("{} of {} in {} files", format_mib(usage.bytes), format_mib(usage.quota_bytes), usage.blobs));
    write_out(&lines.join("\n"));
    Ok(())
}

fn verify(store: &Store, json: bool) -> anyhow::Result<()> {
    let bar = bar("verifying");
    bar.set_length(store.usage()?.bytes);
    let names: BTreeMap<Digest, Vec<String>> = store
        .blobs()?
        .into_iter()
        .map(|blob| (blob.digest, blob.versions.iter().map(VersionRecord::to_string).collect()))
        .collect();
    let found = store.verify(|bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    let damaged = found.iter().filter(|(_, outcome)| outcome.is_err()).count();
    if json {
        let all: Vec<_> = found
            .iter()
            .map(|(digest, outcome)| {
                let reason = outcome.as_ref().err().map(|error| error_chain(error));
                json!({"digest": digest, "versions": names.get(digest), "ok": outcome.is_ok(), "reason": reason})
            })
            .collect();
        write_out(&json!({"blobs": all, "damaged": damaged}).to_string());
    } else {
        for (digest, outcome) in &found {
            let versions = names.get(digest).map(|names| names.join(" ")).unwrap_or_default();
            match outcome {
                Ok(bytes) => write_out(&format!("ok       {digest}  {}  {versions}", format_mib(*bytes))),
                Err(error) => write_out(&format!("DAMAGED  {digest}  {versions}: {}", error_chain(error))),
            }
        }
    }
    match damaged {
        0 => Ok(()),
        damaged => anyhow::bail!("{damaged} of {} files were damaged", found.len()),
    }
}

fn collect(store: &Store, protected: &BTreeSet<Digest>, room: u64, dry_run: bool, json: bool) -> anyhow::Result<()> {
    let evicted =
        if dry_run { store.plan_eviction(room, protected)?.evicted } else { store.free_space(room, protected)? };
    let bytes: u64 = evicted.iter().map(|blob| blob.bytes).sum();
    let names = |blob: &Blob| {
        let names: Vec<String> = blob.versions.iter().map(VersionRecord::to_string).collect();
        if names.is_empty() { "no version".to_owned() } else { names.join(" ") }
    };
    if json {
        let all: Vec<_> = evicted
            .iter()
            .map(|blob| json!({"digest": blob.digest, "bytes": blob.bytes, "versions": names(blob)}))
            .collect();
        write_out(&json!({"evicted": all, "bytes": bytes, "dryRun": dry_run}).to_string());
        return Ok(());
    }
    for blob in &evicted {
        let verb = if dry_run { "would evict" } else { "evicted" };
        write_out(&format!("{verb}  {}  {}  {}", blob.digest, format_mib(blob.bytes), names(blob)));
    }
    write_out(&format!("{} in {} files", format_mib(bytes), evicted.len()));
    Ok(())
}

fn pin(store: &Store, version: &str, pinned: bool) -> Result<(), Failure> {
    let (name, number) = parse(version, true)?;
    let number = number.unwrap_or_default();
    match store.set_pinned(&name, number, pinned).map_err(anyhow::Error::from)? {
        true => {
            write_out(&format!("{name}:{number} is {}", if pinned { "pinned" } else { "not pinned" }));
            Ok(())
        }
        false => Err(Failure::Failed(anyhow::anyhow!(
            "the store has no {name}:{number}; `lineside store ls` lists what it has"
        ))),
    }
}

/// `name:version`; the version may be left out where it is not needed.
fn parse(text: &str, needs_version: bool) -> Result<(String, Option<u64>), Failure> {
    let wrong = || Failure::Usage(vec![format!("`{text}` is no model version; expected a name and a number: parts:3")]);
    let (name, version) = match text.split_once(':') {
        Some((name, version)) => (name, Some(version.parse::<u64>().map_err(|_| wrong())?)),
        None if needs_version => return Err(wrong()),
        None => (text, None),
    };
    match lineside_api::names::is_name(name) {
        true => Ok((name.to_owned(), version)),
        false => Err(wrong()),
    }
}

fn told(json: bool, verb: &str, versions: &[VersionRecord], folder: &Path) {
    let names: Vec<String> = versions.iter().map(VersionRecord::to_string).collect();
    say(
        json,
        &json!({verb: names, "folder": folder, "at": clock::rfc3339(SystemTime::now())}),
        &format!("{verb} {} ({})", names.join(" "), folder.display()),
    );
}

fn say(json: bool, report: &serde_json::Value, text: &str) {
    match json {
        true => write_out(&report.to_string()),
        false => write_out(text),
    }
}
