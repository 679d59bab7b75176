//! The runner of the fuzz targets on stable Rust: each input of the corpus, then a bounded number of mutations of them.
//!
//! The mutations depend only on the seed, so a run can be repeated. A panic is a failure of the test, which prints the input
//! in hexadecimal digits and stores it in `target/fuzz-failures/TARGET`. An input that does not end within
//! [`HANG_AFTER`] ends the process. The input that is being processed is kept in `target/fuzz-failures/TARGET.current`, so
//! that it is also known after a stack overflow.
//!
//! | variable | meaning | default |
//! | --- | --- | --- |
//! | `LINESIDE_FUZZ_RUNS` | mutations of each target | 2000, and at most [`TIME_MAX`] |
//! | `LINESIDE_FUZZ_SEED` | seed of the mutations | 1 |

mod mutate;

use std::fmt::Write as _;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::mpsc;
use std::time::{Duration, Instant};

pub use mutate::mutate;

/// Mutations of each target, unless `LINESIDE_FUZZ_RUNS` sets another number.
const RUNS_DEFAULT: u64 = 2000;
/// Longest time of one target, unless `LINESIDE_FUZZ_RUNS` is set.
const TIME_MAX: Duration = Duration::from_secs(4);
/// An input that takes longer is a hang.
const HANG_AFTER: Duration = Duration::from_secs(20);

/// One fuzz target.
#[derive(Clone, Copy)]
pub struct FuzzTarget {
    /// Name of the target and of its corpus folder.
    pub name: &'static str,
    /// Processes one input. It panics when the input shows a defect.
    pub run: fn(&[u8]),
    /// Inputs that are generated and not stored in the corpus folder, because they are binary.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

impl FuzzTarget {
    /// The files of the corpus folder, sorted by name, and the generated inputs.
    ///
    /// # Panics
    /// When the folder cannot be read.
    pub fn corpus(&self) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name);
        let entries = fs::read_dir(&folder).into_iter().flatten();
        let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.sort();
        let stored = files.iter().filter_map(|file| fs::read(file).ok());
        stored.chain((self.seeds)()).collect()
    }

    /// Runs the target on its corpus and on mutations of it. Returns the number of inputs.
    ///
    /// # Panics
    /// When an input shows a defect; the message contains the input.
    pub fn fuzz(&self) -> u64 {
        let corpus = self.corpus();
        assert!(!corpus.is_empty(), "{}: the corpus is empty", self.name);
        let failures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/fuzz-failures");
        let watched = Watched::start(self.name, &failures);
        let (runs, seed) = (number("LINESIDE_FUZZ_RUNS"), number("LINESIDE_FUZZ_SEED").unwrap_or(1));
        let mut random = fastrand::Rng::with_seed(seed);
        let started = Instant::now();
        let mut count = 0;
        for input in &corpus {
            watched.run(self, input);
            count += 1;
        }
        for _ in 0..runs.unwrap_or(RUNS_DEFAULT) {
            if runs.is_none() && started.elapsed() > TIME_MAX {
                break;
            }
            watched.run(self, &mutate(&mut random, &corpus));
            count += 1;
        }
        count
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Runs inputs, stores those that fail, and ends the process when one does not end.
struct Watched {
    failures: PathBuf,
    current: PathBuf,
    /// Reports the start (`true`) and the end of each input to the thread that waits for hangs.
    progress: mpsc::Sender<bool>,
}

impl Watched {
    #[allow(clippy::expect_used, reason = "without its folder the runner cannot report anything")]
    fn start(name: &'static str, failures: &Path) -> Self {
        fs::create_dir_all(failures.join(name)).expect("the folder of failures can be created");
        let current = failures.join(format!("{name}.current"));
        let (progress, received) = mpsc::channel::<bool>();
        let file = current.clone();
        std::thread::spawn(move || {
            while let Ok(is_started) = received.recv() {
                if is_started && received.recv_timeout(HANG_AFTER) == Err(mpsc::RecvTimeoutError::Timeout) {
                    #[allow(clippy::print_stderr, reason = "the process ends")]
                    {
                        eprintln!("{name}: an input does not end within {HANG_AFTER:?}; it is in {}", file.display());
                    }
                    process::abort();
                }
            }
        });
        Self { failures: failures.join(name), current, progress }
    }

    #[allow(clippy::panic, clippy::expect_used, reason = "this is the result of the test")]
    fn run(&self, target: &FuzzTarget, input: &[u8]) {
        fs::write(&self.current, input).expect("the current input can be stored");
        self.progress.send(true).expect("the thread runs as long as this sender exists");
        let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
        self.progress.send(false).expect("the thread runs as long as this sender exists");
        if outcome.is_ok() {
            return;
        }
        let hex = input.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("a string accepts all text");
            text
        });
        let hash = input.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let path = self.failures.join(format!("{hash:016x}"));
        fs::write(&path, input).expect("the input can be stored");
        panic!("{}: the input {hex} ({}) shows a defect; see the panic above", target.name, path.display());
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Nothing is being processed any more. The file stays only after the process was killed.
        drop(fs::remove_file(&self.current));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_defect_is_found_and_its_input_is_stored() {
        let target = FuzzTarget {
            name: "runner-test",
            run: |input| assert!(!input.contains(&0xFF), "planted"),
            seeds: || vec![b"one".to_vec(), b"two".to_vec()],
        };
        let panic = catch_unwind(|| target.fuzz()).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        let (_, path) = message.split_once('(').unwrap();
        let path = PathBuf::from(path.split_once(')').unwrap().0);
        assert!(message.contains("ff") && fs::read(&path).unwrap().contains(&0xFF), "{message}");
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }
}
