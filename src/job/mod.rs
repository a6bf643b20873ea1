//! What runs unattended: which machines are backed up, how, where to, and when.
//!
//! ```text
//! file       a job as a person wrote it, every mistake named by its line     ─► table, schedule
//! schedule   when it runs next: cron and a time zone; pure
//! select     which machines of its pools it means; pure
//! template   what is told of a run, as a person wrote it; pure
//! lock       one run at a time, and who has it
//! log        what its runs did; how they stand is computed from it and the lock     ─► waiting: lines that a full disk has no room for
//! starts     when its runs began, by the log
//! figures    what runs moved, how fast, and what they waited for, by the log; pure
//! keys       how many backups were made since the last that stores all blocks
//! due        what schedules are to do now, by starts and calendar
//! live       what a run is doing now
//! whole      files that are replaced as a whole
//! ```
//!
//! Invariants: no job file holds a secret; a job that is not whole is not run; no run is ever shown as running that is not. This never
//! prints.

mod due;
pub mod figures;
mod file;
mod keys;
pub mod live;
pub mod lock;
pub mod log;
mod schedule;
mod select;
mod starts;
mod table;
mod template;
mod waiting;

pub use due::Seen;
pub use file::{
    Form, Full, Incremental, Job, Keep, Kind, Known, Limits, PowerState, Reporting, Retries, Timed, Timeouts, Which,
    is_id,
};
pub use keys::SinceKey;
pub use schedule::Calendar;
pub use select::{Machine, Missing, select};
pub use starts::{Kept, Starts};
pub use table::{Fault, Faults};
