//! Values of XAPI's types, whichever envelope they travel in.
//!
//! JSON and XML tell less than XAPI's types do (an integer is a string of digits in XML, a date is a string in JSON), so what
//! arrives becomes a value only by the type that is expected: [`Kind::admit`](crate::schema::Kind::admit).

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// What stands for no object.
pub const NULL: &str = "OpaqueRef:NULL";

/// The name of an object, opaque to clients.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference(Arc<str>);

impl Reference {
    /// Returns the reference that stands for no object.
    pub fn null() -> Reference {
        Reference::from(NULL)
    }

    /// Returns whether this stands for no object.
    pub fn is_null(&self) -> bool {
        &*self.0 == NULL
    }

    /// Returns the text that clients see.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Reference {
    fn from(text: &str) -> Reference {
        Reference(Arc::from(text))
    }
}

impl Borrow<str> for Reference {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A value of one of XAPI's types; nothing at all (void) is an empty text.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `int`, 64 bits.
    Int(i64),
    /// `float`.
    Float(f64),
    /// `bool`.
    Bool(bool),
    /// `string`, a member of an enumeration, a reference.
    Text(String),
    /// `datetime`, as `YYYYMMDDTHH:MM:SSZ`.
    Date(String),
    /// `set`.
    Set(Vec<Value>),
    /// `map`, and records.
    Map(BTreeMap<String, Value>),
}

impl Value {
    /// Returns what a call without a result answers.
    pub fn void() -> Value {
        Value::Text(String::new())
    }

    /// Returns the text, also of a date.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Value::Text(text) | Value::Date(text) => Some(text),
            _ => None,
        }
    }

    /// Returns the members of a set.
    pub fn as_set(&self) -> Option<&[Value]> {
        match self {
            Value::Set(members) => Some(members),
            _ => None,
        }
    }

    /// Returns the entries of a map.
    pub fn as_map(&self) -> Option<&BTreeMap<String, Value>> {
        match self {
            Value::Map(entries) => Some(entries),
            _ => None,
        }
    }

    /// Returns this as JSON has it.
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Value::Int(number) => (*number).into(),
            Value::Float(number) => (*number).into(),
            Value::Bool(flag) => (*flag).into(),
            Value::Text(text) | Value::Date(text) => text.as_str().into(),
            Value::Set(members) => members.iter().map(Value::to_json).collect::<Vec<_>>().into(),
            Value::Map(entries) => entries
                .iter()
                .map(|(key, value)| (key.clone(), value.to_json()))
                .collect::<serde_json::Map<_, _>>()
                .into(),
        }
    }

    /// Returns what JSON holds, before its type is known; null has no counterpart.
    pub fn from_json(json: &serde_json::Value) -> Option<Value> {
        Some(match json {
            serde_json::Value::Null => return None,
            serde_json::Value::Bool(flag) => Value::Bool(*flag),
            serde_json::Value::Number(number) => match number.as_i64() {
                Some(number) => Value::Int(number),
                None => Value::Float(number.as_f64()?),
            },
            serde_json::Value::String(text) => Value::Text(text.clone()),
            serde_json::Value::Array(members) => {
                Value::Set(members.iter().map(Value::from_json).collect::<Option<_>>()?)
            }
            serde_json::Value::Object(entries) => Value::Map(
                entries
                    .iter()
                    .map(|(key, value)| Some((key.clone(), Value::from_json(value)?)))
                    .collect::<Option<_>>()?,
            ),
        })
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Text(text)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Value {
        Value::Bool(flag)
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Value {
        Value::Int(number)
    }
}

impl From<u64> for Value {
    /// Sizes in bytes: what XAPI cannot say is its largest number.
    fn from(number: u64) -> Value {
        Value::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<&Reference> for Value {
    fn from(reference: &Reference) -> Value {
        Value::Text(reference.as_str().to_owned())
    }
}

impl From<Reference> for Value {
    fn from(reference: Reference) -> Value {
        Value::from(&reference)
    }
}

impl<T: Into<Value>> FromIterator<T> for Value {
    fn from_iter<I: IntoIterator<Item = T>>(members: I) -> Value {
        Value::Set(members.into_iter().map(Into::into).collect())
    }
}

/// Returns a map of texts.
pub fn map<K: Into<String>, V: Into<String>>(entries: impl IntoIterator<Item = (K, V)>) -> Value {
    Value::Map(entries.into_iter().map(|(key, value)| (key.into(), Value::Text(value.into()))).collect())
}
