//! HTTP cameras: working, unavailable and faulty ones.

use std::fs;

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::{Broker, Subscriber};
use lineside_tests::camera::{CameraScript, FfmpegCamera, ScriptedCamera};
use lineside_tests::{example, frame, model_manifest, stream_manifest};
use tempfile::TempDir;

struct Site {
    broker: Broker,
    subscriber: Subscriber,
    folder: TempDir,
    agent: Agent,
}

/// A site with the bundled model, the given streams, and a stream `steady` that must not be affected by them.
fn site(streams: &[String]) -> Site {
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let folder = tempfile::tempdir().unwrap();
    let manifests = folder.path().join("manifests");
    fs::create_dir(&manifests).unwrap();
    let steady =
        stream_manifest("steady", &format!("dir://{}?loop=true", example("frames").display()), "parts", "  fps: 20\n");
    let model = model_manifest("parts", 1, &format!("file://{}", example("surface-defects.onnx").display()), "");
    fs::write(manifests.join("a-model.yaml"), model).unwrap();
    fs::write(manifests.join("b-steady.yaml"), steady).unwrap();
    for (index, stream) in streams.iter().enumerate() {
        fs::write(manifests.join(format!("c-stream-{index}.yaml")), stream).unwrap();
    }
    let agent = Agent::start(&AgentOptions {
        manifests: &manifests,
        data: &folder.path().join("data"),
        mqtt: &broker.url(),
        flags: &[],
    });
    Site { broker, subscriber, folder, agent }
}

/// Checks that the stream `steady` produces results and has neither reconnected nor failed.
fn assert_steady(site: &Site) {
    let so_far = site.subscriber.payloads("/steady/result").len();
    site.subscriber.wait_for("/steady/result", so_far + 10);
    assert_eq!(site.agent.metric("lineside_stream_reconnects_total{stream=\"steady\"}"), 0.0);
    assert_eq!(site.agent.metric("lineside_frames_total{outcome=\"failed\",stream=\"steady\"}"), 0.0);
}

#[test]
fn snapshots_and_mjpeg_give_the_same_result_as_the_file() {
    let scratch = frame("part-012-scratch.jpg");
    let snapshot = ScriptedCamera::start(CameraScript::Snapshot(scratch.clone()));
    let mjpeg = ScriptedCamera::start(CameraScript::Mjpeg(scratch));
    let ffmpeg = FfmpegCamera::start(&example("frames/part-012-scratch.jpg"));
    let mut site = site(&[
        stream_manifest("snapshot", &snapshot.url(), "parts", "  fps: 20\n"),
        stream_manifest("mjpeg", &mjpeg.url(), "parts", ""),
        stream_manifest("ffmpeg", &ffmpeg.url(), "parts", ""),
        stream_manifest("file", &format!("file://{}", example("frames/part-012-scratch.jpg").display()), "parts", ""),
    ]);
    let score = |result: &serde_json::Value| {
        assert_eq!(result["classes"][0]["label"], "scratch");
        result["classes"][0]["score"].as_f64().unwrap()
    };
    let expected = score(&site.subscriber.wait_for("/file/result", 1)[0]);
    for stream in ["snapshot", "mjpeg", "ffmpeg"] {
        for result in site.subscriber.wait_for(&format!("/{stream}/result"), 5) {
            assert_eq!(score(&result), expected, "{stream}: the same bytes give the same result");
        }
        site.agent.wait_for_metric_value(&format!("lineside_stream_up{{stream=\"{stream}\"}}"), 1.0);
    }
    assert!(site.agent.terminate().success());
}

#[test]
fn a_camera_outage_is_logged_once_in_each_direction_and_the_stream_recovers() {
    for (name, script) in [
        ("mjpeg", CameraScript::Mjpeg(frame("part-001-good.jpg"))),
        ("snapshot", CameraScript::Snapshot(frame("part-001-good.jpg"))),
    ] {
        let camera = ScriptedCamera::start(script);
        let mut site = site(&[stream_manifest("cam", &camera.url(), "parts", "  fps: 20\n")]);
        site.subscriber.wait_for("/cam/result", 5);
        camera.stop();
        site.agent.wait_for_metric_value("lineside_stream_up{stream=\"cam\"}", 0.0);
        site.agent.wait_for_metric("lineside_stream_reconnects_total{stream=\"cam\"}", 3.0);
        assert_steady(&site);
        let downs = site.agent.events("stream_down").len();
        assert_eq!(downs, 1, "{name}: logged once, not for every attempt");
        let so_far = site.subscriber.payloads("/cam/result").len();
        camera.resume();
        site.subscriber.wait_for("/cam/result", so_far + 5);
        site.agent.wait_for_metric_value("lineside_stream_up{stream=\"cam\"}", 1.0);
        let ups = site.agent.events("stream_up").into_iter().filter(|entry| entry["stream"] == "cam").count();
        assert_eq!(ups, 2, "{name}");
        assert_steady(&site);
        assert!(site.agent.terminate().success());
    }
}

#[test]
fn invalid_camera_responses_are_reported_and_do_not_affect_other_streams() {
    let cases: [(&str, Vec<u8>, &str); 7] = [
        ("refused", b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n".to_vec(), "put user and password into the address"),
        ("moved", b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n".to_vec(), "redirects"),
        ("page", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<hr>".to_vec(), "text/html"),
        ("huge", b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 99999999999\r\n\r\n".to_vec(), "image/jpeg and no picture"),
        (
            "announced",
            b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=b\r\n\r\n--b\r\nContent-Length: 999999999\r\n\r\n"
                .to_vec(),
            "no picture",
        ),
        (
            "endless",
            [&b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace\r\n\r\n"[..], &[b'x'; 100_000]].concat(),
            "no picture",
        ),
        ("noise", [0xFFu8; 300].to_vec(), "without an answer"),
    ];
    let cameras: Vec<ScriptedCamera> =
        cases.iter().map(|(_, answer, _)| ScriptedCamera::start(CameraScript::Raw(answer.clone()))).collect();
    let streams: Vec<String> = cases
        .iter()
        .zip(&cameras)
        .map(|((name, _, _), camera)| stream_manifest(name, &camera.url(), "parts", ""))
        .collect();
    let mut site = site(&streams);
    for (name, _, expected) in &cases {
        let reason = lineside_tests::wait::until(&format!("{name} to be reported"), || {
            let entries = site.agent.events("stream_down");
            entries.into_iter().find(|entry| entry["stream"] == *name).map(|entry| entry["reason"].to_string())
        });
        assert!(reason.contains(expected), "{name}: {reason}");
        assert_eq!(site.agent.metric(&format!("lineside_stream_up{{stream=\"{name}\"}}")), 0.0);
    }
    assert_steady(&site);
    drop(site.broker);
    drop(site.folder);
    assert!(site.agent.terminate().success());
}

#[test]
fn camera_credentials_are_never_logged() {
    let camera =
        ScriptedCamera::start(CameraScript::Raw(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n".to_vec()));
    let url = camera.url().replace("http://", "http://operator:hunter2@") + "?token=s3cret";
    let mut site = site(&[stream_manifest("cam", &url, "parts", "")]);
    site.agent.wait_for_event("stream_down");
    camera.stop();
    site.agent.wait_for_metric("lineside_stream_reconnects_total{stream=\"cam\"}", 3.0);
    let logs = format!("{:?}", site.agent.logs());
    assert!(!logs.contains("hunter2") && !logs.contains("s3cret"), "{logs}");
    assert!(site.agent.terminate().success());
}
