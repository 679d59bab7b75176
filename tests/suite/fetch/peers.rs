//! Blobs from other agents of the site.

use lineside_tests::file_server::{Fault, FileServer};
use lineside_tests::http::HttpRequest;
use lineside_tests::site::{TestSite, digest};
use lineside_tests::utf8;

use super::{apply, assert_stored, download_origin, expect_serving, unreachable_host, variant};

/// A file with the token that peers share.
fn token(site: &TestSite, value: &str) -> String {
    site.write("peer-token", format!("{value}\n").as_bytes());
    utf8(&site.path("peer-token")).to_owned()
}

#[test]
fn a_peer_serves_blobs_only_to_clients_with_the_token() {
    let (home, away, bytes) = (TestSite::offline(), TestSite::offline(), variant(0));
    let server = FileServer::start(&bytes, Fault::None);
    let path = format!("/v1/blobs/sha256/{}", &digest(&bytes)["sha256:".len()..]);
    apply(&home, "parts", &server.url("parts.onnx"), &digest(&bytes));
    let host = server.host();
    let first_token = token(&home, "site-secret");
    let mut first = home.start(&["--source-hosts", &host, "--source-http", "--peer-token-file", &first_token]);
    expect_serving(&first, "parts", &bytes);

    let get = |path: &str, headers: &[(&str, &str)]| {
        HttpRequest { address: first.http(), method: "GET", path, headers, ..HttpRequest::default() }.send()
    };
    let bearer = ("Authorization", "Bearer site-secret");
    assert_eq!(get(&path, &[]).status, 401);
    assert_eq!(get(&path, &[("Authorization", "Bearer site-secre")]).status, 401);
    assert_eq!(
        get(&format!("/v1/blobs/sha256/{}", "1".repeat(64)), &[]).status,
        401,
        "without the token, the response does not reveal which blobs exist"
    );
    assert_eq!(get(&format!("/v1/blobs/sha256/{}", "0".repeat(64)), &[bearer]).status, 404);
    assert_eq!(get("/v1/blobs/sha256/..%2F..%2Flast-good.json", &[bearer]).status / 100, 4);
    let whole = get(&path, &[bearer]);
    assert_eq!((whole.status, whole.body == bytes), (200, true));
    let part = get(&path, &[bearer, ("Range", "bytes=1000-1999")]);
    assert_eq!((part.status, part.body == bytes[1000..2000]), (206, true));

    let so_far = server.requests().len();
    apply(&away, "parts", &format!("http://{}/parts.onnx", unreachable_host()), &digest(&bytes));
    let second_token = token(&away, "site-secret");
    let mut second = away.start(&[
        "--source-hosts",
        "127.0.0.1",
        "--source-http",
        "--peers",
        first.http(),
        "--peer-token-file",
        &second_token,
    ]);
    expect_serving(&second, "parts", &bytes);
    let from = download_origin(&second, "parts");
    assert!(from.contains(first.http()), "{from}");
    assert_eq!(second.metric("lineside_fetch_bytes_total{from=\"peer\"}"), bytes.len() as f64);
    assert_eq!(server.requests().len(), so_far);
    assert_stored(&away, &[&bytes]);
    assert!(second.terminate().success());
    assert!(first.terminate().success());

    // Without a token file, the endpoint does not exist.
    let mut closed = home.start(&["--source-hosts", &host, "--source-http"]);
    assert_eq!(
        HttpRequest {
            address: closed.http(),
            method: "GET",
            path: &path,
            headers: &[bearer],
            ..HttpRequest::default()
        }
        .send()
        .status,
        404
    );
    assert!(closed.terminate().success());
}

#[test]
fn a_failing_peer_falls_back_to_the_source() {
    let (site, bytes) = (TestSite::offline(), variant(0));
    let source = FileServer::start(&bytes, Fault::None);
    let refusing = FileServer::start(&bytes, Fault::RequiresAuthorization("Bearer another".to_owned()));
    let corrupt = FileServer::start(&variant(1), Fault::None);
    apply(&site, "parts", &source.url("parts.onnx"), &digest(&bytes));
    let peers = format!("{},{},{}", unreachable_host(), refusing.host(), corrupt.host());
    let (host, token) = (source.host(), token(&site, "site-secret"));
    let mut agent =
        site.start(&["--source-hosts", &host, "--source-http", "--peers", &peers, "--peer-token-file", &token]);
    expect_serving(&agent, "parts", &bytes);
    let from = download_origin(&agent, "parts");
    assert!(from.contains(&host), "{from}");
    for peer in [&refusing, &corrupt] {
        let requests = peer.requests();
        assert_eq!(requests[0].path, format!("/v1/blobs/sha256/{}", &digest(&bytes)["sha256:".len()..]));
        assert_eq!(requests[0].header("authorization"), Some("Bearer site-secret"));
    }
    assert!(source.requests().iter().all(|request| request.header("authorization").is_none()));
    assert_stored(&site, &[&bytes]);
    assert!(agent.terminate().success());
}
