//! Virtual TPMs. What one holds is a secret: it is in no record and no log.
//!
//! Source: xen-api `ocaml/xapi/xapi_vtpm.ml`.

use super::{Method, lifecycle};
use crate::failure::{Failure, Outcome};
use crate::rpc::{Arguments, Call, argument};
use crate::schema::Class;
use crate::schema::Kind::{Bool, Reference, Text};
use crate::value::{self, Value};
use crate::world::State;
use base64::Engine;

/// The entry of a pool's restrictions that says `false` where there may be virtual TPMs.
pub const RESTRICTION: &str = "restrict_vtpm";

pub(super) const METHODS: &[Method] = &[
    Method::new("VTPM.create", &[argument("vM", Reference), argument("is_unique", Bool)], create),
    Method::new("VTPM.destroy", &[argument("self", Reference)], |call, arguments| {
        let (vtpm, mut access) = (arguments.reference(0), call.world.lock());
        let vm = access.store.reference(Class::Vtpm, &vtpm, "VM")?;
        let power_state = access.store.text(Class::Vm, &vm, "power_state")?;
        if !["Halted", "Suspended"].contains(&power_state) {
            return Err(Failure::power_state(&vm, &["Halted", "Suspended"], power_state));
        }
        destroy(&mut access, &vtpm);
        lifecycle::refresh(&mut access, &vm);
        Ok(Value::void())
    }),
    Method::new("VTPM.get_contents", &[argument("self", Reference)], |call, arguments| {
        let (vtpm, access) = (arguments.reference(0), call.world.lock());
        access.store.object(Class::Vtpm, &vtpm)?;
        Ok(access.tpms.get(&vtpm).map(String::as_str).unwrap_or_default().into())
    }),
    Method::new("VTPM.set_contents", &[argument("self", Reference), argument("contents", Text)], set_contents),
];

fn create(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let vm = arguments.reference(0);
    let mut access = call.world.lock();
    let pool = access.pool();
    if access.store.entry(Class::Pool, &pool, "restrictions", RESTRICTION)? != Some("false") {
        return Err(Failure::new("FEATURE_RESTRICTED", [RESTRICTION]));
    }
    lifecycle::check(&access, &vm, "create_vtpm")?;
    let vtpm = access.store.create(Class::Vtpm, [("VM", Value::from(&vm)), ("is_unique", arguments.value(1))]);
    lifecycle::refresh(&mut access, &vm);
    Ok(vtpm.into())
}

fn set_contents(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let (vtpm, contents) = (arguments.reference(0), arguments.text(1));
    let mut access = call.world.lock();
    access.store.object(Class::Vtpm, &vtpm)?;
    if base64::engine::general_purpose::STANDARD.decode(contents).is_err() {
        return Err(Failure::internal("the contents of a VTPM are not in base64"));
    }
    access.tpms.insert(vtpm, contents.to_owned());
    Ok(Value::void())
}

/// Gives a machine TPMs that hold what those of another do, unless they are unique.
///
/// # Errors
/// `HANDLE_INVALID`.
pub fn copy_all(state: &mut State, from: &value::Reference, to: &value::Reference) -> Outcome<()> {
    for vtpm in state.store.references(Class::Vm, from, "VTPMs")? {
        let mut record = state.store.object(Class::Vtpm, &vtpm)?.record.clone();
        let contents = state.tpms.get(&vtpm).filter(|_| record["is_unique"] == Value::Bool(false)).cloned();
        record.insert("uuid", Value::void());
        record.insert("VM", to.into());
        let copy = state.store.create(Class::Vtpm, record);
        state.tpms.extend(contents.map(|contents| (copy, contents)));
    }
    Ok(())
}

/// Removes a TPM with what it holds.
pub fn destroy(state: &mut State, vtpm: &value::Reference) {
    state.store.destroy(Class::Vtpm, vtpm);
    state.tpms.remove(vtpm);
}
