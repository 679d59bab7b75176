//! Bounded reads and durable writes of the store's JSON files.

use std::io;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use lineside_common::files;

use super::error::{Result, StoreError};

/// Upper bound of one JSON file.
const BYTES_MAX: u64 = 1 << 20;

/// Reads a file.
///
/// # Errors
/// When it cannot be read, or is not JSON of this type (`InvalidData`).
pub(super) fn try_read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    Ok(serde_json::from_slice(&files::read_bounded(path, BYTES_MAX)?)?)
}

/// Reads a file. `None` when it does not exist; a file that cannot be read is ignored with a warning, because every
/// record can be recreated.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    match try_read(path) {
        Ok(value) => Some(value),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(
                event = "store_record_unreadable",
                file = %path.display(),
                %error,
                "Ignoring an unreadable record of the store"
            );
            None
        }
    }
}

/// Replaces a file atomically.
pub(super) fn replace<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(io::Error::other).map_err(StoreError::io(path))?;
    files::replace(path, &text).map_err(StoreError::io(path))
}
