//! Removes files that earlier runs of the agent left in the store.

use std::path::Path;
use std::time::Duration;
use std::{fs, io};

use serde::{Deserialize, Serialize};

use lineside_common::digest::Digest;
use lineside_common::files;

use super::error::{Result, StoreError};
use super::partial_blob::PartialBlob;
use super::records::{DigestRecord, DigestRecordKind};
use super::{RECORD_FOLDERS, Store, listing};

/// Failure records that are kept. The oldest are removed.
const FAILURE_RECORDS_MAX: usize = 1000;
/// A partial file that was not written for this long is removed.
const PARTIAL_AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// The field of an admission record that the cleanup reads. The full type belongs to the admission.
#[derive(Serialize, Deserialize)]
struct AdmissionSubject {
    digest: Digest,
}

impl DigestRecord for AdmissionSubject {
    const KIND: DigestRecordKind = DigestRecordKind::Admission;
}

impl Store {
    /// Removes temporary files, partial files that are older than seven days, admission records without a blob, and the
    /// oldest failure records beyond 1000. Only the agent calls this, before it starts to write.
    ///
    /// # Errors
    /// When a folder cannot be read or a file cannot be removed.
    pub fn remove_stale_files(&self) -> Result<()> {
        let _lock = self.lock()?;
        for name in RECORD_FOLDERS {
            remove_temporary_files(&self.folder(name))?;
        }
        self.remove_old_partial_files()?;
        self.remove_orphaned_admission_records()?;
        self.remove_surplus_failure_records()
    }

    fn remove_old_partial_files(&self) -> Result<()> {
        let folder = self.folder("partial");
        for (digest, metadata) in listing::digest_files(&folder)? {
            let age = metadata.modified().ok().and_then(|modified| modified.elapsed().ok()).unwrap_or_default();
            if age > PARTIAL_AGE_MAX {
                PartialBlob::remove(&folder.join(digest.hex()))?;
            }
        }
        Ok(())
    }

    fn remove_orphaned_admission_records(&self) -> Result<()> {
        for (key, _) in listing::digest_files(&self.folder(DigestRecordKind::Admission.folder()))? {
            let subject: Option<AdmissionSubject> = self.read_digest_record(&key);
            if subject.is_none_or(|subject| !self.contains_blob(&subject.digest)) {
                self.delete_digest_record(DigestRecordKind::Admission, &key)?;
            }
        }
        Ok(())
    }

    fn remove_surplus_failure_records(&self) -> Result<()> {
        let mut records = listing::digest_files(&self.folder(DigestRecordKind::Failure.folder()))?;
        records.sort_by_key(|(_, metadata)| metadata.modified().ok());
        let surplus = records.len().saturating_sub(FAILURE_RECORDS_MAX);
        for (digest, _) in &records[..surplus] {
            self.delete_digest_record(DigestRecordKind::Failure, digest)?;
        }
        Ok(())
    }
}

/// Removes the `.tmp` files that an interrupted atomic replacement leaves.
fn remove_temporary_files(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(StoreError::io(folder))?.filter_map(io::Result::ok) {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "tmp") {
            files::remove(&path).map_err(StoreError::io(&path))?;
        }
    }
    Ok(())
}
