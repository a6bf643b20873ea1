//! What a restore will make, and what it made, as text and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cli::text::{Shown, size};
use crate::pool::restore::{Interface, Plan, PlannedDisk, Restored, RestoredDisk, Room, What};
use crate::probe;

/// Says in text what is planned.
pub fn plan_to_text(plan: &Plan) -> String {
    let mut text = String::new();
    let what = match &plan.what {
        What::Machine(_) => "a new VM".to_owned(),
        What::Disk(_, None) => "a disk that no VM has".to_owned(),
        What::Disk(_, Some(vm)) => format!("a disk for the VM '{}'", Shown(&vm.name_label)),
        What::Archive(_) => "a new VM, out of an XVA".to_owned(),
    };
    let _ = writeln!(text, "{} becomes {what}, called '{}'", Shown(&plan.source), Shown(&plan.name));
    for disk in plan.disks() {
        let from = match &disk.base {
            None => "all that is not zero".to_owned(),
            Some(base) => format!("what differs from its snapshot {} ({})", base.vdi.uuid, base.time),
        };
        let _ = writeln!(
            text,
            "  {}  {}, {} to send: {from}; on '{}'",
            Shown(&disk.name),
            size(disk.size),
            size(disk.image.payload()),
            Shown(&disk.storage.name_label)
        );
    }
    match &plan.what {
        What::Machine(machine) => {
            for interface in &machine.interfaces {
                let to = match &interface.network {
                    Ok(network) => format!("on '{}', {}", Shown(&network.name), mac(interface)),
                    Err(_) => "is left out".to_owned(),
                };
                let (device, old) = (Shown(&interface.device), Shown(&interface.old));
                let _ = writeln!(text, "  interface {device}  was on '{old}': {to}");
            }
            if !machine.vtpms.is_empty() {
                let _ = writeln!(text, "  a virtual TPM with what it held");
            }
        }
        What::Archive(archive) => {
            let to = Shown(&archive.storage.name_label);
            let _ = writeln!(text, "  all of the XVA, {}; its disks on '{to}'", size(archive.xva.size()));
        }
        What::Disk(..) => {}
    }
    for remark in &plan.remarks {
        let _ = writeln!(text, "  note: {}", Shown(remark));
    }
    text
}

fn mac(interface: &Interface) -> String {
    if interface.mac.is_empty() { "with a new MAC".to_owned() } else { format!("with {}", Shown(&interface.mac)) }
}

/// Says the same as JSON.
pub fn plan_to_json(plan: &Plan) -> Value {
    let disk = |disk: &PlannedDisk| {
        json!({
            "name": disk.name,
            "label": disk.label,
            "size": disk.size,
            "bytesToSend": disk.image.payload(),
            "sr": disk.storage.uuid,
            "snapshot": disk.base.as_ref().map(|base| &base.vdi.uuid),
        })
    };
    let interface = |interface: &Interface| {
        json!({
            "device": interface.device,
            "oldNetwork": interface.old,
            "network": interface.network.as_ref().ok().map(|network| &network.uuid),
            "mac": Some(&interface.mac).filter(|mac| !mac.is_empty()),
        })
    };
    let (interfaces, attached, xva): (Vec<Value>, _, _) = match &plan.what {
        What::Machine(machine) => (machine.interfaces.iter().map(interface).collect(), None, None),
        What::Disk(_, vm) => (Vec::new(), vm.as_ref().map(|vm| vm.uuid.clone()), None),
        What::Archive(archive) => (Vec::new(), None, Some(archive)),
    };
    json!({
        "name": plan.name,
        "disks": plan.disks().iter().map(disk).collect::<Vec<_>>(),
        "interfaces": interfaces,
        "attachTo": attached,
        "xva": xva.map(|xva| json!({ "bytes": xva.xva.size(), "sr": xva.storage.uuid })),
        "remarks": plan.remarks,
    })
}

/// Says in text what all of it takes.
pub fn room_to_text(rooms: &[Room]) -> String {
    let mut text = String::new();
    for room in rooms {
        let free = match (room.storage.size, room.is_enough()) {
            (0, _) => "it does not say how much is free".to_owned(),
            (_, true) => format!("{} free", size(room.storage.free())),
            (_, false) => format!("too little: {} free", size(room.storage.free())),
        };
        let _ = writeln!(text, "SR '{}': up to {} needed, {free}", Shown(&room.storage.name), size(room.takes));
    }
    text
}

/// Says the same as JSON.
pub fn room_to_json(rooms: &[Room]) -> Value {
    let room = |room: &Room| {
        let free = (room.storage.size > 0).then(|| room.storage.free());
        json!({ "sr": room.storage.uuid, "bytes": room.takes, "free": free, "isEnough": room.is_enough() })
    };
    rooms.iter().map(room).collect()
}

/// Says in text what was made.
pub fn to_text(plan: &Plan, restored: &Restored, elapsed: Duration) -> String {
    let mut text = String::new();
    let disk = restored.disks.first().map(|disk| disk.uuid.as_str());
    let (kind, uuid, of) = match &plan.what {
        What::Disk(_, None) => ("disk", disk, String::new()),
        What::Disk(_, Some(vm)) => {
            ("disk", disk, format!(" of the VM '{}' {}", Shown(&vm.name_label), Shown(&vm.uuid)))
        }
        What::Machine(_) | What::Archive(_) => ("VM", restored.vm.as_deref(), String::new()),
    };
    let (source, name, uuid) = (Shown(&plan.source), Shown(&restored.name), Shown(uuid.unwrap_or_default()));
    let _ = writeln!(text, "{source}: restored as {kind} '{name}' {uuid}{of}");
    for disk in &restored.disks {
        let onto = disk.base.as_ref().map_or_else(String::new, |base| format!(" onto the snapshot {base}"));
        let verified = if disk.verified.is_some() { ", read back and equal" } else { "" };
        let _ =
            writeln!(text, "  {}  {} of {} sent{onto}{verified}", Shown(&disk.name), size(disk.sent), size(disk.size));
    }
    let bytes = plan.bytes();
    let rate = u128::from(bytes) * 1000 / elapsed.as_millis().max(1);
    let rate = size(u64::try_from(rate).unwrap_or(u64::MAX));
    let _ = writeln!(text, "{} sent in {:.1} s, {rate}/s", size(bytes), elapsed.as_secs_f64());
    let _ = writeln!(text, "{}", Shown(&restored.transfer.bottleneck().line()));
    text
}

/// Says the same as JSON.
pub fn to_json(plan: &Plan, restored: &Restored, elapsed: Duration) -> Value {
    let disk = |disk: &RestoredDisk| {
        json!({
            "name": disk.name,
            "uuid": disk.uuid,
            "size": disk.size,
            "bytesSent": disk.sent,
            "snapshot": disk.base,
            "digest": disk.digest,
            "verifiedDigest": disk.verified,
        })
    };
    let archive = restored.archive.as_ref();
    json!({
        "backup": plan.source,
        "error": null,
        "vm": restored.vm,
        "name": restored.name,
        "disks": restored.disks.iter().map(disk).collect::<Vec<_>>(),
        "xva": archive.map(|(checksum, bytes)| json!({ "bytes": bytes, "checksum": checksum })),
        "remarks": plan.remarks,
        "seconds": elapsed.as_secs_f64(),
        "transfer": probe::transfer_to_json(&restored.transfer),
    })
}
