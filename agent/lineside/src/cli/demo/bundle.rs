//! The model and the frames that are compiled into the program. `examples/surface-defects` describes how they are generated.

/// ONNX file of a classifier of synthetic metal parts.
pub(super) const MODEL: &[u8] = include_bytes!("../../../../../examples/surface-defects/surface-defects.onnx");

macro_rules! frames {
    ($($name:literal,)*) => {
        /// Name and JPEG data of each frame, in playback order. The name contains the true class.
        pub(super) const FRAMES: &[(&str, &[u8])] =
            &[$(($name, include_bytes!(concat!("../../../../../examples/surface-defects/frames/", $name))),)*];
    };
}

frames![
    "part-001-good.jpg",
    "part-002-good.jpg",
    "part-003-stain.jpg",
    "part-004-stain.jpg",
    "part-005-stain.jpg",
    "part-006-good.jpg",
    "part-007-stain.jpg",
    "part-008-good.jpg",
    "part-009-good.jpg",
    "part-010-good.jpg",
    "part-011-good.jpg",
    "part-012-scratch.jpg",
    "part-013-scratch.jpg",
    "part-014-scratch.jpg",
    "part-015-good.jpg",
    "part-016-dent.jpg",
    "part-017-dent.jpg",
    "part-018-good.jpg",
    "part-019-dent.jpg",
    "part-020-good.jpg",
    "part-021-good.jpg",
    "part-022-good.jpg",
    "part-023-good.jpg",
    "part-024-good.jpg",
    "part-025-dent.jpg",
    "part-026-scratch.jpg",
    "part-027-stain.jpg",
    "part-028-good.jpg",
    "part-029-scratch.jpg",
    "part-030-good.jpg",
    "part-031-good.jpg",
    "part-032-good.jpg",
    "part-033-dent.jpg",
    "part-034-good.jpg",
    "part-035-scratch.jpg",
    "part-036-dent.jpg",
    "part-037-good.jpg",
    "part-038-good.jpg",
    "part-039-good.jpg",
    "part-040-stain.jpg",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundle_contains_every_frame_of_the_example() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/surface-defects/frames");
        let mut names: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, FRAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    }
}
