//! The source `dir:`: the pictures of a folder, in the order of their names.
//!
//! With a frame rate the source behaves like a camera: a frame that no model takes in time is replaced by the next one and
//! counted as skipped. With `fps: 0` the source waits for the model and drops no frame. The folder is listed at the beginning
//! of each pass.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{CameraError, FRAME_BYTES_MAX, Health, Pace, SourcePolicy, captured, retry};
use crate::mailbox::Mailbox;
use lineside_common::error_chain;

/// File name suffixes of pictures, in lower case.
const SUFFIXES: [&str; 3] = ["jpg", "jpeg", "png"];

/// A folder whose pictures are played.
pub(super) struct FolderSource<'a> {
    folder: &'a Path,
    /// Whether the source starts again after the last picture.
    repeat: bool,
    policy: &'a SourcePolicy,
    interval: Option<Duration>,
    health: &'a Health,
    /// Names of the files that were logged as unreadable, so that each is logged once. Bounded by the number of files.
    unreadable: Mutex<BTreeSet<String>>,
}

impl<'a> FolderSource<'a> {
    pub(super) fn new(
        folder: &'a Path,
        repeat: bool,
        policy: &'a SourcePolicy,
        interval: Option<Duration>,
        health: &'a Health,
    ) -> Self {
        Self { folder, repeat, policy, interval, health, unreadable: Mutex::default() }
    }

    pub(super) async fn play(&self, mailbox: &Mailbox) {
        retry(self.health, || self.run(mailbox)).await;
        // A model may still be processing the last frame; the stream ends when it has finished.
        mailbox.drained().await;
        self.health.ended();
    }

    /// Plays the folder, repeatedly if configured.
    async fn run(&self, mailbox: &Mailbox) -> Result<(), CameraError> {
        let mut pace = Pace::new(self.interval);
        loop {
            self.play_once(&mut pace, mailbox).await?;
            if !self.repeat {
                return Ok(());
            }
        }
    }

    /// Plays all pictures of the folder. An unreadable file is skipped; a folder without a readable picture is an error.
    async fn play_once(&self, pace: &mut Pace, mailbox: &Mailbox) -> Result<(), CameraError> {
        let (folder, policy) = (self.folder.to_owned(), self.policy.clone());
        let allowed = move || {
            let allowed = policy.files.folder(&folder).map_err(|error| std::io::Error::other(error_chain(&error)));
            allowed.map_err(|error| std::io::Error::other(format!("{}: {error}", folder.display())))
        };
        let files = blocking(move || pictures(&allowed()?)).await.map_err(CameraError::Unreachable)?;
        if files.is_empty() {
            return Err(CameraError::Rejected(format!("{} has no .jpg, .jpeg or .png file", self.folder.display())));
        }
        let mut has_readable = false;
        for file in files {
            pace.tick().await;
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned());
            let policy = self.policy.clone();
            match blocking(move || policy.read(&file, FRAME_BYTES_MAX as u64)).await {
                Ok(bytes) => {
                    has_readable = true;
                    self.deliver(bytes.into(), name, mailbox).await;
                }
                Err(reason) => self.report_unreadable(name.unwrap_or_default(), &reason),
            }
        }
        if has_readable {
            Ok(())
        } else {
            Err(CameraError::Rejected(format!("no picture in {} is readable", self.folder.display())))
        }
    }

    async fn deliver(&self, picture: Bytes, name: Option<String>, mailbox: &Mailbox) {
        self.health.up();
        if self.interval.is_some() {
            mailbox.offer(captured(picture, name, true));
        } else {
            mailbox.put(captured(picture, name, false)).await;
        }
    }

    /// Counts an unreadable file, and logs it the first time.
    fn report_unreadable(&self, file: String, reason: &str) {
        self.health.metrics.failed.inc();
        if self.unreadable.lock().insert(file.clone()) {
            tracing::warn!(
                event = "frame_unreadable",
                stream = self.health.stream,
                file,
                reason,
                "Frame cannot be read and is skipped"
            );
        }
    }
}

/// Runs file system calls on the pool for blocking work.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// The pictures of a folder, sorted by name. Hidden files are ignored, so that a file can be copied under a hidden name and
/// renamed when it is complete.
fn pictures(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let is_picture = |path: &Path| {
        let suffix = path.extension().and_then(OsStr::to_str).unwrap_or_default().to_lowercase();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        SUFFIXES.contains(&suffix.as_str()) && !is_hidden
    };
    let entries = std::fs::read_dir(folder)
        .map_err(|error| std::io::Error::new(error.kind(), format!("{}: {error}", folder.display())))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if is_picture(&path) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_sorted_by_name_and_other_files_are_ignored() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.JPG", "a.png", "c.jpeg", ".hidden.jpg", "notes.txt", "jpg"] {
            std::fs::write(folder.path().join(name), b"").unwrap();
        }
        let names: Vec<_> = pictures(folder.path())
            .unwrap()
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["a.png", "b.JPG", "c.jpeg"]);
        assert!(pictures(Path::new("/no/such")).unwrap_err().to_string().starts_with("/no/such: "));
    }
}
