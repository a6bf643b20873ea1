//! What a mount makes of frames, for those who make them up: fuzzers.

use std::sync::Arc;

use disk::Disk;
use guest::{Mapped, Part, Source, Stack};

use super::check;
use super::protocol::{Frame, Message, receive};

/// Takes bytes for what a worker of a volume of `members` says, and returns how many of its messages are believed, until one is not.
///
/// # Panics
/// If something is believed that the mount relies on not to be.
#[doc(hidden)]
#[must_use]
pub fn judge(mut said: &[u8], members: &[Arc<dyn Disk>]) -> usize {
    let mut believed = 0;
    let mut directory = (check::Directory::default(), 0);
    while let Ok(Frame::Message(message)) = receive::<Message>(&mut said) {
        let is_believed = match message {
            Message::Survey(survey) => check::survey(survey).is_ok_and(|survey| {
                assert!(survey.volumes.iter().all(|volume| !volume.name.is_empty() && !volume.name.contains('/')));
                for part in survey.volumes.iter().filter_map(|volume| volume.stack.as_ref()).flat_map(Stack::parts) {
                    let Part::Map(map) = part else { continue };
                    if let Ok(mapped) = Mapped::new(map.clone(), members.to_vec()) {
                        assert!(mapped.extent_at(mapped.size() - 1).is_ok_and(|extent| extent.len == 1));
                    }
                }
                true
            }),
            Message::Opened(_, facts) => check::facts(facts).problems.len() <= 32,
            Message::List(page) => {
                let (mut listed, from) = directory;
                let next = listed.add(page, from);
                directory = match &next {
                    Ok(Some(next)) => (listed, *next),
                    _ => (check::Directory::default(), 0),
                };
                next.is_ok()
            }
            Message::Attributes(attributes) => check::attributes(attributes).is_ok_and(|attributes| {
                assert!(attributes.size <= i64::MAX.unsigned_abs() && attributes.mode <= 0o7777);
                true
            }),
            Message::Target(target) => check::target(target).is_ok(),
            Message::Xattrs(xattrs) => check::xattrs(xattrs).is_ok(),
            Message::Extents(extents) => check::extents(extents, 0, members).is_ok_and(|extents| {
                assert!(extents.until > 0);
                for pair in extents.found.windows(2) {
                    assert!(pair[0].start + pair[0].len <= pair[1].start);
                }
                for extent in &extents.found {
                    if let Source::Member(number, at) = extent.source {
                        assert!(at + extent.len <= members[usize::from(number)].size());
                    }
                }
                true
            }),
            Message::Failed(_, why) | Message::Panicked(why) => check::sentence(&why).len() <= 1024,
            Message::Ready | Message::Read(..) => true,
        };
        if !is_believed {
            break;
        }
        believed += 1;
    }
    believed
}
