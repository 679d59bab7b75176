//! The store's files for the other agents of the site: `GET /v1/blobs/sha256/<hex>`, behind the token they share. A part
//! can be asked for (`Range: bytes=N-` or `bytes=N-M`, RFC 9110 section 14), so that a cut transfer goes on.

use std::io::SeekFrom;
use std::path::Path;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use lineside_common::digest::Digest;
use lineside_models::fetch::read_peer_token;
use lineside_models::store::Store;

/// Bytes that are read and sent at a time.
const PIECE_BYTES: usize = 64 << 10;

/// Answers a peer.
pub(super) async fn answer(store: &Arc<Store>, token: &Path, hex: &str, headers: &HeaderMap) -> Response {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let refuse = |status: StatusCode, why: &str| (status, Json(json!({"error": why}))).into_response();
    let wanted = match read_peer_token(token) {
        Ok(token) => token,
        Err(error) => {
            let reason = lineside_common::error_chain(&error);
            tracing::warn!(event = "peer_token_unusable", reason, "Cannot answer a peer");
            return refuse(StatusCode::SERVICE_UNAVAILABLE, "the token cannot be read");
        }
    };
    let given = text(header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    // Digests are compared, so that the time it takes tells nothing of the token.
    if Digest::of(given.as_bytes()) != Digest::of(wanted.as_bytes()) {
        return refuse(StatusCode::UNAUTHORIZED, "the token of the site's agents is needed");
    }
    let Ok(digest) = Digest::from_hex(hex) else {
        return refuse(StatusCode::BAD_REQUEST, "expected 64 hexadecimal digits");
    };
    let Some(file) = store.open_blob(&digest) else {
        return refuse(StatusCode::NOT_FOUND, "there is no such blob here");
    };
    let Ok(bytes) = file.metadata().map(|facts| facts.len()) else {
        return refuse(StatusCode::INTERNAL_SERVER_ERROR, "the blob cannot be read");
    };
    let range = match text(header::RANGE).map(|range| part(range, bytes)) {
        None => None,
        Some(Some(range)) => Some(range),
        Some(None) => {
            let headers = [(header::CONTENT_RANGE, format!("bytes */{bytes}"))];
            return (headers, refuse(StatusCode::RANGE_NOT_SATISFIABLE, "there is no such part")).into_response();
        }
    };
    let (first, length) = range.map_or((0, bytes), |(first, last)| (first, last + 1 - first));
    let mut file = tokio::fs::File::from_std(file);
    if file.seek(SeekFrom::Start(first)).await.is_err() {
        return refuse(StatusCode::INTERNAL_SERVER_ERROR, "the blob cannot be read");
    }
    let pieces = stream::unfold((file, length), async |(mut file, left)| {
        let mut piece = vec![0; PIECE_BYTES.min(usize::try_from(left).unwrap_or(PIECE_BYTES))];
        match file.read(&mut piece).await {
            Ok(0) => None,
            Ok(read) => {
                piece.truncate(read);
                Some((Ok(Bytes::from(piece)), (file, left - read as u64)))
            }
            Err(error) => Some((Err(error), (file, 0))),
        }
    });
    let answer = Response::builder()
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CONTENT_LENGTH, length)
        .header(header::ACCEPT_RANGES, "bytes")
        .header(header::ETAG, format!("\"{digest}\""));
    let answer = match range {
        Some((first, last)) => answer
            .status(StatusCode::PARTIAL_CONTENT)
            .header(header::CONTENT_RANGE, format!("bytes {first}-{last}/{bytes}")),
        None => answer,
    };
    answer.body(Body::from_stream(pieces)).unwrap_or_else(|_| refuse(StatusCode::INTERNAL_SERVER_ERROR, "no answer"))
}

/// First and last byte of the one part that is asked for; `None` when there is no such part of `bytes`.
fn part(range: &str, bytes: u64) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.trim().parse().ok()?;
    let last = match last.trim() {
        "" => bytes.checked_sub(1)?,
        last => last.parse::<u64>().ok()?.min(bytes.checked_sub(1)?),
    };
    (first <= last).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_part_can_be_asked_for() {
        assert_eq!(part("bytes=0-", 10), Some((0, 9)));
        assert_eq!(part("bytes=3-5", 10), Some((3, 5)));
        assert_eq!(part("bytes=9-99", 10), Some((9, 9)));
        for wrong in ["bytes=10-", "bytes=5-3", "bytes=-5", "bytes=0-1,3-4", "lines=1-2", "bytes=x-", ""] {
            assert_eq!(part(wrong, 10), None, "{wrong}");
        }
        assert_eq!(part("bytes=0-", 0), None);
    }
}
