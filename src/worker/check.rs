//! What comes from a worker, before it is believed: limits that hold whatever the reader says.

use std::collections::HashSet;
use std::sync::Arc;

use disk::Disk;
use guest::{Attributes, Entry, Error as GuestError, ErrorKind, Extents, Facts, Source, Survey, Xattr};

use super::error::{Error, Result};
use super::protocol::Page;

/// Most names in a directory: some 250 MB of memory while it is listed.
const ENTRIES: usize = 1_000_000;

/// Longest name (bytes): 255 units of UTF-16 have at most 765.
const NAME: usize = 1024;

/// Longest target of a symbolic link (bytes). Source: Linux, `PATH_MAX`, with the zero at its end.
const TARGET: usize = 4095;

/// Most extended attributes of a file, the longest name of one and the longest value (bytes). Source: xattr(7).
const XATTRS: usize = 4096;
const XATTR_NAME: usize = 255;
const XATTR_VALUE: usize = 64 << 10;

/// The largest file (bytes): offsets of Linux have 63 bits.
const SIZE: u64 = i64::MAX as u64;

/// Most volumes of a backup, and the longest name of one with room for `.raw` (bytes).
const VOLUMES: usize = 1024;
const VOLUME_NAME: usize = 250;

/// Nanoseconds of a second.
const SECOND: u32 = 1_000_000_000;

/// Most problems of a volume, and bytes of a sentence.
const SENTENCES: usize = 256;
const SENTENCE: usize = 1024;

/// Returns the error of a worker that answers what no reader does.
pub(super) fn lie(what: &str) -> Error {
    Error::Worker(format!("its worker cannot be believed: {what}"))
}

fn too_much(what: String) -> Error {
    Error::Guest(GuestError::new(ErrorKind::TooMuch, what))
}

/// Checks what is known of a file.
pub(super) fn attributes(attributes: Attributes) -> Result<Attributes> {
    let Attributes { size, mode, accessed, modified, changed, created, .. } = &attributes;
    if *size > SIZE {
        return Err(Error::Guest(GuestError::damaged(format!("it has {size} bytes, which no file has"))));
    }
    let times = [Some(accessed), Some(modified), Some(changed), created.as_ref()];
    let is_time = times.into_iter().flatten().all(|time| time.nanoseconds < SECOND);
    if *mode > 0o7777 || !is_time {
        return Err(lie("a file has a mode or a time that none has"));
    }
    Ok(attributes)
}

/// Adds a part of a directory that starts at entry `from` to what is `listed`; returns where the next part starts.
pub(super) fn page(
    page: Page,
    from: u32,
    listed: &mut Vec<(Entry, std::result::Result<Attributes, String>)>,
) -> Result<Option<u32>> {
    let count = u32::try_from(page.entries.len()).map_err(|_| lie("a part of a directory is too long"))?;
    if page.next.is_some_and(|next| count == 0 || from.checked_add(count) != Some(next)) {
        return Err(lie("the parts of a directory do not follow each other"));
    }
    if listed.len() + page.entries.len() > ENTRIES {
        return Err(too_much(format!("a directory has more than {ENTRIES} names, which are not shown")));
    }
    for (entry, known) in page.entries {
        if !(1..=NAME).contains(&entry.name.len()) {
            return Err(lie("a name in a directory is empty or too long"));
        }
        let known = match known.map(attributes) {
            Ok(Ok(attributes)) => Ok(attributes),
            Ok(Err(error)) => Err(error.to_string()),
            Err(message) => Err(sentence(message)),
        };
        listed.push((entry, known));
    }
    Ok(page.next)
}

/// Checks the target of a link.
pub(super) fn target(target: Vec<u8>) -> Result<Vec<u8>> {
    match target.len() {
        1..=TARGET if !target.contains(&0) => Ok(target),
        len => Err(Error::Guest(GuestError::damaged(format!("a target of {len} bytes is none")))),
    }
}

/// Checks extended attributes.
pub(super) fn xattrs(xattrs: Vec<Xattr>) -> Result<Vec<Xattr>> {
    let is_one = |xattr: &Xattr| {
        (1..=XATTR_NAME).contains(&xattr.name.len()) && !xattr.name.contains(&0) && xattr.value.len() <= XATTR_VALUE
    };
    if xattrs.len() > XATTRS || !xattrs.iter().all(is_one) {
        return Err(too_much("its extended attributes are more, or longer, than Linux can show".to_owned()));
    }
    Ok(xattrs)
}

/// Checks extents that were asked for from `from` on, against the members of the volume.
pub(super) fn extents(extents: Extents, from: u64, members: &[Arc<dyn Disk>]) -> Result<Extents> {
    let mut end = 0;
    for extent in &extents.found {
        let reach = extent.start.checked_add(extent.len).filter(|reach| extent.len > 0 && *reach <= SIZE);
        let (true, Some(reach)) = (extent.start >= end, reach) else {
            return Err(lie("extents of a file do not follow each other"));
        };
        end = reach;
        let is_there = match &extent.source {
            Source::Member(number, offset) => members
                .get(usize::from(*number))
                .is_some_and(|member| offset.checked_add(extent.len).is_some_and(|end| end <= member.size())),
            Source::Bytes(bytes) => bytes.len() as u64 == extent.len,
            Source::Zeroes | Source::Encoded => true,
        };
        if !is_there {
            return Err(lie("an extent of a file lies where nothing is"));
        }
    }
    if extents.until <= from {
        return Err(lie("extents of a file lead nowhere"));
    }
    Ok(extents)
}

/// Shortens what is said of a volume.
pub(super) fn facts(facts: Facts) -> Result<Facts> {
    let Facts { kind, label, uuid, is_replayed, mut problems } = facts;
    problems.truncate(SENTENCES);
    let problems = problems.into_iter().map(sentence).collect();
    Ok(Facts { kind: sentence(kind), label: sentence(label), uuid: sentence(uuid), is_replayed, problems })
}

/// Cuts a text off at a length that a sentence may have.
fn sentence(mut text: String) -> String {
    if text.len() > SENTENCE {
        let end = (0..=SENTENCE).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

/// Checks volumes. Where their bytes lie is checked against the disks by whoever [maps](guest::Mapped) them.
pub(super) fn survey(survey: Survey) -> Result<Survey> {
    let Survey { mut volumes, mut problems } = survey;
    let mut names = HashSet::new();
    let is_name =
        |name: &str| (1..=VOLUME_NAME).contains(&name.len()) && !name.contains(['/', '\0']) && !name.starts_with('.');
    if volumes.len() > VOLUMES
        || !volumes.iter().all(|volume| is_name(&volume.name) && names.insert(volume.name.clone()))
    {
        return Err(lie("volumes are too many, or have names that none has"));
    }
    let told = |problem: guest::Error| GuestError::new(problem.kind(), sentence(problem.to_string()));
    for volume in &mut volumes {
        volume.problem = volume.problem.take().map(told);
    }
    problems.truncate(SENTENCES);
    Ok(Survey { volumes, problems: problems.into_iter().map(told).collect() })
}
