//! JPEGs of every kind that `cjpeg` of libjpeg-turbo can write, decoded as `djpeg` decodes them: all sampling factors and scans.

use std::path::{Path, PathBuf};
use std::process::Command;

use lineside_inference::decode::{DecodeOptions, decode};

/// Largest difference of one value. The inverse DCT and the interpolation of the chrominance are not exactly defined.
const DIFFERENCE_MAX: u8 = 4;
const WIDTH: usize = 83;
const HEIGHT: usize = 61;

/// Sampling factors: of the luminance alone, or of each component.
const SAMPLINGS: [&str; 26] = [
    "1x1",
    "2x1",
    "1x2",
    "2x2",
    "4x1",
    "1x4",
    "4x2",
    "2x4",
    "3x1",
    "3x3",
    "1x3",
    "1x1,2x1,2x1",
    "1x1,2x2,2x2",
    "1x1,1x2,1x2",
    "2x1,1x1,2x1",
    "2x2,1x1,1x2",
    "2x2,2x1,1x1",
    "2x1,2x1,2x1",
    "2x2,2x2,2x2",
    "1x2,2x1,1x1",
    "2x2,2x1,2x1",
    "2x2,1x2,1x2",
    "2x1,2x1,1x1",
    "4x1,2x1,2x1",
    "1x2,1x2,1x2",
    "4x4",
];
/// Scans: which components come together, in which order.
const SCANS: [&str; 4] = ["0; 1; 2;", "0; 1 2;", "0 1; 2;", "2; 1; 0;"];

/// Writes a picture with slow changes, edges and saturated colours.
fn source(folder: &Path) -> PathBuf {
    let mut pixels = Vec::new();
    for (y, x) in (0..HEIGHT).flat_map(|y| (0..WIDTH).map(move |x| (y, x))) {
        let (x, y) = (x as f32, y as f32);
        let wave = |value: f32| (127.0 + 90.0 * value).clamp(0.0, 255.0) as u8;
        let is_mark = (20.0..30.0).contains(&x) && (10.0..40.0).contains(&y);
        let background = [wave((x / 9.0).sin()), wave(((x + y) / 13.0).sin()), wave((x / 5.0 - y / 11.0).cos())];
        pixels.extend(if is_mark { [230, 20, 20] } else { background });
    }
    let path = folder.join("source.ppm");
    std::fs::write(&path, [format!("P6\n{WIDTH} {HEIGHT}\n255\n").as_bytes(), &pixels].concat()).unwrap();
    path
}

/// The output of a program, or `None` when it refuses the options.
fn output(program: &str, arguments: &[&str], file: &Path) -> Option<Vec<u8>> {
    let output = Command::new(program).args(arguments).arg(file).output();
    let output = output.unwrap_or_else(|error| panic!("{program} (Debian: libjpeg-turbo-progs): {error}"));
    output.status.success().then_some(output.stdout)
}

/// The pixels that libjpeg decodes.
fn reference(folder: &Path, jpeg: &[u8]) -> Vec<u8> {
    let path = folder.join("picture.jpg");
    std::fs::write(&path, jpeg).unwrap();
    let ppm = output("djpeg", &["-ppm", "-rgb"], &path).unwrap();
    ppm[ppm.len() - WIDTH * HEIGHT * 3..].to_vec()
}

fn difference(left: &[u8], right: &[u8]) -> u8 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(left, right)| left.abs_diff(*right)).max().unwrap_or_default()
}

#[test]
fn every_sampling_and_scan_is_decoded_as_by_libjpeg() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let scans = SCANS.map(|scans| {
        let path = folder.path().join(scans.replace([' ', ';'], ""));
        std::fs::write(&path, scans.replace("; ", ";\n")).unwrap();
        path.display().to_string()
    });
    let mut ways: Vec<Vec<&str>> =
        vec![vec![], vec!["-progressive"], vec!["-optimize"], vec!["-restart", "1B"], vec!["-grayscale"], vec!["-rgb"]];
    ways.extend(scans.iter().map(|path| vec!["-scans", path]));
    ways.push(vec!["-scans", &scans[0], "-restart", "3B"]);
    let mut compared = 0;
    for (sampling, way) in SAMPLINGS.iter().flat_map(|sampling| ways.iter().map(move |way| (sampling, way))) {
        let arguments = [&["-quality", "90", "-sample", sampling][..], way].concat();
        // libjpeg refuses some combinations, such as too many blocks in one unit.
        let Some(jpeg) = output("cjpeg", &arguments, &source) else { continue };
        let picture = decode(&jpeg, &DecodeOptions::default()).unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
        assert_eq!((picture.width() as usize, picture.height() as usize), (WIDTH, HEIGHT));
        let difference = difference(picture.pixels(), &reference(folder.path(), &jpeg));
        assert!(difference <= DIFFERENCE_MAX, "{arguments:?}: {difference}");
        compared += 1;
    }
    assert!(compared > 200, "only {compared} kinds were compared");
}

#[test]
fn arithmetic_coding_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let jpeg = output("cjpeg", &["-arithmetic"], &source(folder.path())).unwrap();
    let error = decode(&jpeg, &DecodeOptions::default()).unwrap_err().to_string();
    assert!(error.contains("arithmetic coding is not supported"), "{error}");
}

/// Removes segments with this marker, which stand before the first scan.
fn without(jpeg: &[u8], marker: u8) -> Vec<u8> {
    let (mut kept, mut at) = (jpeg[..2].to_vec(), 2);
    while jpeg[at + 1] != 0xDA {
        let end = at + 2 + usize::from(u16::from_be_bytes([jpeg[at + 2], jpeg[at + 3]]));
        if jpeg[at + 1] != marker {
            kept.extend(&jpeg[at..end]);
        }
        at = end;
    }
    [&kept, &jpeg[at..]].concat()
}

#[test]
fn dialects_of_cameras_are_decoded_as_the_plain_picture() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    for (sampling, way) in [("2x2", "-baseline"), ("2x1", "-baseline"), ("1x1", "-baseline"), ("1x1", "-grayscale")] {
        let plain = output("cjpeg", &["-sample", sampling, way], &source).unwrap();
        let expected = decode(&plain, &DecodeOptions::default()).unwrap();
        let scan = plain.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
        let avi = [&plain[..2], b"\xFF\xE0\0\x10AVI1\0\0\0\0\0\0\0\0\0\0", &without(&plain, 0xE0)[2..]].concat();
        for (name, jpeg) in [
            ("without Huffman tables", without(&plain, 0xC4)),
            ("motion JPEG without Huffman tables", without(&avi, 0xC4)),
            ("without JFIF", without(&plain, 0xE0)),
            ("junk before the scan", [&plain[..scan], b"\x00\x01junk", &plain[scan..]].concat()),
            ("fill bytes before the scan", [&plain[..scan], &[0xFF; 7], &plain[scan..]].concat()),
            ("junk behind the end", [&plain[..], b"\xFF\xD9 and more \xFF\xD8"].concat()),
        ] {
            let picture =
                decode(&jpeg, &DecodeOptions::default()).unwrap_or_else(|error| panic!("{name} {sampling}: {error}"));
            assert!(difference(picture.pixels(), expected.pixels()) <= DIFFERENCE_MAX, "{name} {sampling}");
        }
    }
}
