//! `event.from` and `event.inject`: what changed since a token.
//!
//! There is no history, only state: an object that changed ten times is told once, as it is. A token is two numbers, the
//! generation of objects and that of messages, of which there are none here. Source: xen-api `ocaml/xapi/xapi_event.ml`.

use crate::failure::{Failure, Outcome};
use crate::schema::Class;
use crate::store::{Record, Store};
use crate::value::{Reference, Value};
use std::collections::BTreeMap;

/// What a client wants to be told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subscription {
    /// Everything.
    All,
    /// A class; one that does not exist has no events.
    Class(Option<Class>),
    /// One object.
    Object(Option<Class>, Reference),
}

impl Subscription {
    /// Parses `*`, `class` or `class/OpaqueRef:...`.
    ///
    /// # Errors
    /// `EVENT_SUBSCRIPTION_PARSE_FAILURE`.
    pub fn parse(text: &str) -> Outcome<Subscription> {
        let malformed = || Failure::new("EVENT_SUBSCRIPTION_PARSE_FAILURE", [text]);
        if text == "*" {
            return Ok(Subscription::All);
        }
        match text.split('/').collect::<Vec<_>>()[..] {
            [class] if !class.is_empty() => Ok(Subscription::Class(Class::find_in_any_case(class))),
            [class, reference] if !class.is_empty() && !reference.is_empty() => {
                Ok(Subscription::Object(Class::find_in_any_case(class), Reference::from(reference)))
            }
            _ => Err(malformed()),
        }
    }

    fn is_about(&self, class: Class) -> bool {
        match self {
            Subscription::All => true,
            Subscription::Class(of) | Subscription::Object(of, _) => *of == Some(class),
        }
    }

    fn matches(&self, class: Class, reference: &Reference) -> bool {
        match self {
            Subscription::Object(of, one) => *of == Some(class) && one == reference,
            _ => self.is_about(class),
        }
    }
}

/// Returns whether all are about tasks, which are told without delay.
pub fn are_about_tasks(subscriptions: &[Subscription]) -> bool {
    !subscriptions.iter().any(|subscription| match subscription {
        Subscription::All => true,
        Subscription::Class(class) | Subscription::Object(class, _) => *class != Some(Class::Task),
    })
}

/// Returns the token of a generation.
pub fn token(generation: u64) -> String {
    format!("{generation:020},{:020}", 0)
}

/// Parses a token; the empty one is from before everything.
///
/// # Errors
/// `EVENT_FROM_TOKEN_PARSE_FAILURE`.
pub fn parse_token(text: &str) -> Outcome<u64> {
    if text.is_empty() {
        return Ok(0);
    }
    let malformed = || Failure::new("EVENT_FROM_TOKEN_PARSE_FAILURE", [text]);
    let (generation, messages) = text.split_once(',').ok_or_else(malformed)?;
    messages.parse::<u64>().map_err(|_| malformed())?;
    generation.parse().map_err(|_| malformed())
}

/// Returns what happened after generation `since`: additions, changes, deletions, in this order; empty if nothing did.
pub fn since(store: &Store, subscriptions: &[Subscription], since: u64) -> Vec<Value> {
    let (mut added, mut changed, mut deleted) = (Vec::new(), Vec::new(), Vec::new());
    for class in Class::ALL.into_iter().filter(|class| class.is_listed()) {
        if !subscriptions.iter().any(|subscription| subscription.is_about(class)) {
            continue;
        }
        let wanted = |reference: &Reference| subscriptions.iter().any(|one| one.matches(class, reference));
        for (reference, object) in store.all(class).filter(|(_, object)| object.modified > since) {
            if !wanted(reference) {
                continue;
            }
            if object.created > since {
                added.push(event(class, "add", reference, object.modified, Some(&object.record)));
            } else {
                changed.push(event(class, "mod", reference, object.modified, Some(&object.record)));
            }
        }
        // Who learnt of it after it was made; others never hear of it.
        for deletion in store.deletions(class).filter(|one| one.deleted > since && one.created <= since) {
            if wanted(&deletion.reference) {
                deleted.push(event(class, "del", &deletion.reference, deletion.deleted, None));
            }
        }
    }
    added.append(&mut changed);
    added.append(&mut deleted);
    added
}

/// Returns the whole answer of `event.from`.
pub fn answer(store: &Store, events: Vec<Value>) -> Value {
    let counts = Class::ALL
        .into_iter()
        .map(|class| (class.name().to_lowercase(), Value::Int(i64::try_from(store.count(class)).unwrap_or(i64::MAX))));
    Value::Map(BTreeMap::from([
        ("events".to_owned(), Value::Set(events)),
        ("valid_ref_counts".to_owned(), Value::Map(counts.collect())),
        ("token".to_owned(), token(store.generation()).into()),
    ]))
}

/// Returns a record as clients get it.
pub fn snapshot(record: &Record) -> Value {
    Value::Map(record.iter().map(|(&name, value)| (name.to_owned(), value.clone())).collect())
}

fn event(class: Class, operation: &str, reference: &Reference, generation: u64, record: Option<&Record>) -> Value {
    let mut entries = BTreeMap::from([
        ("id".to_owned(), Value::from(generation)),
        ("timestamp".to_owned(), "0.0".into()),
        ("class".to_owned(), class.name().to_lowercase().into()),
        ("operation".to_owned(), operation.into()),
        ("ref".to_owned(), reference.into()),
    ]);
    if let Some(record) = record {
        entries.insert("snapshot".to_owned(), snapshot(record));
    }
    Value::Map(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operations(events: &[Value]) -> Vec<&str> {
        events.iter().map(|event| event.as_map().unwrap()["operation"].as_text().unwrap()).collect()
    }

    #[test]
    fn an_object_is_told_once_and_only_to_who_knew_it() {
        let mut store = Store::new();
        let all = [Subscription::All];
        let vm = store.create(Class::Vm, []);
        let start = store.generation();
        store.touch(Class::Vm, &vm);
        store.touch(Class::Vm, &vm);
        let vdi = store.create(Class::Vdi, []);
        assert_eq!(operations(&since(&store, &all, start)), ["add", "mod"]);
        assert_eq!(operations(&since(&store, &[Subscription::parse("VDI").unwrap()], start)), ["add"]);
        assert_eq!(operations(&since(&store, &[Subscription::parse(&format!("vm/{vm}")).unwrap()], 0)), ["add"]);
        store.destroy(Class::Vdi, &vdi);
        assert_eq!(operations(&since(&store, &all, start)), ["mod"]);
        store.destroy(Class::Vm, &vm);
        assert_eq!(operations(&since(&store, &all, start)), ["del"]);
        assert_eq!(since(&store, &all, store.generation()), []);
    }

    #[test]
    fn tokens_are_two_numbers_of_twenty_digits() {
        assert_eq!(token(42), "00000000000000000042,00000000000000000000");
        assert_eq!(parse_token(&token(42)), Ok(42));
        assert_eq!(parse_token("x").unwrap_err().code, "EVENT_FROM_TOKEN_PARSE_FAILURE");
        assert_eq!(Subscription::parse("a/b/c").unwrap_err().code, "EVENT_SUBSCRIPTION_PARSE_FAILURE");
        assert_eq!(Subscription::parse("nothing"), Ok(Subscription::Class(None)));
    }
}
