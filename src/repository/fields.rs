//! JSON in which any value may be missing or of another type than expected, read without holding what is not kept.
//!
//! A value of a wrong shape reads as if it were not there; only what is no JSON at all is an error. What is not taken
//! is read and dropped, so memory is bounded by what is kept, not by the length of the file.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use uuid::Uuid;

/// Longest key of an object kept (bytes).
const KEY_LIMIT: usize = 256;
/// Most entries of one object or array kept: XAPI allows a VM 255 disks.
const ENTRIES_LIMIT: usize = 1024;

/// Something made of the fields of a JSON object.
pub(super) trait Record: Default {
    /// Takes the value of a field out of `map`: exactly one value, [`IgnoredAny`] for an unknown field.
    fn take<'de, A: MapAccess<'de>>(&mut self, field: &str, map: &mut A) -> Result<(), A::Error>;
}

/// Cuts a text to at most `limit` bytes, at a character.
pub(super) fn cut(mut text: String, limit: usize) -> String {
    let end = (0..=limit.min(text.len())).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    text.truncate(end);
    text.shrink_to_fit();
    text
}

/// A value that is no object and no array; these are read and dropped.
#[derive(Debug)]
pub(super) enum Scalar {
    /// A string.
    Text(String),
    /// A whole number that is not negative.
    Number(u64),
    /// `true` or `false`.
    Flag(bool),
    /// Anything else.
    Other,
}

impl Scalar {
    /// A text, or a number as text; else empty.
    pub fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Number(number) => number.to_string(),
            Self::Flag(_) | Self::Other => String::new(),
        }
    }

    /// XAPI's 64-bit numbers come as numbers or as text.
    pub fn number(self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(number),
            Self::Text(text) => text.parse().ok(),
            Self::Flag(_) | Self::Other => None,
        }
    }

    /// Very old files have 0 and 1.
    pub fn flag(self) -> Option<bool> {
        match self {
            Self::Flag(flag) => Some(flag),
            Self::Number(number @ (0 | 1)) => Some(number == 1),
            _ => None,
        }
    }

    pub fn uuid(self) -> Option<Uuid> {
        Uuid::try_parse(&self.text()).ok()
    }
}

/// An object as a [`Record`]; anything else is an empty one.
pub(super) struct Fields<T>(pub T);

/// An object as its entries, in order; anything else has none.
pub(super) struct Entries<T>(pub Vec<(String, T)>);

/// An array as its texts; anything else has none.
pub(super) struct Texts(pub Vec<String>);

/// Visits any value; what the implementor does not take is read and dropped.
trait Take<'de>: Sized {
    fn nothing() -> Self;
    fn map<A: MapAccess<'de>>(mut map: A) -> Result<Self, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Self::nothing())
    }
    fn sequence<A: SeqAccess<'de>>(mut sequence: A) -> Result<Self, A::Error> {
        while sequence.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Self::nothing())
    }
    fn text(_: String) -> Self {
        Self::nothing()
    }
    fn number(_: u64) -> Self {
        Self::nothing()
    }
    fn flag(_: bool) -> Self {
        Self::nothing()
    }
}

struct Taker<T>(PhantomData<T>);

impl<'de, T: Take<'de>> Visitor<'de> for Taker<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }
    fn visit_bool<E: de::Error>(self, flag: bool) -> Result<T, E> {
        Ok(T::flag(flag))
    }
    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        Ok(u64::try_from(number).map_or_else(|_| T::nothing(), T::number))
    }
    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        Ok(T::number(number))
    }
    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        // Only whole numbers that a double holds exactly are taken: JavaScript writes 1e21 and above with an exponent.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        if number.fract() != 0.0 || !(0.0..=EXACT).contains(&number) {
            return Ok(T::nothing());
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole, and within 0..=2^53")]
        Ok(T::number(number as u64))
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        Ok(T::text(text.to_owned()))
    }
    fn visit_unit<E: de::Error>(self) -> Result<T, E> {
        Ok(T::nothing())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, sequence: A) -> Result<T, A::Error> {
        T::sequence(sequence)
    }
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::map(map)
    }
}

impl<'de> Take<'de> for Scalar {
    fn nothing() -> Self {
        Self::Other
    }
    fn text(text: String) -> Self {
        Self::Text(text)
    }
    fn number(number: u64) -> Self {
        Self::Number(number)
    }
    fn flag(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl<'de, T: Record> Take<'de> for Fields<T> {
    fn nothing() -> Self {
        Self(T::default())
    }
    fn map<A: MapAccess<'de>>(mut map: A) -> Result<Self, A::Error> {
        let mut record = T::default();
        while let Some(field) = map.next_key::<String>()? {
            record.take(&field, &mut map)?;
        }
        Ok(Self(record))
    }
}

impl<'de, T: Deserialize<'de>> Take<'de> for Entries<T> {
    fn nothing() -> Self {
        Self(Vec::new())
    }
    fn map<A: MapAccess<'de>>(mut map: A) -> Result<Self, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if entries.len() < ENTRIES_LIMIT {
                entries.push((cut(key, KEY_LIMIT), map.next_value()?));
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(Self(entries))
    }
}

impl<'de> Take<'de> for Texts {
    fn nothing() -> Self {
        Self(Vec::new())
    }
    fn sequence<A: SeqAccess<'de>>(mut sequence: A) -> Result<Self, A::Error> {
        let mut texts = Vec::new();
        while let Some(value) = sequence.next_element::<Scalar>()? {
            if let (Scalar::Text(text), true) = (value, texts.len() < ENTRIES_LIMIT) {
                texts.push(text);
            }
        }
        Ok(Self(texts))
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Taker(PhantomData))
    }
}

impl<'de, T: Record> Deserialize<'de> for Fields<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Taker(PhantomData))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Taker(PhantomData))
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Taker(PhantomData))
    }
}
