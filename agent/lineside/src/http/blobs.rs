//! Serves the files of the model store to the other agents of the site: `GET /v1/blobs/sha256/<hex>`. Clients authenticate with the
//! bearer token of the site. A request can select one range (`Range: bytes=N-` or `bytes=N-M`, RFC 9110 section 14), so that an
//! interrupted transfer resumes.

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

/// Size of the chunks that are read and sent, in bytes.
const CHUNK_BYTES: usize = 64 << 10;

/// Responds to the request of a peer for the blob with the digest `hex`.
pub(super) async fn serve_blob(store: &Arc<Store>, token: &Path, hex: &str, headers: &HeaderMap) -> Response {
    let header_value = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let error_response = |status: StatusCode, message: &str| (status, Json(json!({"error": message}))).into_response();
    let expected_token = match read_peer_token(token) {
        Ok(token) => token,
        Err(error) => {
            let reason = lineside_common::error_chain(&error);
            tracing::warn!(
                event = "peer_token_unusable",
                reason,
                "Cannot read the peer token; peers cannot fetch models from this node"
            );
            return error_response(StatusCode::SERVICE_UNAVAILABLE, "the peer token of this node cannot be read");
        }
    };
    let token = header_value(header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    // Digests are compared, so that the duration of the comparison does not depend on the token.
    if Digest::of(token.as_bytes()) != Digest::of(expected_token.as_bytes()) {
        return error_response(StatusCode::UNAUTHORIZED, "the bearer token of the site is missing or wrong");
    }
    let Ok(digest) = Digest::from_hex(hex) else {
        return error_response(StatusCode::BAD_REQUEST, "the digest must have 64 hexadecimal digits");
    };
    let Some(file) = store.open_blob(&digest) else {
        return error_response(StatusCode::NOT_FOUND, "the blob is not in the store");
    };
    let Ok(bytes) = file.metadata().map(|metadata| metadata.len()) else {
        return error_response(StatusCode::INTERNAL_SERVER_ERROR, "the blob cannot be read");
    };
    let range = match header_value(header::RANGE).map(|range| parse_range(range, bytes)) {
        None => None,
        Some(Some(range)) => Some(range),
        Some(None) => {
            let headers = [(header::CONTENT_RANGE, format!("bytes */{bytes}"))];
            return (headers, error_response(StatusCode::RANGE_NOT_SATISFIABLE, "the range is not satisfiable"))
                .into_response();
        }
    };
    let (first, length) = range.map_or((0, bytes), |(first, last)| (first, last + 1 - first));
    let mut file = tokio::fs::File::from_std(file);
    if file.seek(SeekFrom::Start(first)).await.is_err() {
        return error_response(StatusCode::INTERNAL_SERVER_ERROR, "the blob cannot be read");
    }
    let chunks = stream::unfold((file, length), async |(mut file, remaining)| {
        let mut chunk = vec![0; CHUNK_BYTES.min(usize::try_from(remaining).unwrap_or(CHUNK_BYTES))];
        match file.read(&mut chunk).await {
            Ok(0) => None,
            Ok(read) => {
                chunk.truncate(read);
                Some((Ok(Bytes::from(chunk)), (file, remaining - read as u64)))
            }
            Err(error) => Some((Err(error), (file, 0))),
        }
    });
    let response = Response::builder()
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CONTENT_LENGTH, length)
        .header(header::ACCEPT_RANGES, "bytes")
        .header(header::ETAG, format!("\"{digest}\""));
    let response = match range {
        Some((first, last)) => response
            .status(StatusCode::PARTIAL_CONTENT)
            .header(header::CONTENT_RANGE, format!("bytes {first}-{last}/{bytes}")),
        None => response,
    };
    response
        .body(Body::from_stream(chunks))
        .unwrap_or_else(|_| error_response(StatusCode::INTERNAL_SERVER_ERROR, "the response cannot be built"))
}

/// Parses a `Range` header with one range. Returns the positions of its first and last byte; `None` when the header is invalid or
/// the range is not satisfiable for a blob of `bytes`.
fn parse_range(range: &str, bytes: u64) -> Option<(u64, u64)> {
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
    fn one_range_is_parsed_and_unsatisfiable_ranges_are_rejected() {
        assert_eq!(parse_range("bytes=0-", 10), Some((0, 9)));
        assert_eq!(parse_range("bytes=3-5", 10), Some((3, 5)));
        assert_eq!(parse_range("bytes=9-99", 10), Some((9, 9)));
        for invalid in ["bytes=10-", "bytes=5-3", "bytes=-5", "bytes=0-1,3-4", "lines=1-2", "bytes=x-", ""] {
            assert_eq!(parse_range(invalid, 10), None, "{invalid}");
        }
        assert_eq!(parse_range("bytes=0-", 0), None);
    }
}
