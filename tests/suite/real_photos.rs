//! A real classifier on real photos. They are available in the development environment and in CI; without them the test
//! reports that it is skipped.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::Stdio;

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::Broker;
use lineside_tests::camera::FfmpegCamera;
use lineside_tests::process::{Process, command};
use lineside_tests::{model_manifest, python, root, stream_manifest};
use serde_json::Value;

fn shared_data() -> Option<PathBuf> {
    let folder = root().join("../shared/data");
    folder.join("expected.json").exists().then(|| folder.canonicalize().unwrap())
}

/// Python's own web server with a folder of images, used as a snapshot camera that is independent of this project.
struct WebServer {
    _process: Process,
    port: u16,
}

impl WebServer {
    fn start(folder: &std::path::Path) -> Self {
        let mut child = command(python())
            .args(["-u", "-m", "http.server", "--bind", "127.0.0.1", "0"])
            .current_dir(folder)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let process = Process::new(child);
        // It prints: Serving HTTP on 127.0.0.1 port 40123 (http://127.0.0.1:40123/) ...
        let port = line.split(" port ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
        Self { _process: process, port: port.unwrap_or_else(|| panic!("no port in {line:?}")) }
    }
}

#[test]
fn real_photos_are_classified_correctly_from_files_snapshots_and_mjpeg() {
    let Some(data) = shared_data() else {
        eprintln!("skipped: ../shared/data does not exist");
        return;
    };
    let expected: Value = serde_json::from_slice(&fs::read(data.join("expected.json")).unwrap()).unwrap();
    let photos = expected.as_object().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (manifests, images) = (folder.path().join("manifests"), folder.path().join("images"));
    fs::create_dir(&manifests).unwrap();
    fs::create_dir(&images).unwrap();
    for photo in photos.keys() {
        fs::copy(data.join(photo), images.join(photo)).unwrap();
    }
    let more = "  input: {mean: [127, 127, 127], std: [128, 128, 128]}\n";
    let uri = format!("file://{}", data.join("efficientnet_lite0.onnx").display());
    let mut text = model_manifest("imagenet", 1, &uri, more)
        + "---\n"
        + &stream_manifest("files", "dir:../images", "imagenet", "");
    let server = WebServer::start(&images);
    let mut cameras = Vec::new();
    for (index, photo) in photos.keys().enumerate() {
        let url = format!("http://127.0.0.1:{}/{photo}", server.port);
        text += &("---\n".to_owned() + &stream_manifest(&format!("snapshot-{index}"), &url, "imagenet", "  fps: 2\n"));
        let camera = FfmpegCamera::start(&images.join(photo));
        text += &("---\n".to_owned()
            + &stream_manifest(&format!("mjpeg-{index}"), &camera.url(), "imagenet", "  fps: 2\n"));
        cameras.push(camera);
    }
    fs::write(manifests.join("all.yaml"), text).unwrap();
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let mut agent = Agent::start(&AgentOptions {
        manifests: &manifests,
        data: &folder.path().join("data"),
        mqtt: &broker.url(),
        flags: &[],
    });
    let first_class = |result: &Value| result["classes"][0]["class"].clone();
    let from_files = subscriber.wait_for("/files/result", photos.len());
    for (index, (photo, expected)) in photos.iter().enumerate() {
        let expected = &expected["top3"][0];
        let result = from_files.iter().find(|result| result["frame"]["name"] == **photo).unwrap();
        assert_eq!(first_class(result), expected[0], "{photo} from a file");
        let score = result["classes"][0]["score"].as_f64().unwrap();
        assert!((score - expected[1].as_f64().unwrap()).abs() < 0.05, "{photo}: {score} instead of {}", expected[1]);
        for kind in ["snapshot", "mjpeg"] {
            for result in subscriber.wait_for(&format!("/{kind}-{index}/result"), 2) {
                assert_eq!(first_class(&result), expected[0], "{photo} from {kind}");
            }
        }
    }
    assert!(agent.terminate().success());
}
