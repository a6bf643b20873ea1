//! What a transfer tells on its way, for faults, shaping and logs.

use std::io;

/// A piece of a transfer, before it is read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Pieces before it.
    pub number: u64,
    /// Where it lies on the disk, in bytes.
    pub offset: u64,
    /// Its length on the disk, in bytes.
    pub length: u64,
    /// Bytes of the whole transfer before it.
    pub done: u64,
    /// Bytes of the whole transfer, if they are known.
    pub total: Option<u64>,
}

/// Is called before each piece: may wait, and ends the transfer with an error.
pub type Hook<'a> = &'a mut dyn FnMut(&Piece) -> io::Result<()>;

/// Lets all pass.
pub fn unhindered(_: &Piece) -> io::Result<()> {
    Ok(())
}
