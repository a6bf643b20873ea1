//! Calls: from the body of a request to its answer.
//!
//! [`call`] takes a method and its arguments, whichever envelope they came in ([`json`], or XML), checks session and
//! arguments as a real server does before it does anything, and runs a [method](crate::methods) or a generated
//! [accessor]. Names are `Class.method` or `Class_method`, with `Async.` before the former.
//! Source: xen-api `ocaml/idl/ocaml_backend/gen_server.ml`, `ocaml/xapi/server_helpers.ml`.

pub mod json;
pub mod xml_rpc;

use crate::accessor::{self, Accessor};
use crate::failure::{Failure, Outcome};
use crate::fault::Act;
use crate::methods::{self, Method};
use crate::schema::{Class, Kind};
use crate::value::{Reference, Value};
use crate::world::World;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A call that runs.
pub struct Call<'a> {
    /// The pool.
    pub world: &'a Arc<World>,
    /// The host that got it, by its position.
    pub host: usize,
    /// Its session; null for what needs none.
    pub session: Reference,
    /// Its task, if it is asynchronous.
    pub task: Option<Reference>,
}

impl Call<'_> {
    /// Returns what stands for the call where objects say what is done to them.
    pub fn operation(&self) -> String {
        match &self.task {
            Some(task) => task.to_string(),
            None => format!("DummyRef:|{}|task", crate::random::fresh_uuid()),
        }
    }
}

/// The arguments of a call, of the types that its parameters have.
pub struct Arguments(Vec<Value>);

impl Arguments {
    /// Returns a text.
    pub fn text(&self, position: usize) -> &str {
        self.0.get(position).and_then(Value::as_text).unwrap_or_default()
    }

    /// Returns a reference.
    pub fn reference(&self, position: usize) -> Reference {
        Reference::from(self.text(position))
    }

    /// Returns a number.
    pub fn number(&self, position: usize) -> i64 {
        match self.0.get(position) {
            Some(Value::Int(number)) => *number,
            _ => 0,
        }
    }

    /// Returns a number of seconds or a fraction.
    pub fn float(&self, position: usize) -> f64 {
        match self.0.get(position) {
            Some(Value::Float(number)) => *number,
            _ => 0.0,
        }
    }

    /// Returns the texts of a set.
    pub fn texts(&self, position: usize) -> Vec<&str> {
        self.0.get(position).and_then(Value::as_set).unwrap_or(&[]).iter().filter_map(Value::as_text).collect()
    }

    /// Returns the entries of a map or the fields of a record.
    pub fn entries(&self, position: usize) -> BTreeMap<String, Value> {
        self.0.get(position).and_then(Value::as_map).cloned().unwrap_or_default()
    }

    /// Returns any value.
    pub fn value(&self, position: usize) -> Value {
        self.0.get(position).cloned().unwrap_or_else(Value::void)
    }
}

/// What becomes of a call.
#[derive(Debug)]
pub enum Reply {
    /// An answer.
    Answer(Outcome<Value>),
    /// No answer: the connection ends.
    Nothing,
}

/// What runs a call.
#[derive(Clone, Copy)]
enum Target {
    Method(&'static Method),
    Accessor(Accessor),
}

/// Runs a call.
pub fn call(world: &Arc<World>, host: usize, method: &str, arguments: Vec<Value>) -> Reply {
    let (is_async, name) = dotted(method);
    note(world, host, method, &name, &arguments);
    let act = {
        let names = arguments.iter().skip(1).flat_map(texts).collect::<Vec<_>>();
        let names = known_names(world, &names);
        world.faults.at_call(&name, &names.iter().map(String::as_str).collect::<Vec<_>>())
    };
    match act {
        Some(Act::Refuse) => Reply::Nothing,
        Some(Act::Cut) => {
            let _lost = run(world, host, method, is_async, &name, arguments, None);
            Reply::Nothing
        }
        act if is_async => Reply::Answer(run(world, host, method, is_async, &name, arguments, act)),
        act => Reply::Answer(
            befall(world, act).unwrap_or_else(|| run(world, host, method, is_async, &name, arguments, None)),
        ),
    }
}

/// Has what goes wrong with a call happen. Returns how the call ends if that is the end of it.
fn befall(world: &World, act: Option<Act>) -> Option<Outcome<Value>> {
    match act {
        Some(Act::Fail(failure)) => return Some(Err(failure)),
        Some(Act::Bitmap(bytes)) => return Some(Ok(methods::cbt::encode(&vec![0xff; bytes]).into())),
        Some(Act::Delay(duration)) => world.pause(duration),
        Some(Act::Upset(upset)) => crate::upset::happen(world, &upset),
        Some(Act::Cut | Act::Refuse) | None => {}
    }
    None
}

fn run(
    world: &Arc<World>,
    host: usize,
    method: &str,
    is_async: bool,
    name: &str,
    mut arguments: Vec<Value>,
    act: Option<Act>,
) -> Outcome<Value> {
    if name == "system.listMethods" {
        return Ok(list_methods().into_iter().collect());
    }
    let target = match methods::find(name) {
        Some(found) if is_async && !found.is_async => return Err(Failure::no_method(method)),
        Some(found) => Target::Method(found),
        None if is_async => return Err(Failure::no_method(method)),
        None => Target::Accessor(accessor::find(name).ok_or_else(|| Failure::no_method(method))?),
    };
    // Whatever a slave is asked, it knows only who to ask.
    let position = {
        let access = world.lock();
        access.position(&access.master())
    };
    if position != Some(host) {
        let address = position.map(|master| world.nodes.hosts[master].address.to_string()).unwrap_or_default();
        return Err(Failure::new("HOST_IS_SLAVE", [address]));
    }
    let needs_session = !matches!(target, Target::Method(found) if !found.needs_session);
    let mut session = Reference::null();
    if needs_session {
        if arguments.is_empty() {
            return Err(Failure::new("MESSAGE_PARAMETER_COUNT_MISMATCH", [method, "1", "0"]));
        }
        session = Reference::from(arguments.remove(0).as_text().unwrap_or_default());
        let mut access = world.lock();
        let state = &mut *access;
        if !state.sessions.note_use(&mut state.store, &state.clock, &session) {
            return Err(Failure::session(session.as_str()));
        }
    }
    let call = Call { world, host, session, task: None };
    match target {
        Target::Accessor(accessor) => {
            let arguments = admit(method, accessor.parameters(), arguments)?;
            accessor.run(&mut world.lock(), &arguments)
        }
        Target::Method(found) => {
            let parameters = found.parameters(&world.lock().settings);
            let arguments = admit(method, parameters, arguments)?;
            if is_async {
                Ok(start(&call, method, found, arguments, act).into())
            } else {
                (found.run)(&call, &arguments)
            }
        }
    }
}

/// A parameter of a method.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// As errors name it.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// What it is if it is left out from the end.
    pub default: Option<&'static str>,
}

/// Returns a parameter that must be given.
pub const fn argument(name: &'static str, kind: Kind) -> Parameter {
    Parameter { name, kind, default: None }
}

/// Returns a parameter that may be left out, and is blank then.
pub const fn optional(name: &'static str, kind: Kind) -> Parameter {
    Parameter { name, kind, default: Some("") }
}

fn admit(method: &str, parameters: &[Parameter], given: Vec<Value>) -> Outcome<Arguments> {
    let least = parameters.iter().filter(|parameter| parameter.default.is_none()).count();
    if given.len() < least || given.len() > parameters.len() {
        let expected = parameters.len().to_string();
        let got = given.len().to_string();
        return Err(Failure::new("MESSAGE_PARAMETER_COUNT_MISMATCH", [method, &expected, &got]));
    }
    let mut admitted = Vec::with_capacity(parameters.len());
    let mut given = given.into_iter();
    for parameter in parameters {
        let value = match given.next() {
            Some(value) => parameter.kind.admit(value).ok_or_else(|| Failure::kind(parameter.name))?,
            None => match parameter.kind {
                Kind::Set => Value::Set(Vec::new()),
                Kind::Map | Kind::Record => Value::Map(BTreeMap::new()),
                Kind::Bool => Value::Bool(false),
                _ => parameter.default.unwrap_or_default().into(),
            },
        };
        admitted.push(value);
    }
    Ok(Arguments(admitted))
}

/// Makes a task and runs the method beside, with what goes wrong there.
fn start(call: &Call, method: &str, found: &'static Method, arguments: Arguments, act: Option<Act>) -> Reference {
    let task = {
        let mut access = call.world.lock();
        let state = &mut *access;
        state.tasks.create(&mut state.store, &state.clock, &call.session, method, "", &Reference::null())
    };
    let (host, session, started) = (call.host, call.session.clone(), task.clone());
    call.world.spawn(move |world| {
        let call = Call { world, host, session, task: Some(started.clone()) };
        let outcome = befall(world, act).unwrap_or_else(|| (found.run)(&call, &arguments));
        let mut access = world.lock();
        let state = &mut *access;
        state.tasks.finish(&mut state.store, &state.clock, &started, &outcome);
    });
    task
}

/// Returns whether a name asks for a task, and the name with a point between class and method.
fn dotted(method: &str) -> (bool, String) {
    for prefix in ["Async.", "InternalAsync."] {
        if let Some(rest) = method.strip_prefix(prefix) {
            return (true, rest.to_owned());
        }
    }
    if method.contains('.') {
        return (false, method.to_owned());
    }
    // Of VM_x and VM_guest_metrics_x, the longer class is meant.
    let class = Class::ALL.into_iter().map(Class::name).chain(["event", "system"]);
    let named = class.filter(|class| method.strip_prefix(class).is_some_and(|rest| rest.starts_with('_')));
    match named.max_by_key(|class| class.len()) {
        Some(class) => (false, format!("{class}.{}", &method[class.len() + 1..])),
        None => (false, method.to_owned()),
    }
}

fn list_methods() -> Vec<String> {
    let mut names = vec!["system.listMethods".to_owned()];
    for method in methods::all() {
        names.push(method.name.to_owned());
        if method.is_async {
            names.push(format!("Async.{}", method.name));
        }
    }
    names.extend(accessor::all());
    names.sort();
    names.dedup();
    names
}

/// Writes a request down without what must not be seen.
fn note(world: &World, host: usize, method: &str, name: &str, arguments: &[Value]) {
    let shown = arguments.iter().enumerate().filter_map(|(position, value)| match (name, position) {
        ("session.login_with_password", 1) | ("VTPM.set_contents", 2) => Some("\"***\"".to_owned()),
        ("session.login_with_password", _) => Some(value.to_json().to_string()),
        (_, 0) => None,
        _ => Some(value.to_json().to_string()),
    });
    world.log.request(host, method, shown.collect());
}

fn texts(value: &Value) -> Vec<&str> {
    match value {
        Value::Text(text) => vec![text],
        Value::Set(members) => members.iter().flat_map(texts).collect(),
        _ => Vec::new(),
    }
}

/// Returns the texts, and uuids and names of the objects that they refer to.
fn known_names(world: &World, texts: &[&str]) -> Vec<String> {
    let mut names: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
    let access = world.lock();
    for text in texts.iter().filter(|text| text.starts_with("OpaqueRef:")) {
        let reference = Reference::from(*text);
        for object in Class::ALL.into_iter().filter_map(|class| access.store.find(class, &reference)) {
            let known = ["uuid", "name_label"].into_iter().filter_map(|field| object.record.get(field)?.as_text());
            names.extend(known.map(str::to_owned));
        }
    }
    names
}
