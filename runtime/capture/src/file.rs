//! The source `file:`: one file with a picture, or an MJPEG recording: concatenated JPEGs, as `ffmpeg -f mjpeg` writes them. A picture in a
//! recording that is cut off by the next one is dropped and counted.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use lineside_ipc::jpeg;
use lineside_ipc::jpeg::Extent;

use super::{CameraError, Health, Pace, SourcePolicy, captured, retry};
use crate::mailbox::Mailbox;

/// Largest recording in bytes; it is kept in memory while it is played.
const RECORDING_BYTES_MAX: u64 = 1 << 30;

pub(super) async fn play(
    path: &Path,
    policy: &SourcePolicy,
    interval: Option<Duration>,
    mailbox: &Mailbox,
    health: &Health,
) {
    retry(health, || play_once(path, policy, interval, mailbox, health)).await;
    mailbox.drained().await;
    health.ended();
}

/// Plays all frames of the file.
async fn play_once(
    path: &Path,
    policy: &SourcePolicy,
    interval: Option<Duration>,
    mailbox: &Mailbox,
    health: &Health,
) -> Result<(), CameraError> {
    let (file, policy) = (path.to_owned(), policy.clone());
    let bytes = tokio::task::spawn_blocking(move || policy.read(&file, RECORDING_BYTES_MAX))
        .await
        .map_err(std::io::Error::other)
        .flatten()
        .map_err(|error| CameraError::Unreachable(format!("{}: {error}", path.display())))?;
    if bytes.starts_with(&[0, 0, 1]) || bytes.starts_with(&[0, 0, 0, 1]) {
        let reason = "is H.264, which is not supported by this version; use MJPEG";
        return Err(CameraError::Rejected(format!("{} {reason}", path.display())));
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let mut rest = Bytes::from(bytes);
    let mut pace = Pace::new(interval);
    while let Some(frame) = next_frame(&mut rest) {
        let Some(frame) = frame else {
            health.metrics.failed.inc();
            continue;
        };
        pace.tick().await;
        health.up();
        if interval.is_some() {
            mailbox.offer(captured(frame, name.clone(), true));
        } else {
            mailbox.put(captured(frame, name.clone(), false)).await;
        }
    }
    Ok(())
}

/// Removes the next picture from the front, with the bytes between two JPEGs. Data that is not a complete JPEG is returned as
/// one piece, which the decoder identifies or rejects. The inner `None` is a picture that was cut off by the next one.
fn next_frame(rest: &mut Bytes) -> Option<Option<Bytes>> {
    if rest.is_empty() {
        return None;
    }
    match jpeg::extent(rest) {
        Extent::Complete(length) => {
            let frame = rest.split_to(length);
            let next = rest.windows(3).position(|bytes| bytes == [0xFF, 0xD8, 0xFF]).unwrap_or(rest.len());
            drop(rest.split_to(next));
            Some(Some(frame))
        }
        Extent::Interrupted(next) => {
            drop(rest.split_to(next));
            Some(None)
        }
        Extent::Truncated | Extent::NotJpeg => Some(Some(std::mem::take(rest))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_is_split_into_its_pictures() {
        let jpeg = [0xFF, 0xD8, 0xFF, 0xDA, 0x00, 0x02, 0x12, 0xFF, 0xD9];
        let mut recording = Bytes::from([&jpeg[..], b"\0\0", &jpeg, &jpeg[..7], &jpeg, &jpeg[..5], b""].concat());
        let frames: Vec<Option<Bytes>> = std::iter::from_fn(|| next_frame(&mut recording)).collect();
        let whole = || Some(Bytes::copy_from_slice(&jpeg));
        assert_eq!(frames, [whole(), whole(), None, whole(), Some(Bytes::copy_from_slice(&jpeg[..5]))]);
        let mut png = Bytes::from_static(b"\x89PNG...");
        assert_eq!(next_frame(&mut png).unwrap().unwrap().len(), 7);
        assert_eq!(next_frame(&mut png), None);
    }
}
