//! A full backup, an XVA, as it is: one pass over its bytes, to all destinations at once.
//!
//! ```text
//! source ─► reader ─► pieces ─► sum ─┬► lane of a destination ─► writer
//!                    (bounded)       └► lane ...      (bounded)
//! ```
//!
//! Whether it is compressed does not matter: what is stored are its bytes (`xva_source`).
//!
//! The slowest destination that lives sets the pace. Memory: with D destinations at most 3 + [`DEPTH`] × (1 + D) + D pieces of
//! 2 MiB, and one more of each place that is encrypted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crossbeam::channel::{self, Receiver, Sender};
use storage::{Checksum, Summing, WritableStream};

use super::copy::{Failure, start_one};
use super::error::{Error, Result};
use super::probe::Probe;
use super::run::Stages;
use super::watch::Watch;
use super::xva_source::Xva;

/// Pieces that wait for the sum, and for the writer of each destination.
const DEPTH: usize = 4;

/// A destination of the XVA.
pub(super) struct Lane<'a> {
    pub writing: &'a mut dyn WritableStream,
    pub failure: &'a Failure,
    pub probe: &'a Probe,
}

/// Stores the bytes of an XVA in each lane; returns their checksum and how many they are. Errors of a lane are its failure, and
/// where all failed neither says anything.
///
/// # Errors
/// What the source says if the XVA cannot be read, or is not what was written; that it was interrupted.
pub(super) fn copy(xva: &Xva, lanes: Vec<Lane>, stages: &Stages, watch: &Watch) -> Result<(Checksum, u64)> {
    let broken = Failure::default();
    let failures: Vec<&Failure> = lanes.iter().map(|lane| lane.failure).collect();
    let are_failed = || failures.iter().all(|failure| failure.is_failed());
    let is_over = || watch.is_cancelled() || are_failed();
    let mut summing = Summing::default();
    let size = AtomicU64::new(0);
    watch.expect(xva.expected_size());
    thread::scope(|scope| {
        let mut outputs = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let (give, take) = channel::bounded::<Arc<Vec<u8>>>(DEPTH);
            start_one(scope, move || write(lane, &take))?;
            outputs.push(give);
        }
        let (give, take) = channel::bounded::<Vec<u8>>(DEPTH);
        let (is_over, broken, size) = (&is_over, &broken, &size);
        start_one(scope, move || match xva.read(&give, is_over, &stages.read) {
            Ok(bytes) => size.store(bytes, Ordering::Relaxed),
            Err(error) => broken.set(error),
        })?;
        while let Ok(piece) = stages.hash.take(|| take.recv()) {
            let len = piece.len();
            stages.hash.work(|| summing.add(&piece));
            stages.hash.add(len);
            let piece = Arc::new(piece);
            for (_, output) in failures.iter().zip(&outputs).filter(|(failure, _)| !failure.is_failed()) {
                drop(stages.hash.give(|| output.send(piece.clone())));
            }
            watch.advance(len as u64);
            watch.sees(take.is_empty(), outputs.iter().any(Sender::is_full));
        }
        Ok::<(), Error>(())
    })?;
    watch.check()?;
    if let Some(error) = broken.take() {
        return Err(error);
    }
    let found = summing.finish();
    if !are_failed() {
        xva.check_sum(found)?;
    }
    Ok((found, size.into_inner()))
}

/// Stores pieces until there are no more; once it failed they are dropped, so that nobody waits for it.
fn write(lane: Lane, take: &Receiver<Arc<Vec<u8>>>) {
    while let Ok(piece) = lane.probe.take(|| take.recv()) {
        if lane.failure.is_failed() {
            continue;
        }
        match lane.probe.work(|| lane.writing.append(&piece)) {
            Ok(()) => lane.probe.add(piece.len()),
            Err(error) => lane.failure.set(error.into()),
        }
    }
}
