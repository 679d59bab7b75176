//! Runs one fuzz target, named by `LINESIDE_FUZZ_TARGET`, under libFuzzer. First writes its corpus to `LINESIDE_FUZZ_CORPUS`.

#![no_main]

#[cfg(feature = "full")]
#[path = "../targets/full.rs"]
mod full;
#[path = "../targets/light.rs"]
mod light;
#[path = "../targets/spool.rs"]
mod spool;

use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use lineside_fuzz::FuzzTarget;

static TARGET: OnceLock<FuzzTarget> = OnceLock::new();

fn find() -> FuzzTarget {
    let name = std::env::var("LINESIDE_FUZZ_TARGET").expect("LINESIDE_FUZZ_TARGET names a target");
    let targets = light::TARGETS.iter().chain(spool::TARGETS);
    #[cfg(feature = "full")]
    let targets = targets.chain(full::TARGETS);
    let target = targets.copied().find(|target| target.name == name);
    let target = target.unwrap_or_else(|| panic!("{name} is not a target; some require --features full"));
    let folder = PathBuf::from(std::env::var("LINESIDE_FUZZ_CORPUS").expect("LINESIDE_FUZZ_CORPUS names a folder"));
    std::fs::create_dir_all(&folder).expect("the corpus can be created");
    for (number, input) in target.corpus().iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{number:03}")), input).expect("the corpus can be written");
    }
    // libFuzzer's hook ends the process at every panic, also at those that the product catches. What a target does not catch
    // ends the process without the hook.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    target
}

fuzz_target!(init: { TARGET.get_or_init(find); }, |input: &[u8]| (TARGET.get_or_init(find).run)(input));
