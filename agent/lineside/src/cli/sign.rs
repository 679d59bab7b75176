//! `lineside keygen` and `lineside sign`: keys, and signatures of model versions.

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

const ENVELOPE_BYTES_MAX: u64 = 1 << 20;

#[derive(Args)]
#[command(after_help = "\
The private key stays where models are built; give the .pub file to the nodes (lineside run --trusted-keys).
`openssl genpkey -algorithm ed25519` makes keys that work as well.")]
pub(super) struct KeygenArguments {
    /// Where the private key goes; the public one goes beside it with .pub added. Nothing is overwritten.
    file: PathBuf,
}

#[derive(Args)]
#[command(after_help = "\
Prints what belongs into the manifest's spec, or with --json the envelope alone.

Examples:
  lineside sign model.onnx --name surface-defects --version 3 --key release.key
  lineside sign model.onnx --name surface-defects --version 3 --key release.key --json > one.json
  lineside sign model.onnx --name surface-defects --version 3 --key second.key --envelope one.json")]
pub(super) struct SignArguments {
    /// The ONNX file.
    model: PathBuf,
    /// The model's name, as in the manifest.
    #[arg(long)]
    name: String,
    /// The model's version, as in the manifest.
    #[arg(long)]
    version: u64,
    /// The private key.
    #[arg(long, value_name = "KEY")]
    key: PathBuf,
    /// Until when the version may begin to serve: 2027-12-31, or 2027-12-31T12:00:00Z. What serves by then goes on.
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Add a signature to this envelope, which has to say the same.
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
    let usage = |why: String| Failure::Usage(vec![why]);
    if !lineside_api::names::is_name(&arguments.name) {
        return Err(usage(format!("--name: `{}` is no name of a model", arguments.name)));
    }
    let expires = match &arguments.expires {
        Some(text) => Some(clock::rfc3339(
            parse_time(text).map_err(|error| usage(format!("--expires: {}", error_chain(&error))))?,
        )),
        None => None,
    };
    let key = SigningKey::read(&arguments.key).context("--key")?;
    let file = files::open_regular(&arguments.model).with_context(|| arguments.model.display().to_string())?;
    let (digest, size) = Digest::of_reader(file).with_context(|| arguments.model.display().to_string())?;
    let statement = Statement { name: arguments.name.clone(), version: arguments.version, digest, size, expires };
    let mut envelope = match &arguments.envelope {
        Some(path) => existing(path, &statement, arguments.expires.is_some())?,
        None => {
            let payload = serde_json::to_vec(&statement).map_err(anyhow::Error::from)?;
            Envelope::new(MODEL_PAYLOAD, &payload)
        }
    };
    lineside_models::signing::sign(&mut envelope, &key).map_err(anyhow::Error::from)?;
    let text = serde_json::to_string(&envelope).map_err(anyhow::Error::from)?;
    match arguments.json {
        true => write_out(&text),
        false => write_out(&format!(
            "# For the manifest of {} version {}; the address is yours to fill in.\nsource:\n  uri: https://...\n  \
             digest: {digest}\n  size: {size}\n  signature: {text}",
            arguments.name, arguments.version
        )),
    }
    Ok(())
}

/// An envelope that others have signed. It must say what this signature is asked to say.
fn existing(path: &Path, wanted: &Statement, says_expiry: bool) -> Result<Envelope, Failure> {
    let shown = path.display().to_string();
    let failed = |why: String| Failure::Failed(anyhow!("--envelope {shown}: {why}"));
    let bytes = files::read_bounded(path, ENVELOPE_BYTES_MAX).map_err(|error| failed(error.to_string()))?;
    let envelope: Envelope = serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?;
    let payload = envelope.decoded().map_err(|error| failed(error.to_string()))?;
    let mut said: Statement = serde_json::from_slice(&payload).map_err(|error| failed(error.to_string()))?;
    if !says_expiry {
        said.expires = None;
    }
    match envelope.payload_type == MODEL_PAYLOAD && said == *wanted {
        true => Ok(envelope),
        false => Err(failed("it vouches for something else than this model, name, version and expiry".to_owned())),
    }
}
