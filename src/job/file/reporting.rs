//! Who is told how runs end.

use std::ops::Range;

use super::values;
use crate::job::table::{Placed, Section};

/// Who is told how a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reporting {
    /// A program and its arguments, which reads the report.
    pub command: Vec<String>,
    /// Whether it gets JSON, else a mail.
    pub is_json: bool,
    /// To whom a mail goes.
    pub to: Option<String>,
    /// Whether also good runs are told.
    pub always: bool,
}

/// Reads `[report]`.
pub(super) fn report(section: Section) -> Option<Reporting> {
    let command = values(section.texts("command"));
    if command.is_empty() {
        section.note("command is missing: a program and its arguments, like [\"/usr/sbin/sendmail\", \"-t\"]");
    }
    let format = section.choice("format", &[("mail", false), ("json", true)]);
    let is_json = format.is_some_and(|format| format.value);
    let to: Option<Placed<String>> = section.text("to");
    match &to {
        None if !is_json => section.note("to is missing: the address that a mail goes to; or say format = \"json\""),
        Some(to) if to.value.contains(['\r', '\n']) => no_line(&section, &to.span),
        _ => {}
    }
    let always = section.choice("when", &[("failure", false), ("always", true)]).is_some_and(|when| when.value);
    section.finish();
    (!command.is_empty()).then(|| Reporting { command, is_json, to: to.map(|to| to.value), always })
}

fn no_line(section: &Section, span: &Range<usize>) {
    section.note_at(span, "an address is one line");
}
