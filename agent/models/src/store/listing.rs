//! Lists the files of a folder that are named by a digest.

use std::fs::{self, Metadata};
use std::path::Path;

use lineside_common::digest::Digest;

use super::error::{Result, StoreError};

/// The regular files of a folder that are named by a digest, with or without `.json`. Other files do not belong to the
/// store and are left out.
pub(super) fn digest_files(folder: &Path) -> Result<Vec<(Digest, Metadata)>> {
    let mut listed = Vec::new();
    for entry in fs::read_dir(folder).map_err(StoreError::io(folder))? {
        let entry = entry.map_err(StoreError::io(folder))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let Ok(digest) = Digest::from_hex(name.strip_suffix(".json").unwrap_or(name)) else { continue };
        // A file without metadata was removed since the folder was listed.
        if let Ok(metadata) = entry.metadata()
            && metadata.is_file()
        {
            listed.push((digest, metadata));
        }
    }
    Ok(listed)
}
