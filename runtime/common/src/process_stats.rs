//! Memory of this process, processor time of any process, and percentiles of run times; used by admission and by `lineside check`.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::time::Duration;

/// The memory figures of this process, for a process that may open no file later.
#[derive(Debug)]
pub struct MemoryStatus(File);

impl MemoryStatus {
    /// Opens the figures.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn open() -> io::Result<Self> {
        Ok(Self(File::open("/proc/self/status")?))
    }

    /// As [`memory_bytes`].
    pub fn bytes(&mut self, field: &str) -> u64 {
        let mut text = String::new();
        let read = self.0.rewind().and_then(|()| self.0.read_to_string(&mut text));
        if read.is_ok() { bytes_of(&text, field) } else { 0 }
    }
}

/// Memory of this process in bytes, by the name of a field of `/proc/self/status`: `VmRSS` for the current resident memory,
/// `VmHWM` for its peak. Returns 0 when the field does not exist.
pub fn memory_bytes(field: &str) -> u64 {
    bytes_of(&std::fs::read_to_string("/proc/self/status").unwrap_or_default(), field)
}

/// Memory of a process that only it uses, or that it shares without a file, in bytes: what its control group is charged for it.
/// `None` when it does not exist.
pub fn private_bytes(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(bytes_of(&status, "RssAnon").saturating_add(bytes_of(&status, "RssShmem")))
}

fn bytes_of(status: &str, field: &str) -> u64 {
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|value| value.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Processor time that a process and its threads have used; `None` when it does not exist.
pub fn cpu_time(pid: i32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program, in parentheses, may contain anything. Fields 14 and 15 (proc_pid_stat(5)) are user and system
    // time in ticks, of which a second has 100 in every Linux ABI that this program supports.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_whitespace().skip(11).map(|field| field.parse::<u64>().ok());
    let ticks = times.next()??.checked_add(times.next()??)?;
    Some(Duration::from_millis(ticks.saturating_mul(10)))
}

/// The median and the 99th percentile by nearest rank; zero for an empty list. Sorts `times`.
pub fn p50_p99(times: &mut [f64]) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    let rank = |fraction: f64| ((times.len() as f64 * fraction).ceil() as usize).max(1) - 1;
    let at = |fraction: f64| times.get(rank(fraction)).copied().unwrap_or_default();
    (at(0.5), at(0.99))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_grows() {
        let own = std::process::id() as i32;
        let before = cpu_time(own).unwrap();
        while cpu_time(own).unwrap() == before {
            std::hint::black_box((0..10_000u64).sum::<u64>());
        }
        assert_eq!(cpu_time(-1), None);
    }

    #[test]
    fn percentiles_are_observed_values() {
        let mut times: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(p50_p99(&mut times), (50.0, 99.0));
        assert_eq!(p50_p99(&mut [7.0]), (7.0, 7.0));
        assert_eq!(p50_p99(&mut []), (0.0, 0.0));
        let mut status = MemoryStatus::open().unwrap();
        assert!(status.bytes("VmHWM") > 0 && status.bytes("VmHWM") > 0, "it can be read again");
        assert!(memory_bytes("VmHWM") >= memory_bytes("VmRSS") / 2 && memory_bytes("VmRSS") > 0);
    }
}
