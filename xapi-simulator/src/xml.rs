//! XML-RPC: calls that are parsed, values and answers that are written.
//!
//! Integers are texts of digits, as XAPI writes them. Source: xen-api `doc/content/xen-api/wire-protocol.md`.

use crate::value::Value;
use roxmltree::{Document, Node, ParsingOptions};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Nodes of a document at most: what fits into the longest body has fewer.
const NODES: u32 = 100_000;
/// How deep values may nest.
const DEPTH: usize = 32;

/// Parses a `methodCall`: its name and arguments. `None` if it is none.
pub fn parse_call(text: &str) -> Option<(String, Vec<Value>)> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).ok()?;
    let call = document.root_element();
    if !call.has_tag_name("methodCall") {
        return None;
    }
    let method = child(call, "methodName")?.text()?.trim().to_owned();
    let arguments = match child(call, "params") {
        Some(params) => {
            elements(params, "param").map(|param| value(child(param, "value")?, DEPTH)).collect::<Option<_>>()?
        }
        None => Vec::new(),
    };
    Some((method, arguments))
}

/// Writes `<value>...</value>`.
pub fn write(value: &Value, out: &mut String) {
    out.push_str("<value>");
    match value {
        // Writing to a string cannot fail.
        Value::Int(number) => write!(out, "{number}").unwrap_or_default(),
        Value::Float(number) => write!(out, "<double>{number}</double>").unwrap_or_default(),
        Value::Bool(flag) => write!(out, "<boolean>{}</boolean>", u8::from(*flag)).unwrap_or_default(),
        Value::Text(text) => escape(text, out),
        Value::Date(text) => write!(out, "<dateTime.iso8601>{text}</dateTime.iso8601>").unwrap_or_default(),
        Value::Set(members) => {
            out.push_str("<array><data>");
            for member in members {
                write(member, out);
            }
            out.push_str("</data></array>");
        }
        Value::Map(entries) => {
            out.push_str("<struct>");
            for (key, value) in entries {
                out.push_str("<member><name>");
                escape(key, out);
                out.push_str("</name>");
                write(value, out);
                out.push_str("</member>");
            }
            out.push_str("</struct>");
        }
    }
    out.push_str("</value>");
}

/// Returns a whole answer.
pub fn response(value: &Value) -> String {
    let mut out = "<?xml version=\"1.0\"?><methodResponse><params><param>".to_owned();
    write(value, &mut out);
    out.push_str("</param></params></methodResponse>");
    out
}

/// Returns what a task's `result` holds: XML even for who speaks JSON, nothing for nothing.
pub fn result(value: &Value) -> String {
    let mut out = String::new();
    if *value != Value::void() {
        write(value, &mut out);
    }
    out
}

fn escape(text: &str, out: &mut String) {
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // XML has no other control characters; clients could not parse them.
            '\t' | '\n' | '\r' => out.push(character),
            control if control.is_control() => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
}

fn elements<'a, 'input: 'a>(node: Node<'a, 'input>, name: &'static str) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> Option<Node<'a, 'input>> {
    elements(node, name).next()
}

fn value(node: Node, depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    let Some(typed) = node.children().find(Node::is_element) else {
        return Some(Value::Text(node.text().unwrap_or_default().to_owned()));
    };
    let text = typed.text().unwrap_or_default();
    Some(match typed.tag_name().name() {
        "string" => Value::Text(text.to_owned()),
        "int" | "i4" | "i8" => Value::Int(text.trim().parse().ok()?),
        "double" => Value::Float(text.trim().parse().ok()?),
        "boolean" => match text.trim() {
            "1" => Value::Bool(true),
            "0" => Value::Bool(false),
            _ => return None,
        },
        "dateTime.iso8601" => Value::Date(text.trim().to_owned()),
        "nil" => Value::void(),
        "array" => {
            Value::Set(elements(child(typed, "data")?, "value").map(|one| value(one, depth)).collect::<Option<_>>()?)
        }
        "struct" => Value::Map(
            elements(typed, "member")
                .map(|member| {
                    let name = child(member, "name")?.text().unwrap_or_default().to_owned();
                    Some((name, value(child(member, "value")?, depth)?))
                })
                .collect::<Option<BTreeMap<_, _>>>()?,
        ),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::value::map;

    #[test]
    fn what_is_written_is_parsed_again() {
        let value =
            Value::Set(vec!["a<&>\"".into(), Value::Int(7), Value::Bool(true), Value::Float(0.5), map([("k", "v")])]);
        let mut text = "<methodCall><methodName>VM.x</methodName><params><param>".to_owned();
        write(&value, &mut text);
        text.push_str("</param></params></methodCall>");
        let (method, arguments) = parse_call(&text).unwrap();
        assert_eq!(method, "VM.x");
        // An integer comes back as its digits.
        let expected =
            Value::Set(vec!["a<&>\"".into(), "7".into(), Value::Bool(true), Value::Float(0.5), map([("k", "v")])]);
        assert_eq!(arguments, [expected]);
    }

    #[test]
    fn a_result_of_nothing_is_nothing() {
        assert_eq!(result(&Value::void()), "");
        assert_eq!(result(&"OpaqueRef:1".into()), "<value>OpaqueRef:1</value>");
    }
}
