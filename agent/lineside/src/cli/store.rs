//! `lineside store`: lists, verifies, evicts, pins, exports and imports the model versions in the store of this node. The commands
//! also work while the agent runs. `tests/suite/store.rs` tests them as whole processes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::json;

use super::progress::byte_bar;
use super::{DataDir, Failure, write_out};
use crate::app::STORE_FOLDER;
use lineside_common::clock;
use lineside_common::digest::Digest;
use lineside_common::error_chain;
use lineside_common::files;
use lineside_models::bundle::{self, BundleProgress, VersionSelector};
use lineside_models::last_good::LastGoodVersions;
use lineside_models::signing::{Keyring, SigningKey};
use lineside_models::store::{Blob, DigestRecordKind, FailureRecord, Index, Store, VersionRecord, format_mib};

#[derive(Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    data: DataDir,
    /// Maximum size of the store, in MiB. Use the value of the agent.
    #[arg(long, value_name = "MIB", default_value_t = 4096, env = "LINESIDE_STORE_MIB_MAX", global = true)]
    store_mib_max: u64,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// List the versions with their size, last use and marks: last-good, pinned, signed, quarantined.
    Ls,
    /// Verify the digest of every file. Damaged files are removed, and the agent fetches them again.
    Verify,
    /// Evict the least recently used files down to the low watermark. Last-good and pinned versions are kept.
    Gc {
        /// Print the files that would be evicted, and remove none.
        #[arg(long)]
        dry_run: bool,
        /// Space to make available for new files, in MiB.
        #[arg(long, value_name = "MIB", default_value_t = 0)]
        room: u64,
    },
    /// Protect a version from eviction.
    Pin {
        /// Model version, such as surface-defects:3.
        #[arg(value_name = "NAME:VERSION")]
        version: String,
    },
    /// Remove the protection of a version from eviction.
    Unpin {
        /// Model version, such as surface-defects:3.
        #[arg(value_name = "NAME:VERSION")]
        version: String,
    },
    /// Release a digest from quarantine. The agent loads it again when it starts or when the manifest changes.
    Release {
        /// Digest of the model file: sha256: and 64 hexadecimal digits.
        digest: String,
    },
    /// Replace the highest version of each model by the version that served last. For a highest-versions.json that cannot be
    /// read: without it the agent loads no other version. Restart the agent afterwards.
    ResetHighestVersions,
    /// Export versions as a signed bundle, for nodes without a network.
    Export {
        /// Model with all its versions, such as surface-defects, or one version, such as surface-defects:3.
        #[arg(value_name = "NAME[:VERSION]")]
        model: String,
        /// Folder of the bundle, such as a USB stick. It is created if it does not exist.
        #[arg(long, value_name = "FOLDER")]
        output: PathBuf,
        /// Private key file that signs the bundle; see `lineside keygen`.
        #[arg(long, value_name = "KEY")]
        key: PathBuf,
    },
    /// Import a bundle. A bundle that is damaged or lacks a trusted signature is rejected as a whole.
    Import {
        /// Folder of the bundle.
        folder: PathBuf,
        /// Trusted public key file, or a folder of them.
        #[arg(long, value_name = "PATH", env = "LINESIDE_TRUSTED_KEYS")]
        trusted_keys: PathBuf,
        /// Minimum number of trusted keys that have signed.
        #[arg(long, value_name = "N", default_value_t = 1, env = "LINESIDE_SIGNATURE_THRESHOLD")]
        signature_threshold: usize,
    },
}

/// A number of MiB in bytes; the largest number of bytes where they are more.
fn bytes_of_mib(mib: u64) -> u64 {
    mib.saturating_mul(1 << 20)
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    // A bundle is for other nodes and readable; everything else stays in the data folder.
    if !matches!(arguments.command, Command::Export { .. }) {
        files::private_by_default();
    }
    let root = arguments.data.data_dir.join(STORE_FOLDER);
    // A mistyped folder must not be created. Only an import may create the store.
    if !root.is_dir() && !matches!(arguments.command, Command::Import { .. }) {
        let message = format!(
            "--data-dir {} does not contain a model store; specify the data folder of the agent",
            arguments.data.data_dir.display()
        );
        return Err(Failure::Failed(anyhow::anyhow!(message)));
    }
    let open = || -> anyhow::Result<Store> {
        Store::open(&root, bytes_of_mib(arguments.store_mib_max), Index::off()).context("cannot open the store")
    };
    let last_good = LastGoodVersions::read(&arguments.data.data_dir);
    let json = arguments.json;
    match arguments.command {
        Command::Ls => Ok(list(&open()?, &last_good, json)?),
        Command::Verify => Ok(verify(&open()?, json)?),
        Command::Gc { dry_run, room } => Ok(evict(&open()?, &last_good.digests(), bytes_of_mib(room), dry_run, json)?),
        Command::Pin { version } => pin(&open()?, &version, true),
        Command::Unpin { version } => pin(&open()?, &version, false),
        Command::Release { digest } => {
            let digest = Digest::parse(&digest).map_err(|error| Failure::Usage(vec![error.to_string()]))?;
            let is_released =
                open()?.delete_digest_record(DigestRecordKind::Failure, &digest).map_err(anyhow::Error::from)?;
            if !is_released {
                return Err(Failure::Failed(anyhow::anyhow!("the store has no failure record of {digest}")));
            }
            print_output(json, &json!({"released": digest}), &format!("{digest} is released from quarantine"));
            Ok(())
        }
        Command::ResetHighestVersions => {
            let mut last_good = last_good;
            let highest = last_good.reset_highest().map_err(anyhow::Error::from)?;
            let names: Vec<String> = highest.iter().map(|(name, version)| format!("{name}:{version}")).collect();
            let text = format!("the highest versions are now {}", names.join(" "));
            let text = if names.is_empty() { "no model has a highest version any more".to_owned() } else { text };
            print_output(json, &json!({"highestVersions": highest}), &text);
            Ok(())
        }
        Command::Export { model, output, key } => {
            let (name, version) = parse_version(&model, false)?;
            let key = SigningKey::read(&key).context("--key")?;
            let bar = byte_bar("exporting");
            let selector = VersionSelector { name, version };
            let progress = |progress| match progress {
                BundleProgress::Total(bytes) => bar.set_length(bytes),
                BundleProgress::Advanced(bytes) => bar.inc(bytes),
            };
            let versions = bundle::export(&open()?, &selector, &output, &key, progress).map_err(anyhow::Error::from)?;
            bar.finish_and_clear();
            print_versions(json, "exported", &versions, &output);
            Ok(())
        }
        Command::Import { folder, trusted_keys, signature_threshold } => {
            let keys = Keyring::read(&trusted_keys, signature_threshold)
                .map_err(|error| Failure::Usage(vec![format!("--trusted-keys: {}", error_chain(&error))]))?;
            let bar = byte_bar("importing");
            let store = open()?;
            let progress = |progress| match progress {
                BundleProgress::Total(bytes) => bar.set_length(bytes),
                BundleProgress::Advanced(bytes) => bar.inc(bytes),
            };
            let versions =
                bundle::import(&store, &folder, &keys, &last_good.digests(), progress).map_err(anyhow::Error::from)?;
            bar.finish_and_clear();
            print_versions(json, "imported", &versions, &folder);
            Ok(())
        }
    }
}

/// One version in the output of `ls`.
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
        let failure_record: Option<FailureRecord> = store.read_digest_record(&blob.digest);
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
                quarantine: failure_record.clone().filter(|record| record.quarantined),
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
        let marks: Vec<&str> = marks.iter().filter(|(is_set, _)| *is_set).map(|(_, mark)| *mark).collect();
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
    let bar = byte_bar("verifying");
    bar.set_length(store.usage()?.bytes);
    let names: BTreeMap<Digest, Vec<String>> = store
        .blobs()?
        .into_iter()
        .map(|blob| (blob.digest, blob.versions.iter().map(VersionRecord::to_string).collect()))
        .collect();
    let outcomes = store.verify(|bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    let damaged = outcomes.iter().filter(|(_, outcome)| outcome.is_err()).count();
    if json {
        let entries: Vec<_> = outcomes
            .iter()
            .map(|(digest, outcome)| {
                let reason = outcome.as_ref().err().map(|error| error_chain(error));
                json!({"digest": digest, "versions": names.get(digest), "ok": outcome.is_ok(), "reason": reason})
            })
            .collect();
        write_out(&json!({"blobs": entries, "damaged": damaged}).to_string());
    } else {
        for (digest, outcome) in &outcomes {
            let versions = names.get(digest).map(|names| names.join(" ")).unwrap_or_default();
            match outcome {
                Ok(bytes) => write_out(&format!("ok       {digest}  {}  {versions}", format_mib(*bytes))),
                Err(error) => write_out(&format!("DAMAGED  {digest}  {versions}: {}", error_chain(error))),
            }
        }
    }
    anyhow::ensure!(damaged == 0, "{damaged} of {} files were damaged", outcomes.len());
    Ok(())
}

fn evict(store: &Store, protected: &BTreeSet<Digest>, room: u64, dry_run: bool, json: bool) -> anyhow::Result<()> {
    let evicted =
        if dry_run { store.plan_eviction(room, protected)?.evicted } else { store.free_space(room, protected)? };
    let bytes: u64 = evicted.iter().map(|blob| blob.bytes).sum();
    let names = |blob: &Blob| {
        let names: Vec<String> = blob.versions.iter().map(VersionRecord::to_string).collect();
        if names.is_empty() { "no version".to_owned() } else { names.join(" ") }
    };
    if json {
        let entries: Vec<_> = evicted
            .iter()
            .map(|blob| json!({"digest": blob.digest, "bytes": blob.bytes, "versions": names(blob)}))
            .collect();
        write_out(&json!({"evicted": entries, "bytes": bytes, "dryRun": dry_run}).to_string());
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
    let (name, number) = parse_version(version, true)?;
    let number = number.unwrap_or_default();
    if store.set_pinned(&name, number, pinned).map_err(anyhow::Error::from)? {
        write_out(&format!("{name}:{number} is {}", if pinned { "pinned" } else { "not pinned" }));
        Ok(())
    } else {
        Err(Failure::Failed(anyhow::anyhow!(
            "{name}:{number} is not in the store; `lineside store ls` lists the versions in the store"
        )))
    }
}

/// Parses `name:version`. The version is optional unless `needs_version` is set.
fn parse_version(text: &str, needs_version: bool) -> Result<(String, Option<u64>), Failure> {
    let invalid = || {
        Failure::Usage(vec![format!("`{text}` is not a model version; expected a name and a number, such as parts:3")])
    };
    let (name, version) = match text.split_once(':') {
        Some((name, version)) => (name, Some(version.parse::<u64>().map_err(|_| invalid())?)),
        None if needs_version => return Err(invalid()),
        None => (text, None),
    };
    if lineside_api::names::is_name(name) { Ok((name.to_owned(), version)) } else { Err(invalid()) }
}

/// Prints the versions that were exported or imported.
fn print_versions(json: bool, verb: &str, versions: &[VersionRecord], folder: &Path) {
    let names: Vec<String> = versions.iter().map(VersionRecord::to_string).collect();
    print_output(
        json,
        &json!({verb: names, "folder": folder, "at": clock::rfc3339(SystemTime::now())}),
        &format!("{verb} {} ({})", names.join(" "), folder.display()),
    );
}

/// Prints `report` with `--json`, and `text` without.
fn print_output(json: bool, report: &serde_json::Value, text: &str) {
    if json {
        write_out(&report.to_string());
    } else {
        write_out(text);
    }
}
