//! The calls that every class has for its records and fields. Source: xen-api `ocaml/idl/datamodel_utils.ml`.

use crate::event;
use crate::failure::{Failure, Outcome};
use crate::rpc::{Arguments, Parameter, argument};
use crate::schema::{Class, Field, Kind};
use crate::value::Value;
use crate::world::State;

/// A call that is made out of the schema.
#[derive(Clone, Copy, Debug)]
pub struct Accessor {
    class: Class,
    act: Act,
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Record,
    All,
    AllRecords,
    ByUuid,
    ByName,
    Get(&'static Field),
    Set(&'static Field),
    /// To a map: key and value.
    AddTo(&'static Field),
    /// From a map: the key.
    RemoveFrom(&'static Field),
    /// To a set.
    Add(&'static Field),
    /// From a set.
    Remove(&'static Field),
}

/// Finds an accessor by its name, `Class.act`.
pub fn find(name: &str) -> Option<Accessor> {
    let (class, act) = name.split_once('.')?;
    let class = Class::find(class)?;
    let writable = |field: &str, kind: fn(&Kind) -> bool| {
        class.field(field).filter(|field| field.is_writable && kind(&field.kind))
    };
    let is_map = |kind: &Kind| matches!(kind, Kind::Map);
    let is_set = |kind: &Kind| matches!(kind, Kind::Set);
    let act = match act {
        "get_record" => Act::Record,
        "get_all" if class.is_listed() => Act::All,
        "get_all_records" if class.is_listed() => Act::AllRecords,
        "get_by_uuid" => Act::ByUuid,
        "get_by_name_label" if class.field("name_label").is_some() => Act::ByName,
        _ => {
            if let Some(field) = act.strip_prefix("get_") {
                Act::Get(class.field(field)?)
            } else if let Some(field) = act.strip_prefix("set_") {
                Act::Set(writable(field, |_| true)?)
            } else if let Some(field) = act.strip_prefix("add_to_") {
                Act::AddTo(writable(field, is_map)?)
            } else if let Some(field) = act.strip_prefix("remove_from_") {
                Act::RemoveFrom(writable(field, is_map)?)
            } else if let Some(field) = act.strip_prefix("add_") {
                Act::Add(writable(field, is_set)?)
            } else {
                Act::Remove(writable(act.strip_prefix("remove_")?, is_set)?)
            }
        }
    };
    Some(Accessor { class, act })
}

/// Returns the names of all of them.
pub fn all() -> Vec<String> {
    let mut names = Vec::new();
    for class in Class::ALL {
        let mut add = |act: &str| {
            let name = format!("{}.{act}", class.name());
            if find(&name).is_some() {
                names.push(name);
            }
        };
        for act in ["get_record", "get_all", "get_all_records", "get_by_uuid", "get_by_name_label"] {
            add(act);
        }
        for field in class.fields() {
            for act in ["get_", "set_", "add_to_", "remove_from_", "add_", "remove_"] {
                add(&format!("{act}{}", field.name));
            }
        }
    }
    names
}

impl Accessor {
    /// Returns what it takes beside the session.
    pub fn parameters(self) -> &'static [Parameter] {
        const OBJECT: Parameter = argument("self", Kind::Reference);
        // One list for each type of a field: they live as long as the program.
        const fn value(kind: Kind) -> [Parameter; 2] {
            [OBJECT, argument("value", kind)]
        }
        match self.act {
            Act::All | Act::AllRecords => &[],
            Act::ByUuid => const { &[argument("uuid", Kind::Text)] },
            Act::ByName => const { &[argument("label", Kind::Text)] },
            Act::Record | Act::Get(_) => &[OBJECT],
            Act::AddTo(_) => const { &[OBJECT, argument("key", Kind::Text), argument("value", Kind::Text)] },
            Act::RemoveFrom(_) => const { &[OBJECT, argument("key", Kind::Text)] },
            Act::Add(_) | Act::Remove(_) => &const { value(Kind::Text) },
            Act::Set(field) => match field.kind {
                Kind::Int => &const { value(Kind::Int) },
                Kind::Float => &const { value(Kind::Float) },
                Kind::Bool => &const { value(Kind::Bool) },
                Kind::Date => &const { value(Kind::Date) },
                Kind::Set => &const { value(Kind::Set) },
                Kind::Map => &const { value(Kind::Map) },
                // Which members there are is asked where it is set.
                Kind::Text | Kind::Choice(_) | Kind::Reference | Kind::Record => &const { value(Kind::Text) },
            },
        }
    }

    /// Runs it.
    ///
    /// # Errors
    /// `HANDLE_INVALID`, `UUID_INVALID`, `MAP_DUPLICATE_KEY`, `FIELD_TYPE_ERROR`.
    pub fn run(self, state: &mut State, arguments: &Arguments) -> Outcome<Value> {
        let class = self.class;
        let store = &mut state.store;
        let object = arguments.reference(0);
        match self.act {
            Act::Record => return Ok(event::snapshot(&store.object(class, &object)?.record)),
            Act::All => return Ok(store.all(class).map(|(reference, _)| Value::from(reference)).collect()),
            Act::AllRecords => {
                let records = store
                    .all(class)
                    .map(|(reference, object)| (reference.to_string(), event::snapshot(&object.record)));
                return Ok(Value::Map(records.collect()));
            }
            Act::ByUuid => return store.by_uuid(class, arguments.text(0)).map(Value::from),
            Act::ByName => {
                let named = store.all(class).filter(|(_, object)| {
                    object.record.get("name_label").and_then(Value::as_text) == Some(arguments.text(0))
                });
                return Ok(named.map(|(reference, _)| Value::from(reference)).collect());
            }
            Act::Get(field) => return store.value(class, &object, field.name).cloned(),
            Act::Set(field) => {
                let value = field.kind.admit(arguments.value(1)).ok_or_else(|| Failure::kind(field.name))?;
                store.set(class, &object, field.name, value)?;
            }
            Act::AddTo(field) => {
                let key = arguments.text(1);
                if store.entry(class, &object, field.name, key)?.is_some() {
                    let params = [class.name(), field.name, object.as_str(), key];
                    return Err(Failure::new("MAP_DUPLICATE_KEY", params));
                }
                store.edit(class, &object, field.name, |value| {
                    if let Value::Map(entries) = value {
                        entries.insert(key.to_owned(), arguments.value(2));
                    }
                })?;
            }
            Act::RemoveFrom(field) => store.edit(class, &object, field.name, |value| {
                if let Value::Map(entries) = value {
                    entries.remove(arguments.text(1));
                }
            })?,
            Act::Add(field) => store.edit(class, &object, field.name, |value| {
                if let Value::Set(members) = value
                    && !members.contains(&arguments.value(1))
                {
                    members.push(arguments.value(1));
                }
            })?,
            Act::Remove(field) => store.edit(class, &object, field.name, |value| {
                if let Value::Set(members) = value {
                    members.retain(|member| *member != arguments.value(1));
                }
            })?,
        }
        Ok(Value::void())
    }
}
