//! Who is told how runs end.

use std::path::Path;
use std::time::Duration;

use super::values;
use crate::job::table::Section;
use crate::job::template::Template;

/// How long the program may take, where nothing is said.
const USUAL_TIMEOUT: Duration = Duration::from_secs(120);

/// Who is told how a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reporting {
    /// A program and its arguments, which reads the report.
    pub command: Vec<String>,
    /// What it reads.
    pub form: Form,
    /// Whether also good runs are told.
    pub always: bool,
    /// How long the program may take.
    pub timeout: Duration,
}

/// What the program reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// A mail with its head, to this address.
    Mail(String),
    /// The report as JSON.
    Json,
    /// What a template makes of that.
    Template(Template),
}

/// Reads `[report]` of a file in `folder`.
pub(super) fn report(section: Section, folder: &Path) -> Option<Reporting> {
    let command = values(section.texts("command"));
    if command.is_empty() {
        section.note_by(
            &["command"],
            "command is missing: a program and its arguments, like [\"/usr/sbin/sendmail\", \"-t\"]",
        );
    }
    let format = section.choice("format", &[("mail", false), ("json", true)]);
    let (template, to) = (section.text("template"), section.text("to"));
    for (key, other) in [("format", format.as_ref().map(|format| &format.span)), ("to", to.as_ref().map(|to| &to.span))]
    {
        if let Some(span) = other.filter(|_| template.is_some()) {
            section
                .note_at(span, format!("the template says all that the program reads: leave {key} out, or template"));
        }
    }
    if let Some(to) = to.as_ref().filter(|to| to.value.contains(['\r', '\n'])) {
        section.note_at(&to.span, "an address is one line");
    }
    let is_json = format.is_some_and(|format| format.value);
    let form = match (template, to) {
        (Some(template), _) => {
            let read = Template::read(&folder.join(&template.value));
            read.map_err(|error| section.note_at(&template.span, error)).ok().map(Form::Template)
        }
        (None, _) if is_json => Some(Form::Json),
        (None, Some(to)) => Some(Form::Mail(to.value)),
        (None, None) => {
            section.note_by(
                &["to", "format", "template"],
                "to is missing: the address that a mail goes to; or say format = \"json\", or name a template",
            );
            None
        }
    };
    let always = section.choice("when", &[("failure", false), ("always", true)]).is_some_and(|when| when.value);
    let timeout = section.duration("timeout").unwrap_or(USUAL_TIMEOUT);
    section.finish();
    Some(Reporting { command, form: form?, always, timeout })
}
