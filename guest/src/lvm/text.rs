//! LVM's text format: sections of values, within each other.
//!
//! ```text
//! vg0 {                                # a section
//!     seqno = 5                        # a number
//!     status = ["RESIZEABLE", "READ"]  # a list
//!     root { ... }
//! }
//! ```
//!
//! It is read as bytes, since a description may hold what an administrator typed in any encoding. Nothing is recursive, and
//! the number of values and the depth of sections are bounded. Source: lvm2 `libdm/libdm-config.c`, lvm(8).

use crate::{Error, ErrorKind, Result};

/// Sections within each other; LVM has four.
const MAX_DEPTH: usize = 16;
/// Keys and values of a text: more than a thousand for each of a thousand volumes.
const MAX_ITEMS: usize = 1 << 20;

/// A number or a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Number(u64),
    /// What stood in quotes, with its backslashes; or a word that is no such number.
    Text(&'a [u8]),
}

/// What belongs to a key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item<'a> {
    Value(Value<'a>),
    List(Vec<Value<'a>>),
    Section(Section<'a>),
}

/// Keys and what belongs to them, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Section<'a> {
    items: Vec<(&'a [u8], Item<'a>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    /// `{`, `}`, `[`, `]`, `=` or `,`.
    Sign(u8),
    Quoted(&'a [u8]),
    Word(&'a [u8]),
}

impl<'a> Section<'a> {
    /// Parses a text, which may end with a NUL.
    ///
    /// # Errors
    /// `Damaged` if it is none, `TooMuch` if it is too deep or has too many values.
    pub(super) fn parse(text: &'a [u8]) -> Result<Self> {
        let mut tokens = Tokens { text, at: 0, left: MAX_ITEMS };
        let mut open = vec![(&b""[..], Section::default())];
        while let Some(token) = tokens.next()? {
            let (Token::Word(key) | Token::Quoted(key)) = token else {
                let Token::Sign(b'}') = token else { return Err(tokens.unexpected("a name or }")) };
                let (key, section) = open.pop().expect("one is always open");
                let Some((_, outer)) = open.last_mut() else { return Err(tokens.unexpected("no } here")) };
                outer.items.push((key, Item::Section(section)));
                continue;
            };
            match tokens.next()? {
                Some(Token::Sign(b'=')) => {
                    let item = tokens.item()?;
                    let (_, section) = open.last_mut().expect("one is always open");
                    section.items.push((key, item));
                }
                Some(Token::Sign(b'{')) if open.len() > MAX_DEPTH => {
                    return Err(Error::new(ErrorKind::TooMuch, "sections of the LVM metadata are too deep"));
                }
                Some(Token::Sign(b'{')) => open.push((key, Section::default())),
                _ => return Err(tokens.unexpected("= or {")),
            }
        }
        match (open.pop(), open.is_empty()) {
            (Some((_, section)), true) => Ok(section),
            _ => Err(Error::damaged("the LVM metadata ends within a section")),
        }
    }

    fn get(&self, key: &str) -> Option<&Item<'a>> {
        self.items.iter().find(|(found, _)| *found == key.as_bytes()).map(|(_, item)| item)
    }

    /// Returns the number of that name.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Item::Value(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// Returns the text of that name.
    pub(super) fn text(&self, key: &str) -> Option<&'a [u8]> {
        match self.get(key)? {
            Item::Value(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Returns the list of that name; nothing if there is none.
    pub(super) fn list(&self, key: &str) -> &[Value<'a>] {
        match self.get(key) {
            Some(Item::List(list)) => list,
            _ => &[],
        }
    }

    /// Returns whether the list of that name has that word.
    pub(super) fn has_flag(&self, key: &str, flag: &str) -> bool {
        self.list(key).contains(&Value::Text(flag.as_bytes()))
    }

    /// Returns the section of that name.
    pub(super) fn section(&self, key: &str) -> Option<&Self> {
        match self.get(key)? {
            Item::Section(section) => Some(section),
            _ => None,
        }
    }

    /// Yields all sections with their names, in order.
    pub(super) fn sections(&self) -> impl Iterator<Item = (&'a [u8], &Self)> {
        self.items.iter().filter_map(|(key, item)| match item {
            Item::Section(section) => Some((*key, section)),
            _ => None,
        })
    }
}

struct Tokens<'a> {
    text: &'a [u8],
    at: usize,
    left: usize,
}

impl<'a> Tokens<'a> {
    fn unexpected(&self, expected: &str) -> Error {
        Error::damaged(format!("the LVM metadata should have {expected} before byte {}", self.at))
    }

    /// Takes bytes as long as they are of one kind.
    fn take(&mut self, is_kind: impl Fn(u8) -> bool) -> &'a [u8] {
        let rest = &self.text[self.at..];
        let len = rest.iter().position(|byte| !is_kind(*byte)).unwrap_or(rest.len());
        self.at += len;
        &rest[..len]
    }

    fn next(&mut self) -> Result<Option<Token<'a>>> {
        loop {
            self.take(|byte| byte.is_ascii_whitespace());
            if self.text.get(self.at) != Some(&b'#') {
                break;
            }
            self.take(|byte| byte != b'\n');
        }
        let Some(first) = self.text.get(self.at).filter(|byte| **byte != 0) else { return Ok(None) };
        self.left = self
            .left
            .checked_sub(1)
            .ok_or_else(|| Error::new(ErrorKind::TooMuch, "the LVM metadata has more values than are read"))?;
        match first {
            b'{' | b'}' | b'[' | b']' | b'=' | b',' => {
                self.at += 1;
                Ok(Some(Token::Sign(*first)))
            }
            b'"' | b'\'' => self.quoted(*first).map(Some),
            _ => {
                let word = self.take(|byte| !byte.is_ascii_whitespace() && !b"{}[]=,\"'#\0".contains(&byte));
                Ok(Some(Token::Word(word)))
            }
        }
    }

    fn quoted(&mut self, quote: u8) -> Result<Token<'a>> {
        let start = self.at + 1;
        let mut end = start;
        loop {
            match self.text.get(end) {
                None => return Err(self.unexpected("an end of the text that starts")),
                Some(byte) if *byte == quote => break,
                Some(b'\\') => end += 2,
                Some(_) => end += 1,
            }
        }
        self.at = end + 1;
        Ok(Token::Quoted(&self.text[start..end]))
    }

    /// Takes what stands behind `=`.
    fn item(&mut self) -> Result<Item<'a>> {
        match self.next()? {
            Some(Token::Sign(b'[')) => {}
            Some(token) => return self.value(token).map(Item::Value),
            None => return Err(self.unexpected("a value")),
        }
        let mut list = vec![];
        loop {
            match self.next()? {
                Some(Token::Sign(b']')) => return Ok(Item::List(list)),
                Some(Token::Sign(b',')) => {}
                Some(token) => list.push(self.value(token)?),
                None => return Err(self.unexpected("] somewhere")),
            }
        }
    }

    fn value(&self, token: Token<'a>) -> Result<Value<'a>> {
        match token {
            Token::Quoted(text) => Ok(Value::Text(text)),
            Token::Word(word) => {
                let number = std::str::from_utf8(word).ok().and_then(|word| word.parse().ok());
                Ok(number.map_or(Value::Text(word), Value::Number))
            }
            Token::Sign(_) => Err(self.unexpected("a value")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_hold_numbers_texts_lists_and_sections() {
        let text = b"# made by LVM\nvg-0.a {\n\tseqno = 5\n\tid=\"a\\\"b # c\"\n status = [\"READ\",\"WRITE\" , 7]\n\
            none = []\n minus = -1 # -1\n\"in quotes\" { segment1 { deep = 18446744073709551615 } }\n\
            description = \"\xe9t\xe9\"\n}\nversion = 1\n\0 { this is not read";
        let all = Section::parse(text).unwrap();
        assert_eq!(all.number("version"), Some(1));
        let (name, group) = all.sections().next().unwrap();
        assert_eq!(
            (name, group.number("seqno"), group.text("id")),
            (&b"vg-0.a"[..], Some(5), Some(&br#"a\"b # c"#[..]))
        );
        assert_eq!(group.list("status"), [Value::Text(b"READ"), Value::Text(b"WRITE"), Value::Number(7)]);
        assert!(group.has_flag("status", "WRITE") && !group.has_flag("status", "write"));
        assert_eq!((group.list("none"), group.list("seqno"), group.list("absent")), (&[][..], &[][..], &[][..]));
        assert_eq!((group.number("minus"), group.text("minus")), (None, Some(&b"-1"[..])));
        assert_eq!(group.text("description"), Some(&b"\xe9t\xe9"[..]));
        let deep = group.section("in quotes").and_then(|section| section.section("segment1")).unwrap();
        assert_eq!(deep.number("deep"), Some(u64::MAX));
    }

    #[test]
    fn what_is_no_such_text_is_damaged() {
        let texts = [
            "a",
            "a =",
            "a = [",
            "a = [1",
            "a = {",
            "a = ]",
            "a {",
            "a { b = 1",
            "}",
            "a { } }",
            "= 1",
            "a = \"b",
            "a = \"b\\",
            "a = 1 2",
            "a [ ]",
            "a = [[1]]",
            "a = [1 }",
            "{",
        ];
        for text in texts {
            assert_eq!(Section::parse(text.as_bytes()).unwrap_err().kind(), ErrorKind::Damaged, "{text}");
        }
    }

    #[test]
    fn depth_and_number_of_values_are_bounded() {
        let deep = |depth| "a {".repeat(depth) + &"}".repeat(depth);
        assert!(Section::parse(deep(16).as_bytes()).is_ok());
        for text in [deep(17), deep(5 << 20), format!("a = [{}]", "1,".repeat(MAX_ITEMS)), "a = 1\n".repeat(MAX_ITEMS)]
        {
            assert_eq!(Section::parse(text.as_bytes()).unwrap_err().kind(), ErrorKind::TooMuch);
        }
    }
}
