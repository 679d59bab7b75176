//! Web servers: TLS, credentials, faults, redirects, address policy and limits.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use lineside_tests::file_server::{Fault, FileServer};
use lineside_tests::site::{TestSite, digest, large_model, manifest_with_source, model_status, wait_for_rejection};
use lineside_tests::source::{BASIC, PASSWORD, TlsFileServer, TlsFiles, USER, write_secret};
use lineside_tests::wait::until_long;
use lineside_tests::{http, utf8};
use serde_json::json;

use super::{
    CUT_BYTES, apply, apply_with_secret, assert_stored, contains_any, expect_rejection, expect_serving, variant,
};

#[test]
fn a_model_is_downloaded_over_tls_when_its_authority_is_trusted() {
    let (tls, site, bytes) = (TlsFiles::create(), TestSite::offline(), variant(0));
    let server = TlsFileServer::start(&tls, None);
    fs::write(server.folder().join("parts.onnx"), &bytes).unwrap();
    apply(&site, "parts", &server.url("parts.onnx"), &digest(&bytes));
    let hosts = server.host();
    let mut untrusting = site.start(&["--source-hosts", &hosts]);
    expect_rejection(&untrusting, "parts", &["certificate"]);
    assert_stored(&site, &[]);
    assert!(untrusting.terminate().success());

    let mut agent = site.start(&["--source-hosts", &hosts, "--source-ca", utf8(&tls.ca())]);
    expect_serving(&agent, "parts", &bytes);
    assert_stored(&site, &[&bytes]);
    let entry = agent.wait_for_event("model_downloaded");
    assert_eq!(entry["bytes"].as_u64(), Some(bytes.len() as u64));
    assert_eq!(entry["digest"], digest(&bytes));
    assert_eq!(agent.metric("lineside_fetch_bytes_total{from=\"source\"}"), bytes.len() as f64);
    assert!(agent.terminate().success());
}

#[test]
fn secrets_authenticate_downloads_and_their_values_are_never_exposed() {
    let (tls, site, bytes) = (TlsFiles::create(), TestSite::offline(), variant(0));
    let (basic, bearer) =
        (TlsFileServer::start(&tls, Some(BASIC)), TlsFileServer::start(&tls, Some("Bearer t0ken-value")));
    write_secret(&site.path("secrets"), "basic", &[("username", USER), ("password", PASSWORD)]);
    write_secret(&site.path("secrets"), "bearer", &[("token", "t0ken-value\n")]);
    let models = [
        ("basic", &basic, Some("basic"), variant(0)),
        ("bearer", &bearer, Some("bearer"), variant(1)),
        ("none", &basic, None, variant(2)),
        ("other", &basic, Some("bearer"), variant(3)),
        ("absent", &basic, Some("absent-secret"), variant(4)),
    ];
    for (name, server, secret, bytes) in &models {
        fs::write(server.folder().join(name), bytes).unwrap();
        match secret {
            Some(secret) => apply_with_secret(&site, name, &server.url(name), &digest(bytes), secret),
            None => apply(&site, name, &server.url(name), &digest(bytes)),
        }
    }
    let (hosts, secrets) = (format!("{},{}", basic.host(), bearer.host()), site.path("secrets"));
    let mut agent =
        site.start(&["--source-hosts", &hosts, "--source-ca", utf8(&tls.ca()), "--secrets-dir", utf8(&secrets)]);
    expect_serving(&agent, "basic", &bytes);
    expect_serving(&agent, "bearer", &models[1].3);
    expect_rejection(&agent, "none", &["secretRef", "credentials", "401"]);
    expect_rejection(&agent, "other", &["credentials", "401", "refuse"]);
    expect_rejection(&agent, "absent", &["absent-secret"]);
    let shown = format!("{:?}{}", agent.logs(), http::get(agent.http(), "/v1/status").unwrap().1);
    for value in [PASSWORD, "t0ken-value", BASIC] {
        assert!(!shown.contains(value), "{shown}");
    }
    assert_stored(&site, &[&bytes, &models[1].3]);
    assert!(agent.terminate().success());
}

#[test]
fn plain_http_requires_an_explicit_flag() {
    let (site, bytes) = (TestSite::offline(), variant(0));
    let server = FileServer::start(&bytes, Fault::None);
    apply(&site, "parts", &server.url("parts.onnx"), &digest(&bytes));
    apply(&site, "object", &format!("s3://b/k?endpoint={}&region=r", server.url("")), &digest(&variant(1)));
    let host = server.host();
    let mut restricted = site.start(&["--source-hosts", &host]);
    for name in ["parts", "object"] {
        expect_rejection(&restricted, name, &["source-http", "sourceHttp", "https"]);
    }
    assert_eq!(server.connections(), 0);
    assert!(restricted.terminate().success());

    fs::remove_file(site.path("manifests/object.yaml")).unwrap();
    let mut agent = site.start(&["--source-hosts", &host, "--source-http"]);
    expect_serving(&agent, "parts", &bytes);
    assert_stored(&site, &[&bytes]);
    assert!(agent.terminate().success());
}

#[test]
fn an_interrupted_download_is_resumed() {
    let (site, bytes) = (TestSite::offline(), variant(0));
    let server = FileServer::start(&bytes, Fault::None);
    server.set_faults(&[Fault::CutAfter(CUT_BYTES), Fault::CutAfter(CUT_BYTES), Fault::None]);
    apply(&site, "parts", &server.url("parts.onnx"), &digest(&bytes));
    let host = server.host();
    let mut agent = site.start(&["--source-hosts", &host, "--source-http"]);
    expect_serving(&agent, "parts", &bytes);
    let requests: Vec<_> = server.requests().into_iter().filter(|request| request.method == "GET").collect();
    assert_eq!(requests.len(), 3, "{requests:?}");
    assert_eq!(requests[0].range_start().unwrap_or(0), 0);
    for request in &requests[1..] {
        assert!(request.range_start().is_some_and(|start| start > 0), "{request:?}");
        assert_eq!(request.header("if-range"), Some(server.etag().as_str()));
    }
    assert!(server.bytes_sent() <= bytes.len() + 20_000, "{} bytes were sent", server.bytes_sent());
    assert_stored(&site, &[&bytes]);
    assert!(agent.terminate().success());
}

#[test]
fn a_download_is_resumed_after_the_agent_is_killed() {
    // Large enough for the agent to sync a part of it before it is killed.
    let (site, bytes) = (TestSite::offline(), large_model(12, 1));
    let server = FileServer::start(&bytes, Fault::StallAfter(10 << 20));
    apply(&site, "parts", &server.url("parts.onnx"), &digest(&bytes));
    let host = server.host();
    let flags = ["--source-hosts", host.as_str(), "--source-http"];
    let mut first = site.start(&flags);
    let partial = site.data().join("store/partial").join(&digest(&bytes)["sha256:".len()..]);
    until_long("most of the file", || fs::metadata(&partial).is_ok_and(|meta| meta.len() >= 9 << 20).then_some(()));
    first.signal("KILL");
    first.wait();
    assert_stored(&site, &[]);

    server.set_fault(Fault::None);
    let mut second = site.start(&flags);
    expect_serving(&second, "parts", &bytes);
    let request = server.requests().into_iter().rfind(|request| request.method == "GET").unwrap();
    assert!(request.range_start().is_some_and(|start| start > 0), "{request:?}");
    assert_eq!(request.header("if-range"), Some(server.etag().as_str()));
    assert_stored(&site, &[&bytes]);
    assert!(!partial.exists() && !partial.with_extension("json").exists());
    assert!(second.terminate().success());
}

/// Name, the initial variant of the server, its faults, the desired variant, and the words of a rejection.
type Case = (&'static str, u8, Vec<Fault>, u8, &'static [&'static str]);

/// Experiment 18: for every fault of a server, the correct file serves in the end or the model is rejected with a
/// reason.
#[test]
fn server_faults_are_tolerated_or_reported() {
    let cut = || Fault::CutAfter(CUT_BYTES);
    let change = |tag| Fault::ChangesAfter(CUT_BYTES, variant(tag));
    let cases: [Case; 9] = [
        ("wrong-length", 0, vec![Fault::WrongContentLength, Fault::None], 0, &[]),
        ("changed-to", 9, vec![change(1), Fault::None], 1, &[]),
        ("changed-away", 2, vec![change(9), Fault::None], 2, &["digest"]),
        ("misaligned", 3, vec![cut(), Fault::Misaligned206, Fault::None], 3, &[]),
        ("unsatisfiable", 4, vec![cut(), Fault::Unsatisfiable416, Fault::None], 4, &[]),
        ("stalled", 5, vec![Fault::StallAfter(1), Fault::StallAfter(CUT_BYTES), Fault::None], 5, &[]),
        ("gzip", 6, vec![Fault::Gzip], 6, &["encod", "compress", "gzip", "digest"]),
        ("endless", 7, vec![Fault::EndlessBody], 7, &["MiB", "more than", "larger", "too large"]),
        ("failing", 8, vec![Fault::Status(500)], 8, &["500"]),
    ];
    let site = TestSite::offline();
    let servers: Vec<FileServer> = cases
        .iter()
        .map(|(name, initial, faults, desired, _)| {
            let server = FileServer::start(&variant(*initial), Fault::None);
            server.set_faults(faults);
            apply(&site, name, &server.url("model.onnx"), &digest(&variant(*desired)));
            server
        })
        .collect();
    let small = FileServer::start(&variant(9), Fault::None);
    let source = json!({"uri": small.url("m"), "digest": digest(&variant(9)), "size": 5});
    site.apply("size.yaml", &manifest_with_source("size", 1, &source, ""));
    let mut agent = site.start(&[
        "--source-hosts",
        "127.0.0.1",
        "--source-http",
        "--model-mib-max",
        "1",
        "--source-stall-seconds",
        "1",
    ]);
    let mut served = Vec::new();
    for (name, _, _, desired, words) in &cases {
        if words.is_empty() {
            expect_serving(&agent, name, &variant(*desired));
            served.push(variant(*desired));
        } else {
            expect_rejection(&agent, name, words);
            assert!(model_status(&agent, name)["serving"].is_null(), "{name} serves");
        }
    }
    expect_rejection(&agent, "size", &["size", "bytes"]);
    // The buffers of the operating system hold a few MiB for each attempt.
    let endless = servers[7].bytes_sent() / servers[7].requests().len();
    assert!(endless < 32 << 20, "{endless} bytes of an infinite body were read");
    assert_stored(&site, &served.iter().map(Vec::as_slice).collect::<Vec<_>>());
    assert!(agent.terminate().success());
}

#[test]
fn a_file_with_a_wrong_digest_is_rejected_with_both_digests_until_the_right_one_is_served() {
    let (site, wrong, right) = (TestSite::offline(), variant(1), variant(2));
    let server = FileServer::start(&wrong, Fault::None);
    apply(&site, "parts", &server.url("parts.onnx"), &digest(&right));
    let host = server.host();
    let mut agent = site.start(&["--source-hosts", &host, "--source-http", "--readiness", "models"]);
    let reason = wait_for_rejection(&agent, "parts");
    assert!(reason.contains(&digest(&wrong)) && reason.contains(&digest(&right)), "{reason}");
    assert!(model_status(&agent, "parts")["serving"].is_null());
    assert_stored(&site, &[]);
    assert_eq!(http::get(agent.http(), "/readyz").unwrap().0, 503);

    server.set_body(&right);
    expect_serving(&agent, "parts", &right);
    assert_stored(&site, &[&right]);
    assert!(agent.terminate().success());
}

#[test]
fn redirects_are_limited_to_listed_hosts_and_drop_credentials() {
    let (site, bytes) = (TestSite::offline(), variant(0));
    let target = FileServer::start(&bytes, Fault::None);
    let first = FileServer::start(&bytes, Fault::Redirect(target.url("moved.onnx")));
    let lost = FileServer::start(&bytes, Fault::None);
    lost.set_fault(Fault::Redirect(lost.url("again")));
    let local = FileServer::start(&bytes, Fault::Redirect("file:///etc/hostname".to_owned()));
    write_secret(&site.path("secrets"), "bearer", &[("token", "t0ken-value")]);
    apply_with_secret(&site, "parts", &first.url("parts.onnx"), &digest(&bytes), "bearer");
    apply(&site, "lost", &lost.url("m"), &digest(&variant(1)));
    apply(&site, "local", &local.url("m"), &digest(&variant(2)));
    let secrets = site.path("secrets");
    let start = |hosts: &str| site.start(&["--source-http", "--secrets-dir", utf8(&secrets), "--source-hosts", hosts]);
    let few = format!("{},{},{}", first.host(), lost.host(), local.host());
    let mut restricted = start(&few);
    expect_rejection(&restricted, "parts", &[&target.host()]);
    expect_rejection(&restricted, "lost", &["redirect"]);
    expect_rejection(&restricted, "local", &["redirect", "file:", "not allowed", "address"]);
    assert_eq!(target.connections(), 0);
    assert_stored(&site, &[]);
    assert!(restricted.terminate().success());

    let mut agent = start(&format!("{few},{}", target.host()));
    expect_serving(&agent, "parts", &bytes);
    assert!(target.requests().iter().all(|request| request.header("authorization").is_none()));
    assert!(agent.terminate().success());
}

#[test]
fn loopback_and_link_local_sources_are_rejected() {
    let (site, server) = (TestSite::offline(), FileServer::start(b"x", Fault::None));
    let port = server.host().split(':').next_back().unwrap().to_owned();
    let addresses = [
        format!("http://localhost:{port}/m"),
        format!("http://127.0.0.1:{port}/m"),
        format!("http://127.1:{port}/m"),
        format!("http://2130706433:{port}/m"),
        format!("http://0.0.0.0:{port}/m"),
        format!("http://[::ffff:127.0.0.1]:{port}/m"),
        format!("http://[::1]:{port}/m"),
        "http://169.254.169.254/latest/meta-data/".to_owned(),
        "http://[fe80::1]/m".to_owned(),
        "http://224.0.0.1/m".to_owned(),
        format!("s3://bucket/key?endpoint=http://127.0.0.1:{port}&region=r"),
        format!("oci://127.0.0.1:{port}/models/parts:v1"),
    ];
    for (index, uri) in addresses.iter().enumerate() {
        apply(&site, &format!("case-{index}"), uri, &digest(uri.as_bytes()));
    }
    apply(&site, "signed", &format!("http://user:hunter2@localhost:{port}/m"), &digest(b"signed"));
    let mut agent = site.start(&["--source-http"]);
    for (index, uri) in addresses.iter().enumerate() {
        let why = ["source-hosts", "sourceHosts", "loopback", "link-local", "unspecified", "multicast", "not allowed"];
        let reason = wait_for_rejection(&agent, &format!("case-{index}"));
        assert!(contains_any(&reason, &why), "{uri}: {reason}");
    }
    let entry = agent.wait_for_event("manifest_rejected");
    assert!(contains_any(entry["reason"].as_str().unwrap(), &["credentials"]), "{entry}");
    assert!(!format!("{:?}", agent.logs()).contains("hunter2"));
    assert_eq!(server.connections(), 0, "{:?}", server.requests());
    assert!(agent.terminate().success());
}

#[test]
fn a_rate_limited_download_reports_its_progress() {
    let (site, bytes) = (TestSite::offline(), variant(0));
    let server = FileServer::start(&bytes, Fault::None);
    apply(&site, "parts", &server.url("parts.onnx"), &digest(&bytes));
    let host = server.host();
    let mut agent = site.start(&["--source-hosts", &host, "--source-http", "--source-kib-per-second", "64"]);
    let seen = until_long("progress", || {
        let seen = model_status(&agent, "parts");
        let percent = seen["progress"]["percent"].as_f64()?;
        (percent > 0.0 && percent < 100.0).then_some(seen)
    });
    assert_eq!(seen["state"], "Downloading", "{seen}");
    assert_eq!(seen["progress"]["total"].as_u64(), Some(bytes.len() as u64), "{seen}");
    assert!(seen["progress"]["bytes"].as_u64().is_some_and(|got| (1..bytes.len() as u64).contains(&got)), "{seen}");
    assert!(seen["progress"]["from"].as_str().is_some_and(|from| from.contains(&host)), "{seen}");
    expect_serving(&agent, "parts", &bytes);
    assert!(agent.terminate().success());
}

/// A small file system that is mounted on a folder until this is dropped.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(folder: &'a Path) -> Option<Self> {
        fs::create_dir(folder).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"]).arg(folder).stderr(Stdio::null());
        mount.status().is_ok_and(|done| done.success()).then_some(Self(folder))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(self.0).status());
    }
}

#[test]
fn a_full_disk_is_reported_and_the_serving_version_continues() {
    let (site, bytes) = (TestSite::offline(), variant(0));
    let data = site.data();
    let Some(disk) = SmallDisk::mount(&data) else {
        eprintln!("skipped: mounting a file system is not permitted");
        return;
    };
    site.write("parts.onnx", &bytes);
    apply(&site, "parts", "file:../parts.onnx", &digest(&bytes));
    let large = large_model(24, 1);
    let server = FileServer::start(&large, Fault::None);
    let host = server.host();
    let mut agent = site.start(&["--source-hosts", &host, "--source-http"]);
    expect_serving(&agent, "parts", &bytes);
    apply(&site, "large", &server.url("large.onnx"), &digest(&large));
    expect_rejection(&agent, "large", &["space"]);
    assert!(agent.is_running());
    expect_serving(&agent, "parts", &bytes);
    site.verify_blobs();
    assert!(!site.blob_path(&digest(&large)).exists());
    assert!(agent.terminate().success());
    drop(agent);
    drop(disk);
}
