//! A real classifier and real photos, where they are at hand: beside a developer's checkout and in CI. Users have no such
//! folder, and then this says that it was passed over.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use lineside_tests::agent::{Agent, Start};
use lineside_tests::broker::{Broker, free_port};
use lineside_tests::camera::Ffmpeg;
use lineside_tests::wait::until_true;
use lineside_tests::{model_manifest, python, root, stream_manifest};
use serde_json::Value;

fn shared_data() -> Option<PathBuf> {
    let folder = root().join("../shared/data");
    folder.join("expected.json").exists().then(|| folder.canonicalize().unwrap())
}

/// Python's own web server, serving a folder: a snapshot camera nobody here has written.
struct WebServer {
    child: Child,
    port: u16,
}

impl WebServer {
    fn start(folder: &std::path::Path) -> Self {
        let port = free_port();
        let child = Command::new(python())
            .args(["-m", "http.server", "--bind", "127.0.0.1", &port.to_string()])
            .current_dir(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        until_true("the web server", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { child, port }
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn real_photos_get_their_first_class_from_files_snapshots_and_mjpeg() {
    let Some(data) = shared_data() else {
        eprintln!("skipped: ../shared/data is not there");
        return;
    };
    let expected: Value = serde_json::from_slice(&fs::read(data.join("expected.json")).unwrap()).unwrap();
    let photos = expected.as_object().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (manifests, pictures) = (folder.path().join("manifests"), folder.path().join("pictures"));
    fs::create_dir(&manifests).unwrap();
    fs::create_dir(&pictures).unwrap();
    for photo in photos.keys() {
        fs::copy(data.join(photo), pictures.join(photo)).unwrap();
    }
    let more = "  input: {mean: [127, 127, 127], std: [128, 128, 128]}\n";
    let uri = format!("file://{}", data.join("efficientnet_lite0.onnx").display());
    let mut text = model_manifest("imagenet", 1, &uri, more)
        + "---\n"
        + &stream_manifest("files", "dir:../pictures", "imagenet", "");
    let server = WebServer::start(&pictures);
    let mut cameras = Vec::new();
    for (index, photo) in photos.keys().enumerate() {
        let url = format!("http://127.0.0.1:{}/{photo}", server.port);
        text += &("---\n".to_owned() + &stream_manifest(&format!("snapshot-{index}"), &url, "imagenet", "  fps: 2\n"));
        let camera = Ffmpeg::start(&pictures.join(photo));
        text += &("---\n".to_owned()
            + &stream_manifest(&format!("mjpeg-{index}"), &camera.url(), "imagenet", "  fps: 2\n"));
        cameras.push(camera);
    }
    fs::write(manifests.join("all.yaml"), text).unwrap();
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let mut agent = Agent::start(&Start {
        manifests: &manifests,
        data: &folder.path().join("data"),
        mqtt: &broker.url(),
        flags: &[],
    });
    let first_class = |result: &Value| result["classes"][0]["class"].clone();
    let from_files = subscriber.wait_for("/files/result", photos.len());
    for (index, (photo, wanted)) in photos.iter().enumerate() {
        let wanted = &wanted["top3"][0];
        let result = from_files.iter().find(|result| result["frame"]["name"] == **photo).unwrap();
        assert_eq!(first_class(result), wanted[0], "{photo} from a file");
        let score = result["classes"][0]["score"].as_f64().unwrap();
        assert!((score - wanted[1].as_f64().unwrap()).abs() < 0.05, "{photo}: {score} instead of {}", wanted[1]);
        for kind in ["snapshot", "mjpeg"] {
            for result in subscriber.wait_for(&format!("/{kind}-{index}/result"), 2) {
                assert_eq!(first_class(&result), wanted[0], "{photo} from {kind}");
            }
        }
    }
    assert!(agent.end().success());
}
