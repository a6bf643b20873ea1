//! One disk, in all destinations: it is opened once for them, copied in one pass, once more if that broke off, and as a whole if what
//! differs from the base cannot be had.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::copy::{self, Lanes};
use super::error::{Error, ErrorKind, Result};
use super::feed::Feed;
use super::intake::Taken;
use super::plan::DiskPlan;
use super::pool::agreed;
use super::report::{Pass, ReadDisk};
use super::run::{Attempt, Stages, each, living, repositories};
use super::source::Source;
use super::target::Target;
use super::wanted::Wanted;
use super::watch::Watch;
use crate::probe::{Stage, Way};

/// How long is waited before a disk is read again: a host whose toolstack starts anew does not answer for a while.
const PAUSE: Duration = Duration::from_secs(2);
/// How often it is looked meanwhile whether it is to be stopped.
const TICK: Duration = Duration::from_millis(50);

/// Stores a disk in all destinations that have not failed.
///
/// # Errors
/// What the source says, if it can be read in no way.
pub(super) fn copy_disk(wanted: &Wanted, disk: usize, attempts: &mut [Attempt], watch: &Watch) -> Result<ReadDisk> {
    let (name, source) = &wanted.disks[disk];
    let (transfer, mut passes) = (watch.transfer(), Vec::new());
    let from = match source {
        Source::Pool(disk) => disk.source(),
        Source::Disk(_) | Source::Stream(_) => wanted.source(),
    };
    let waits = transfer.step(Stage::Slot, &from);
    let _turn = waits.take(|| source.turn(&|sentence| watch.say(sentence)))?;
    // An image has no snapshots.
    let mut base = match source {
        Source::Pool(source) => base_of_all(attempts, disk, source.history()),
        Source::Disk(_) | Source::Stream(_) => None,
    };
    let (mut retries, mut is_broken) = (wanted.disk_retries, false);
    while living(attempts).next().is_some() {
        let taken = Taken::default();
        let opening = transfer.step(Stage::Open, &from);
        let (result, way, is_difference) = match opening.work(|| Feed::open(source, base)) {
            Ok((feed, way, by)) => {
                let stages = Stages::of(transfer, &from, by, encoded(attempts, disk));
                let result = copy_once(wanted, disk, &feed, attempts, &stages, watch, &taken);
                (result, way, feed.is_difference())
            }
            Err(error) => (Err(error), String::new(), false),
        };
        let mut pass = Pass {
            way,
            base: base.map(|(uuid, _)| uuid),
            bytes: taken.source.load(Ordering::Relaxed),
            base_bytes: taken.base.load(Ordering::Relaxed),
            given_up: None,
        };
        match result {
            Ok(()) => {
                passes.push(pass);
                break;
            }
            // Who is to stop breaks off what it reads, too.
            Err(_) if watch.is_cancelled() => return Err(Error::interrupted()),
            // What broke may not even be opened again for a while.
            Err(error) if retries > 0 && (error.kind() == ErrorKind::Broken || is_broken && pass.way.is_empty()) => {
                is_broken = true;
                retries -= 1;
                watch.say(&format!("disk {name} is read again: {error}"));
                pass.given_up = Some(error.to_string());
                pause(watch)?;
            }
            Err(error)
                if (error.kind() == ErrorKind::Difference || (error.kind() == ErrorKind::Broken && is_difference))
                    && base.take().is_some() =>
            {
                watch.say(&format!("disk {name} is read as a whole: {error}"));
                pass.given_up = Some(error.to_string());
            }
            Err(error) => return Err(error),
        }
        passes.push(pass);
        each(attempts, |target| target.restart(disk));
    }
    Ok(ReadDisk { name: name.clone(), passes })
}

/// Waits before a disk is read again.
fn pause(watch: &Watch) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < PAUSE {
        watch.check()?;
        thread::sleep(TICK);
    }
    Ok(())
}

/// Makes one pass.
fn copy_once(
    wanted: &Wanted,
    disk: usize,
    feed: &Feed,
    attempts: &mut [Attempt],
    stages: &Stages,
    watch: &Watch,
    taken: &Taken,
) -> Result<()> {
    if matches!(wanted.disks[disk].1, Source::Pool(_)) {
        attempts
            .iter_mut()
            .for_each(|attempt| attempt.in_repository(|target| target.believe(disk, feed, wanted.reserve)));
        if let Some(base) = repositories(attempts).find_map(|target| target.plans[disk].base.as_ref()) {
            feed.spot_check(base.disk.as_ref(), taken)?;
        }
    }
    attempts.iter_mut().for_each(|attempt| attempt.in_repository(|target| target.create(disk)));
    let plans: Vec<&DiskPlan> = repositories(attempts).map(|target| &target.plans[disk]).collect();
    let has_replicas = living(attempts).any(|target| target.repository().is_none());
    let candidates = feed.candidates(&plans, has_replicas)?;
    for attempt in attempts.iter_mut() {
        let name = attempt.name.clone();
        attempt.then(|target| {
            let Target::Replica(target) = target else { return Ok(()) };
            if let Some(why) = target.open(wanted, disk, feed, &candidates.replicated)? {
                watch.say(&format!("{name}: disk {} is sent in full: {why}", wanted.disks[disk].0));
            }
            Ok(())
        });
    }
    watch.check()?;
    let mut lanes = Lanes::default();
    for attempt in attempts.iter_mut() {
        match &mut attempt.state {
            Ok(Target::Repository(target)) => lanes.repositories.extend(target.lane(disk)),
            Ok(Target::Replica(target)) => lanes.replicas.extend(target.lane()),
            Err(_) => {}
        }
    }
    if lanes.repositories.is_empty() && lanes.replicas.is_empty() {
        return Ok(());
    }
    let size = copy::copy(feed, &candidates, lanes, stages, watch, taken)?;
    each(attempts, |target| target.finish(disk, size));
    Ok(())
}

/// Returns what the blocks of a disk are encoded by: of several, what takes longest.
fn encoded(attempts: &[Attempt], disk: usize) -> Way {
    let ways = || repositories(attempts).map(|target| target.encoded(disk));
    let longest = |is_it: fn(&Way) -> bool| ways().find(is_it);
    longest(|way| matches!(way, Way::Brotli)).or_else(|| longest(|way| matches!(way, Way::Gzip))).unwrap_or(Way::Only)
}

/// Returns the snapshot that a disk is read relative to for all destinations, if there is one, and its size in bytes.
fn base_of_all(attempts: &[Attempt], disk: usize, history: &[Uuid]) -> Option<(Uuid, u64)> {
    let bases: Vec<Option<(Uuid, u64)>> = living(attempts).map(|target| target.base(disk)).collect();
    let snapshot = agreed(bases.iter().map(|base| base.map(|(snapshot, _)| snapshot)), history)?;
    // What is behind the smallest differs from that.
    Some((snapshot, bases.iter().flatten().map(|(_, size)| *size).min()?))
}
