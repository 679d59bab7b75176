//! Wall-clock time in the format of messages and status.

use std::time::{SystemTime, UNIX_EPOCH};

/// 2026-01-01T00:00:00Z in seconds since 1970. This program did not exist before that date, so a clock with an earlier
/// time was never set.
const PLAUSIBLE_SINCE_SECONDS: u64 = 1_767_225_600;

/// Formats a time as RFC 3339 in UTC with milliseconds, such as `2026-11-23T18:35:56.123Z`. Times before 1970 and after
/// 9999 are clamped to that range.
pub fn rfc3339(time: SystemTime) -> String {
    // The formatter supports years up to 9999.
    let seconds_max = 253_402_300_799;
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default().min(std::time::Duration::from_secs(seconds_max));
    humantime::format_rfc3339_millis(UNIX_EPOCH + since).to_string()
}

/// Whether the wall clock may be correct. A device without a battery-backed clock starts in 1970 until NTP sets the time.
pub fn is_plausible(time: SystemTime) -> bool {
    time.duration_since(UNIX_EPOCH).is_ok_and(|since| since.as_secs() >= PLAUSIBLE_SINCE_SECONDS)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_formatted_in_utc_with_milliseconds() {
        let time = UNIX_EPOCH + Duration::from_millis(1_795_458_956_123);
        assert_eq!(rfc3339(time), "2026-11-23T18:35:56.123Z");
        assert!(is_plausible(time));
        assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_secs(5)), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(u64::MAX / 4)), "9999-12-31T23:59:59.000Z");
        assert!(!is_plausible(UNIX_EPOCH));
    }
}
