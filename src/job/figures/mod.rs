//! What runs moved, how fast, and what they waited for: figures of their logs. Pure, but for the file of the totals.
//!
//! ```text
//! log ─► run        one run: its machines, its merges, what failed         transfer   what the log says of the stages of one of them
//!         ├► sums       several runs: by stage, by place, by reason
//!         ├► timeline   throughput over time, for a picture
//!         └► totals     what all runs ever did, also those that no log holds any more
//! ```
//!
//! Logs are read as they are: older ones that tell of no stages, runs that were cut off, names that anybody chose, clocks that went back.

mod run;
#[cfg(test)]
pub mod samples;
mod sums;
#[cfg(test)]
mod tests;
mod timeline;
mod totals;
mod transfer;

pub use run::{CUT_OFF, Failure, MergeFigures, RunFigures, VmFigures};
pub use sums::{Failures, Merged, Row, Sums, Work};
pub use timeline::{Strip, strips};
pub use totals::{Counts, MergeCounts, StageCounts, Totals};
pub use transfer::{Bottleneck, Pace, Place, Shares, Stage, Times, Transfer, rate};
