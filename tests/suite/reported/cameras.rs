//! HTTP cameras as they really answer: heads, envelopes, lengths and ends that strict clients refuse, digest authentication, connections
//! that are closed, and connections that stay open without a picture.

use lineside_tests::agent::Agent;
use lineside_tests::broker::{Broker, Subscriber};
use lineside_tests::camera::{CameraScript, ScriptedCamera};
use lineside_tests::site::TestSite;
use lineside_tests::{example, frame, model_manifest, stream_manifest};

/// An agent with one stream for each camera.
struct Site {
    subscriber: Subscriber,
    agent: Agent,
    _broker: Broker,
    _folder: TestSite,
    _cameras: Vec<ScriptedCamera>,
}

fn site(cameras: Vec<(&str, CameraScript)>, more: &str) -> Site {
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let folder = TestSite::offline();
    let uri = format!("file://{}", example("surface-defects.onnx").display());
    folder.apply("model.yaml", &model_manifest("parts", 1, &uri, ""));
    let mut started = Vec::new();
    for (name, script) in cameras {
        let camera = ScriptedCamera::start(script);
        let address = camera.url().replace("http://", "http://operator:se%2Fcret@");
        folder.apply(&format!("{name}.yaml"), &stream_manifest(name, &address, "parts", more));
        started.push(camera);
    }
    let agent = folder.start_with_broker(&broker.url(), &[]);
    Site { subscriber, agent, _broker: broker, _folder: folder, _cameras: started }
}

impl Site {
    /// Waits for results of a stream, which all have this label, from frames of which none failed.
    fn assert_results(&self, stream: &str, label: &str) {
        for result in self.subscriber.wait_for(&format!("/{stream}/result"), 4) {
            assert_eq!(result["classes"][0]["label"], label, "{stream}: {result}");
        }
        let failed = self.agent.metric(&format!("lineside_frames_total{{outcome=\"failed\",stream=\"{stream}\"}}"));
        assert_eq!(failed, 0.0, "{stream}: failed frames");
    }
}

/// A head, and parts with a picture.
fn stream(head: &str, before: &str, picture: &[u8], after: &[u8]) -> CameraScript {
    let part = [before.replace('@', &picture.len().to_string()).as_bytes(), picture, after].concat();
    CameraScript::Stream(head.as_bytes().to_vec(), part)
}

const MULTIPART: &str = "HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace;boundary=b\r\n\r\n";
const PART: &str = "--b\r\nContent-Type: image/jpeg\r\nContent-Length: @\r\n\r\n";

#[test]
fn every_envelope_gives_its_pictures() {
    let dent = frame("part-016-dent.jpg");
    let single = |head: &str| {
        let head = head.replace('@', &dent.len().to_string());
        CameraScript::Raw([head.as_bytes(), &dent].concat())
    };
    let parts = |part: &str, after: &[u8]| stream(MULTIPART, part, &dent, after);
    let old_rest = &frame("part-001-good.jpg")[4000..];
    let mut site = site(
        vec![
            ("blank-colon", single("HTTP/1.1 200 OK\r\nX-Frame : no\r\nContent-Length:@\r\n\r\n")),
            (
                "nameless",
                single("HTTP/1.1 200 OK\r\nTue, 12 Jun 2012 01:56:34 GMT\r\nContent-Type: image/jpeg\r\n\r\n"),
            ),
            ("line-feeds", stream(&MULTIPART.replace('\r', ""), &PART.replace('\r', ""), &dent, b"\n")),
            ("two-statuses", stream(&format!("HTTP/1.0 200 OK\r\n{MULTIPART}"), PART, &dent, b"\r\n")),
            ("no-reason", single("HTTP/1.0 200\r\n\r\n")),
            (
                "multipart-single",
                single("HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed;boundary=x\r\nContent-Length: @\r\n\r\n"),
            ),
            ("text-type", single("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\n")),
            ("no-type", stream("HTTP/1.0 200 OK\r\n\r\n", PART, &dent, b"\r\n")),
            ("other-boundary", parts("--another\r\nContent-Type: image/jpeg\r\n\r\n", b"\r\n")),
            ("no-boundary", stream("HTTP/1.0 200 OK\r\nContent-Type: video/x-motion-jpeg\r\n\r\n", "", &dent, b"")),
            ("wrong-length", parts("--b\r\nContent-Length: 5\r\nContent-Length: \r\n\r\n", b"\r\n")),
            ("padding", parts(PART, &[0; 512])),
            ("old-rest", parts(PART, old_rest)),
            (
                "text-parts",
                parts(
                    &format!("--b\r\nContent-Type: text/plain\r\nContent-Length:9\r\n\r\nHeartbeat\r\n{PART}"),
                    b"\r\n",
                ),
            ),
            (
                "chunked",
                CameraScript::Raw(
                    [
                        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                        format!("{:x}\r\n", dent.len()).as_bytes(),
                        &dent,
                        b"\r\n0\r\n\r\n",
                    ]
                    .concat(),
                ),
            ),
        ],
        "  fps: 5\n",
    );
    for name in [
        "blank-colon",
        "nameless",
        "line-feeds",
        "two-statuses",
        "no-reason",
        "multipart-single",
        "text-type",
        "no-type",
        "other-boundary",
        "no-boundary",
        "wrong-length",
        "padding",
        "old-rest",
        "text-parts",
        "chunked",
    ] {
        site.assert_results(name, "dent");
    }
    assert!(site.agent.terminate().success());
}

#[test]
fn a_picture_counts_when_its_last_byte_has_come_and_a_cut_one_takes_nothing_with_it() {
    let (dent, good) = (frame("part-016-dent.jpg"), frame("part-001-good.jpg"));
    // Nothing follows the picture, not even a boundary: the camera stalls.
    let only = [MULTIPART.as_bytes(), b"--b\r\nContent-Type: image/jpeg\r\n\r\n", &dent].concat();
    let cut = [PART.as_bytes(), &good[..good.len() / 2], b"\r\n", PART.as_bytes()].concat();
    let mut site = site(
        vec![
            ("stalled", CameraScript::Stall(only)),
            ("cut", CameraScript::Stream(MULTIPART.as_bytes().to_vec(), [&cut[..], &dent].concat())),
        ],
        "",
    );
    site.subscriber.wait_for("/stalled/result", 1);
    for result in site.subscriber.wait_for("/cut/result", 5) {
        assert_eq!(result["classes"][0]["label"], "dent", "no result is of half a picture");
    }
    site.agent.wait_for_metric("lineside_frames_total{outcome=\"failed\",stream=\"cut\"}", 1.0);
    // Without a picture for 15 s the camera is connected again, although its connection is open.
    let results = site.subscriber.wait_for("/stalled/result", 2);
    assert_eq!(results[1]["classes"][0]["label"], "dent");
    assert!(site.agent.terminate().success());
}

#[test]
fn digest_authentication_and_busy_cameras_work_and_passwords_stay_secret() {
    let dent = frame("part-016-dent.jpg");
    let ok = [b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n", &dent[..]].concat();
    let challenge = |value: &str| {
        format!("HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: {value}\r\nContent-Length: 0\r\n\r\n").into_bytes()
    };
    let digest = challenge("Digest realm=\"cam\", nonce=\"abc\", qop=\"auth\", algorithm=SHA-256");
    let integrity = challenge("Digest realm=\"cam\", nonce=\"abc\", qop=\"auth-int\"");
    let mut site = site(
        vec![
            ("digest", CameraScript::Unless("Digest username=\"operator\"", digest, ok.clone())),
            (
                "basic",
                CameraScript::Unless("Basic b3BlcmF0b3I6c2UvY3JldA==", challenge("Basic realm=\"cam\""), ok.clone()),
            ),
            ("integrity", CameraScript::Unless("never", integrity, ok)),
            ("forgetful", CameraScript::Forgetful(dent)),
            ("text", CameraScript::Raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nDevice Busy".to_vec())),
        ],
        "  fps: 10\n",
    );
    for stream in ["digest", "basic", "forgetful"] {
        site.assert_results(stream, "dent");
    }
    assert_eq!(
        site.agent.metric("lineside_stream_reconnects_total{stream=\"forgetful\"}"),
        0.0,
        "a repeated GET does not count as a lost camera"
    );
    let reason = |stream: &str| {
        let events = lineside_tests::wait::until("the stream to be down", || {
            let events = site.agent.events("stream_down");
            events.iter().any(|event| event["stream"] == stream).then_some(events)
        });
        events.iter().find(|event| event["stream"] == stream).unwrap()["reason"].as_str().unwrap().to_owned()
    };
    assert!(reason("integrity").contains("Digest auth-int"), "{}", reason("integrity"));
    // What is sent instead of a picture may be a secret of another service.
    assert!(reason("text").contains("text/plain") && !reason("text").contains("Device"), "{}", reason("text"));
    let log = serde_json::to_string(&site.agent.logs()).unwrap();
    assert!(!log.contains("cret") && !log.contains("operator"), "the password or user is in the log");
    assert!(site.agent.terminate().success());
}
