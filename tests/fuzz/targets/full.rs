//! Fuzz targets that need the inference engine, the model store, the cluster client or the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lineside::config::flags::Flags;
use lineside::config::settings::ConfigLayers;
use lineside::desired::Node;
use lineside::desired::object_set::{ApiObject, ObjectSet};
use lineside_api::envelope::Envelope;
use lineside_api::kinds::manifest::read_object;
use lineside_api::names::{ConfigErrors, topic_segment};
use lineside_common::digest::Digest;
use lineside_common::net::AllowedHosts;
use lineside_fuzz::FuzzTarget;
use lineside_inference::decode::{DecodeOptions, decode};
use lineside_inference::engine::inspect;
use lineside_kube::{ResourceKind, WatchChange, parse_watch_message};
use lineside_models::admission::AdmissionRecord;
use lineside_models::fetch::AddressPolicy;
use lineside_models::last_good::{HighestVersion, LastGoodVersions};
use lineside_models::signing::{Keyring, MODEL_PAYLOAD, SigningKey, Statement, sign};
use lineside_models::store::{FailureRecord, Index, Store};
use lineside_tests::onnx::{Dim, FLOAT, Model, mean_colour_classifier};
use tempfile::TempDir;
use url::{Host, Url};

/// The targets of this file.
pub(crate) const TARGETS: &[FuzzTarget] = &[
    FuzzTarget { name: "picture", run: run_picture, seeds: picture_seeds },
    FuzzTarget { name: "model", run: run_model, seeds: model_seeds },
    FuzzTarget { name: "watch_message", run: run_watch_message, seeds: Vec::new },
    FuzzTarget { name: "cached_objects", run: run_cached_objects, seeds: Vec::new },
    FuzzTarget { name: "address", run: run_address, seeds: Vec::new },
    FuzzTarget { name: "signature", run: run_signature, seeds: signature_seeds },
    FuzzTarget { name: "store_record", run: run_store_record, seeds: Vec::new },
    FuzzTarget { name: "last_good", run: run_last_good, seeds: Vec::new },
    FuzzTarget { name: "config", run: run_config, seeds: Vec::new },
];

/// A picture, decoded within small limits.
fn run_picture(input: &[u8]) {
    const LIMITS: DecodeOptions = DecodeOptions {
        encoded_bytes_max: 64 << 10,
        side_pixels_max: 256,
        total_pixels_max: 128 * 128,
        auto_rotate: true,
    };
    if let Ok(picture) = decode(input, &LIMITS) {
        let pixels = u64::from(picture.width()) * u64::from(picture.height());
        assert!(picture.width().max(picture.height()) <= LIMITS.side_pixels_max && pixels <= LIMITS.total_pixels_max);
        assert_eq!(picture.pixels().len() as u64, 3 * pixels);
    }
}

fn picture_seeds() -> Vec<Vec<u8>> {
    use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgb, RgbImage, Rgba, RgbaImage};
    let encoded = |picture: &DynamicImage, format| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut bytes, format).map_or_else(|_| Vec::new(), |()| bytes.into_inner())
    };
    let rgb: DynamicImage = RgbImage::from_fn(24, 17, |x, y| Rgb([x as u8 * 9, y as u8 * 7, 77])).into();
    let gray: DynamicImage = GrayImage::from_fn(9, 40, |x, y| Luma([(x * y) as u8])).into();
    let alpha: DynamicImage = RgbaImage::from_fn(5, 5, |x, y| Rgba([x as u8, y as u8, 1, 128])).into();
    let wide: DynamicImage = GrayImage::from_pixel(300, 2, Luma([9])).into();
    let deep: DynamicImage = DynamicImage::ImageRgb16(rgb.to_rgb16());
    vec![
        encoded(&rgb, ImageFormat::Jpeg),
        encoded(&gray, ImageFormat::Jpeg),
        encoded(&rgb, ImageFormat::Png),
        encoded(&gray, ImageFormat::Png),
        encoded(&alpha, ImageFormat::Png),
        encoded(&wide, ImageFormat::Png),
        encoded(&deep, ImageFormat::Png),
    ]
}

/// A model file, as far as it is inspected before an engine loads it.
fn run_model(input: &[u8]) {
    if let Ok(info) = inspect(input) {
        assert_eq!(info.outputs.len(), info.activations.len());
        assert!(info.nodes > 0 && info.class_names().is_none_or(|names| !names.by_number.is_empty()));
        let shapes = info.inputs.iter().chain(&info.outputs).map(|tensor| tensor.protocol_shape());
        assert!(shapes.flatten().all(|size| size >= -1));
        assert!(info.image_size() != Some((0, 0)) || info.metadata.contains_key("imgsz"));
    }
}

fn model_seeds() -> Vec<Vec<u8>> {
    let classifier = mean_colour_classifier(8, 6, 4).metadata("names", "{0: 'good', 1: 'scratch'}");
    let input = |model: Model| model.input("x", FLOAT, &[Dim::Named("batch"), Dim::Size(2)]);
    vec![
        classifier.metadata("imgsz", "[8, 6]").build(),
        input(Model::new()).node("Softmax", &["x"], &["y"], &[]).output("y", FLOAT, &[Dim::Size(1)]).build(),
        input(Model::new())
            .integers("shape", &[2], &[1, -1])
            .node("Reshape", &["x", "shape"], &["z"], &[])
            .node("Sigmoid", &["z"], &["y"], &[])
            .output("y", FLOAT, &[])
            .build(),
        input(Model::new()).external("w", &[1 << 40], "/etc/hostname").node("Add", &["x", "w"], &["y"], &[]).build(),
    ]
}

/// A message of a watch of the API server.
fn run_watch_message(input: &[u8]) {
    for kind in [ResourceKind::EdgeModel, ResourceKind::CameraStream, ResourceKind::EdgeNode] {
        if let Ok((WatchChange::Updated(resource), _)) = parse_watch_message(kind, input) {
            assert_eq!(resource.document["kind"], kind.name(), "the kind is that of the watch");
            drop(read_object(resource.document, &|_| Ok(())));
        }
    }
}

/// The objects of `desired.json`, the cached desired state.
fn run_cached_objects(input: &[u8]) {
    let Ok(objects) = serde_json::from_slice::<Vec<ApiObject>>(input) else { return };
    let mut set = ObjectSet::default();
    for object in objects {
        set.put(object, &|_| Ok(()));
    }
    let node = Node { name: "edge-1".to_owned(), labels: BTreeMap::from([("line".to_owned(), "a".to_owned())]) };
    let desired = set.desired_state(&node, &BTreeMap::new(), true);
    assert_eq!(desired.objects.len(), set.cacheable(&node).len());
}

/// An address of a model under the address policy.
fn run_address(input: &[u8]) {
    let Some(url) = std::str::from_utf8(input).ok().and_then(|text| Url::parse(text).ok()) else { return };
    let listed = ["models.plant", "10.0.0.1:443", "[::1]:9", ""];
    let any = AddressPolicy { hosts: AllowedHosts::any(), allow_http: true };
    let some = AddressPolicy { hosts: listed.into_iter().collect(), allow_http: false };
    assert!(some.check(&url).is_err() || url.scheme() == "https");
    if any.check(&url).is_ok() {
        let address = match url.host() {
            Some(Host::Ipv4(address)) => Some(address),
            Some(Host::Ipv6(address)) => address.to_ipv4_mapped(),
            _ => None,
        };
        let is_local = address.is_some_and(|address| {
            address.is_loopback() || address.is_link_local() || address.is_unspecified() || address.is_multicast()
        });
        assert!(!is_local, "{url}");
    }
}

/// A key with a fixed seed, so that runs can be repeated, and its keyring.
fn keys() -> &'static (SigningKey, Keyring) {
    static KEYS: OnceLock<(SigningKey, Keyring)> = OnceLock::new();
    KEYS.get_or_init(|| {
        let folder = TempDir::new().unwrap();
        let pem = |label: &str, der: &[u8]| {
            format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", BASE64.encode(der))
        };
        let pkcs8: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
        let spki: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];
        let path = folder.path().join("key");
        fs::write(&path, pem("PRIVATE KEY", &[&pkcs8[..], &[7; 32]].concat())).unwrap();
        let key = SigningKey::read(&path).unwrap();
        let public = folder.path().join("key.pub");
        fs::write(&public, pem("PUBLIC KEY", &[&spki[..], &key.public()].concat())).unwrap();
        let keyring = Keyring::read(&public, 1).unwrap();
        (key, keyring)
    })
}

fn statement() -> Statement {
    Statement {
        name: "m".to_owned(),
        version: 3,
        digest: Digest::of(b"model"),
        size: 5,
        expires: Some("2027-12-31".to_owned()),
        rollback: false,
        spec_digest: Digest::of(b"spec"),
    }
}

/// A signature: an envelope that verifies states what was signed.
fn run_signature(input: &[u8]) {
    let Ok(envelope) = serde_json::from_slice::<Envelope>(input) else { return };
    if let Ok(stated) = keys().1.verify_statement(&envelope, "m", 3) {
        assert_eq!(stated, statement(), "only the signed statement verifies");
    }
}

fn signature_seeds() -> Vec<Vec<u8>> {
    let payload = serde_json::to_vec(&statement()).unwrap();
    let mut signed = Envelope::new(MODEL_PAYLOAD, &payload);
    sign(&mut signed, &keys().0).unwrap();
    let other = Envelope { payload_type: "text/plain".to_owned(), ..signed.clone() };
    let changed = Envelope { payload: BASE64.encode(b"{\"name\":\"m\",\"version\":3}"), ..signed.clone() };
    let twice = Envelope { signatures: vec![signed.signatures[0].clone(); 2], ..signed.clone() };
    [Envelope::new(MODEL_PAYLOAD, &payload), signed, other, changed, twice]
        .iter()
        .map(|envelope| serde_json::to_vec(envelope).unwrap())
        .collect()
}

/// A folder that all inputs of a target share, one input at a time.
fn with_folder(folder: &Mutex<Option<TempDir>>, work: impl FnOnce(&Path)) {
    let mut folder = folder.lock().unwrap_or_else(PoisonError::into_inner);
    work(folder.get_or_insert_with(|| TempDir::new().unwrap()).path());
}

/// Every record of the model store: of a version, of an admission, of failures, and the checkpoint of a download.
fn run_store_record(input: &[u8]) {
    static FOLDER: Mutex<Option<TempDir>> = Mutex::new(None);
    with_folder(&FOLDER, |folder| {
        let store = Store::open(folder, 1 << 20, Index::off()).unwrap();
        let key = Digest::of(b"m:3");
        for kind in ["versions", "verdicts", "trials", "partial"] {
            fs::write(folder.join(kind).join(format!("{}.json", key.hex())), input).unwrap();
        }
        fs::write(folder.join("partial").join(key.hex()), b"received").unwrap();
        let versions = store.versions().unwrap();
        assert!(versions.len() <= 1);
        drop(store.version("m", 3).unwrap());
        store.set_pinned("m", 3, true).unwrap();
        drop(store.read_digest_record::<FailureRecord>(&key));
        drop(store.read_digest_record::<AdmissionRecord>(&key));
        assert!(store.usage().is_ok());
        drop(store.plan_eviction(1 << 19, &BTreeSet::new()));
        drop(store.open_partial(&key));
        assert!(!store.contains_blob(&key), "a record makes no file complete");
    });
}

/// The files of the last-good versions.
fn run_last_good(input: &[u8]) {
    static FOLDER: Mutex<Option<TempDir>> = Mutex::new(None);
    with_folder(&FOLDER, |folder| {
        fs::write(folder.join("last-good.json"), input).unwrap();
        fs::write(folder.join("highest-versions.json"), input).unwrap();
        let mut versions = LastGoodVersions::read(folder);
        let names: Vec<String> = versions.names().cloned().collect();
        for name in names {
            let found = versions.get(&name).cloned().unwrap();
            assert_eq!(found.manifest.name, name);
            versions.record(&found.manifest, found.digest).unwrap();
            match versions.highest_version(&name) {
                HighestVersion::Version(highest) => assert!(highest >= found.manifest.version),
                // The input is no valid file of the highest versions.
                HighestVersion::Unknown => {}
                HighestVersion::None => panic!("{name} serves"),
            }
        }
    });
}

/// A configuration file, or the variables of the environment after a first line `#env`.
fn run_config(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut layers = ConfigLayers::new(Flags::default());
    let mut errors = ConfigErrors::default();
    match text.strip_prefix("#env\n") {
        Some(variables) => layers.environment(
            variables.lines().filter_map(|line| line.split_once('=')).map(|(name, value)| (name.into(), value.into())),
        ),
        None => layers.file("lineside.yaml", text, &mut errors),
    }
    match layers.resolve(errors, "edge-1") {
        Ok(config) => {
            for level in [&config.node, &config.site].into_iter().map(String::as_str).chain(config.prefix.split('/')) {
                assert_eq!(topic_segment(level), Ok(()));
            }
            assert!(!config.mqtt.brokers.is_empty());
        }
        Err(errors) => assert!(!errors.is_empty()),
    }
}
