//! Names of the spool's files and folders.

use std::path::{Path, PathBuf};

use crate::record::RecordKind;

/// The file that stores which positions of a partition are completed.
pub(crate) const CURSOR: &str = "cursor";
/// The cursor while it is replaced.
pub(crate) const CURSOR_TMP: &str = "cursor.tmp";

/// The folder of the spool in the data folder of an agent.
pub fn folder(data_dir: &Path) -> PathBuf {
    data_dir.join("spool")
}

/// The folder of a partition.
pub(crate) fn partition_folder(root: &Path, kind: RecordKind) -> PathBuf {
    root.join(kind.name())
}
