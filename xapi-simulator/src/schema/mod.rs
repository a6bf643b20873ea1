//! What classes there are, and the fields of their records.
//!
//! Fields that name other objects have a counterpart there (`VBD.VDI` and `VDI.VBDs`): it is declared once, on the side of the
//! many, and kept by the [store](crate::store).

mod machines;
mod pool;
mod storage;

use crate::value::{NULL, Value};
use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

/// A field of a class.
type Place = (Class, &'static str);

/// A class of XAPI's objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Somebody logged in.
    Session,
    /// Something that goes on.
    Task,
    /// The pool; there is one.
    Pool,
    /// A host.
    Host,
    /// A host's certificate.
    Certificate,
    /// A network.
    Network,
    /// A host's interface on a network.
    Pif,
    /// A storage repository.
    Sr,
    /// A host's connection to an SR.
    Pbd,
    /// A disk.
    Vdi,
    /// A machine's connection to a disk.
    Vbd,
    /// A machine, or a snapshot or template of one.
    Vm,
    /// What a machine's tools tell.
    GuestMetrics,
    /// A machine's interface on a network.
    Vif,
    /// A machine's TPM.
    Vtpm,
}

impl Class {
    /// All of them.
    pub const ALL: [Class; 15] = [
        Class::Session,
        Class::Task,
        Class::Pool,
        Class::Host,
        Class::Certificate,
        Class::Network,
        Class::Pif,
        Class::Sr,
        Class::Pbd,
        Class::Vdi,
        Class::Vbd,
        Class::Vm,
        Class::GuestMetrics,
        Class::Vif,
        Class::Vtpm,
    ];

    /// Returns its name in calls.
    pub fn name(self) -> &'static str {
        match self {
            Class::Session => "session",
            Class::Task => "task",
            Class::Pool => "pool",
            Class::Host => "host",
            Class::Certificate => "Certificate",
            Class::Network => "network",
            Class::Pif => "PIF",
            Class::Sr => "SR",
            Class::Pbd => "PBD",
            Class::Vdi => "VDI",
            Class::Vbd => "VBD",
            Class::Vm => "VM",
            Class::GuestMetrics => "VM_guest_metrics",
            Class::Vif => "VIF",
            Class::Vtpm => "VTPM",
        }
    }

    /// Returns the class with this name, exactly.
    pub fn find(name: &str) -> Option<Class> {
        Class::ALL.into_iter().find(|class| class.name() == name)
    }

    /// Returns the class with this name in any case, as subscriptions have it.
    pub fn find_in_any_case(name: &str) -> Option<Class> {
        Class::ALL.into_iter().find(|class| class.name().eq_ignore_ascii_case(name))
    }

    /// Returns whether its objects can be listed and send events: sessions cannot and do not.
    pub fn is_listed(self) -> bool {
        self != Class::Session
    }

    /// Returns the fields of its records.
    pub fn fields(self) -> &'static [Field] {
        match self {
            Class::Session => pool::SESSION,
            Class::Task => pool::TASK,
            Class::Pool => pool::POOL,
            Class::Host => pool::HOST,
            Class::Certificate => pool::CERTIFICATE,
            Class::Network => pool::NETWORK,
            Class::Pif => pool::PIF,
            Class::Sr => storage::SR,
            Class::Pbd => storage::PBD,
            Class::Vdi => storage::VDI,
            Class::Vbd => storage::VBD,
            Class::Vm => machines::VM,
            Class::GuestMetrics => machines::GUEST_METRICS,
            Class::Vif => machines::VIF,
            Class::Vtpm => machines::VTPM,
        }
    }

    /// Returns the field of this name.
    pub fn field(self, name: &str) -> Option<&'static Field> {
        self.fields().iter().find(|field| field.name == name)
    }

    /// Returns a record of starting values.
    pub fn blank(self) -> BTreeMap<&'static str, Value> {
        self.fields().iter().map(|field| (field.name, field.starting())).collect()
    }

    /// Returns where the class that a field refers to lists what refers to it: `(VDI, "VBDs")` for `VBD.VDI`.
    pub fn counterpart(self, field: &'static str) -> Option<(Class, &'static str)> {
        static TABLE: LazyLock<HashMap<Place, Place>> = LazyLock::new(|| {
            let mut table = HashMap::new();
            for class in Class::ALL {
                for field in class.fields() {
                    if let Some(by) = field.listed_by {
                        table.insert(by, (class, field.name));
                    }
                }
            }
            table
        });
        TABLE.get(&(self, field)).copied()
    }
}

/// The type of a field or an argument.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A text.
    Text,
    /// An integer of 64 bits.
    Int,
    /// A floating-point number.
    Float,
    /// A flag.
    Bool,
    /// A time, in seconds.
    Date,
    /// A member of an enumeration.
    Choice(&'static [&'static str]),
    /// Of one class, or null.
    Reference,
    /// Of texts, of references, or of members of enumerations.
    Set,
    /// Texts by texts.
    Map,
    /// A record, as constructors take it: looked at field by field.
    Record,
}

impl Kind {
    /// Returns `value` as a value of this type, or `None` if it is none. Numbers may be texts, as in XML.
    pub fn admit(self, value: Value) -> Option<Value> {
        match (self, value) {
            (Kind::Int, Value::Text(digits)) => digits.parse().ok().map(Value::Int),
            (Kind::Int, value @ Value::Int(_)) => Some(value),
            (Kind::Float, Value::Text(digits)) => digits.parse().ok().map(Value::Float),
            #[expect(clippy::cast_precision_loss, reason = "seconds and fractions that clients wrote without a point")]
            (Kind::Float, Value::Int(number)) => Some(Value::Float(number as f64)),
            (Kind::Float, value @ Value::Float(_)) => Some(value),
            (Kind::Bool, value @ Value::Bool(_)) => Some(value),
            (Kind::Text | Kind::Reference, Value::Text(text) | Value::Date(text)) => Some(Value::Text(text)),
            (Kind::Choice(members), Value::Text(text)) => members.contains(&text.as_str()).then_some(Value::Text(text)),
            (Kind::Date, Value::Text(text) | Value::Date(text)) => is_date(&text).then_some(Value::Date(text)),
            (Kind::Set, Value::Set(members)) => {
                members.into_iter().map(|member| Kind::Text.admit(member)).collect::<Option<_>>().map(Value::Set)
            }
            (Kind::Map, Value::Map(entries)) => entries
                .into_iter()
                .map(|(key, value)| Some((key, Kind::Text.admit(value)?)))
                .collect::<Option<_>>()
                .map(Value::Map),
            (Kind::Record, value @ Value::Map(_)) => Some(value),
            _ => None,
        }
    }
}

fn is_date(text: &str) -> bool {
    const SHAPE: &[u8] = b"ddddddddTdd:dd:ddZ";
    // Also `YYYY-MM-DD...`, which some clients send and XAPI takes.
    let compact: Vec<u8> = text.bytes().filter(|&byte| byte != b'-').collect();
    compact.len() == SHAPE.len()
        && compact.iter().zip(SHAPE).all(|(byte, shape)| match shape {
            b'd' => byte.is_ascii_digit(),
            other => byte == other,
        })
}

/// What a field holds before anybody sets it.
#[derive(Clone, Copy, Debug)]
enum Start {
    /// Empty, zero, false, null.
    Blank,
    Text(&'static str),
    Int(i64),
    Float(f64),
    Bool(bool),
}

/// A field of a class.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// As in records.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Whether there are calls to change it.
    pub is_writable: bool,
    /// For a set of all objects whose field says this object: their class, and the field.
    pub listed_by: Option<(Class, &'static str)>,
    start: Start,
}

impl Field {
    const fn or(mut self, text: &'static str) -> Field {
        self.start = Start::Text(text);
        self
    }

    const fn or_int(mut self, number: i64) -> Field {
        self.start = Start::Int(number);
        self
    }

    const fn or_float(mut self, number: f64) -> Field {
        self.start = Start::Float(number);
        self
    }

    const fn or_true(mut self) -> Field {
        self.start = Start::Bool(true);
        self
    }

    fn starting(&self) -> Value {
        match (self.start, self.kind) {
            (Start::Text(text), _) => text.into(),
            (Start::Int(number), _) => number.into(),
            (Start::Float(number), _) => Value::Float(number),
            (Start::Bool(flag), _) => flag.into(),
            (Start::Blank, Kind::Text | Kind::Choice(_)) => Value::void(),
            (Start::Blank, Kind::Int) => Value::Int(0),
            (Start::Blank, Kind::Float) => Value::Float(0.0),
            (Start::Blank, Kind::Bool) => Value::Bool(false),
            (Start::Blank, Kind::Date) => Value::Date("19700101T00:00:00Z".to_owned()),
            (Start::Blank, Kind::Reference) => NULL.into(),
            (Start::Blank, Kind::Set) => Value::Set(Vec::new()),
            (Start::Blank, Kind::Map | Kind::Record) => Value::Map(BTreeMap::new()),
        }
    }
}

/// A field that only the pool changes.
const fn ro(name: &'static str, kind: Kind) -> Field {
    Field { name, kind, is_writable: false, listed_by: None, start: Start::Blank }
}

/// A field that clients change.
const fn rw(name: &'static str, kind: Kind) -> Field {
    Field { name, kind, is_writable: true, listed_by: None, start: Start::Blank }
}

/// A set of what refers to the object by another class's field.
const fn many(name: &'static str, class: Class, field: &'static str) -> Field {
    Field { name, kind: Kind::Set, is_writable: false, listed_by: Some((class, field)), start: Start::Blank }
}
