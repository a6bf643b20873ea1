//! Which machines a job means, as its file says it; `select` finds them.

use super::values;
use crate::job::table::Section;

/// Which machines are backed up: those that are named, or have a tag, or all; less those that are excluded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Which {
    /// All of the pools.
    pub all: bool,
    /// By name.
    pub names: Vec<String>,
    /// By uuid, in lower case.
    pub uuids: Vec<String>,
    /// By tag.
    pub tags: Vec<String>,
    /// Only in these states, as XAPI calls them; in all, if there is none.
    pub power_states: Vec<PowerState>,
    /// Not these, by name or uuid.
    pub exclude: Vec<String>,
    /// Not those with these tags.
    pub exclude_tags: Vec<String>,
}

/// The state of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerState {
    /// It runs.
    Running,
    /// It is shut down.
    Halted,
    /// It is stopped, and in memory.
    Paused,
    /// It is stopped, and its memory is on a disk.
    Suspended,
}

impl PowerState {
    /// Returns what XAPI calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "Running",
            Self::Halted => "Halted",
            Self::Paused => "Paused",
            Self::Suspended => "Suspended",
        }
    }
}

/// Reads `[vms]`.
pub(super) fn which(vms: Section) -> Which {
    const STATES: [(&str, PowerState); 4] = [
        ("running", PowerState::Running),
        ("halted", PowerState::Halted),
        ("paused", PowerState::Paused),
        ("suspended", PowerState::Suspended),
    ];
    let all = vms.flag("all").unwrap_or(false);
    let names = vms.texts("names");
    let uuids = vms.texts("uuids");
    for text in &uuids {
        if uuid::Uuid::try_parse(&text.value).is_err() {
            vms.note_at(&text.span, format!("'{}' is no uuid", text.value.escape_debug()));
        }
    }
    let tags = vms.texts("tags");
    let mut power_states = Vec::new();
    for text in vms.texts("power_states") {
        match STATES.iter().find(|(word, _)| *word == text.value) {
            Some((_, state)) => power_states.push(*state),
            None => {
                let words = STATES.map(|(word, _)| word).join(", ");
                vms.note_at(&text.span, format!("'{}' is no state; there are {words}", text.value.escape_debug()));
            }
        }
    }
    let chosen = names.len() + uuids.len() + tags.len();
    match (all, chosen) {
        (false, 0) => vms.note_by(
            &["all", "names", "uuids", "tags"],
            "[vms] names no machine: give names, uuids, tags, or all = true",
        ),
        (true, 1..) => vms.note("[vms] says all = true, and names some: leave the one or the other out"),
        _ => {}
    }
    let (exclude, exclude_tags) = (values(vms.texts("exclude")), values(vms.texts("exclude_tags")));
    let uuids = values(uuids).into_iter().map(|uuid| uuid.to_ascii_lowercase()).collect();
    let which = Which { all, names: values(names), uuids, tags: values(tags), power_states, exclude, exclude_tags };
    vms.finish();
    which
}
