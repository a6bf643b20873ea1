//! What comes from a worker, before it is believed: limits that hold whatever the reader says.

use std::collections::HashSet;
use std::sync::Arc;

use disk::Disk;
use guest::{
    Attributes, Error as GuestError, ErrorKind, Extents, Facts, Map, Part, SegmentSource, Source, Survey, Xattr,
};

use super::error::{Error, Result};
use super::protocol::Page;
use super::volume::Listed;

/// Most names in a directory: some 250 MB of memory while it is listed.
const ENTRIES: usize = 1_000_000;

/// Most bytes of names in a directory.
const TEXT: usize = 64 << 20;

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

/// The shortest stripe (bytes) and the most disks of a striped volume. Source: lvmraid(7), md(4).
const LEAST_STRIPE: u64 = 4096;
const MOST_COLUMNS: usize = 128;

/// Nanoseconds of a second.
const SECOND: u32 = 1_000_000_000;

/// Most problems of a volume, and bytes of a sentence.
const SENTENCES: usize = 32;
const SENTENCE: usize = 1024;

/// Most extents of a file at a time, and bytes that lie in them.
const EXTENTS_AT_ONCE: usize = 32 << 10;
const BYTES_AT_ONCE: u64 = 4 << 20;

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

/// A directory that comes in parts.
#[derive(Default)]
pub(super) struct Directory {
    listed: Listed,
    /// Bytes of all names and messages.
    text: usize,
}

impl Directory {
    /// Adds the part that starts at entry `from`; returns where the next part starts.
    pub(super) fn add(&mut self, page: Page, from: u32) -> Result<Option<u32>> {
        let count = u32::try_from(page.entries.len()).map_err(|_| lie("a part of a directory is too long"))?;
        if page.next.is_some_and(|next| count == 0 || from.checked_add(count) != Some(next)) {
            return Err(lie("the parts of a directory do not follow each other"));
        }
        for (entry, known) in page.entries {
            if !(1..=NAME).contains(&entry.name.len()) {
                return Err(lie("a name in a directory is empty or too long"));
            }
            let known = match known.map(attributes) {
                Ok(Ok(attributes)) => Ok(attributes),
                Ok(Err(error)) => Err(error.to_string()),
                Err(message) => Err(sentence(&message)),
            };
            self.text += entry.name.len() + known.as_ref().err().map_or(0, String::len);
            self.listed.push((entry, known));
            if self.listed.len() > ENTRIES || self.text > TEXT {
                return Err(too_much(format!(
                    "a directory has more than {ENTRIES} names, or {} MiB of them",
                    TEXT >> 20
                )));
            }
        }
        Ok(page.next)
    }

    pub(super) fn done(self) -> Listed {
        self.listed
    }
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
    let in_memory = extents.found.iter().filter(|extent| matches!(extent.source, Source::Bytes(_)));
    if extents.found.len() > EXTENTS_AT_ONCE
        || in_memory.map(|extent| extent.len).fold(0, u64::saturating_add) > BYTES_AT_ONCE
    {
        return Err(lie("extents of a file are more than were asked for"));
    }
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
pub(super) fn facts(facts: Facts) -> Facts {
    let Facts { kind, label, uuid, is_replayed, mut problems } = facts;
    problems.truncate(SENTENCES);
    let problems = problems.iter().map(|problem| sentence(problem)).collect();
    Facts { kind: sentence(&kind), label: sentence(&label), uuid: sentence(&uuid), is_replayed, problems }
}

/// Returns a text that can be shown: without control characters, cut off at a length that a sentence may have.
pub(super) fn sentence(text: &str) -> String {
    let shown = text.chars().map(|character| if character.is_control() { ' ' } else { character });
    let mut length = 0;
    shown
        .take_while(|character| {
            length += character.len_utf8();
            length <= SENTENCE
        })
        .collect()
}

/// Checks volumes. What they are made of was checked when it came ([`guest::Stack`]); where their bytes lie is checked against
/// the disks by whoever [maps](guest::Mapped) them.
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
    let mut others = HashSet::new();
    let is_other = |name: &String| names.contains(name) && others.insert(name.clone());
    if !volumes.iter().flat_map(|volume| &volume.others).all(is_other) {
        return Err(lie("a filesystem is on volumes that are not there, or two are on one"));
    }
    let parts = volumes.iter().filter_map(|volume| volume.stack.as_ref()).flat_map(|stack| stack.parts());
    let maps = parts.filter_map(|part| match part {
        Part::Map(map) => Some(map),
        Part::Layer { .. } => None,
    });
    let segments = maps.flat_map(Map::segments);
    let stripes = segments.filter_map(|segment| match &segment.source {
        SegmentSource::Striped(stripes) if stripes.columns.len() > 1 => Some(stripes),
        _ => None,
    });
    // Each stripe is a read of its own.
    if stripes.into_iter().any(|stripes| stripes.stripe_size < LEAST_STRIPE || stripes.columns.len() > MOST_COLUMNS) {
        return Err(lie("a volume has smaller stripes, or more of them, than any system makes"));
    }
    let told = |problem: guest::Error| GuestError::new(problem.kind(), sentence(&problem.to_string()));
    for volume in &mut volumes {
        volume.problem = volume.problem.take().map(told);
    }
    problems.truncate(SENTENCES);
    Ok(Survey { volumes, problems: problems.into_iter().map(told).collect() })
}
