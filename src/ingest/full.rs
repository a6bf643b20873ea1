//! A full backup, an XVA, as it is: one pass over its bytes, to all destinations at once.
//!
//! ```text
//! source ─► reader ─► pieces ─► sum ─┬► lane of a destination ─► writer
//!                    (bounded)       └► lane ...      (bounded)
//! ```
//!
//! A replica gets the last piece only once the source has proven that it is the end: a pool that takes an XVA believes what ends.
//!
//! Whether it is compressed does not matter: what is stored are its bytes (`xva_source`).
//!
//! The slowest destination that lives sets the pace. Memory: with D destinations at most 4 + [`DEPTH`] × (1 + D) + D pieces of
//! 2 MiB, and one more of each place that is encrypted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crossbeam::channel::{self, Receiver, Sender};
use storage::{Checksum, Summing, WritableStream};

use super::copy::{Failure, start_one};
use super::error::Result;
use super::replica::ReplicaArchive;
use super::run::Stages;
use super::watch::Watch;
use super::xva_source::Xva;
use crate::probe::Probe;

/// Pieces that wait for the sum, and for the writer of each destination.
const DEPTH: usize = 4;

/// A destination of the XVA.
pub(super) struct Lane<'a> {
    pub output: Output<'a>,
    pub failure: &'a Failure,
    pub probe: &'a Probe,
}

/// What takes the bytes.
pub(super) enum Output<'a> {
    Repository(&'a mut dyn WritableStream),
    Replica(&'a mut dyn ReplicaArchive),
}

impl Output<'_> {
    fn is_repository(&self) -> bool {
        matches!(self, Self::Repository(_))
    }

    fn append(&mut self, piece: &[u8]) -> Result<()> {
        match self {
            Self::Repository(stream) => Ok(stream.append(piece)?),
            Self::Replica(archive) => archive.append(piece),
        }
    }
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
    let checksum = thread::scope(|scope| {
        let mut repositories = Vec::with_capacity(lanes.len());
        let mut replicas = Vec::new();
        for lane in lanes {
            let (give, take) = channel::bounded::<Arc<Vec<u8>>>(DEPTH);
            let outputs = if lane.output.is_repository() { &mut repositories } else { &mut replicas };
            outputs.push((lane.failure, give));
            start_one(scope, move || write(lane, &take))?;
        }
        let (give, take) = channel::bounded::<Vec<u8>>(DEPTH);
        let (is_over, broken, size) = (&is_over, &broken, &size);
        start_one(scope, move || match xva.read(&give, is_over, &stages.read) {
            Ok(bytes) => size.store(bytes, Ordering::Relaxed),
            Err(error) => broken.set(error),
        })?;
        let send = |outputs: &[(&Failure, Sender<Arc<Vec<u8>>>)], piece: &Arc<Vec<u8>>| {
            for (_, output) in outputs.iter().filter(|(failure, _)| !failure.is_failed()) {
                drop(stages.hash.give(|| output.send(piece.clone())));
            }
        };
        let mut last = None;
        while let Ok(piece) = stages.hash.take(|| take.recv()) {
            let len = piece.len();
            stages.hash.work(|| summing.add(&piece));
            stages.hash.add(len);
            let piece = Arc::new(piece);
            send(&repositories, &piece);
            if let Some(before) = last.replace(piece) {
                send(&replicas, &before);
            }
            watch.advance(len as u64);
            let is_full = repositories.iter().chain(&replicas).any(|(_, output)| output.is_full());
            watch.sees(take.is_empty(), is_full);
        }
        watch.check()?;
        if let Some(error) = broken.take() {
            return Err(error);
        }
        let found = summing.finish();
        if !are_failed() {
            xva.check_sum(found)?;
        }
        last.iter().for_each(|last| send(&replicas, last));
        Ok(found)
    })?;
    Ok((checksum, size.into_inner()))
}

/// Stores pieces until there are no more; once it failed they are dropped, so that nobody waits for it.
fn write(mut lane: Lane, take: &Receiver<Arc<Vec<u8>>>) {
    while let Ok(piece) = lane.probe.take(|| take.recv()) {
        if lane.failure.is_failed() {
            continue;
        }
        match lane.probe.work(|| lane.output.append(&piece)) {
            Ok(()) => lane.probe.add(piece.len()),
            Err(error) => lane.failure.set(error),
        }
    }
}
