//! Starting and stopping machines.

use super::Method;
use super::lifecycle;
use super::snapshot::suspend_image;
use crate::failure::{Failure, Outcome};
use crate::rpc::{Arguments, Call, argument};
use crate::schema::Class;
use crate::schema::Kind::{Bool, Reference};
use crate::value::{self, Value};
use crate::world::{State, World};
use std::sync::Arc;

pub(super) const METHODS: &[Method] = &[
    Method::new(
        "VM.start",
        &[argument("vm", Reference), argument("start_paused", Bool), argument("force", Bool)],
        |call, arguments| start(call, arguments, None),
    ),
    Method::new(
        "VM.start_on",
        &[
            argument("vm", Reference),
            argument("host", Reference),
            argument("start_paused", Bool),
            argument("force", Bool),
        ],
        |call, arguments| start(call, arguments, Some(arguments.reference(1))),
    ),
    Method::new("VM.clean_shutdown", &[argument("vm", Reference)], |call, arguments| {
        stop(call, arguments, "clean_shutdown")
    }),
    Method::new("VM.shutdown", &[argument("vm", Reference)], |call, arguments| {
        let is_suspended =
            call.world.lock().store.text(Class::Vm, &arguments.reference(0), "power_state")? == "Suspended";
        stop(call, arguments, if is_suspended { "hard_shutdown" } else { "clean_shutdown" })
    }),
    Method::new("VM.hard_shutdown", &[argument("vm", Reference)], |call, arguments| {
        stop(call, arguments, "hard_shutdown")
    }),
    Method::new("VM.suspend", &[argument("vm", Reference)], |call, arguments| {
        suspend(&mut call.world.lock(), &arguments.reference(0))?;
        Ok(Value::void())
    }),
    Method::new(
        "VM.resume",
        &[argument("vm", Reference), argument("start_paused", Bool), argument("force", Bool)],
        resume,
    ),
];

/// Has a machine be suspended, its memory on a disk.
///
/// # Errors
/// If it does not run, or there is no room.
pub fn suspend(state: &mut State, vm: &value::Reference) -> Outcome<()> {
    lifecycle::check(state, vm, "suspend")?;
    let image = suspend_image(state, vm)?;
    state.store.set(Class::Vm, vm, "suspend_VDI", &image)?;
    lifecycle::rest(state, vm, "Suspended")
}

fn resume(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let vm = arguments.reference(0);
    {
        let mut access = call.world.lock();
        lifecycle::check(&access, &vm, "resume")?;
        let image = access.store.reference(Class::Vm, &vm, "suspend_VDI")?;
        access.content(&image)?;
        let host = place(&access, &vm, None)?;
        // What it had attached it has still.
        lifecycle::rest(&mut access, &vm, "Halted")?;
        run(&mut access, &vm, &host)?;
        access.store.set(Class::Vm, &vm, "suspend_VDI", value::NULL)?;
        access.destroy_vdi(&image)?;
    }
    show_tools(call.world, &vm);
    Ok(Value::void())
}

fn start(call: &Call, arguments: &Arguments, on: Option<value::Reference>) -> Outcome<Value> {
    let vm = arguments.reference(0);
    {
        let mut access = call.world.lock();
        lifecycle::check(&access, &vm, if on.is_some() { "start_on" } else { "start" })?;
        let host = place(&access, &vm, on)?;
        run(&mut access, &vm, &host)?;
    }
    show_tools(call.world, &vm);
    Ok(Value::void())
}

/// Returns a host that sees all disks of a machine: the master, if it does, or the one that is asked for.
///
/// # Errors
/// `VM_REQUIRES_SR` if that one does not see an SR, `NO_HOSTS_AVAILABLE` if no one sees all of them.
pub fn place(state: &State, vm: &value::Reference, asked: Option<value::Reference>) -> Outcome<value::Reference> {
    let mut repositories = Vec::new();
    for vbd in state.store.references(Class::Vm, vm, "VBDs")? {
        let vdi = state.store.reference(Class::Vbd, &vbd, "VDI")?;
        if !vdi.is_null() {
            repositories.push(state.store.reference(Class::Vdi, &vdi, "SR")?);
        }
    }
    let missing = |host: &value::Reference| repositories.iter().find(|sr| !state.hosts_of(sr).contains(host));
    if let Some(host) = asked {
        state.store.object(Class::Host, &host)?;
        return match missing(&host) {
            Some(sr) => Err(Failure::new("VM_REQUIRES_SR", [vm.as_str(), sr.as_str()])),
            None => Ok(host),
        };
    }
    let all = std::iter::once(state.master()).chain(state.hosts.iter().cloned());
    let none = || Failure::new("NO_HOSTS_AVAILABLE", Vec::<String>::new());
    all.into_iter().find(|host| missing(host).is_none()).ok_or_else(none)
}

/// Makes a machine run: its disks and interfaces are attached.
///
/// # Errors
/// `VDI_IN_USE`, with nothing changed.
pub fn run(state: &mut State, vm: &value::Reference, host: &value::Reference) -> Outcome<()> {
    let vbds = state.store.references(Class::Vm, vm, "VBDs")?;
    for vbd in &vbds {
        let vdi = state.store.reference(Class::Vbd, vbd, "VDI")?;
        if !vdi.is_null() && state.store.text(Class::Vbd, vbd, "type")? == "Disk" {
            state.check_unused(&vdi, "attach")?;
        }
    }
    for vbd in &vbds {
        let device = state.store.text(Class::Vbd, vbd, "userdevice")?.parse::<u8>().unwrap_or(0);
        let letter = char::from(b'a'.saturating_add(device.min(25)));
        state.store.set(Class::Vbd, vbd, "device", format!("xvd{letter}"))?;
        let is_empty = state.store.flag(Class::Vbd, vbd, "empty")?;
        state.store.set(Class::Vbd, vbd, "currently_attached", !is_empty)?;
    }
    for vif in state.store.references(Class::Vm, vm, "VIFs")? {
        state.store.set(Class::Vif, &vif, "currently_attached", true)?;
    }
    let old = state.store.reference(Class::Vm, vm, "guest_metrics")?;
    state.store.destroy(Class::GuestMetrics, &old);
    let date = Value::Date(state.clock.date());
    let metrics = state.store.create(Class::GuestMetrics, [("live", true.into()), ("last_updated", date)]);
    state.store.set(Class::Vm, vm, "guest_metrics", &metrics)?;
    state.store.set(Class::Vm, vm, "resident_on", host)?;
    state.store.set(Class::Vm, vm, "domid", 1_i64)?;
    state.store.set(Class::Vm, vm, "power_state", "Running")?;
    lifecycle::refresh(state, vm);
    Ok(())
}

/// Has a machine's tools be seen after a while.
pub fn show_tools(world: &Arc<World>, vm: &value::Reference) {
    let vm = vm.clone();
    world.spawn(move |world| {
        let delay = world.lock().settings.tools_delay;
        world.pause(delay);
        let mut access = world.lock();
        let Ok(metrics) = access.store.reference(Class::Vm, &vm, "guest_metrics") else { return };
        if access.store.find(Class::GuestMetrics, &metrics).is_some() {
            // Found a line ago, under the same lock.
            let _gone = access.store.set(Class::GuestMetrics, &metrics, "PV_drivers_detected", true);
            let _gone = access.store.set(Class::GuestMetrics, &metrics, "PV_drivers_up_to_date", true);
        }
    });
}

fn stop(call: &Call, arguments: &Arguments, operation: &str) -> Outcome<Value> {
    let vm = arguments.reference(0);
    let mut access = call.world.lock();
    lifecycle::check(&access, &vm, operation)?;
    halt(&mut access, &vm)?;
    Ok(Value::void())
}

/// Has a machine be halted; the memory of a suspended one is lost.
///
/// # Errors
/// `HANDLE_INVALID`.
pub fn halt(state: &mut State, vm: &value::Reference) -> Outcome<()> {
    let metrics = state.store.reference(Class::Vm, vm, "guest_metrics")?;
    state.store.destroy(Class::GuestMetrics, &metrics);
    state.store.set(Class::Vm, vm, "guest_metrics", value::NULL)?;
    let image = state.store.reference(Class::Vm, vm, "suspend_VDI")?;
    if !image.is_null() {
        state.store.set(Class::Vm, vm, "suspend_VDI", value::NULL)?;
        // Somebody may look at it; then it stays.
        let _kept = state.destroy_vdi(&image);
    }
    lifecycle::rest(state, vm, "Halted")
}
