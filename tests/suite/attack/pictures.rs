//! Pictures that are small as files and large when they are decoded. Four cameras with PNGs of 310 kB and 40 megapixels ended the
//! agent every 0.7 s.

use lineside_tests::camera::{CameraScript, ScriptedCamera};
use lineside_tests::process::command;
use lineside_tests::python;
use lineside_tests::site::TestSite;
use lineside_tests::stream_manifest;

/// A PNG of one color with 16 bits per sample and an alpha channel: the most memory for its pixels.
fn png(width: u32, height: u32) -> Vec<u8> {
    let script = "\
import struct, sys, zlib
width, height = int(sys.argv[1]), int(sys.argv[2])
def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
row = b'\\0' * (1 + width * 8)
pack = zlib.compressobj(9)
pixels = b''.join(pack.compress(row) for _ in range(height)) + pack.flush()
header = struct.pack('>IIBBBBB', width, height, 16, 6, 0, 0, 0)
sys.stdout.buffer.write(b'\\x89PNG\\r\\n\\x1a\\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b''))";
    let arguments = ["-c", script, &width.to_string(), &height.to_string()];
    let output = command(python()).args(arguments).output().expect("python starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Four cameras whose frames fit into the budget one at a time, four whose frames never fit, and one with ordinary frames.
/// Requires that the stream client takes a permit of the `DecodeBudget` for every frame.
#[test]
fn large_frames_of_several_cameras_are_decoded_one_after_the_other() {
    let large = png(4000, 2500);
    let oversized = png(8000, 5000);
    assert!(oversized.len() < 400_000, "{} bytes", oversized.len());
    let site = TestSite::with_broker_and_stream(10);
    let cameras: Vec<_> = (0..8)
        .map(|index| {
            let picture = if index < 4 { large.clone() } else { oversized.clone() };
            let camera = ScriptedCamera::start(CameraScript::Snapshot(picture));
            let name = format!("cam-{index}");
            site.apply(&format!("{name}.yaml"), &stream_manifest(&name, &camera.url(), "parts", "  fps: 20\n"));
            camera
        })
        .collect();
    let mut agent = site.start(&["--decode-mib", "160"]);
    for index in 0..4 {
        agent.wait_for_metric(&format!("lineside_frames_total{{outcome=\"processed\",stream=\"cam-{index}\"}}"), 2.0);
    }
    for index in 4..8 {
        agent.wait_for_metric(&format!("lineside_frames_total{{outcome=\"failed\",stream=\"cam-{index}\"}}"), 2.0);
    }
    agent.wait_for_metric("lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}", 10.0);
    assert!(agent.is_running() && cameras.iter().all(|camera| camera.requests() > 0));
}

#[test]
fn a_frame_with_more_pixels_than_its_stream_allows_is_not_decoded() {
    let camera = ScriptedCamera::start(CameraScript::Snapshot(png(200, 100)));
    let site = TestSite::with_broker_and_stream(10);
    let stream = |name: &str, max: u32| {
        site.apply(
            &format!("{name}.yaml"),
            &stream_manifest(name, &camera.url(), "parts", &format!("  fps: 20\n  maxPixels: {max}\n")),
        );
    };
    stream("exact", 20_000);
    stream("tight", 19_999);
    let agent = site.start(&[]);
    agent.wait_for_metric("lineside_frames_total{outcome=\"processed\",stream=\"exact\"}", 2.0);
    agent.wait_for_metric("lineside_frames_total{outcome=\"failed\",stream=\"tight\"}", 2.0);
    assert_eq!(agent.metric("lineside_frames_total{outcome=\"processed\",stream=\"tight\"}"), 0.0);
}
