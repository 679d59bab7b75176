//! `dir:`: the pictures of a folder, in the order of their names.
//!
//! At a given pace it plays like a camera: a frame that nobody took in time is replaced by the next, and counted. With
//! `fps: 0` it waits for the model instead and loses nothing. The folder is listed anew for every round.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::{CameraError, FRAME_BYTES_MAX, Health, Pace, captured, retry};
use lineside_common::files::read_bounded;
use crate::mailbox::Mailbox;

const SUFFIXES: [&str; 3] = ["jpg", "jpeg", "png"];

pub(super) async fn play(
    folder: &Path,
    repeat: bool,
    interval: Option<Duration>,
    mailbox: &Mailbox,
    health: Health,
) {
    // Files already complained about, so that a loop does not complain in every round. Bounded by the folder.
    let unreadable = Mutex::new(BTreeSet::new());
    retry(&health, || round(folder, repeat, interval, mailbox, &health, &unreadable)).await;
    // A model may still be looking at the last frame; the stream ends when that is done.
    mailbox.drained().await;
    health.ended();
}

async fn round(
    folder: &Path,
    repeat: bool,
    interval: Option<Duration>,
    mailbox: &Mailbox,
    health: &Health,
    unreadable: &Mutex<BTreeSet<String>>,
) -> Result<(), CameraError> {
    let mut pace = Pace::new(interval);
    loop {
        let files = blocking({
            let folder = folder.to_owned();
            move || pictures(&folder)
        })
        .await
        .map_err(CameraError::Unreachable)?;
        if files.is_empty() {
            return Err(CameraError::Rejected(format!("{} holds no .jpg, .jpeg or .png file", folder.display())));
        }
        let mut played = 0;
        for file in files {
            pace.tick().await;
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned());
            let bytes = blocking(move || read_bounded(&file, FRAME_BYTES_MAX as u64)).await;
            let bytes = match bytes {
                Ok(bytes) => Bytes::from(bytes),
                Err(reason) => {
                    health.metrics.failed.inc();
                    let is_news = unreadable
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .insert(name.clone().unwrap_or_default());
                    if is_news {
                        tracing::warn!(
                            event = "frame_unreadable",
                            stream = health.stream,
                            file = name,
                            reason,
                            "frame cannot be read, going on"
                        );
                    }
                    continue;
                }
            };
            played += 1;
            health.up();
            match interval {
                Some(_) => mailbox.offer(captured(bytes, name, true)),
                None => mailbox.put(captured(bytes, name, false)).await,
            }
        }
        if played == 0 {
            return Err(CameraError::Rejected(format!("no picture in {} can be read", folder.display())));
        }
        if !repeat {
            return Ok(());
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// The pictures of a folder, sorted by name. Hidden files are left out, so that one being copied is not read half.
fn pictures(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let is_picture = |path: &Path| {
        let suffix = path.extension().and_then(OsStr::to_str).unwrap_or_default().to_lowercase();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        SUFFIXES.contains(&suffix.as_str()) && !is_hidden
    };
    let list = std::fs::read_dir(folder)
        .map_err(|error| std::io::Error::new(error.kind(), format!("{}: {error}", folder.display())))?;
    let mut files = Vec::new();
    for entry in list {
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
    fn pictures_come_by_name_and_other_files_do_not() {
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
