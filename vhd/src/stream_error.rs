//! Why a VHD that comes over a connection cannot be taken, with the byte of it.

use std::fmt;
use std::io;

/// What is wrong with a stream.
#[derive(Debug)]
pub struct StreamError {
    at: u64,
    kind: StreamErrorKind,
    reason: String,
    source: Option<io::Error>,
}

/// What a caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamErrorKind {
    /// It ends too early, or contradicts itself: it may come whole when it is asked for again.
    Damaged,
    /// It is of a kind that is not read.
    Unsupported,
    /// The server failed, and put an error page of HTTP into it, which the error tells.
    Page,
    /// It could not be read from.
    Read,
}

impl StreamError {
    /// How much of an error page is looked at (bytes).
    pub(crate) const PAGE: usize = 4096;
    /// How much of it is told (characters).
    const TOLD: usize = 300;

    pub(crate) fn damaged(at: u64, reason: impl Into<String>) -> Self {
        Self { at, kind: StreamErrorKind::Damaged, reason: reason.into(), source: None }
    }

    pub(crate) fn unsupported(at: u64, reason: impl Into<String>) -> Self {
        Self { at, kind: StreamErrorKind::Unsupported, reason: reason.into(), source: None }
    }

    pub(crate) fn read(at: u64, error: io::Error) -> Self {
        Self { at, kind: StreamErrorKind::Read, reason: error.to_string(), source: Some(error) }
    }

    /// About a page that begins at `at`.
    pub(crate) fn page(at: u64, page: &[u8]) -> Self {
        let page = String::from_utf8_lossy(&page[..page.len().min(Self::PAGE)]);
        let (head, body) = page.split_once("\r\n\r\n").unwrap_or((&page, ""));
        let status = head.lines().next().unwrap_or_default();
        let mut is_tag = false;
        let text = body.chars().filter(|letter| {
            let is_text = !is_tag && *letter != '<';
            is_tag = (is_tag || *letter == '<') && *letter != '>';
            is_text
        });
        let words = text.collect::<String>().split_whitespace().collect::<Vec<_>>().join(" ");
        let told: String = format!("{status}: {words}").chars().take(Self::TOLD).collect();
        let reason = format!("the server failed, and says '{}'", told.escape_debug());
        Self { at, kind: StreamErrorKind::Page, reason, source: None }
    }

    /// Returns the byte of the stream that it is about.
    #[must_use]
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> StreamErrorKind {
        self.kind
    }
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {} of a VHD stream: {}", self.at, self.reason)
    }
}

impl std::error::Error for StreamError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().and_then(|error| error.get_ref()).map(|error| error as &(dyn std::error::Error + 'static))
    }
}

/// Whether bytes begin as a reply of HTTP does: "HTTP/1.1 500 ".
pub(crate) fn is_page(bytes: &[u8]) -> bool {
    bytes.len() > 12
        && bytes.starts_with(b"HTTP/1.")
        && bytes[7].is_ascii_digit()
        && bytes[8] == b' '
        && bytes[9..12].iter().all(u8::is_ascii_digit)
        && bytes[12] == b' '
}

/// Returns where such a reply begins in the last bytes of what came: a disk may hold such texts as well, so it is looked
/// for only where the stream is wrong anyhow.
pub(crate) fn page_in(bytes: &[u8]) -> Option<usize> {
    bytes.windows(13).position(is_page)
}
