//! What was not written when the machine stopped: the tables of the last checkpoint, and what every record since does to them.

use super::change::{Change, Operation};
use super::journal::Journal;
use super::tables::{OpenAttribute, Tables, Transaction};
use crate::{Error, ErrorKind, Result};

/// Records that are looked at; more is an error. The smallest has 88 bytes, and Windows keeps well below this.
pub(super) const MAX_RECORDS: usize = 1 << 22;

/// Brings the tables of a checkpoint up to the end of the journal.
pub(super) fn analyse(journal: &Journal, tables: &mut Tables) -> Result<()> {
    let mut record = journal.record(tables.start)?;
    for _ in 0..MAX_RECORDS {
        let Some(next) = journal.after(&record)? else { return Ok(()) };
        record = next;
        if record.is_restart {
            continue;
        }
        let change = Change::parse(&record)?;
        if change.redo == Operation::Dump {
            continue;
        }
        let undo_next = match change.undo {
            Operation::Compensation => record.undo_next,
            _ => record.lsn,
        };
        let new = Transaction { first: record.lsn, undo_next };
        let transaction = tables.transactions.entry(record.transaction).or_insert(new);
        transaction.undo_next = undo_next;
        match change.redo {
            Operation::Forget => {
                tables.transactions.remove(&record.transaction);
            }
            Operation::OpenAttribute => open(tables, &change)?,
            _ if change.redo.target().is_some() => tables.touch(&change)?,
            _ => {}
        }
    }
    Err(Error::new(ErrorKind::TooMuch, "the journal has more records than are read"))
}

fn open(tables: &mut Tables, change: &Change) -> Result<()> {
    let attribute = OpenAttribute::parse(&change.redo_data);
    let attribute = attribute.ok_or_else(|| Error::damaged("what is said of an open attribute does not fit"))?;
    let before = tables.attributes.insert(change.attribute, attribute);
    // Changes of both would be about the same place in the table.
    if before.is_some_and(|before| before != attribute) {
        return Err(Error::unsupported("the journal uses a place in its table of open attributes again"));
    }
    Ok(())
}
