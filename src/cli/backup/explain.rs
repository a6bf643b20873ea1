//! `xofs backup --explain`: what will be read, for people and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::cli::text::{Shown, size};
use crate::pool::{Base, ExplainedDisk, ExplainedReplica, Explanation, Fate};

/// Says it for people.
pub fn to_text(explanation: &Explanation) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{} ({}):", Shown(&explanation.name), Shown(&explanation.uuid));
    for disk in &explanation.disks {
        let (kind, why) = fate(disk);
        let _ = writeln!(text, "  {}  {}  {kind}: {}", disk.name, size(disk.size), Shown(&why));
        if let Fate::Read(_, ways) = &disk.fate {
            let ways: Vec<&str> = ways.iter().map(|way| way.name()).collect();
            let _ = writeln!(text, "    by {}", ways.join(", else "));
        }
    }
    for room in &explanation.room {
        let is_short = if room.takes > room.free { ": it may not fit" } else { "" };
        let (storage, takes, free) = (Shown(&room.storage), size(room.takes), size(room.free));
        let _ = writeln!(
            text,
            "  the snapshot takes up to {takes} on {storage}, which is thick and has {free} free{is_short}"
        );
    }
    if explanation.room.is_empty() {
        let _ = writeln!(text, "  the snapshot takes next to no room");
    }
    for replica in &explanation.replicas {
        let _ = writeln!(text, "{}:", Shown(&replica.name));
        let _ = match &replica.machine {
            Ok((name, uuid)) => {
                writeln!(text, "  onto '{}' ({}), which has {} states", Shown(name), Shown(uuid), replica.states)
            }
            Err(why) => writeln!(text, "  onto a new VM: {}", Shown(why)),
        };
        for (disk, base) in &replica.disks {
            let _ = match base {
                Ok(time) => writeln!(text, "  {disk}  what changed since {}", Shown(time)),
                Err(why) => writeln!(text, "  {disk}  whole: {}", Shown(why)),
            };
        }
        let is_short = if replica.takes > replica.free { ": it may not fit" } else { "" };
        let (takes, free) = (size(replica.takes), size(replica.free));
        let _ = writeln!(text, "  what is sent as a whole takes up to {takes}, and {free} are free there{is_short}");
    }
    for remark in explanation.chain_problem.iter().chain(&explanation.remarks) {
        let _ = writeln!(text, "  {}", Shown(remark));
    }
    text
}

/// Says it as JSON.
pub fn to_json(explanation: &Explanation) -> Value {
    let disk = |disk: &ExplainedDisk| {
        let (kind, why) = fate(disk);
        let ways: Vec<&str> = match &disk.fate {
            Fate::Read(_, ways) => ways.iter().map(|way| way.name()).collect(),
            Fate::LeftOut | Fate::Full => Vec::new(),
        };
        json!({ "name": disk.name, "label": disk.label, "size": disk.size, "kind": kind, "why": why, "ways": ways })
    };
    json!({
        "disks": explanation.disks.iter().map(disk).collect::<Vec<_>>(),
        "room": explanation.room.iter().map(|room| {
            json!({ "storage": room.storage, "takes": room.takes, "free": room.free })
        }).collect::<Vec<_>>(),
        "replicas": explanation.replicas.iter().map(replica_to_json).collect::<Vec<_>>(),
        "chainProblem": explanation.chain_problem,
        "remarks": explanation.remarks,
    })
}

fn replica_to_json(replica: &ExplainedReplica) -> Value {
    let disk = |(name, base): &(String, Result<String, String>)| json!({ "name": name, "since": base.as_ref().ok(), "whyWhole": base.as_ref().err() });
    json!({
        "name": replica.name,
        "vm": replica.machine.as_ref().ok().map(|(name, uuid)| json!({ "name": name, "uuid": uuid })),
        "whyNew": replica.machine.as_ref().err(),
        "states": replica.states,
        "disks": replica.disks.iter().map(disk).collect::<Vec<_>>(),
        "takes": replica.takes,
        "free": replica.free,
    })
}

/// Says what is made of a disk, and why.
fn fate(disk: &ExplainedDisk) -> (&'static str, String) {
    match &disk.fate {
        Fate::LeftOut => ("left out", "[NOBAK] in its name".to_owned()),
        Fate::Full => ("full", "all of the VM becomes one XVA".to_owned()),
        Fate::Read(Base::Snapshot { has_data: true, .. }, _) => {
            ("increment", "the snapshot of the backup before is there".to_owned())
        }
        Fate::Read(Base::Snapshot { has_data: false, .. }, _) => {
            ("increment", "what changed since the backup before was tracked".to_owned())
        }
        Fate::Read(Base::Whole(why), _) => ("increment, read as a whole", why.clone()),
        Fate::Read(Base::Key(why), _) => ("key", why.clone()),
    }
}
