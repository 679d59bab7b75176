//! Fetching models: from real servers, from ones that do everything wrong, and from the agent next door.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lineside_tests::agent::Agent;
use lineside_tests::plant::{Plant, digest, heavy, model, refusal, serves, sourced, twin, until_late, utf8};
use lineside_tests::source::{
    BASIC, Fault, FileServer, MODEL_PACK, PASSWORD, Registry, S3, Tls, TlsFileServer, USER, exchange, secret,
};
use lineside_tests::wait::until_true;
use lineside_tests::{example, http};
use serde_json::json;

/// Where the scripted servers break off: twice within the bundled model.
const CUT: usize = 60_000;

/// The bundled model under one of ten digests, so that no model of a test is served from another's download.
fn variant(tag: u8) -> Vec<u8> {
    twin(&fs::read(example("surface-defects.onnx")).unwrap(), tag)
}

/// Asks for version 1 of a model with the name of the file's.
fn apply(plant: &Plant, name: &str, uri: &str, digest: &str) {
    plant.apply(&format!("{name}.yaml"), &sourced(name, 1, &json!({"uri": uri, "digest": digest}), ""));
}

/// The same, with a secret.
fn apply_with_secret(plant: &Plant, name: &str, uri: &str, digest: &str, secret: &str) {
    let source = json!({"uri": uri, "digest": digest, "secretRef": {"name": secret}});
    plant.apply(&format!("{name}.yaml"), &sourced(name, 1, &source, ""));
}

/// Waits until the model serves, with exactly these bytes.
fn arrives(agent: &Agent, name: &str, bytes: &[u8]) {
    assert_eq!(serves(agent, name, 1)["serving"]["digest"], digest(bytes), "{name}");
}

/// Waits until the model is refused for a reason with one of these words. There may be other reasons before, such as a
/// connection that was cut.
fn is_refused(agent: &Agent, name: &str, words: &[&str]) {
    until_true(&format!("{name} to be refused, saying one of {words:?}"), || {
        let entries = agent.events("model_load_failed");
        let mut reasons =
            entries.iter().filter(|entry| entry["model"] == name).map(|entry| entry["reason"].to_string());
        reasons.any(|reason| holds(&reason, words))
    });
}

/// Whether one of these words is in the text, whatever their case.
fn holds(text: &str, words: &[&str]) -> bool {
    words.iter().any(|word| text.to_lowercase().contains(&word.to_lowercase()))
}

/// The store shows these files, no others, and each has the digest it is named by.
fn assert_stored(plant: &Plant, files: &[&[u8]]) {
    plant.check_blobs();
    let mut expected: Vec<PathBuf> = files.iter().map(|bytes| plant.blob(&digest(bytes))).collect();
    let mut found = plant.blobs();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

/// The end of a download in the log, with where it came from.
fn came_from(agent: &Agent, name: &str) -> String {
    let entries = agent.events("model_downloaded");
    let entry = entries.iter().find(|entry| entry["model"] == name).unwrap();
    entry["from"].as_str().unwrap().to_owned()
}

/// A port where nobody listens by the time it is used.
fn dead_host() -> String {
    format!("127.0.0.1:{}", lineside_tests::broker::free_port())
}

#[test]
fn a_model_comes_over_tls_when_its_authority_is_trusted() {
    let (tls, plant, bytes) = (Tls::create(), Plant::offline(), variant(0));
    let server = TlsFileServer::start(&tls, None);
    fs::write(server.folder().join("parts.onnx"), &bytes).unwrap();
    apply(&plant, "parts", &server.url("parts.onnx"), &digest(&bytes));
    let hosts = server.host();
    let mut stranger = plant.start(&["--source-hosts", &hosts]);
    is_refused(&stranger, "parts", &["certificate"]);
    assert_stored(&plant, &[]);
    assert!(stranger.end().success());

    let mut agent = plant.start(&["--source-hosts", &hosts, "--source-ca", utf8(&tls.ca())]);
    arrives(&agent, "parts", &bytes);
    assert_stored(&plant, &[&bytes]);
    let entry = agent.wait_for_event("model_downloaded");
    assert_eq!(entry["bytes"].as_u64(), Some(bytes.len() as u64));
    assert_eq!(entry["digest"], digest(&bytes));
    assert_eq!(agent.metric("lineside_fetch_bytes_total{from=\"source\"}"), bytes.len() as f64);
    assert!(agent.end().success());
}

#[test]
fn secrets_open_a_web_server_and_their_values_are_never_shown() {
    let (tls, plant, bytes) = (Tls::create(), Plant::offline(), variant(0));
    let (basic, bearer) =
        (TlsFileServer::start(&tls, Some(BASIC)), TlsFileServer::start(&tls, Some("Bearer t0ken-value")));
    secret(&plant.path("secrets"), "basic", &[("username", USER), ("password", PASSWORD)]);
    secret(&plant.path("secrets"), "bearer", &[("token", "t0ken-value\n")]);
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
            Some(secret) => apply_with_secret(&plant, name, &server.url(name), &digest(bytes), secret),
            None => apply(&plant, name, &server.url(name), &digest(bytes)),
        }
    }
    let (hosts, secrets) = (format!("{},{}", basic.host(), bearer.host()), plant.path("secrets"));
    let mut agent =
        plant.start(&["--source-hosts", &hosts, "--source-ca", utf8(&tls.ca()), "--secrets-dir", utf8(&secrets)]);
    arrives(&agent, "basic", &bytes);
    arrives(&agent, "bearer", &models[1].3);
    is_refused(&agent, "none", &["secretRef", "credentials", "401"]);
    is_refused(&agent, "other", &["credentials", "401", "refuse"]);
    is_refused(&agent, "absent", &["absent-secret"]);
    let shown = format!("{:?}{}", agent.logs(), http::get(agent.http(), "/v1/status").unwrap().1);
    for value in [PASSWORD, "t0ken-value", BASIC] {
        assert!(!shown.contains(value), "{shown}");
    }
    assert_stored(&plant, &[&bytes, &models[1].3]);
    assert!(agent.end().success());
}

#[test]
fn plain_http_is_for_those_who_ask_for_it() {
    let (plant, bytes) = (Plant::offline(), variant(0));
    let server = FileServer::start(&bytes, Fault::None);
    apply(&plant, "parts", &server.url("parts.onnx"), &digest(&bytes));
    apply(&plant, "object", &format!("s3://b/k?endpoint={}&region=r", server.url("")), &digest(&variant(1)));
    let host = server.host();
    let mut strict = plant.start(&["--source-hosts", &host]);
    for name in ["parts", "object"] {
        is_refused(&strict, name, &["source-http", "sourceHttp", "https"]);
    }
    assert_eq!(server.connections(), 0);
    assert!(strict.end().success());

    fs::remove_file(plant.path("manifests/object.yaml")).unwrap();
    let mut agent = plant.start(&["--source-hosts", &host, "--source-http"]);
    arrives(&agent, "parts", &bytes);
    assert_stored(&plant, &[&bytes]);
    assert!(agent.end().success());
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_was() {
    let (plant, bytes) = (Plant::offline(), variant(0));
    let server = FileServer::start(&bytes, Fault::None);
    server.play(&[Fault::CutAfter(CUT), Fault::CutAfter(CUT), Fault::None]);
    apply(&plant, "parts", &server.url("parts.onnx"), &digest(&bytes));
    let host = server.host();
    let mut agent = plant.start(&["--source-hosts", &host, "--source-http"]);
    arrives(&agent, "parts", &bytes);
    let requests: Vec<_> = server.requests().into_iter().filter(|request| request.method == "GET").collect();
    assert_eq!(requests.len(), 3, "{requests:?}");
    assert_eq!(requests[0].range_start().unwrap_or(0), 0);
    for request in &requests[1..] {
        assert!(request.range_start().is_some_and(|start| start > 0), "{request:?}");
        assert_eq!(request.header("if-range"), Some(server.etag().as_str()));
    }
    assert!(server.bytes_sent() <= bytes.len() + 20_000, "{} bytes were sent", server.bytes_sent());
    assert_stored(&plant, &[&bytes]);
    assert!(agent.end().success());
}

#[test]
fn a_download_outlives_the_agent_that_began_it() {
    // Large enough for the agent to have made a part of it safe from a power cut.
    let (plant, bytes) = (Plant::offline(), heavy(12, 1));
    let server = FileServer::start(&bytes, Fault::StallAfter(10 << 20));
    apply(&plant, "parts", &server.url("parts.onnx"), &digest(&bytes));
    let host = server.host();
    let flags = ["--source-hosts", host.as_str(), "--source-http"];
    let mut first = plant.start(&flags);
    let partial = plant.data().join("store/partial").join(&digest(&bytes)["sha256:".len()..]);
    until_late("most of the file", || fs::metadata(&partial).is_ok_and(|meta| meta.len() >= 9 << 20).then_some(()));
    first.signal("KILL");
    first.wait();
    assert_stored(&plant, &[]);

    server.set_fault(Fault::None);
    let mut second = plant.start(&flags);
    arrives(&second, "parts", &bytes);
    let request = server.requests().into_iter().rfind(|request| request.method == "GET").unwrap();
    assert!(request.range_start().is_some_and(|start| start > 0), "{request:?}");
    assert_eq!(request.header("if-range"), Some(server.etag().as_str()));
    assert_stored(&plant, &[&bytes]);
    assert!(!partial.exists() && !partial.with_extension("json").exists());
    assert!(second.end().success());
}

/// Name, the variant a server has at first, its script, the variant that is asked for, and the words of a refusal.
type Case = (&'static str, u8, Vec<Fault>, u8, &'static [&'static str]);

/// The table of experiment 18: whatever a server does, the right file serves in the end or there is a reason.
#[test]
fn a_server_that_does_wrong_is_survived_or_named() {
    let cut = || Fault::CutAfter(CUT);
    let change = |tag| Fault::ChangesAfter(CUT, variant(tag));
    let cases: [Case; 9] = [
        ("lying", 0, vec![Fault::LyingLength, Fault::None], 0, &[]),
        ("changed-to", 9, vec![change(1), Fault::None], 1, &[]),
        ("changed-away", 2, vec![change(9), Fault::None], 2, &["digest"]),
        ("misaligned", 3, vec![cut(), Fault::Misaligned206, Fault::None], 3, &[]),
        ("unsatisfiable", 4, vec![cut(), Fault::Unsatisfiable416, Fault::None], 4, &[]),
        ("stalled", 5, vec![Fault::StallAfter(1), Fault::StallAfter(CUT), Fault::None], 5, &[]),
        ("gzip", 6, vec![Fault::Gzip], 6, &["encod", "compress", "gzip", "digest"]),
        ("endless", 7, vec![Fault::EndlessBody], 7, &["MiB", "more than", "larger", "too large"]),
        ("failing", 8, vec![Fault::Status(500)], 8, &["500"]),
    ];
    let plant = Plant::offline();
    let servers: Vec<FileServer> = cases
        .iter()
        .map(|(name, has, script, asked, _)| {
            let server = FileServer::start(&variant(*has), Fault::None);
            server.play(script);
            apply(&plant, name, &server.url("model.onnx"), &digest(&variant(*asked)));
            server
        })
        .collect();
    let small = FileServer::start(&variant(9), Fault::None);
    let source = json!({"uri": small.url("m"), "digest": digest(&variant(9)), "size": 5});
    plant.apply("size.yaml", &sourced("size", 1, &source, ""));
    let mut agent = plant.start(&[
        "--source-hosts",
        "127.0.0.1",
        "--source-http",
        "--model-mib-max",
        "1",
        "--source-stall-seconds",
        "1",
    ]);
    let mut served = Vec::new();
    for (name, _, _, asked, words) in &cases {
        if words.is_empty() {
            arrives(&agent, name, &variant(*asked));
            served.push(variant(*asked));
        } else {
            is_refused(&agent, name, words);
            assert!(model(&agent, name)["serving"].is_null(), "{name} serves");
        }
    }
    is_refused(&agent, "size", &["size", "bytes"]);
    // Buffers of the system's hold a few MiB for each of the attempts.
    let endless = servers[7].bytes_sent() / servers[7].requests().len();
    assert!(endless < 32 << 20, "{endless} bytes were taken of a body without an end");
    assert_stored(&plant, &served.iter().map(Vec::as_slice).collect::<Vec<_>>());
    assert!(agent.end().success());
}

#[test]
fn a_wrong_file_is_refused_by_both_digests_until_the_right_one_is_there() {
    let (plant, wrong, right) = (Plant::offline(), variant(1), variant(2));
    let server = FileServer::start(&wrong, Fault::None);
    apply(&plant, "parts", &server.url("parts.onnx"), &digest(&right));
    let host = server.host();
    let mut agent = plant.start(&["--source-hosts", &host, "--source-http"]);
    let reason = refusal(&agent, "parts");
    assert!(reason.contains(&digest(&wrong)) && reason.contains(&digest(&right)), "{reason}");
    assert!(model(&agent, "parts")["serving"].is_null());
    assert_stored(&plant, &[]);
    assert_eq!(http::get(agent.http(), "/readyz").unwrap().0, 503);

    server.set_body(&right);
    arrives(&agent, "parts", &right);
    assert_stored(&plant, &[&right]);
    assert!(agent.end().success());
}

#[test]
fn redirects_lead_only_to_listed_hosts_and_take_no_credentials_along() {
    let (plant, bytes) = (Plant::offline(), variant(0));
    let elsewhere = FileServer::start(&bytes, Fault::None);
    let first = FileServer::start(&bytes, Fault::Redirect(elsewhere.url("moved.onnx")));
    let lost = FileServer::start(&bytes, Fault::None);
    lost.set_fault(Fault::Redirect(lost.url("again")));
    let local = FileServer::start(&bytes, Fault::Redirect("file:///etc/hostname".to_owned()));
    secret(&plant.path("secrets"), "bearer", &[("token", "t0ken-value")]);
    apply_with_secret(&plant, "parts", &first.url("parts.onnx"), &digest(&bytes), "bearer");
    apply(&plant, "lost", &lost.url("m"), &digest(&variant(1)));
    apply(&plant, "local", &local.url("m"), &digest(&variant(2)));
    let secrets = plant.path("secrets");
    let start = |hosts: &str| plant.start(&["--source-http", "--secrets-dir", utf8(&secrets), "--source-hosts", hosts]);
    let few = format!("{},{},{}", first.host(), lost.host(), local.host());
    let mut strict = start(&few);
    is_refused(&strict, "parts", &[&elsewhere.host()]);
    is_refused(&strict, "lost", &["redirect"]);
    is_refused(&strict, "local", &["redirect", "file:", "not allowed", "address"]);
    assert_eq!(elsewhere.connections(), 0);
    assert_stored(&plant, &[]);
    assert!(strict.end().success());

    let mut agent = start(&format!("{few},{}", elsewhere.host()));
    arrives(&agent, "parts", &bytes);
    assert!(elsewhere.requests().iter().all(|request| request.header("authorization").is_none()));
    assert!(agent.end().success());
}

#[test]
fn nobody_is_led_to_addresses_that_are_this_machines_own() {
    let (plant, server) = (Plant::offline(), FileServer::start(b"x", Fault::None));
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
        apply(&plant, &format!("case-{index}"), uri, &digest(uri.as_bytes()));
    }
    apply(&plant, "signed", &format!("http://user:hunter2@localhost:{port}/m"), &digest(b"signed"));
    let mut agent = plant.start(&["--source-http"]);
    for (index, uri) in addresses.iter().enumerate() {
        let why = ["source-hosts", "sourceHosts", "loopback", "link-local", "unspecified", "multicast", "not allowed"];
        let reason = refusal(&agent, &format!("case-{index}"));
        assert!(holds(&reason, &why), "{uri}: {reason}");
    }
    let entry = agent.wait_for_event("manifest_rejected");
    assert!(holds(entry["reason"].as_str().unwrap(), &["credentials"]), "{entry}");
    assert!(!format!("{:?}", agent.logs()).contains("hunter2"));
    assert_eq!(server.connections(), 0, "{:?}", server.requests());
    assert!(agent.end().success());
}

#[test]
fn artifacts_come_from_a_registry_by_tag_and_by_digest() {
    let (tls, plant) = (Tls::create(), Plant::offline());
    let (closed, open) = (Registry::start(&tls, true), Registry::start(&tls, false));
    let secrets = plant.path("secrets");
    secret(&secrets, "registry", &[("username", USER), ("password", PASSWORD)]);
    secret(&secrets, "wrong", &[("username", USER), ("password", "guessed")]);
    let docker = json!({"auths": {closed.host(): {"auth": BASIC.trim_start_matches("Basic ")}}}).to_string();
    secret(&secrets, "docker", &[(".dockerconfigjson", &docker)]);
    let push = |registry: &Registry, tag: u8, kind| {
        let bytes = variant(tag);
        let layers = [("README.md", &b"parts"[..]), ("model/parts.onnx", bytes.as_slice())];
        registry.push("models/parts", &format!("v{tag}"), &layers, kind)
    };
    let pack = push(&closed, 0, Some(MODEL_PACK));
    let other_pack = push(&closed, 1, Some(MODEL_PACK));
    push(&closed, 2, None);
    let oras = push(&closed, 3, None);
    push(&open, 4, None);
    assert_ne!(pack, other_pack);
    let only = variant(5);
    closed.push("models/only", "v5", &[("weights.bin", &only)], Some(MODEL_PACK));

    let tagged = |tag: u8| closed.url("models/parts", &format!(":v{tag}"));
    let pinned = |digest: &str| closed.url("models/parts", &format!("@{digest}"));
    let served = [
        ("pack-tag", tagged(0), "registry", 0),
        ("pack-pinned", pinned(&other_pack), "registry", 1),
        ("oras-tag", tagged(2), "docker", 2),
        ("oras-pinned", pinned(&oras), "registry", 3),
        ("only-layer", closed.url("models/only", ":v5"), "registry", 5),
    ];
    for (name, uri, secret, tag) in &served {
        apply_with_secret(&plant, name, uri, &digest(&variant(*tag)), secret);
    }
    apply(&plant, "open", &open.url("models/parts", ":v4"), &digest(&variant(4)));
    // None of these is in the store under the digest it asks for.
    let wanted = |tag| digest(&variant(tag));
    apply(&plant, "no-secret", &tagged(0), &wanted(6));
    apply_with_secret(&plant, "wrong-password", &tagged(0), &wanted(7), "wrong");
    apply_with_secret(&plant, "other-digest", &tagged(0), &wanted(8), "registry");
    apply_with_secret(&plant, "no-tag", &closed.url("models/parts", ":v99"), &wanted(9), "registry");

    let hosts = format!("{},{}", closed.host(), open.host());
    let mut agent =
        plant.start(&["--source-hosts", &hosts, "--source-ca", utf8(&tls.ca()), "--secrets-dir", utf8(&secrets)]);
    for (name, _, _, tag) in &served {
        arrives(&agent, name, &variant(*tag));
    }
    arrives(&agent, "open", &variant(4));
    is_refused(&agent, "no-secret", &["secretRef", "credentials", "401"]);
    is_refused(&agent, "wrong-password", &["credentials", "password", "401", "refuse"]);
    is_refused(&agent, "other-digest", &["digest"]);
    is_refused(&agent, "no-tag", &["not found", "no such", "404", "unknown"]);
    assert!(!format!("{:?}", agent.logs()).contains(PASSWORD));
    let stored: Vec<Vec<u8>> = (0..6).map(variant).collect();
    assert_stored(&plant, &stored.iter().map(Vec::as_slice).collect::<Vec<_>>());
    assert!(agent.end().success());
}

#[test]
fn a_registry_that_is_down_is_waited_for() {
    let (tls, plant, bytes) = (Tls::create(), Plant::offline(), variant(0));
    let mut registry = Registry::start(&tls, false);
    registry.push("models/parts", "v1", &[("parts.onnx", &bytes)], None);
    registry.stop();
    apply(&plant, "parts", &registry.url("models/parts", ":v1"), &digest(&bytes));
    let host = registry.host();
    let mut agent = plant.start(&["--source-hosts", &host, "--source-ca", utf8(&tls.ca())]);
    is_refused(&agent, "parts", &["connect", "reach"]);
    registry.restart();
    arrives(&agent, "parts", &bytes);
    assert!(agent.end().success());
}

#[test]
fn objects_come_from_s3_with_a_signature() {
    let (tls, plant, bytes) = (Tls::create(), Plant::offline(), variant(0));
    let s3 = S3::start(Some(&tls));
    let secrets = plant.path("secrets");
    secret(&secrets, "s3", &[("accessKeyId", "edge"), ("secretAccessKey", "s3-hidden-key")]);
    s3.put("models", "plant/parts.onnx", &bytes);
    let url = s3.url("models", "plant/parts.onnx");
    apply_with_secret(&plant, "parts", &url, &digest(&bytes), "s3");
    apply_with_secret(&plant, "missing", &s3.url("models", "none.onnx"), &digest(&variant(1)), "s3");
    apply(&plant, "unsigned", &url, &digest(&variant(2)));
    let mut agent =
        plant.start(&["--source-hosts", s3.host(), "--source-ca", utf8(&tls.ca()), "--secrets-dir", utf8(&secrets)]);
    arrives(&agent, "parts", &bytes);
    is_refused(&agent, "missing", &["not found", "no such", "404"]);
    is_refused(&agent, "unsigned", &["secretRef", "credentials", "403", "refuse"]);
    let logs = format!("{:?}", agent.logs());
    assert!(!logs.contains("s3-hidden-key"), "{logs}");
    assert!(!logs.contains("169.254."), "nobody asks the cloud's metadata service: {logs}");
    assert_stored(&plant, &[&bytes]);
    assert!(agent.end().success());
}

/// A file with a token that peers share.
fn token(plant: &Plant, value: &str) -> String {
    plant.put("peer-token", format!("{value}\n").as_bytes());
    utf8(&plant.path("peer-token")).to_owned()
}

#[test]
fn a_peer_gives_what_it_has_to_those_who_know_the_token() {
    let (home, away, bytes) = (Plant::offline(), Plant::offline(), variant(0));
    let server = FileServer::start(&bytes, Fault::None);
    let path = format!("/v1/blobs/sha256/{}", &digest(&bytes)["sha256:".len()..]);
    apply(&home, "parts", &server.url("parts.onnx"), &digest(&bytes));
    let host = server.host();
    let first_token = token(&home, "site-secret");
    let mut first = home.start(&["--source-hosts", &host, "--source-http", "--peer-token-file", &first_token]);
    arrives(&first, "parts", &bytes);

    let ask = |path: &str, headers: &[(&str, &str)]| exchange(first.http(), None, "GET", path, headers, b"");
    let bearer = ("Authorization", "Bearer site-secret");
    assert_eq!(ask(&path, &[]).status, 401);
    assert_eq!(ask(&path, &[("Authorization", "Bearer site-secre")]).status, 401);
    assert_eq!(ask(&format!("/v1/blobs/sha256/{}", "1".repeat(64)), &[]).status, 401, "strangers learn nothing");
    assert_eq!(ask(&format!("/v1/blobs/sha256/{}", "0".repeat(64)), &[bearer]).status, 404);
    assert_eq!(ask("/v1/blobs/sha256/..%2F..%2Flast-good.json", &[bearer]).status / 100, 4);
    let whole = ask(&path, &[bearer]);
    assert_eq!((whole.status, whole.body == bytes), (200, true));
    let part = ask(&path, &[bearer, ("Range", "bytes=1000-1999")]);
    assert_eq!((part.status, part.body == bytes[1000..2000]), (206, true));

    let so_far = server.requests().len();
    apply(&away, "parts", &format!("http://{}/parts.onnx", dead_host()), &digest(&bytes));
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
    arrives(&second, "parts", &bytes);
    let from = came_from(&second, "parts");
    assert!(from.contains(first.http()), "{from}");
    assert_eq!(second.metric("lineside_fetch_bytes_total{from=\"peer\"}"), bytes.len() as f64);
    assert_eq!(server.requests().len(), so_far);
    assert_stored(&away, &[&bytes]);
    assert!(second.end().success());
    assert!(first.end().success());

    // Without a token there is nothing to ask for.
    let mut closed = home.start(&["--source-hosts", &host, "--source-http"]);
    assert_eq!(exchange(closed.http(), None, "GET", &path, &[bearer], b"").status, 404);
    assert!(closed.end().success());
}

#[test]
fn a_peer_that_refuses_lies_or_is_gone_costs_only_the_way_to_the_source() {
    let (plant, bytes) = (Plant::offline(), variant(0));
    let source = FileServer::start(&bytes, Fault::None);
    let refusing = FileServer::start(&bytes, Fault::WantsAuthorization("Bearer another".to_owned()));
    let lying = FileServer::start(&variant(1), Fault::None);
    apply(&plant, "parts", &source.url("parts.onnx"), &digest(&bytes));
    let peers = format!("{},{},{}", dead_host(), refusing.host(), lying.host());
    let (host, token) = (source.host(), token(&plant, "site-secret"));
    let mut agent =
        plant.start(&["--source-hosts", &host, "--source-http", "--peers", &peers, "--peer-token-file", &token]);
    arrives(&agent, "parts", &bytes);
    let from = came_from(&agent, "parts");
    assert!(from.contains(&host), "{from}");
    for peer in [&refusing, &lying] {
        let requests = peer.requests();
        assert_eq!(requests[0].path, format!("/v1/blobs/sha256/{}", &digest(&bytes)["sha256:".len()..]));
        assert_eq!(requests[0].header("authorization"), Some("Bearer site-secret"));
    }
    assert!(source.requests().iter().all(|request| request.header("authorization").is_none()));
    assert_stored(&plant, &[&bytes]);
    assert!(agent.end().success());
}

#[test]
fn a_capped_download_tells_how_far_it_is() {
    let (plant, bytes) = (Plant::offline(), variant(0));
    let server = FileServer::start(&bytes, Fault::None);
    apply(&plant, "parts", &server.url("parts.onnx"), &digest(&bytes));
    let host = server.host();
    let mut agent = plant.start(&["--source-hosts", &host, "--source-http", "--source-kib-per-second", "64"]);
    let seen = until_late("progress", || {
        let seen = model(&agent, "parts");
        let percent = seen["progress"]["percent"].as_f64()?;
        (percent > 0.0 && percent < 100.0).then_some(seen)
    });
    assert_eq!(seen["state"], "Downloading", "{seen}");
    assert_eq!(seen["progress"]["total"].as_u64(), Some(bytes.len() as u64), "{seen}");
    assert!(seen["progress"]["bytes"].as_u64().is_some_and(|got| (1..bytes.len() as u64).contains(&got)), "{seen}");
    assert!(seen["progress"]["from"].as_str().is_some_and(|from| from.contains(&host)), "{seen}");
    arrives(&agent, "parts", &bytes);
    assert!(agent.end().success());
}

/// A small file system of its own, for as long as it is held.
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
fn a_full_disk_is_named_and_what_serves_goes_on() {
    let (plant, bytes) = (Plant::offline(), variant(0));
    let data = plant.data();
    let Some(disk) = SmallDisk::mount(&data) else {
        eprintln!("skipped: this machine lets nobody mount a small file system");
        return;
    };
    plant.put("parts.onnx", &bytes);
    apply(&plant, "parts", "file:../parts.onnx", &digest(&bytes));
    let large = heavy(24, 1);
    let server = FileServer::start(&large, Fault::None);
    let host = server.host();
    let mut agent = plant.start(&["--source-hosts", &host, "--source-http"]);
    arrives(&agent, "parts", &bytes);
    apply(&plant, "large", &server.url("large.onnx"), &digest(&large));
    is_refused(&agent, "large", &["space"]);
    assert!(agent.is_running());
    arrives(&agent, "parts", &bytes);
    plant.check_blobs();
    assert!(!plant.blob(&digest(&large)).exists());
    assert!(agent.end().success());
    drop(agent);
    drop(disk);
}
