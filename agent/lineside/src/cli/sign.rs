//! `lineside keygen` and `lineside sign`: generate Ed25519 keys, and sign model versions with them. A signature is a DSSE envelope
//! over the name, version, digest, size and expiry of a version. `lineside_models::signing` defines the format and has its tests.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use clap::Args;

use super::{Failure, write_out};
use lineside_api::envelope::Envelope;
use lineside_common::clock;
use lineside_common::digest::Digest;
use lineside_common::error_chain;
use lineside_common::files;
use lineside_models::signing::{MODEL_PAYLOAD, SigningKey, Statement, key_id, parse_time};

/// Maximum size of an envelope file, in bytes.
const ENVELOPE_BYTES_MAX: u64 = 1 << 20;

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

Examples:
  lineside sign model.onnx --name surface-defects --version 3 --key release.key
  lineside sign model.onnx --name surface-defects --version 3 --key release.key --json > one.json
  lineside sign model.onnx --name surface-defects --version 3 --key second.key --envelope one.json")]
pub(super) struct SignArguments {
    /// ONNX file of the model.
    model: PathBuf,
    /// Name of the model, as in the manifest.
    #[arg(long)]
    name: String,
    /// Version of the model, as in the manifest.
    #[arg(long)]
    version: u64,
    /// Private key file.
    #[arg(long, value_name = "KEY")]
    key: PathBuf,
    /// Expiry of the signature, such as 2027-12-31 or 2027-12-31T12:00:00Z. A node does not start to serve the version after
    /// this time; a version that already serves continues to serve [default: none].
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Add the signature to this envelope, which must have been signed for the same name, version, digest, size and expiry.
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
    if !lineside_api::names::is_name(&arguments.name) {
        return Err(usage_error(format!("--name: `{}` is not a valid model name", arguments.name)));
    }
    let expires = match &arguments.expires {
        Some(text) => Some(clock::rfc3339(
            parse_time(text).map_err(|error| usage_error(format!("--expires: {}", error_chain(&error))))?,
        )),
        None => None,
    };
    let key = SigningKey::read(&arguments.key).context("--key")?;
    let file = files::open_regular(&arguments.model).with_context(|| arguments.model.display().to_string())?;
    let (digest, size) = Digest::of_reader(file).with_context(|| arguments.model.display().to_string())?;
    let statement = Statement { name: arguments.name.clone(), version: arguments.version, digest, size, expires };
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
            arguments.name, arguments.version
        ));
    }
    Ok(())
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
        Err(failed("the envelope was signed for another model file, name, version or expiry".to_owned()))
    }
}
