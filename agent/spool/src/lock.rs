//! The lock that gives one process exclusive use of a spool.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::error::{IoContext as _, SpoolError};
use crate::layout::LOCK;

const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Locks the spool for this process, until the returned file is closed. Waits up to `timeout` for another process to
/// release it.
pub(crate) fn acquire(folder: &Path, timeout: Duration) -> Result<File, SpoolError> {
    let path = folder.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path).during("create", &path)?;
    let started = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if started.elapsed() < timeout => {
                std::thread::park_timeout(RETRY_INTERVAL);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(SpoolError::Locked { path }),
            Err(error) => return Err(std::io::Error::from(error)).during("lock", &path),
        }
    }
}
