//! The journal as a row of records: which pages count, and where a record and the one after it lie.
//!
//! A page that is not full is written again and again, in turn to two places besides its own; the one written last counts.
//! What is written last ends where nothing follows: no page then holds anything later, or the journal is not understood.

use std::cell::RefCell;

use super::super::record;
use super::super::stream::Stream;
use super::super::volume::{Node, Volume};
use super::restart::Layout;
use crate::{Error, ErrorKind, Fields, Result};

/// Bytes of a journal at most; Windows makes it 64 MiB by itself.
const MAX_SIZE: u64 = 1 << 30;

/// Bytes that one record may hold.
const MAX_RECORD: usize = 16 << 20;

/// Pages that are read at once.
const CHUNK: u64 = 256;

/// A page that holds records, wherever it stands.
#[derive(Debug, Clone, Copy)]
struct Page {
    /// The page of the journal to read.
    at: u64,
    /// The last record that ends on it.
    last_end: u64,
}

/// A journal of which records can be read.
pub(super) struct Journal<'a> {
    volume: &'a Volume,
    node: &'a Node,
    stream: &'a Stream,
    layout: Layout,
    /// Of each page what to read for it.
    pages: Vec<Option<Page>>,
    /// The page that was read last.
    last: RefCell<Option<(u64, Vec<u8>)>>,
}

/// A record of the journal.
#[derive(Debug)]
pub(super) struct LogRecord {
    pub(super) lsn: u64,
    /// The record to undo before this one.
    pub(super) undo_next: u64,
    pub(super) transaction: u32,
    /// Whether it says where to start, and not what was changed.
    pub(super) is_restart: bool,
    pub(super) data: Vec<u8>,
    /// Where the next one would be.
    next: u64,
}

impl<'a> Journal<'a> {
    /// Looks at all pages.
    pub(super) fn open(volume: &'a Volume, node: &'a Node, stream: &'a Stream, layout: Layout) -> Result<Self> {
        let size = layout.pages * Layout::PAGE_SIZE as u64;
        if size > MAX_SIZE || size > stream.size()? {
            let message = format!("a journal of {size} bytes is in a file of {}", stream.size()?);
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
        let pages = vec![None; usize::try_from(layout.pages).expect("as many as fit in memory")];
        let mut journal = Self { volume, node, stream, layout, pages, last: RefCell::default() };
        let mut start = 2;
        while start < layout.pages {
            let count = CHUNK.min(layout.pages - start);
            let mut bytes = vec![0; usize::try_from(count).expect("few") * Layout::PAGE_SIZE];
            journal.read(start, &mut bytes)?;
            for (at, page) in (start..).zip(bytes.chunks_exact_mut(Layout::PAGE_SIZE)) {
                journal.take(at, page)?;
            }
            start += count;
        }
        Ok(journal)
    }

    fn read(&self, page: u64, buffer: &mut [u8]) -> Result<()> {
        let offset = page * Layout::PAGE_SIZE as u64;
        super::super::content::read(self.volume, self.node, self.stream, offset, buffer)
    }

    /// Remembers a page if it is later than what is known of its place.
    fn take(&mut self, at: u64, page: &mut [u8]) -> Result<()> {
        if !page.starts_with(b"RCRD") {
            return Ok(());
        }
        record::restore(page, b"RCRD").map_err(|error| of_page(at, &error))?;
        let fields = Fields(page);
        let number = |offset| fields.le64(offset).unwrap_or_default();
        let last_end = number(0x20);
        let place = if at >= self.layout.first {
            at
        } else {
            let offset = if self.layout.is_old { number(8) } else { number(0x3c) & 0xffff_ffff };
            let size = Layout::PAGE_SIZE as u64;
            if offset % size != 0 || offset / size < self.layout.first || offset / size >= self.layout.pages {
                return Err(Error::damaged(format!("page {at} of the journal is a copy of none")));
            }
            offset / size
        };
        let known = &mut self.pages[usize::try_from(place).expect("within the journal")];
        if known.is_none_or(|known| known.last_end < last_end) {
            *known = Some(Page { at, last_end });
        }
        Ok(())
    }

    /// Does something with a page as it was before it was written.
    fn with_page<T>(&self, page: u64, act: impl FnOnce(&[u8]) -> T) -> Result<Option<T>> {
        let known = usize::try_from(page).ok().and_then(|page| self.pages.get(page).copied().flatten());
        let Some(known) = known else { return Ok(None) };
        let mut last = self.last.borrow_mut();
        if last.as_ref().is_none_or(|(at, _)| *at != known.at) {
            let mut bytes = vec![0; Layout::PAGE_SIZE];
            self.read(known.at, &mut bytes)?;
            record::restore(&mut bytes, b"RCRD").map_err(|error| of_page(known.at, &error))?;
            *last = Some((known.at, bytes));
        }
        Ok(last.as_ref().map(|(_, bytes)| act(bytes)))
    }

    /// Returns the record of this number, if it is there.
    fn find(&self, lsn: u64) -> Result<Option<LogRecord>> {
        let (mut page, within) = self.layout.place(lsn);
        if within < Layout::DATA_OFFSET || within + Layout::HEADER_SIZE > Layout::PAGE_SIZE {
            return Ok(None);
        }
        let header = self.with_page(page, |bytes| Fields(bytes).array::<{ Layout::HEADER_SIZE }>(within))?.flatten();
        let Some(header) = header.filter(|header| Fields(header).le64(0) == Some(lsn)) else { return Ok(None) };
        let fields = Fields(&header);
        let damaged = |what: &str| Error::damaged(format!("record {lsn:#x} of the journal {what}"));
        let len = fields.le32(0x18).and_then(|len| usize::try_from(len).ok()).unwrap_or(usize::MAX);
        if len > MAX_RECORD {
            return Err(damaged(&format!("holds {len} bytes")));
        }
        let is_restart = match fields.le32(0x20) {
            Some(1) => false,
            Some(2) => true,
            _ => return Err(damaged("is of an unknown kind")),
        };
        let mut data = Vec::new();
        let mut from = within + Layout::HEADER_SIZE;
        loop {
            let part = (len - data.len()).min(Layout::PAGE_SIZE - from);
            let taken = self.with_page(page, |bytes| {
                data.extend_from_slice(&bytes[from..from + part]);
                // Where the rest is not there yet, the page is still of the round before.
                Fields(bytes).le64(0x20).is_some_and(|last_end| last_end >= lsn) || data.len() < len
            })?;
            if taken != Some(true) {
                return Err(damaged("is not whole"));
            }
            from += part;
            if data.len() == len {
                break;
            }
            page = self.layout.page_after(page);
            from = Layout::DATA_OFFSET;
        }
        // The next one follows if there is room for its start.
        let mut end = from.next_multiple_of(8);
        if end + Layout::HEADER_SIZE > Layout::PAGE_SIZE {
            page = self.layout.page_after(page);
            end = Layout::DATA_OFFSET;
        }
        Ok(Some(LogRecord {
            lsn,
            undo_next: fields.le64(0x10).unwrap_or_default(),
            transaction: fields.le32(0x24).unwrap_or_default(),
            is_restart,
            data,
            next: self.layout.lsn_after(lsn, page, end),
        }))
    }

    /// Returns a record that something leads to.
    pub(super) fn record(&self, lsn: u64) -> Result<LogRecord> {
        self.find(lsn)?.ok_or_else(|| Error::damaged(format!("the journal has no record {lsn:#x}")))
    }

    /// Returns the record that follows one.
    pub(super) fn after(&self, record: &LogRecord) -> Result<Option<LogRecord>> {
        if let Some(next) = self.find(record.next)? {
            return Ok(Some(next));
        }
        let last = self.pages.iter().flatten().map(|page| page.last_end).max().unwrap_or_default();
        if last == record.lsn {
            return Ok(None);
        }
        Err(Error::damaged(format!("the journal breaks off after record {:#x}, and goes on to {last:#x}", record.lsn)))
    }
}

fn of_page(page: u64, error: &Error) -> Error {
    Error::new(error.kind(), format!("page {page} of the journal: {error}"))
}
