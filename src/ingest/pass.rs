//! One disk, in all destinations: it is opened once for them, copied in one pass, and once more as a whole if what differs from
//! the base cannot be had.

use std::sync::atomic::Ordering;

use super::copy::{self, Lane};
use super::error::{Error, ErrorKind, Result};
use super::feed::Feed;
use super::intake::Taken;
use super::pool::agreed;
use super::report::{Pass, ReadDisk};
use super::run::{Attempt, Stages, each, living};
use super::source::Source;
use super::target::Target;
use super::wanted::Wanted;
use super::watch::Watch;

/// Stores a disk in all destinations that have not failed.
///
/// # Errors
/// What the source says, if it can be read in no way.
pub(super) fn copy_disk(
    wanted: &Wanted,
    disk: usize,
    attempts: &mut [Attempt],
    stages: &Stages,
    watch: &Watch,
) -> Result<ReadDisk> {
    let (name, source) = &wanted.disks[disk];
    // An image has no snapshots.
    let mut base = match source {
        Source::Pool(_) => agreed(living(attempts).map(|target| target.base(disk))),
        Source::Disk(_) | Source::Stream(_) => None,
    };
    let mut passes = Vec::new();
    while living(attempts).next().is_some() {
        let taken = Taken::default();
        let (result, way) = match Feed::open(source, base) {
            Ok((feed, way)) => (copy_once(wanted, disk, &feed, attempts, stages, watch, &taken), way),
            Err(error) => (Err(error), String::new()),
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
            Err(error) if error.kind() == ErrorKind::Difference && base.take().is_some() => {
                watch.say(&format!("disk {name} is read as a whole: {error}"));
                pass.given_up = Some(error.to_string());
                passes.push(pass);
                each(attempts, |target| target.restart(disk));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(ReadDisk { name: name.clone(), passes })
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
        attempts.iter_mut().for_each(|attempt| {
            attempt.then(|target| {
                target.believe(disk, feed.changed());
                target.check_room(&[(disk, feed)], wanted.reserve)
            });
        });
        if let Some(base) = living(attempts).find_map(|target| target.plans[disk].base.as_ref()) {
            feed.spot_check(base.disk.as_ref(), taken)?;
        }
    }
    attempts.iter_mut().for_each(|attempt| attempt.then(|target| target.create(disk)));
    let lanes: Vec<Lane> = living(attempts).filter_map(|target| lane(target, disk)).collect();
    if lanes.is_empty() {
        return Ok(());
    }
    let size = copy::copy(feed, &lanes, stages, watch, taken)?;
    drop(lanes);
    each(attempts, |target| target.finish(disk, size));
    Ok(())
}

fn lane<'a>(target: &'a Target, disk: usize) -> Option<Lane<'a>> {
    let sink = target.sink.as_deref()?;
    let (plan, compared) = (&target.plans[disk], &target.compared[disk]);
    Some(Lane { plan, compared, sink, failure: &target.failure, probe: &target.write })
}
