//! The calls that do more than read and write fields.

pub mod cbt;
mod disk;
pub mod lifecycle;
pub mod machine;
mod plug;
mod pool;
pub mod power;
mod revert;
mod session;
mod snapshot;
mod task;
pub mod tpm;

use crate::failure::{Failure, Outcome};
use crate::rpc::{Arguments, Call, Parameter};
use crate::scene::Settings;
use crate::schema::Class;
use crate::value::Value;
use std::collections::BTreeMap;

/// A call.
pub struct Method {
    /// `Class.method`.
    pub name: &'static str,
    /// What it takes beside the session.
    parameters: &'static [Parameter],
    /// Whether it can be called with `Async.`.
    pub is_async: bool,
    /// Whether its first argument is a session.
    pub needs_session: bool,
    /// Does it.
    pub run: fn(&Call, &Arguments) -> Outcome<Value>,
}

impl Method {
    const fn new(
        name: &'static str,
        parameters: &'static [Parameter],
        run: fn(&Call, &Arguments) -> Outcome<Value>,
    ) -> Method {
        Method { name, parameters, is_async: true, needs_session: true, run }
    }

    const fn only_synchronous(mut self) -> Method {
        self.is_async = false;
        self
    }

    const fn without_session(mut self) -> Method {
        self.needs_session = false;
        self
    }

    /// Returns what it takes beside the session, in the pool's version.
    pub fn parameters(&self, settings: &Settings) -> &'static [Parameter] {
        match self.parameters {
            [before @ .., last] if last.name == "ignore_vdis" && !settings.has_ignore_vdis => before,
            all => all,
        }
    }
}

/// Goes through all of them.
pub fn all() -> impl Iterator<Item = &'static Method> {
    [
        cbt::METHODS,
        disk::METHODS,
        machine::METHODS,
        plug::METHODS,
        pool::METHODS,
        power::METHODS,
        revert::METHODS,
        session::METHODS,
        snapshot::METHODS,
        task::METHODS,
        tpm::METHODS,
    ]
    .into_iter()
    .flatten()
}

/// Finds one by its name.
pub fn find(name: &str) -> Option<&'static Method> {
    all().find(|method| method.name == name)
}

/// Takes the fields of `class` out of a record that a constructor got: those of `required` must be there, and what is neither of
/// both is not looked at, as on a real server.
fn record(
    class: Class,
    mut given: BTreeMap<String, Value>,
    required: &[&'static str],
    optional: &[&'static str],
) -> Outcome<BTreeMap<&'static str, Value>> {
    let mut fields = BTreeMap::new();
    for (name, must) in required.iter().map(|&name| (name, true)).chain(optional.iter().map(|&name| (name, false))) {
        match given.remove(name) {
            Some(value) => {
                let field = class.field(name).ok_or_else(|| Failure::kind(name))?;
                fields.insert(name, field.kind.admit(value).ok_or_else(|| Failure::kind(name))?);
            }
            None if must => return Err(Failure::kind(name)),
            None => {}
        }
    }
    Ok(fields)
}
