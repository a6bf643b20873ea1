//! What a record of the journal says: what to do, what undoes it, and where.

use super::journal::LogRecord;
use crate::{Error, Fields, Result};

/// What is to be done. Not listed is what no journal was seen to do whose outcome is known, and so is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Nothing,
    /// It is what undid something before.
    Compensation,
    InitializeRecord,
    DeallocateRecord,
    CreateAttribute,
    DeleteAttribute,
    UpdateResident,
    UpdateNonResident,
    UpdateMapping,
    SetSizes,
    AddToRoot,
    DeleteFromRoot,
    AddToBlock,
    DeleteFromBlock,
    WriteEndOfBlock,
    SetVcnInRoot,
    SetVcnInBlock,
    UpdateNameInRoot,
    UpdateNameInBlock,
    SetBits,
    ClearBits,
    Forget,
    OpenAttribute,
    /// One of the tables of a checkpoint.
    Dump,
    UpdateDataInBlock,
    ZeroEndOfRecord,
}

/// What an operation is done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Record,
    Block,
    Bytes,
    Bits,
}

impl Operation {
    fn parse(stored: u16) -> Option<Self> {
        Some(match stored {
            0x00 => Self::Nothing,
            0x01 => Self::Compensation,
            0x02 => Self::InitializeRecord,
            0x03 => Self::DeallocateRecord,
            0x05 => Self::CreateAttribute,
            0x06 => Self::DeleteAttribute,
            0x07 => Self::UpdateResident,
            0x08 => Self::UpdateNonResident,
            0x09 => Self::UpdateMapping,
            0x0b => Self::SetSizes,
            0x0c => Self::AddToRoot,
            0x0d => Self::DeleteFromRoot,
            0x0e => Self::AddToBlock,
            0x0f => Self::DeleteFromBlock,
            0x10 => Self::WriteEndOfBlock,
            0x11 => Self::SetVcnInRoot,
            0x12 => Self::SetVcnInBlock,
            0x13 => Self::UpdateNameInRoot,
            0x14 => Self::UpdateNameInBlock,
            0x15 => Self::SetBits,
            0x16 => Self::ClearBits,
            0x1b => Self::Forget,
            0x1c => Self::OpenAttribute,
            0x1d..=0x1f => Self::Dump,
            0x22 => Self::UpdateDataInBlock,
            0x25 => Self::ZeroEndOfRecord,
            _ => return None,
        })
    }

    /// Returns what it changes on the volume, if it does.
    pub(super) fn target(self) -> Option<Target> {
        match self {
            Self::InitializeRecord
            | Self::DeallocateRecord
            | Self::CreateAttribute
            | Self::DeleteAttribute
            | Self::UpdateResident
            | Self::UpdateMapping
            | Self::SetSizes
            | Self::AddToRoot
            | Self::DeleteFromRoot
            | Self::SetVcnInRoot
            | Self::UpdateNameInRoot
            | Self::ZeroEndOfRecord => Some(Target::Record),
            Self::AddToBlock
            | Self::DeleteFromBlock
            | Self::WriteEndOfBlock
            | Self::SetVcnInBlock
            | Self::UpdateNameInBlock
            | Self::UpdateDataInBlock => Some(Target::Block),
            Self::UpdateNonResident => Some(Target::Bytes),
            Self::SetBits | Self::ClearBits => Some(Target::Bits),
            Self::Nothing | Self::Compensation | Self::Forget | Self::OpenAttribute | Self::Dump => None,
        }
    }
}

/// What a record of the journal says.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) lsn: u64,
    pub(super) redo: Operation,
    pub(super) undo: Operation,
    pub(super) redo_data: Vec<u8>,
    pub(super) undo_data: Vec<u8>,
    /// The attribute that is changed, as a place in the table of open ones.
    pub(super) attribute: u16,
    /// Where its clusters from `vcn` on lie.
    pub(super) lcns: Vec<u64>,
    pub(super) vcn: u64,
    /// Bytes from the first of them to the block that is changed.
    pub(super) block_offset: usize,
    /// Bytes from there: in a record, to the attribute.
    pub(super) record_offset: usize,
    /// Bytes from there.
    pub(super) attribute_offset: usize,
}

impl Change {
    pub(super) fn parse(record: &LogRecord) -> Result<Self> {
        let fields = Fields(&record.data);
        let damaged = || Error::damaged(format!("record {:#x} of the journal does not fit", record.lsn));
        let number = |at| fields.le16(at).ok_or_else(damaged);
        let operation = |at| {
            let stored = number(at)?;
            Operation::parse(stored)
                .ok_or_else(|| Error::unsupported(format!("record {:#x} of the journal does {stored:#x}", record.lsn)))
        };
        let bytes = |operation, at, len| -> Result<Vec<u8>> {
            let (at, len) = (usize::from(number(at)?), usize::from(number(len)?));
            let bytes = match operation {
                // It only says how many.
                Operation::ZeroEndOfRecord => return Ok(vec![0; len]),
                // It may be larger than the field can say.
                Operation::Dump => record.data.get(at..),
                Operation::OpenAttribute => fields.bytes(at, len),
                // Of the others there need not be any, whatever the fields say.
                _ if len == 0 || operation.target().is_none() => Some(&[][..]),
                _ => fields.bytes(at, len),
            };
            Ok(bytes.ok_or_else(damaged)?.to_vec())
        };
        let (redo, undo) = (operation(0)?, operation(2)?);
        let lcns = (0..usize::from(number(0x0e)?)).map(|index| fields.le64(0x20 + index * 8).ok_or_else(damaged));
        Ok(Self {
            lsn: record.lsn,
            redo,
            undo,
            redo_data: bytes(redo, 4, 6)?,
            undo_data: bytes(undo, 8, 0x0a)?,
            attribute: number(0x0c)?,
            lcns: lcns.collect::<Result<_>>()?,
            vcn: fields.le64(0x18).ok_or_else(damaged)?,
            block_offset: usize::from(number(0x14)?) * 512,
            record_offset: usize::from(number(0x10)?),
            attribute_offset: usize::from(number(0x12)?),
        })
    }
}
