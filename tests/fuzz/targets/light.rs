//! Fuzz targets of parsers that need no inference engine: manifests, addresses, rules, names, MQTT, streams of pictures and JPEG.
//!
//! Each target checks, besides the absence of panics, what must hold for every input.

use std::collections::BTreeSet;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use lineside_api::kinds::manifest::{self, Object};
use lineside_api::kinds::{ModelSource, StreamSource, document};
use lineside_api::message::{IncomingTopic, Topics};
use lineside_api::names::{is_name, topic_segment};
use lineside_api::prediction::{Class, Detection, Prediction};
use lineside_capture::{Found, PictureScanner};
use lineside_fuzz::FuzzTarget;
use lineside_ipc::jpeg::{Extent, extent};
use lineside_mqtt::command::{CommandAction, CommandName};
use lineside_mqtt::connection::MqttMessage;
use lineside_mqtt::sparkplug::{HostSignal, SparkplugSession};
use lineside_rules::{FrameFacts, Rule};
use serde_json::json;
use url::Url;

/// The targets of this file.
pub(crate) const TARGETS: &[FuzzTarget] = &[
    FuzzTarget { name: "manifest", run: run_manifest, seeds: Vec::new },
    FuzzTarget { name: "object", run: run_object, seeds: Vec::new },
    FuzzTarget { name: "url", run: run_url, seeds: Vec::new },
    FuzzTarget { name: "rule", run: run_rule, seeds: Vec::new },
    FuzzTarget { name: "name", run: run_name, seeds: Vec::new },
    FuzzTarget { name: "command", run: run_command, seeds: Vec::new },
    FuzzTarget { name: "sparkplug", run: run_sparkplug, seeds: sparkplug_seeds },
    FuzzTarget { name: "mqtt_packet", run: run_mqtt_packet, seeds: mqtt_packet_seeds },
    FuzzTarget { name: "picture_stream", run: run_picture_stream, seeds: Vec::new },
    FuzzTarget { name: "jpeg", run: run_jpeg, seeds: jpeg_seeds },
];

/// A file of manifests, YAML or JSON.
fn run_manifest(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match manifest::read(text, Path::new("/manifests"), &|_| Ok(())) {
        Ok(objects) => objects.iter().for_each(check_object),
        Err(errors) => assert!(!errors.into_list().is_empty(), "a rejected file has an error"),
    }
}

/// An object of the API server, JSON.
fn run_object(input: &[u8]) {
    let Ok(document) = serde_json::from_slice(input) else { return };
    match manifest::read_object(document, &|_| Ok(())) {
        Ok(object) => check_object(&object),
        Err(errors) => assert!(!errors.into_list().is_empty(), "a rejected object has an error"),
    }
}

fn check_object(object: &Object) {
    assert!(is_name(object.key().1), "names are parts of topics and paths");
    match object {
        Object::Model(model) => {
            let again = model.document.read(&|_| Ok(()));
            assert_eq!(again.as_ref().ok(), Some(object), "the stored document reads as the same object");
            assert!((1..=64).contains(&model.instances));
            assert!(model.golden.iter().all(|golden| (0.0..=1.0).contains(&golden.tolerance)));
        }
        Object::Stream(stream) => {
            assert!(is_name(&stream.model));
            assert!(stream.frame_interval.is_none_or(|interval| !interval.is_zero()));
        }
    }
}

/// `source.uri` of a model and of a stream. The shown address contains no password.
fn run_url(input: &[u8]) {
    let Ok(uri) = std::str::from_utf8(input) else { return };
    let digest = format!("sha256:{}", "0".repeat(64));
    let model = json!({"version": 1, "source": {"uri": uri, "digest": digest}});
    let stream = json!({"source": {"uri": uri}, "model": "m", "nodeName": "n"});
    let read = |kind, spec| manifest::read_object(document(kind, "x", &spec), &|_| Ok(())).ok();
    let mut shown = Vec::new();
    if let Some(Object::Model(model)) = read("EdgeModel", model) {
        shown.push(model.source.to_string());
        if let ModelSource::Http(url) = &model.source {
            assert!(url.username().is_empty() && url.password().is_none(), "{uri}");
        }
    }
    if let Some(Object::Stream(stream)) = read("CameraStream", stream) {
        shown.push(stream.source.to_string());
        assert!(
            !matches!(&stream.source, StreamSource::Http(url) if url.host_str().is_none_or(str::is_empty)),
            "{uri}"
        );
    }
    let password = Url::parse(uri).ok().and_then(|url| url.password().map(str::to_owned)).unwrap_or_default();
    // Short passwords, and those that are also part of the path, appear by chance.
    let is_distinct = password.len() >= 6
        && password.bytes().all(|byte| byte.is_ascii_alphanumeric())
        && uri.matches(&password).count() == 1;
    assert!(!is_distinct || shown.iter().all(|text| !text.contains(&password)), "{shown:?} shows a password");
}

/// A verdict rule, compiled and evaluated for a prediction of each task.
fn run_rule(input: &[u8]) {
    let Ok(expression) = std::str::from_utf8(input) else { return };
    let Ok(rule) = Rule::compile(expression) else { return };
    let class = |label: &str| Class { label: label.into(), class: 1, score: 0.7 };
    let detection = |left: f32| Detection { class: class("dent"), bbox: [left, 2.0, 30.0, 40.5] };
    let frame = FrameFacts { width: 640, height: 480, name: Some("part-1.jpg") };
    for (task, prediction) in [
        ("classify", Prediction::Classes(vec![class("good"), class("scratch")])),
        ("detect", Prediction::Detections(vec![detection(0.0), detection(f32::MAX), detection(-1.5)])),
        ("anomaly", Prediction::Anomaly { score: f32::NAN, map: None }),
        ("tensor", Prediction::Tensors(Vec::new())),
    ] {
        if let Err(error) = rule.evaluate(task, &prediction, frame) {
            assert!(!error.to_string().contains('\n'), "the message is one line");
        }
    }
}

/// Names of objects, levels of topics, and topics of received messages.
fn run_name(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let topics = Topics::new("lineside", "plant", "edge-1");
    let own = |rest: String| format!("lineside/v1/plant/edge-1/{rest}");
    if is_name(text) {
        assert_eq!(topic_segment(text), Ok(()), "a name is a level of a topic");
        assert_eq!(topics.parse(&own(format!("{text}/trigger"))), Some(IncomingTopic::Trigger(text)));
    }
    if topic_segment(text).is_ok() {
        assert!(!text.contains(['/', '+', '#', '\0']) && text.len() <= 253);
    }
    for topic in [text.to_owned(), own(text.to_owned()), own(format!("cmd/{text}/set"))] {
        match topics.parse(&topic) {
            Some(IncomingTopic::Trigger(stream)) => assert!(is_name(stream)),
            Some(IncomingTopic::Command(name)) => assert!(!name.contains('/')),
            Some(IncomingTopic::Presence) | None => {}
        }
    }
}

/// A command: its name in the first line, and its payload.
fn run_command(input: &[u8]) {
    let mut parts = input.splitn(2, |byte| *byte == b'\n');
    let name = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let payload = parts.next().unwrap_or_default();
    let allowed: BTreeSet<CommandName> =
        CommandName::ALL.into_iter().filter(|name| *name != CommandName::Snapshot).collect();
    let (_, action) = CommandAction::parse(&name, payload, &allowed);
    if action.is_ok() {
        assert!(name.parse().is_ok_and(|name| allowed.contains(&name)), "only allowed commands are executed");
    }
}

/// Messages of a Sparkplug B host: the first byte selects the topic, the rest is the payload.
fn run_sparkplug(input: &[u8]) {
    let Some((selector, payload)) = input.split_first() else { return };
    let topic = ["spBv1.0/STATE/host", "spBv1.0/g/NCMD/edge-1", "spBv1.0/g/DCMD/edge-1/cam"][usize::from(selector % 3)];
    let mut session = SparkplugSession::new("g", "edge-1", "plant", Some("host"), 255);
    let message =
        MqttMessage { topic: topic.into(), payload: Bytes::copy_from_slice(payload), retain: selector & 0x80 != 0 };
    let was_online = session.is_host_online();
    let signal = session.handle_message(&message);
    assert_eq!(session.is_host_online() != was_online, signal == HostSignal::HostOnline);
    assert_ne!(session.handle_message(&message), HostSignal::HostOnline, "the same message changes nothing");
}

fn sparkplug_seeds() -> Vec<Vec<u8>> {
    // Payload { metrics: [Metric { name: "Node Control/Rebirth", datatype: 11, boolean_value: true }] }
    let mut metric = vec![0x0A, 20];
    metric.extend_from_slice(b"Node Control/Rebirth");
    metric.extend_from_slice(&[0x20, 11, 0x70, 1]);
    let mut rebirth = vec![1, 0x08, 1, 0x12, u8::try_from(metric.len()).unwrap_or_default()];
    rebirth.extend_from_slice(&metric);
    vec![rebirth, b"\0{\"online\": true, \"timestamp\": 1800000000000}".to_vec(), b"\x02\x12\x00".to_vec()]
}

/// The bytes of a broker, as the MQTT client parses them.
fn run_mqtt_packet(input: &[u8]) {
    let mut stream = BytesMut::from(input);
    loop {
        let before = stream.len();
        if rumqttc::Packet::read(&mut stream, 8 << 20).is_err() {
            return;
        }
        assert!(stream.len() < before, "a packet takes bytes");
    }
}

fn mqtt_packet_seeds() -> Vec<Vec<u8>> {
    let publish = [&[0x32, 12, 0, 5][..], b"a/b/c", &[0, 7], b"xyz"].concat();
    vec![
        vec![0x20, 2, 1, 0],                      // CONNACK, session present
        vec![0x20, 2, 0, 5],                      // CONNACK, not authorized
        vec![0x40, 2, 0, 7],                      // PUBACK
        vec![0x90, 4, 0, 1, 0, 0x80],             // SUBACK with a failure
        vec![0xD0, 0],                            // PINGRESP
        vec![0x30, 0xFF, 0xFF, 0xFF, 0x7F, 0, 1], // PUBLISH of 256 MiB
        publish,
    ]
}

/// A stream of pictures: the first byte selects the size of the pieces that are received.
fn run_picture_stream(input: &[u8]) {
    let Some((step, stream)) = input.split_first() else { return };
    const PICTURE_BYTES_MAX: usize = 1000;
    let step = usize::from(*step) + 1;
    let whole = found(stream, stream.len().max(1), PICTURE_BYTES_MAX);
    let stepped = found(stream, step, PICTURE_BYTES_MAX);
    for one in stepped.iter().flatten().chain(whole.iter().flatten()) {
        if let Found::Picture(picture) = one {
            assert!(picture.starts_with(&[0xFF, 0xD8, 0xFF]) || picture.starts_with(b"\x89PNG"));
        }
    }
    if let (Some(whole), Some(stepped)) = (whole, stepped) {
        assert_eq!(whole, stepped, "what is found does not depend on the size of the received pieces");
    }
}

/// All that is found; `None` when a picture is too large.
fn found(stream: &[u8], step: usize, bytes_max: usize) -> Option<Vec<Found>> {
    let mut scanner = PictureScanner::new(bytes_max);
    let mut found = Vec::new();
    for piece in stream.chunks(step) {
        scanner.feed(piece);
        while let Some(one) = scanner.next_found().ok()? {
            found.push(one);
        }
    }
    Some(found)
}

/// The extent of a JPEG.
fn run_jpeg(input: &[u8]) {
    match extent(input) {
        Extent::Complete(bytes) => {
            assert!(bytes <= input.len());
            assert_eq!(extent(&input[..bytes]), Extent::Complete(bytes));
            assert_eq!(extent(&input[..bytes - 1]), Extent::Truncated);
        }
        Extent::Truncated => {
            let completed = [input, &[0xFF; 16]].concat();
            assert_ne!(extent(&input[..input.len() / 2]), Extent::NotJpeg);
            assert!(!matches!(extent(&completed), Extent::Complete(bytes) if bytes < input.len()));
        }
        Extent::Interrupted(next) => assert!(input[next..].starts_with(&[0xFF, 0xD8])),
        Extent::NotJpeg => {}
    }
}

fn jpeg_seeds() -> Vec<Vec<u8>> {
    let picture = [
        &[0xFF, 0xD8, 0xFF, 0xE1, 0x00, 0x06, 0xFF, 0xD8, 0xFF, 0xD9][..], // SOI, APP1 with an end marker inside
        &[0xFF, 0xC0, 0x00, 0x0B, 8, 0, 16, 0, 16, 1, 1, 0x11, 0],         // SOF0, 16x16, grey
        &[0xFF, 0xDA, 0x00, 0x03, 0x01, 0x12, 0xFF, 0x00, 0xFF, 0xD3, 0x34, 0xFF, 0xFF, 0xD9],
    ]
    .concat();
    vec![picture.repeat(2), picture[..20].to_vec(), picture, vec![0xFF, 0xD8, 0xFF, 0xE0, 0, 0]]
}
