//! Runs every fuzz target on its corpus and on mutations of it (see the crate's documentation).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the message")]
#![allow(clippy::cast_possible_truncation, reason = "the pixels of generated pictures wrap")]

#[path = "targets/full.rs"]
mod full;
#[path = "targets/light.rs"]
mod light;
#[path = "targets/spool.rs"]
mod spool;

use lineside_fuzz::FuzzTarget;

fn targets() -> impl Iterator<Item = FuzzTarget> {
    light::TARGETS.iter().chain(spool::TARGETS).chain(full::TARGETS).copied()
}

/// One test for each target, so that they run in parallel.
macro_rules! tests {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            let target = targets().find(|target| target.name == stringify!($name)).unwrap();
            println!("{}: {} inputs", target.name, target.fuzz());
        })*

        #[test]
        fn every_target_has_a_test_and_every_corpus_a_target() {
            let mut names: Vec<&str> = targets().map(|target| target.name).collect();
            let mut tests = vec![$(stringify!($name)),*];
            names.sort_unstable();
            tests.sort_unstable();
            assert_eq!(names, tests);
            for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus")).unwrap() {
                let folder = entry.unwrap().file_name().into_string().unwrap();
                assert!(names.contains(&folder.as_str()), "{folder} is no target");
            }
        }
    };
}

tests! {
    address cached_objects command config jpeg last_good manifest model mqtt_packet name object picture picture_stream rule
    signature sparkplug spool store_record url watch_message
}
