//! Tasks that clients make, watch and destroy.

use super::Method;
use crate::failure::{Failure, Outcome};
use crate::rpc::{Arguments, Call, argument};
use crate::schema::Class;
use crate::schema::Kind::{Choice, Float, Reference, Set, Text};
use crate::value::{self, Value};

pub(super) const METHODS: &[Method] = &[
    Method::new("task.create", &[argument("label", Text), argument("description", Text)], create).only_synchronous(),
    Method::new("task.destroy", &[argument("self", Reference)], destroy).only_synchronous(),
    Method::new("task.cancel", &[argument("task", Reference)], cancel),
    Method::new(
        "task.set_status",
        &[
            argument("self", Reference),
            argument("value", Choice(&["pending", "success", "failure", "cancelling", "cancelled"])),
        ],
        set_status,
    )
    .only_synchronous(),
    Method::new("task.set_progress", &[argument("self", Reference), argument("value", Float)], |call, arguments| {
        set(call, arguments, "progress")
    })
    .only_synchronous(),
    Method::new("task.set_result", &[argument("self", Reference), argument("value", Text)], |call, arguments| {
        set(call, arguments, "result")
    })
    .only_synchronous(),
    Method::new("task.set_error_info", &[argument("self", Reference), argument("value", Set)], |call, arguments| {
        set(call, arguments, "error_info")
    })
    .only_synchronous(),
];

fn create(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let mut access = call.world.lock();
    let state = &mut *access;
    let (label, description) = (arguments.text(0), arguments.text(1));
    let none = value::Reference::null();
    let task = state.tasks.create(&mut state.store, &state.clock, &call.session, label, description, &none);
    Ok(task.into())
}

fn destroy(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let mut access = call.world.lock();
    let state = &mut *access;
    state.tasks.destroy(&mut state.store, &arguments.reference(0))?;
    Ok(Value::void())
}

fn cancel(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let mut access = call.world.lock();
    let state = &mut *access;
    state.tasks.cancel(&mut state.store, &arguments.reference(0))?;
    Ok(Value::void())
}

fn set_status(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    if arguments.text(1) == "cancelling" {
        return Err(Failure::kind("value"));
    }
    let mut access = call.world.lock();
    let state = &mut *access;
    let task = arguments.reference(0);
    state.store.set(Class::Task, &task, "status", arguments.text(1))?;
    state.tasks.note_status(&mut state.store, &state.clock, &task, arguments.text(1));
    Ok(Value::void())
}

fn set(call: &Call, arguments: &Arguments, field: &'static str) -> Outcome<Value> {
    call.world.lock().store.set(Class::Task, &arguments.reference(0), field, arguments.value(1))?;
    Ok(Value::void())
}
