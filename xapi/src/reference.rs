//! References: what XAPI calls an object by, each with the class that it is of.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer};
use serde::ser::{Serialize, Serializer};

/// The reference that refers to nothing.
const NULL: &str = "OpaqueRef:NULL";

/// A reference to an object of class `C`, or to nothing. Its text means nothing, and does not outlive the object.
pub struct Ref<C> {
    text: String,
    class: PhantomData<fn() -> C>,
}

impl<C> Ref<C> {
    /// Takes the text that XAPI has for it.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), class: PhantomData }
    }

    /// Returns the reference to nothing.
    #[must_use]
    pub fn null() -> Self {
        Self::new(NULL)
    }

    /// Whether it refers to nothing. Older servers say so by an empty text.
    #[must_use]
    pub fn is_null(&self) -> bool {
        self.text.is_empty() || self.text == NULL
    }

    /// Returns it, unless it refers to nothing.
    #[must_use]
    pub fn known(&self) -> Option<&Self> {
        (!self.is_null()).then_some(self)
    }

    /// Returns the text that XAPI has for it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl<C> Default for Ref<C> {
    fn default() -> Self {
        Self::null()
    }
}

impl<C> Clone for Ref<C> {
    fn clone(&self) -> Self {
        Self::new(self.text.clone())
    }
}

impl<C> PartialEq for Ref<C> {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl<C> Eq for Ref<C> {}

impl<C> PartialOrd for Ref<C> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<C> Ord for Ref<C> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.text.cmp(&other.text)
    }
}

impl<C> Hash for Ref<C> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl<C> fmt::Display for Ref<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::error::quoted(&self.text))
    }
}

impl<C> fmt::Debug for Ref<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl<C> Serialize for Ref<C> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de, C> Deserialize<'de> for Ref<C> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}
