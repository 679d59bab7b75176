//! `lineside keygen` and `lineside sign`: generate Ed25519 keys, and sign model versions with them. A signature is a DSSE envelope
//! over the name, version, digest, size and expiry of a version, whether it is a rollback, and the digest of the manifest's spec. `lineside_models::signing` defines the format and has its tests.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use clap::Args;

use super::{Failure, write_out};
use lineside_api::envelope::Envelope;
use lineside_api::kinds::manifest::{self, Object};
use lineside_api::spec::ModelSpec;
use lineside_common::clock;
use lineside_common::digest::Digest;
use lineside_common::error_chain;
use lineside_common::files;
use lineside_models::signing::{MODEL_PAYLOAD, SigningKey, Statement, key_id, parse_time, spec_digest};

/// Maximum size of an envelope file, in bytes.
const ENVELOPE_BYTES_MAX: u64 = 1 << 20;

/// Maximum size of a manifest file, in bytes.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

#[derive(Args)]
#[command(after_help = "\
Keep the private key where models are built, and copy the .pub file to the nodes (lineside run --trusted-keys).
Keys of `openssl genpkey -algorithm ed25519` are also accepted.")]
pub(super) struct KeygenArguments {
    /// File for the private key. The public key is written to the same path with .pub appended. Existing files are not
    /// overwritten.
    file: PathBuf,
}

#[derive(Args)]
#[command(after_help = "\
Prints the spec.source of the manifest as YAML, or only the envelope with --json.

The signature covers spec.task, spec.input and spec.output of the manifest. Without --manifest they must be empty.

Examples:
  lineside sign model.onnx --manifest model.yaml --key release.key
  lineside sign model.onnx --manifest model.yaml --key release.key --json > one.json
  lineside sign model.onnx --manifest model.yaml --key second.key --envelope one.json
  lineside sign model.onnx --name surface-defects --version 3 --key release.key")]
pub(super) struct SignArguments {
    /// ONNX file of the model.
    model: PathBuf,
    /// Manifest file from which name, version, rollback and spec are taken. With several models in it, --name selects one.
    #[arg(long, value_name = "FILE")]
    manifest: Option<PathBuf>,
    /// Name of the model, as in the manifest.
    #[arg(long, required_unless_present = "manifest")]
    name: Option<String>,
    /// Version of the model, as in the manifest.
    #[arg(long, required_unless_present = "manifest", conflicts_with = "manifest")]
    version: Option<u64>,
    /// Allow the version to replace a higher one where the manifest sets rollback: true. An envelope can be used again;
    /// limit it with --expires.
    #[arg(long)]
    rollback: bool,
    /// Private key file.
    #[arg(long, value_name = "KEY")]
    key: PathBuf,
    /// Expiry of the signature, such as 2027-12-31 or 2027-12-31T12:00:00Z. A node does not start to serve the version after
    /// this time; a version that already serves continues to serve [default: none].
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Add the signature to this envelope, which must have been signed for the same statement.
    #[arg(long, value_name = "FILE")]
    envelope: Option<PathBuf>,
    /// Print the envelope as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn keygen(arguments: &KeygenArguments) -> Result<(), Failure> {
    let key = SigningKey::generate(&arguments.file).map_err(anyhow::Error::from)?;
    let public = format!("{}.pub", arguments.file.display());
    write_out(&format!("{} and {public}, key {}", arguments.file.display(), key_id(&key.public())));
    Ok(())
}

pub(super) fn sign(arguments: &SignArguments) -> Result<(), Failure> {
    let usage_error = |message: String| Failure::Usage(vec![message]);
    let subject = subject(arguments)?;
    let expires = match &arguments.expires {
        Some(text) => Some(clock::rfc3339(
            parse_time(text).map_err(|error| usage_error(format!("--expires: {}", error_chain(&error))))?,
        )),
        None => None,
    };
    let key = SigningKey::read(&arguments.key).context("--key")?;
    let file = files::open_regular(&arguments.model).with_context(|| arguments.model.display().to_string())?;
    let (digest, size) = Digest::of_reader(file).with_context(|| arguments.model.display().to_string())?;
    let statement = Statement {
        name: subject.name,
        version: subject.version,
        digest,
        size,
        expires,
        rollback: subject.rollback,
        spec_digest: spec_digest(&subject.spec).context("--manifest")?,
    };
    let mut envelope = match &arguments.envelope {
        Some(path) => read_envelope(path, &statement, arguments.expires.is_some())?,
        None => {
            let payload = serde_json::to_vec(&statement).map_err(anyhow::Error::from)?;
            Envelope::new(MODEL_PAYLOAD, &payload)
        }
    };
    lineside_models::signing::sign(&mut envelope, &key).map_err(anyhow::Error::from)?;
    let text = serde_json::to_string(&envelope).map_err(anyhow::Error::from)?;
    if arguments.json {
        write_out(&text);
    } else {
        write_out(&format!(
            "# For the manifest of {} version {}. Replace the URI.\nsource:\n  uri: https://...\n  \
             digest: {digest}\n  size: {size}\n  signature: {text}",
            statement.name, statement.version
        ));
    }
    Ok(())
}

/// What a signature is about, apart from the file of the model.
struct Subject {
    name: String,
    version: u64,
    rollback: bool,
    spec: ModelSpec,
}

/// The subject, from the manifest or from the flags.
fn subject(arguments: &SignArguments) -> Result<Subject, Failure> {
    let usage_error = |message: String| Failure::Usage(vec![message]);
    let Some(path) = &arguments.manifest else {
        let name = arguments.name.clone().unwrap_or_default();
        if !lineside_api::names::is_name(&name) {
            return Err(usage_error(format!("--name: `{name}` is not a valid model name")));
        }
        let version = arguments.version.unwrap_or_default();
        return Ok(Subject { name, version, rollback: arguments.rollback, spec: ModelSpec::default() });
    };
    let place = format!("--manifest {}", path.display());
    let bytes = files::read_bounded(path, MANIFEST_BYTES_MAX).with_context(|| place.clone())?;
    let text = String::from_utf8(bytes).with_context(|| place.clone())?;
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    // Verdict rules belong to streams, which are not signed.
    let objects = manifest::read(&text, folder, &|_| Ok(()))
        .map_err(|errors| usage_error(format!("{place}: {}", errors.list().join("; "))))?;
    let models = objects.into_iter().filter_map(|object| match object {
        Object::Model(model) => {
            Some(model).filter(|model| arguments.name.as_ref().is_none_or(|name| *name == model.name))
        }
        Object::Stream(_) => None,
    });
    match <[_; 1]>::try_from(models.collect::<Vec<_>>()) {
        Ok([model]) => Ok(Subject {
            name: model.name,
            version: model.version,
            rollback: model.rollback || arguments.rollback,
            spec: model.spec,
        }),
        Err(models) if models.is_empty() => Err(usage_error(format!("{place}: does not contain the EdgeModel"))),
        Err(_) => Err(usage_error(format!("{place}: contains several EdgeModels; select one with --name"))),
    }
}

/// Reads an envelope that other keys have signed. Its statement must equal `expected`; without `--expires` the expiry of the
/// envelope is kept.
fn read_envelope(path: &Path, expected: &Statement, has_expiry: bool) -> Result<Envelope, Failure> {
    let file = path.display().to_string();
    let failed = |reason: String| Failure::Failed(anyhow!("--envelope {file}: {reason}"));
    let bytes = files::read_bounded(path, ENVELOPE_BYTES_MAX).map_err(|error| failed(error.to_string()))?;
    let envelope: Envelope = serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?;
    let payload = envelope.decoded().map_err(|error| failed(error.to_string()))?;
    let mut statement: Statement = serde_json::from_slice(&payload).map_err(|error| failed(error.to_string()))?;
    if !has_expiry {
        statement.expires = None;
    }
    if envelope.payload_type == MODEL_PAYLOAD && statement == *expected {
        Ok(envelope)
    } else {
        Err(failed(
            "the envelope was signed for another model file, name, version, expiry, rollback or spec".to_owned(),
        ))
    }
}
