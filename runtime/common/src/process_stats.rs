//! Memory of this process, and percentiles of run times; used by admission and by `lineside check`.

/// Memory of this process in bytes, by the name of a field of `/proc/self/status`: `VmRSS` for the current resident memory,
/// `VmHWM` for its peak. Returns 0 when the field does not exist.
pub fn memory_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|value| value.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
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
    fn percentiles_are_observed_values() {
        let mut times: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(p50_p99(&mut times), (50.0, 99.0));
        assert_eq!(p50_p99(&mut [7.0]), (7.0, 7.0));
        assert_eq!(p50_p99(&mut []), (0.0, 0.0));
        assert!(memory_bytes("VmHWM") >= memory_bytes("VmRSS") / 2 && memory_bytes("VmRSS") > 0);
    }
}
