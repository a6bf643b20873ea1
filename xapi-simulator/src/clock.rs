//! The pool's time: the machine's, and what a test adds to it.

use jiff::Timestamp;
use std::time::Duration;

/// Tells the pool's time, which a test can move on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    ahead: Duration,
}

impl Clock {
    /// Returns the time since 1970.
    pub fn now(&self) -> Duration {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        now.saturating_add(self.ahead)
    }

    /// Lets time pass at once.
    pub fn advance(&mut self, by: Duration) {
        self.ahead = self.ahead.saturating_add(by);
    }

    /// Returns the time as XAPI writes it, `YYYYMMDDTHH:MM:SSZ`.
    pub fn date(&self) -> String {
        date(self.now())
    }
}

/// Returns a time since 1970 as XAPI writes it; what is past year 9999 is 1970.
pub fn date(time: Duration) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(0);
    Timestamp::from_second(seconds).unwrap_or_default().strftime("%Y%m%dT%H:%M:%SZ").to_string()
}
