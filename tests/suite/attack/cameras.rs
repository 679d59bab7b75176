//! Camera sources that name what only the node can reach: files, and services of the node. Case `snapshot-reads-any-file`: a
//! snapshot of such a stream sent /etc/shadow, and the answer of an internal service, off the node.

use std::fs;

use lineside_tests::broker::{Broker, Subscriber};
use lineside_tests::camera::{CameraScript, ScriptedCamera};
use lineside_tests::process::run_with_input;
use lineside_tests::site::TestSite;
use lineside_tests::wait::{until_long, until_true};
use lineside_tests::{frame, stream_manifest, utf8};
use serde_json::Value;

const SECRET: &str = "root:$6$s3cret:19000:0:99999:7:::\n";
const COMMANDS: &str = "snapshot,pause,resume";

/// Sends commands, and reads their replies.
struct Operator {
    broker: Broker,
    subscriber: Subscriber,
    commands: u32,
}

impl Operator {
    fn start() -> Self {
        let broker = Broker::start();
        let subscriber = broker.subscribe("lineside/v1/plant/#");
        Self { broker, subscriber, commands: 0 }
    }

    fn send(&mut self, name: &str, stream: &str) -> String {
        self.commands += 1;
        let id = self.commands.to_string();
        let payload = format!(r#"{{"id":"{id}","stream":"{stream}"}}"#);
        self.broker.publish(&format!("lineside/v1/plant/edge-1/cmd/{name}/set"), payload, false);
        id
    }

    fn reply(&self, id: &str) -> Value {
        until_long(&format!("the reply to command {id}"), || {
            self.subscriber.payloads("/state").into_iter().find(|reply| reply["id"] == id)
        })
    }

    /// The attack: the stream reads its source again while a snapshot waits for the next frame.
    fn snapshot(&mut self, stream: &str) -> Value {
        let pause = self.send("pause", stream);
        self.reply(&pause);
        self.send("resume", stream);
        let snapshot = self.send("snapshot", stream);
        self.reply(&snapshot)
    }
}

fn assert_refused(reply: &Value) {
    assert_eq!(reply["ok"], false, "{reply}");
    assert!(reply["image"].is_null(), "{reply}");
}

#[test]
fn files_outside_the_allowed_folders_are_never_read() {
    let mut operator = Operator::start();
    let site = TestSite::with_stream(20);
    let frames = site.path("frames");
    fs::create_dir(&frames).unwrap();
    fs::write(frames.join("a.jpg"), frame("part-001-good.jpg")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", frames.join("b.jpg")).unwrap();
    let outside = TestSite::offline();
    outside.write("outside.jpg", &frame("part-001-good.jpg"));
    let sources = [
        ("etc", "file:///etc/passwd".to_owned()),
        ("link", format!("file://{}", frames.join("b.jpg").display())),
        ("dots", format!("file://{}/../../../../../etc/passwd", frames.display())),
        ("proc", "file:///proc/self/environ".to_owned()),
        ("state", format!("file://{}", site.data().join("boot-epoch").display())),
        ("picture", format!("file://{}", outside.path("outside.jpg").display())),
        ("folder", format!("dir://{}?loop=true", outside.path("").display())),
    ];
    for (name, uri) in &sources {
        site.apply(&format!("{name}.yaml"), &stream_manifest(name, uri, "parts", "  fps: 20\n"));
    }
    // A link in an allowed folder is skipped; the folder's other files are played.
    let mixed = format!("dir://{}?loop=true", frames.display());
    site.apply("mixed.yaml", &stream_manifest("mixed", &mixed, "parts", "  fps: 20\n"));
    let root = site.path("");
    let agent =
        site.start_with_broker(&operator.broker.url(), &["--mqtt-commands", COMMANDS, "--file-roots", utf8(&root)]);
    for (name, _) in &sources {
        until_true(&format!("the stream {name} to be down"), || {
            agent.events("stream_down").iter().any(|entry| entry["stream"] == *name)
        });
    }
    operator.subscriber.wait_for("/mixed/result", 3);
    agent.wait_for_metric("lineside_frames_total{outcome=\"failed\",stream=\"mixed\"}", 1.0);
    for stream in ["etc", "link"] {
        assert_refused(&operator.snapshot(stream));
    }
    for (name, _) in &sources {
        assert_eq!(agent.metric(&format!("lineside_frames_total{{outcome=\"processed\",stream=\"{name}\"}}")), 0.0);
        assert_eq!(agent.metric(&format!("lineside_frames_total{{outcome=\"failed\",stream=\"{name}\"}}")), 0.0);
    }
}

#[test]
fn a_snapshot_of_bytes_that_are_not_a_picture_is_refused() {
    let mut operator = Operator::start();
    let site = TestSite::with_stream(20);
    let service = ScriptedCamera::start(CameraScript::Snapshot(SECRET.into()));
    site.apply("service.yaml", &stream_manifest("service", &service.url(), "parts", "  fps: 20\n"));
    let jpeg = frame("part-001-good.jpg");
    // A picture that decoders reject: its header is that of a picture.
    let mut damaged = jpeg.clone();
    let scan = damaged.windows(2).position(|bytes| bytes == [0xFF, 0xC4]).unwrap();
    damaged[scan + 5..scan + 21].fill(0xFF);
    let broken = ScriptedCamera::start(CameraScript::Snapshot(damaged));
    site.apply("broken.yaml", &stream_manifest("broken", &broken.url(), "parts", "  fps: 20\n"));
    let with_secret = [&jpeg[..], SECRET.as_bytes()].concat();
    let camera = ScriptedCamera::start(CameraScript::Snapshot(with_secret));
    site.apply("camera.yaml", &stream_manifest("camera", &camera.url(), "parts", "  fps: 20\n"));
    let agent = site.start_with_broker(&operator.broker.url(), &["--mqtt-commands", COMMANDS]);
    // Bytes other than a picture never become a frame, and nothing of them leaves the node.
    let is_down = |event: &serde_json::Value| event["stream"] == "service";
    let down = until_long("the service to be down", || agent.events("stream_down").into_iter().find(is_down));
    assert!(down["reason"].as_str().unwrap().contains("no picture"), "{down}");
    assert_refused(&operator.snapshot("service"));
    assert!(!format!("{:?}", agent.logs()).contains(SECRET.trim()), "the log has what the service sent");
    // A stream that has just been resumed may have no frame yet, which is another error.
    until_long("a frame that is not a picture", || {
        let reply = operator.snapshot("broken");
        assert_refused(&reply);
        reply["error"].as_str().unwrap().contains("not a picture").then_some(())
    });
    // Of a picture with something behind it, the picture is sent.
    let reply = until_long("a snapshot", || Some(operator.snapshot("camera")).filter(|reply| reply["ok"] == true));
    let image = run_with_input("base64", &["-d"], reply["image"].as_str().unwrap().as_bytes());
    assert_eq!(image, jpeg);
}

#[test]
fn services_of_this_node_are_no_cameras_unless_they_are_listed() {
    let operator = Operator::start();
    let site = TestSite::with_stream(20);
    let service = ScriptedCamera::start(CameraScript::Snapshot(frame("part-001-good.jpg")));
    let listed = ScriptedCamera::start(CameraScript::Snapshot(frame("part-001-good.jpg")));
    let port = service.url().rsplit_once(':').unwrap().1.to_owned();
    let number = port.split_once('/').unwrap().0.to_owned();
    let spellings = [
        ("literal", service.url()),
        ("name", format!("http://localhost:{port}")),
        ("number", format!("http://2130706433:{port}")),
        ("mapped", format!("http://[::ffff:127.0.0.1]:{port}")),
        ("zero", format!("http://0.0.0.0:{port}")),
        ("metadata", format!("http://169.254.169.254:{number}/latest")),
    ];
    for (name, uri) in &spellings {
        site.apply(&format!("{name}.yaml"), &stream_manifest(name, uri, "parts", "  fps: 20\n"));
    }
    site.apply("listed.yaml", &stream_manifest("listed", &listed.url(), "parts", "  fps: 20\n"));
    let allowed = listed.url().trim_start_matches("http://").trim_end_matches("/video").to_owned();
    let hosts = format!("*,{allowed}");
    let agent = site.start_with_broker(&operator.broker.url(), &["--camera-hosts", &hosts]);
    for (name, _) in &spellings {
        until_true(&format!("the stream {name} to be down"), || {
            agent.events("stream_down").iter().any(|entry| entry["stream"] == *name)
        });
    }
    operator.subscriber.wait_for("/listed/result", 3);
    assert_eq!(service.requests(), 0);
}
