//! Tables of TOML, read key by key: what is wrong is noted with its line, and reading goes on, so that all mistakes are named at once.
//!
//! Whoever reads a table asks for each key by name, which makes the list of those that are known; [`Section::finish`] refuses the rest.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::SignedDuration;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::size::parse_rate;

/// No time is longer: what is, is a slip of the pen.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Its line, from 1.
    pub line: usize,
    /// What is wrong, and what was expected.
    pub message: String,
}

/// All mistakes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults {
    /// The file.
    pub path: PathBuf,
    /// At least one, by line.
    pub faults: Vec<Fault>,
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, fault) in self.faults.iter().enumerate() {
            let end = if number + 1 < self.faults.len() { "\n" } else { "" };
            write!(f, "{}:{}: {}{end}", self.path.display(), fault.line, fault.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// A text, and what was found wrong with it.
pub struct Document<'a> {
    text: &'a str,
    faults: RefCell<Vec<Fault>>,
}

impl<'a> Document<'a> {
    /// Takes the text of a file.
    pub fn new(text: &'a str) -> Self {
        Self { text, faults: RefCell::default() }
    }

    /// Parses it; what is no TOML is noted, and there is nothing to read then.
    pub fn parse(&self) -> Option<Spanned<DeTable<'a>>> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        for error in &errors {
            self.note(error.span().unwrap_or(0..0), format!("no TOML: {}", error.message()));
        }
        errors.is_empty().then_some(table)
    }

    /// Notes a mistake at a place of the text (bytes).
    pub fn note(&self, span: Range<usize>, message: impl Into<String>) {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        self.faults.borrow_mut().push(Fault { line, message: message.into() });
    }

    /// Returns `value` if nothing was wrong.
    ///
    /// # Errors
    /// All that was noted, as of the file at `path`.
    pub fn finish<T>(self, value: Option<T>, path: &Path) -> Result<T, Faults> {
        let mut faults = self.faults.into_inner();
        faults.sort_by_key(|fault| fault.line);
        // A parser that goes on after a mistake finds it again and again.
        let mut said = BTreeSet::new();
        faults.retain(|fault| said.insert((fault.line, fault.message.clone())));
        match value {
            Some(value) if faults.is_empty() => Ok(value),
            _ => Err(Faults { path: path.to_owned(), faults }),
        }
    }
}

/// A value and where it is written (bytes).
#[derive(Debug, Clone)]
pub struct Placed<T> {
    /// The value.
    pub value: T,
    /// Its place.
    pub span: Range<usize>,
}

/// One table that is read.
pub struct Section<'a> {
    document: &'a Document<'a>,
    /// As a person calls it, `[vms]`; empty for the whole file.
    name: String,
    /// Where it begins.
    pub span: Range<usize>,
    table: &'a DeTable<'a>,
    known: RefCell<Vec<&'static str>>,
    /// Keys whose values are not of their kind.
    wrong: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Section<'a> {
    /// Takes the table of a whole file.
    pub fn root(document: &'a Document<'a>, table: &'a Spanned<DeTable<'a>>) -> Self {
        Self::new(document, String::new(), 0..0, table.get_ref())
    }

    fn new(document: &'a Document<'a>, name: String, span: Range<usize>, table: &'a DeTable<'a>) -> Self {
        Self { document, name, span, table, known: RefCell::default(), wrong: RefCell::default() }
    }

    /// Notes a mistake of the table as a whole.
    pub fn note(&self, message: impl Into<String>) {
        self.document.note(self.span.clone(), message);
    }

    /// Notes a mistake of the table that is seen by what some keys say; not if these were not understood, which was noted.
    pub fn note_by(&self, keys: &[&'static str], message: impl Into<String>) {
        if !keys.iter().any(|key| self.is_wrong(key)) {
            self.note(message);
        }
    }

    /// Whether the value of a key that was asked for is not of its kind.
    pub fn is_wrong(&self, key: &str) -> bool {
        self.wrong.borrow().contains(key)
    }

    /// Notes a mistake at a place of the text.
    pub fn note_at(&self, span: &Range<usize>, message: impl Into<String>) {
        self.document.note(span.clone(), message);
    }

    fn value(&self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.known.borrow_mut().push(key);
        self.table.iter().find(|(name, _)| name.get_ref() == key).map(|(_, value)| value)
    }

    fn expected(&self, key: &'static str, found: &Spanned<DeValue<'a>>, expected: &str) {
        let found_as = match found.get_ref() {
            DeValue::String(text) => format!("'{}'", text.escape_debug()),
            DeValue::Integer(number) => number.to_string(),
            other => other.type_str().to_owned(),
        };
        self.note_at(&found.span(), format!("'{key}' is {found_as}; expected {expected}"));
        self.wrong.borrow_mut().insert(key);
    }

    /// Reads a text that is not empty.
    pub fn text(&self, key: &'static str) -> Option<Placed<String>> {
        let value = self.value(key)?;
        let text = as_text(value);
        if text.is_none() {
            self.expected(key, value, "a text in quotes");
        }
        text
    }

    /// Reads a list of texts, each given once; an empty one if there is none.
    pub fn texts(&self, key: &'static str) -> Vec<Placed<String>> {
        let Some(value) = self.value(key) else { return Vec::new() };
        let DeValue::Array(items) = value.get_ref() else {
            self.expected(key, value, "a list of texts, like [\"one\", \"other\"]");
            return Vec::new();
        };
        let mut texts: Vec<Placed<String>> = Vec::new();
        for item in items {
            match as_text(item) {
                None => self.expected(key, item, "texts in quotes"),
                Some(text) if texts.iter().any(|known| known.value == text.value) => {
                    self.note_at(&text.span, format!("'{}' is named twice", text.value.escape_debug()));
                }
                Some(text) => texts.push(text),
            }
        }
        texts
    }

    /// Reads `true` or `false`.
    pub fn flag(&self, key: &'static str) -> Option<bool> {
        let value = self.value(key)?;
        if let DeValue::Boolean(flag) = value.get_ref() {
            return Some(*flag);
        }
        self.expected(key, value, "true or false");
        None
    }

    /// Reads a number within a range.
    pub fn number(&self, key: &'static str, range: RangeInclusive<u32>) -> Option<u32> {
        let value = self.value(key)?;
        if let DeValue::Integer(number) = value.get_ref() {
            let number = u32::from_str_radix(number.as_str(), number.radix()).ok();
            if let Some(number) = number.filter(|number| range.contains(number)) {
                return Some(number);
            }
        }
        self.expected(key, value, &format!("a number from {} to {}", range.start(), range.end()));
        None
    }

    /// Reads a time that is not negative, and not longer than [`LONGEST`].
    pub fn duration(&self, key: &'static str) -> Option<Duration> {
        let value = self.value(key)?;
        let parsed = as_text(value).and_then(|text| text.value.parse::<SignedDuration>().ok());
        let duration = parsed.and_then(|duration| Duration::try_from(duration).ok());
        let duration = duration.filter(|duration| *duration <= LONGEST);
        if duration.is_none() {
            let most = LONGEST.as_secs() / 3600;
            self.expected(key, value, &format!("a time like \"90s\", \"30m\" or \"6h\", of {most}h at most"));
        }
        duration
    }

    /// Reads a rate that is not less than `least` (bytes a second).
    pub fn rate(&self, key: &'static str, least: u64) -> Option<u64> {
        let value = self.value(key)?;
        let rate = as_text(value).and_then(|text| parse_rate(&text.value).ok()).filter(|rate| *rate >= least);
        if rate.is_none() {
            self.expected(key, value, &format!("a rate like \"100 MiB/s\", of {} KiB/s or more", least / 1024));
        }
        rate
    }

    /// Reads one of several words.
    pub fn choice<T: Copy>(&self, key: &'static str, choices: &[(&str, T)]) -> Option<Placed<T>> {
        let value = self.value(key)?;
        let text = as_text(value);
        if let Some((_, chosen)) =
            choices.iter().find(|(word, _)| text.as_ref().is_some_and(|text| text.value == *word))
        {
            return Some(Placed { value: *chosen, span: value.span() });
        }
        let words: Vec<String> = choices.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        self.expected(key, value, &words.join(" or "));
        None
    }

    /// Reads a table.
    pub fn section(&self, key: &'static str) -> Option<Self> {
        let value = self.value(key)?;
        if let DeValue::Table(table) = value.get_ref() {
            return Some(Self::new(self.document, format!("[{key}]"), value.span(), table));
        }
        self.expected(key, value, &format!("a table, [{key}]"));
        None
    }

    /// Reads a list of tables.
    pub fn sections(&self, key: &'static str) -> Vec<Self> {
        let Some(value) = self.value(key) else { return Vec::new() };
        let tables = |items: &'a toml::de::DeArray<'a>| -> Option<Vec<Self>> {
            let table = |item: &'a Spanned<DeValue<'a>>| match item.get_ref() {
                DeValue::Table(table) => Some(Self::new(self.document, format!("[[{key}]]"), item.span(), table)),
                _ => None,
            };
            items.iter().map(table).collect()
        };
        let found = match value.get_ref() {
            DeValue::Array(items) => tables(items),
            _ => None,
        };
        found.unwrap_or_else(|| {
            self.expected(key, value, &format!("tables, each begun with [[{key}]]"));
            Vec::new()
        })
    }

    /// Refuses the keys that nobody asked for.
    pub fn finish(self) {
        let known = self.known.borrow();
        for (key, _) in self.table.iter().filter(|(key, _)| !known.contains(&key.get_ref().as_ref())) {
            let of = if self.name.is_empty() { "a job".to_owned() } else { self.name.clone() };
            let shown = key.get_ref().escape_debug();
            let message = match nearest(key.get_ref(), known.iter().copied()) {
                Some(near) => format!("'{shown}' is no key of {of}; did you mean '{near}'?"),
                None => format!("'{shown}' is no key of {of}; there are {}", known.join(", ")),
            };
            self.note_at(&key.span(), message);
        }
    }
}

fn as_text(value: &Spanned<DeValue>) -> Option<Placed<String>> {
    match value.get_ref() {
        DeValue::String(text) if !text.trim().is_empty() => {
            Some(Placed { value: text.clone().into_owned(), span: value.span() })
        }
        _ => None,
    }
}

/// Returns the name that somebody may have meant: one slip of the pen away, or one for each three letters.
pub fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let most = (wanted.chars().count() / 3).max(1);
    let slips = |name: &'a str| (strsim::damerau_levenshtein(wanted, name), name);
    names.map(slips).filter(|(slips, _)| *slips <= most).min().map(|(_, name)| name)
}
