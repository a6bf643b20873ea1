//! What is told of a run, as a person wrote it: a template in the syntax of Jinja, filled in with the report.
//!
//! In a file whose name ends in `.json` each value is written as JSON, in one that ends in `.html` so that a browser shows it; in any
//! other as it is, but for control characters: no name of a machine ends a line of a mail's head. A name that the report does not have
//! is a mistake, not nothing.

use std::path::{Path, PathBuf};

use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value};

use crate::whole;

/// No template is longer (bytes).
const LONGEST: u64 = 1 << 20;
/// Steps that one may take; each loop over each machine takes a few.
const FUEL: u64 = 10_000_000;

/// A template whose syntax is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    path: PathBuf,
    text: String,
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// In a sentence, why it is none.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = whole::text(path, LONGEST);
        let text = text.map_err(|error| format!("read the template '{}': {error}", path.display()))?;
        let template = Self { path: path.to_owned(), text };
        template
            .environment()
            .template_from_named_str(&template.name(), &template.text)
            .map_err(|error| template.wrong(&error))?;
        Ok(template)
    }

    /// Fills it in. `text` is what of `report` may have several lines.
    ///
    /// # Errors
    /// In a sentence, with the line of the template.
    pub fn fill(&self, report: &serde_json::Value, text: &str) -> Result<String, String> {
        let (environment, name) = (self.environment(), self.name());
        let written = || {
            let template = environment.template_from_named_str(&name, &self.text)?;
            let text = if self.is_plain() { Value::from_safe_string(text.to_owned()) } else { Value::from(text) };
            template.render(minijinja::context! { text, ..Value::from_serialize(report) })
        };
        written().map_err(|error| self.wrong(&error))
    }

    fn name(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }

    fn is_plain(&self) -> bool {
        matches!(minijinja::default_auto_escape_callback(&self.name()), AutoEscape::None)
    }

    fn environment(&self) -> Environment<'static> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_keep_trailing_newline(true);
        if self.is_plain() {
            environment.set_formatter(|out, state, value| match value.as_str().filter(|_| !value.is_safe()) {
                Some(text) => {
                    let plain: String =
                        text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
                    out.write_str(&plain).map_err(minijinja::Error::from)
                }
                None => minijinja::escape_formatter(out, state, value),
            });
        }
        environment
    }

    fn wrong(&self, error: &minijinja::Error) -> String {
        let line = error.line().map(|line| format!(":{line}")).unwrap_or_default();
        let detail = error.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
        format!("the template '{}'{line} is wrong: {}{detail}", self.path.display(), error.kind())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    fn read(name: &str, text: &str) -> Result<Template, String> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        fs::write(&path, text).expect("written");
        Template::read(&path).map_err(|error| error.replace(&folder.path().display().to_string(), ""))
    }

    fn fill(name: &str, text: &str) -> String {
        let report =
            json!({ "job": "night", "vms": [{ "name": "web\n01", "reason": null }, { "name": "\"db\" <1>" }] });
        read(name, text).expect("right").fill(&report, "one\ntwo\n").unwrap_or_else(|error| error)
    }

    #[test]
    fn values_are_written_as_the_name_of_the_template_asks() {
        let each = "{% for vm in vms %}[{{ vm.name }}]{% endfor %}";
        assert_eq!(fill("mail.txt", each), "[web 01][\"db\" <1>]");
        assert_eq!(fill("page.html", each), "[web\n01][&quot;db&quot; &lt;1&gt;]");
        assert_eq!(fill("chat.json", r#"{"text": {{ job ~ ": " ~ vms[0].name }}}"#), r#"{"text": "night: web\n01"}"#);
        assert_eq!(fill("mail.txt", "Subject: {{ job }}\n\n{{ text }}"), "Subject: night\n\none\ntwo\n");
        assert_eq!(fill("chat.json", "{{ text }}"), "\"one\\ntwo\\n\"");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let said = read("a.txt", "one\n{% if %}").expect_err("no condition");
        assert!(said.starts_with("the template '/a.txt':2 is wrong: syntax error: "), "{said}");
        let said = fill("a.txt", "one\n{{ jbo }}");
        assert!(said.contains("a.txt':2 is wrong: undefined value"), "{said}");
        let said = fill("a.txt", "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}");
        assert!(said.contains("is wrong: engine ran out of fuel"), "{said}");
        assert!(Template::read(Path::new("/nowhere")).expect_err("absent").contains("No such file"));
    }
}
