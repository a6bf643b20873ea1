//! Transactions: what was to be done as a whole, put together from the operations of records.
//!
//! ```text
//! records       ─┬─ start 7 ─┬─ 7: ... ─┬─ start 8 ─┬─ 7: ... ─┬─ 8: ... ─┬─ commit 7 ─┬─ ...
//! transaction 7  = a header, regions: the first of each item says what it is, and of how many regions
//! ```
//!
//! A region that did not fit in a record is continued in the next. What has no commit was not done.
//!
//! Source: `struct xlog_op_header` in Linux `fs/xfs/libxfs/xfs_log_format.h`; `xlog_recovery_process_trans` in
//! `fs/xfs/xfs_log_recover.c`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::record::Records;
use crate::{Error, ErrorKind, Fields, Result};

/// Regions of transactions that are not committed yet at most, some 50 bytes each besides their own; more is an error.
const MAX_REGIONS: usize = 2_000_000;

/// Transactions that are not committed yet at most; more is an error. Linux has a few at once.
const MAX_OPEN: usize = 100_000;

/// Regions of an item at most: every other 128 bytes of 64 KiB, and its first.
const MAX_ITEM: u16 = 257;

/// What each operation begins with (bytes).
const OPERATION: usize = 12;

/// "TRAN", and bytes of what starts with it.
const HEADER: (u32, usize) = (0x5452_414e, 16);

// Flags of an operation.
const START: u8 = 1;
const COMMIT: u8 = 2;
const CONTINUES: u8 = 4;
const CONTINUED: u8 = 8;
const END: u8 = 0x10;
const UNMOUNT: u8 = 0x20;

/// What is done to one thing.
pub(super) struct Item<'a> {
    /// What it is: `XFS_LI_...`.
    pub(super) kind: u16,
    /// What it consists of: one region at least.
    regions: &'a [Cow<'a, [u8]>],
}

impl<'a> Item<'a> {
    /// Returns the region that says what is done.
    pub(super) fn format(&self) -> Fields<'a> {
        Fields(&self.regions[0])
    }

    /// Returns the other regions.
    pub(super) fn data(&self) -> &'a [Cow<'a, [u8]>] {
        &self.regions[1..]
    }
}

#[derive(Default)]
struct Open<'a> {
    lsn: u64,
    regions: Vec<Cow<'a, [u8]>>,
}

/// Hands over the items of each transaction, in the order of commits, with the number of the record that it starts in (LSN).
///
/// # Errors
/// [`ErrorKind::Damaged`] if an operation or item cannot be, and what `apply` returns.
pub(super) fn each(records: &Records, mut apply: impl FnMut(u64, Vec<Item<'_>>) -> Result<()>) -> Result<()> {
    let mut open: BTreeMap<u32, Open<'_>> = BTreeMap::new();
    let mut regions = 0;
    for (lsn, operations, body) in records.iter() {
        let mut rest = body;
        for _ in 0..operations {
            if rest.is_empty() {
                break;
            }
            let operation = Operation::parse(rest).ok_or_else(|| Error::damaged("an operation is cut off"))?;
            rest = &rest[OPERATION + operation.payload.len()..];
            if operation.flags & START != 0 {
                if open.insert(operation.transaction, Open { lsn, ..Open::default() }).is_some() {
                    return Err(Error::damaged("a transaction starts twice"));
                }
                continue;
            }
            // Of one that started before the tail all is in its place.
            let Some(transaction) = open.get_mut(&operation.transaction) else { continue };
            let continued = match operation.flags & !END {
                0 | CONTINUES => false,
                flags if flags & !CONTINUES == CONTINUED => true,
                COMMIT => {
                    let transaction = open.remove(&operation.transaction).unwrap_or_default();
                    regions -= transaction.regions.len();
                    apply(transaction.lsn, items(&transaction.regions)?)?;
                    continue;
                }
                UNMOUNT => {
                    regions -= open.remove(&operation.transaction).unwrap_or_default().regions.len();
                    continue;
                }
                flags => return Err(Error::damaged(format!("an operation is unknown ({flags:#x})"))),
            };
            match transaction.regions.last_mut() {
                Some(last) if continued => last.to_mut().extend_from_slice(operation.payload),
                _ if operation.payload.is_empty() => {}
                _ => {
                    transaction.regions.push(Cow::Borrowed(operation.payload));
                    regions += 1;
                }
            }
        }
        // A record more or less does not matter.
        if regions > MAX_REGIONS || open.len() > MAX_OPEN {
            let message = format!("{} transactions of {regions} pieces are not committed at once", open.len());
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
    }
    Ok(())
}

struct Operation<'a> {
    transaction: u32,
    flags: u8,
    payload: &'a [u8],
}

impl<'a> Operation<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let fields = Fields(bytes);
        let payload = fields.bytes(OPERATION, usize::try_from(fields.be32(4)?).ok()?)?;
        // Of a transaction, or of the log itself.
        matches!(fields.u8(8)?, 0x69 | 0xaa).then_some(())?;
        Some(Self { transaction: fields.be32(0)?, flags: fields.u8(9)?, payload })
    }
}

/// Returns what regions of a whole transaction are.
fn items<'a>(regions: &'a [Cow<'a, [u8]>]) -> Result<Vec<Item<'a>>> {
    let Some((header, mut rest)) = regions.split_first() else { return Ok(Vec::new()) };
    if Fields(header).le32(0) != Some(HEADER.0) || header.len() != HEADER.1 {
        return Err(Error::damaged("a transaction has no header"));
    }
    let mut items = Vec::new();
    while let Some(first) = rest.first() {
        let cut = || Error::damaged("an item is cut off");
        let (kind, count) = Fields(first).le16(0).zip(Fields(first).le16(2)).ok_or_else(cut)?;
        if count == 0 || count > MAX_ITEM {
            return Err(Error::damaged(format!("an item of kind {kind:#x} has {count} pieces")));
        }
        let (regions, after) = rest.split_at_checked(usize::from(count)).ok_or_else(cut)?;
        items.push(Item { kind, regions });
        rest = after;
    }
    Ok(items)
}
