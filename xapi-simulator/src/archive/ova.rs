//! `ova.xml`: the records of a VM and of what belongs to it, as XML in the manner of XML-RPC values.
//!
//! ```text
//!   struct
//!     version: struct of the server that wrote it
//!     objects: array of struct { class: "VM", id: "Ref:0", snapshot: struct of all fields }
//! ```
//!
//! Records are JSON as the API gives them: whole numbers are numbers there and text in XML, so that it takes their names to
//! read them back; dates are text there and have an element in XML. Source: xen-api `ocaml/xapi/export.ml`,
//! `doc/content/xen-api/wire-protocol.md`.

use std::fmt::Write as _;

use roxmltree::{Document, Node, ParsingOptions};
use serde_json::{Map, Value};

/// Nodes of XML at most.
const MAX_NODES: u32 = 1 << 20;
/// How deep values stand in each other at most; those of servers, 9.
const MAX_DEPTH: usize = 16;

/// Fields that are whole numbers.
const NUMBERS: [&str; 19] = [
    "MTU",
    "VCPUs_at_startup",
    "VCPUs_max",
    "domid",
    "hardware_platform_version",
    "memory_dynamic_max",
    "memory_dynamic_min",
    "memory_overhead",
    "memory_static_max",
    "memory_static_min",
    "memory_target",
    "order",
    "physical_size",
    "physical_utilisation",
    "shutdown_delay",
    "start_delay",
    "user_version",
    "virtual_allocation",
    "virtual_size",
];
/// A whole number, but only of a VM.
const VM_NUMBER: &str = "version";

/// What an `ova.xml` holds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ova {
    /// Who wrote it: `hostname`, `product_version`, `export_vsn` ...
    pub version: Map<String, Value>,
    /// The objects.
    pub objects: Vec<Object>,
}

/// An object.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// Its class: `VM`, `VBD`, `VDI`, `VIF`, `network`, `SR` ...
    pub class: String,
    /// Its reference within the archive: `Ref:0`.
    pub reference: String,
    /// Its record; references in it are those of the archive.
    pub record: Map<String, Value>,
}

impl Ova {
    /// Returns the XML.
    pub fn to_xml(&self) -> String {
        let mut xml = String::from("<?xml version='1.0'?>");
        write_struct(&mut xml, |xml| {
            member(xml, "version", |xml| write(xml, &Value::Object(self.version.clone())));
            member(xml, "objects", |xml| {
                xml.push_str("<value><array><data>");
                for object in &self.objects {
                    write_struct(xml, |xml| {
                        member(xml, "class", |xml| text(xml, &object.class));
                        member(xml, "id", |xml| text(xml, &object.reference));
                        member(xml, "snapshot", |xml| write_record(xml, &object.record));
                    });
                }
                xml.push_str("</data></array></value>");
            });
        });
        xml
    }

    /// Parses the XML.
    ///
    /// # Errors
    /// Says what it is not.
    pub fn from_xml(xml: &str) -> Result<Self, String> {
        let options = ParsingOptions { nodes_limit: MAX_NODES, ..ParsingOptions::default() };
        let document = Document::parse_with_options(xml, options).map_err(|error| format!("is no XML: {error}"))?;
        let Value::Object(mut root) = read(document.root_element(), MAX_DEPTH)? else {
            return Err("is no struct".into());
        };
        let (Some(Value::Object(version)), Some(Value::Array(objects))) =
            (root.remove("version"), root.remove("objects"))
        else {
            return Err("lacks its version or its objects".into());
        };
        let objects = objects.into_iter().map(object).collect::<Option<_>>();
        Ok(Self { version, objects: objects.ok_or("has an object that lacks its class, id or snapshot")? })
    }
}

fn object(value: Value) -> Option<Object> {
    let Value::Object(mut members) = value else { return None };
    match (members.remove("class")?, members.remove("id")?, members.remove("snapshot")?) {
        (Value::String(class), Value::String(reference), Value::Object(mut record)) => {
            for (name, value) in &mut record {
                let is_number = NUMBERS.contains(&name.as_str()) || (class == "VM" && name == VM_NUMBER);
                if let Some(number) = value.as_str().filter(|_| is_number).and_then(|text| text.parse::<i64>().ok()) {
                    *value = number.into();
                }
            }
            Some(Object { class, reference, record })
        }
        _ => None,
    }
}

fn write_record(xml: &mut String, record: &Map<String, Value>) {
    write_struct(xml, |xml| {
        for (name, value) in record {
            member(xml, name, |xml| match value {
                // Only fields are dates; in maps of text there may be something that looks like one.
                Value::String(date) if is_date(date) => {
                    let _ = write!(xml, "<value><dateTime.iso8601>{date}</dateTime.iso8601></value>");
                }
                _ => write(xml, value),
            });
        }
    });
}

fn write(xml: &mut String, value: &Value) {
    match value {
        Value::Null => text(xml, ""),
        Value::String(value) => text(xml, value),
        Value::Number(number) if number.is_f64() => {
            let _ = write!(xml, "<value><double>{number}</double></value>");
        }
        Value::Number(number) => text(xml, &number.to_string()),
        Value::Bool(value) => {
            let _ = write!(xml, "<value><boolean>{}</boolean></value>", u8::from(*value));
        }
        Value::Array(values) => {
            xml.push_str("<value><array><data>");
            for value in values {
                write(xml, value);
            }
            xml.push_str("</data></array></value>");
        }
        Value::Object(members) => write_struct(xml, |xml| {
            for (name, value) in members {
                member(xml, name, |xml| write(xml, value));
            }
        }),
    }
}

fn write_struct(xml: &mut String, members: impl FnOnce(&mut String)) {
    xml.push_str("<value><struct>");
    members(xml);
    xml.push_str("</struct></value>");
}

fn member(xml: &mut String, name: &str, value: impl FnOnce(&mut String)) {
    xml.push_str("<member><name>");
    escape(xml, name);
    xml.push_str("</name>");
    value(xml);
    xml.push_str("</member>");
}

fn text(xml: &mut String, value: &str) {
    xml.push_str("<value>");
    escape(xml, value);
    xml.push_str("</value>");
}

fn escape(xml: &mut String, value: &str) {
    for character in value.chars() {
        match character {
            '&' => xml.push_str("&amp;"),
            '<' => xml.push_str("&lt;"),
            '>' => xml.push_str("&gt;"),
            '"' => xml.push_str("&quot;"),
            '\r' => xml.push_str("&#13;"),
            // Not allowed in XML, not even escaped.
            control if control < ' ' && control != '\n' && control != '\t' => {}
            other => xml.push(other),
        }
    }
}

/// Returns whether it is `20260102T03:04:05Z`.
fn is_date(value: &str) -> bool {
    let shape: String =
        value.chars().map(|character| if character.is_ascii_digit() { '0' } else { character }).collect();
    shape == "00000000T00:00:00Z"
}

fn read(value: Node<'_, '_>, depth: usize) -> Result<Value, String> {
    if !value.has_tag_name("value") || depth == 0 {
        return Err(format!("has '{}' where a value should stand", value.tag_name().name()));
    }
    let Some(kind) = value.first_element_child() else {
        return Ok(Value::String(inner_text(value)));
    };
    let text = inner_text(kind);
    let number = |what: &str| format!("has '{text}' for a number ({what})");
    Ok(match kind.tag_name().name() {
        "string" | "dateTime.iso8601" => Value::String(text),
        "i4" | "i8" | "int" => text.trim().parse::<i64>().map_err(|error| number(&error.to_string()))?.into(),
        "double" => text.trim().parse::<f64>().map_err(|error| number(&error.to_string()))?.into(),
        "boolean" => Value::Bool(text.trim() == "1"),
        "nil" => Value::Null,
        "array" => {
            let data = kind.first_element_child().ok_or("has an array without data")?;
            let values = data.children().filter(Node::is_element).map(|value| read(value, depth - 1));
            Value::Array(values.collect::<Result<_, _>>()?)
        }
        "struct" => {
            let members = kind.children().filter(Node::is_element).map(|member| read_member(member, depth - 1));
            Value::Object(members.collect::<Result<_, _>>()?)
        }
        other => return Err(format!("has a value of the unknown kind '{other}'")),
    })
}

fn read_member(member: Node<'_, '_>, depth: usize) -> Result<(String, Value), String> {
    let child = |name| member.children().find(|node| node.has_tag_name(name));
    match (child("name"), child("value")) {
        (Some(name), Some(value)) => Ok((inner_text(name), read(value, depth)?)),
        _ => Err("has a member without its name or its value".into()),
    }
}

/// Returns all text right within an element; comments may cut it.
fn inner_text(node: Node<'_, '_>) -> String {
    node.children().filter(Node::is_text).filter_map(|node| node.text()).collect()
}
