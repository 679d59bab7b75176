//! Invalid input of every kind causes a clear error that names the file or field, never a panic and never the end of
//! the agent.

use std::fs;
use std::path::Path;

use lineside_tests::agent::{Agent, AgentOptions, lineside};
use lineside_tests::broker::{Broker, UNREACHABLE_BROKER};
use lineside_tests::onnx::{Dim, FLOAT, Model};
use lineside_tests::site::wait_for_rejection;
use lineside_tests::wait::until;
use lineside_tests::{example, frame, model_manifest, stream_manifest};

#[test]
fn invalid_frames_are_counted_logged_once_and_skipped() {
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let folder = tempfile::tempdir().unwrap();
    let (manifests, frames) = (folder.path().join("manifests"), folder.path().join("frames"));
    fs::create_dir(&manifests).unwrap();
    fs::create_dir(&frames).unwrap();
    let good = frame("part-001-good.jpg");
    let mut huge =
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xEA\x60\0\0\xEA\x60\x08\x02\0\0\0\x0F\xB0\xE2\x15\0\0\0\x40IDAT".to_vec();
    huge.extend_from_slice(&[0; 64]);
    fs::write(frames.join("1-good.jpg"), &good).unwrap();
    fs::write(frames.join("2-truncated.jpg"), &good[..good.len() / 2]).unwrap();
    fs::write(frames.join("3-text.jpg"), "no picture").unwrap();
    fs::write(frames.join("4-empty.png"), "").unwrap();
    fs::write(frames.join("5-huge.png"), &huge).unwrap();
    fs::write(frames.join("6-zeros.jpg"), vec![0; 5000]).unwrap();
    fs::create_dir(frames.join("7-folder.jpg")).unwrap();
    std::os::unix::fs::symlink("nowhere", frames.join("8-link.jpg")).unwrap();
    fs::write(frames.join("9-good.jpg"), &good).unwrap();
    let text = model_manifest("parts", 1, &format!("file://{}", example("surface-defects.onnx").display()), "")
        + "---\n"
        + &stream_manifest("line-1", &format!("dir://{}", frames.display()), "parts", "");
    fs::write(manifests.join("all.yaml"), text).unwrap();
    let mut agent = Agent::start(&AgentOptions {
        manifests: &manifests,
        data: &folder.path().join("data"),
        mqtt: &broker.url(),
        flags: &[],
    });
    agent.wait_for_event("stream_ended");
    let results = subscriber.wait_for("/line-1/result", 2);
    let names: Vec<_> = results.iter().map(|result| result["frame"]["name"].clone()).collect();
    assert_eq!(names, ["1-good.jpg", "9-good.jpg"]);
    assert_eq!(agent.metric("lineside_frames_total{outcome=\"failed\",stream=\"line-1\"}"), 7.0);
    let reasons = |event: &str| -> Vec<String> {
        agent.events(event).iter().map(|entry| entry["reason"].as_str().unwrap().to_owned()).collect()
    };
    let failed = reasons("frame_failed").join("\n");
    for expected in ["is cut off", "neither JPEG nor PNG", "3600000000 pixels"] {
        assert!(failed.contains(expected), "{expected} is not in {failed}");
    }
    assert_eq!(reasons("frame_unreadable").len(), 2, "a folder and a dangling link");
    assert_eq!(agent.events("panic").len(), 0);
    assert!(agent.terminate().success());
}

#[test]
fn invalid_models_are_rejected_with_a_reason() {
    let unknown = Model::new()
        .input("x", FLOAT, &[Dim::Size(1), Dim::Size(3), Dim::Size(4), Dim::Size(4)])
        .node("PaintItBlack", &["x"], &["y"], &[])
        .output("y", FLOAT, &[Dim::Size(1), Dim::Size(3)])
        .build();
    let external = Model::new()
        .input("x", FLOAT, &[Dim::Size(1), Dim::Size(3), Dim::Size(4), Dim::Size(4)])
        .external("w", &[1], "/etc/passwd")
        .node("Mul", &["x", "w"], &["y"], &[])
        .output("y", FLOAT, &[Dim::Size(1), Dim::Size(3), Dim::Size(4), Dim::Size(4)])
        .build();
    let good = fs::read(example("surface-defects.onnx")).unwrap();
    let cases: [(&str, &[u8], &str); 6] = [
        ("empty", b"", "the file is empty"),
        ("text", b"hello", "not an ONNX model"),
        ("picture", &frame("part-001-good.jpg"), "not an ONNX model"),
        ("cut", &good[..good.len() / 2], "not an ONNX model"),
        ("operator", &unknown, "PaintItBlack"),
        ("external", &external, "in another file"),
    ];
    let folder = tempfile::tempdir().unwrap();
    let manifests = folder.path().join("manifests");
    fs::create_dir(&manifests).unwrap();
    for (name, bytes, expected) in &cases {
        let file = folder.path().join(format!("{name}.onnx"));
        fs::write(&file, bytes).unwrap();
        fs::write(manifests.join(format!("{name}.yaml")), model_manifest(name, 1, &format!("file:../{name}.onnx"), ""))
            .unwrap();
        // The command reports the same reason as the agent.
        let output = lineside(&["check", file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        let printed = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(printed.contains(expected) && printed.contains(&format!("{name}.onnx")), "{name}: {printed}");
        assert!(!printed.contains("panicked"), "{name}: {printed}");
    }
    let mut agent = Agent::start(&AgentOptions {
        manifests: &manifests,
        data: &folder.path().join("data"),
        mqtt: UNREACHABLE_BROKER,
        flags: &[],
    });
    for (name, _, expected) in &cases {
        let reason = until(&format!("{name} to be rejected"), || {
            let entries = agent.events("model_load_failed");
            entries
                .iter()
                .find(|entry| entry["model"] == *name)
                .map(|entry| entry["reason"].as_str().unwrap().to_owned())
        });
        assert!(reason.contains(expected) && reason.contains(&format!("{name}.onnx")), "{name}: {reason}");
    }
    assert!(agent.is_running());
    assert!(agent.terminate().success());
}

#[test]
fn one_start_reports_every_configuration_error_and_exits_64() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("lineside.yaml");
    fs::write(&config, "speed: 9\nsite: a/b\n").unwrap();
    let output = lineside(&[
        "run",
        "--config",
        config.to_str().unwrap(),
        "--manifests",
        "/no/such",
        "--mqtt",
        "nonsense",
        "--http",
        "0.0.0.0:80",
    ]);
    assert_eq!(output.status.code(), Some(64));
    let printed = String::from_utf8_lossy(&output.stderr);
    for expected in ["speed: is not a known key", "site: `a/b`", "--manifests: /no/such", "--mqtt: ", "--insecure-bind"]
    {
        assert!(printed.contains(expected), "{expected} is not in {printed}");
    }
    for wrong in [&["run", "--no-such-flag"][..], &["fly"], &["check"], &["demo", "--fps", "-1"]] {
        assert_eq!(lineside(wrong).status.code(), Some(64), "{wrong:?}");
    }
    assert_eq!(lineside(&["--help"]).status.code(), Some(0));
}

#[test]
fn a_busy_port_and_an_unusable_data_folder_are_reported_and_exit_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    let run = |data: &Path, http: &str| {
        let output = lineside(&[
            "run",
            "--manifests",
            folder.path().to_str().unwrap(),
            "--mqtt",
            UNREACHABLE_BROKER,
            "--data-dir",
            data.to_str().unwrap(),
            "--http",
            http,
        ]);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, printed) = run(&folder.path().join("data"), &address);
    assert_eq!(code, Some(1));
    assert!(printed.contains(&format!("--http {address} cannot be bound")), "{printed}");
    let (code, printed) = run(Path::new("/proc/nowhere"), "127.0.0.1:0");
    assert_eq!(code, Some(1));
    assert!(printed.contains("--data-dir /proc/nowhere"), "{printed}");
}

#[test]
fn a_model_with_oversized_results_is_refused_and_does_not_block_other_streams() {
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let folder = tempfile::tempdir().unwrap();
    let manifests = folder.path().join("manifests");
    fs::create_dir(&manifests).unwrap();
    let shape = [Dim::Size(1), Dim::Size(3), Dim::Size(640), Dim::Size(640)];
    let wide = Model::new().input("x", FLOAT, &shape).node("Relu", &["x"], &["y"], &[]).output("y", FLOAT, &shape);
    fs::write(folder.path().join("wide.onnx"), wide.build()).unwrap();
    let frames = format!("dir://{}", example("frames").display());
    let text = [
        model_manifest("wide", 1, "file:../wide.onnx", "  task: tensor\n"),
        stream_manifest("wide", &format!("{frames}?loop=true"), "wide", "  fps: 5\n"),
        model_manifest("parts", 1, &format!("file://{}", example("surface-defects.onnx").display()), ""),
        stream_manifest("line-1", &frames, "parts", ""),
    ];
    fs::write(manifests.join("all.yaml"), text.join("---\n")).unwrap();
    let mut agent = Agent::start(&AgentOptions {
        manifests: &manifests,
        data: &folder.path().join("data"),
        mqtt: &broker.url(),
        flags: &[],
    });
    // Its results could never be sent, so the version is refused before it serves.
    let reason = wait_for_rejection(&agent, "wide");
    assert!(reason.contains("can be sent") && reason.contains("spec.task"), "{reason}");
    let results = subscriber.wait_for("/line-1/result", 40);
    let seqs: Vec<u64> = results.iter().map(|result| result["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, (1..=40).collect::<Vec<u64>>());
    assert!(subscriber.payloads("/wide/result").is_empty());
    assert_eq!(agent.metric("lineside_mqtt_connected"), 1.0);
    assert!(agent.terminate().success());
}
