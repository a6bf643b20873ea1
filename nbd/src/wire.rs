//! Numbers of the protocol. All are big-endian.

use std::io::{self, Read};

/// What a server greets with, then [`OPTIONS_MAGIC`].
pub const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub const OPTIONS_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Flags of the server in its greeting, and of the client in its answer: the same bits.
pub const FIXED_NEWSTYLE: u16 = 1;
pub const NO_ZEROES: u16 = 2;

pub const OPTION_EXPORT_NAME: u32 = 1;
pub const OPTION_START_TLS: u32 = 5;
pub const OPTION_GO: u32 = 7;
pub const OPTION_STRUCTURED_REPLY: u32 = 8;
pub const OPTION_SET_META_CONTEXT: u32 = 10;

pub const REPLY_ACK: u32 = 1;
pub const REPLY_INFO: u32 = 3;
pub const REPLY_META_CONTEXT: u32 = 4;
pub const REPLY_ERROR: u32 = 1 << 31;
pub const REPLY_UNSUPPORTED: u32 = REPLY_ERROR + 1;
pub const REPLY_POLICY: u32 = REPLY_ERROR + 2;
pub const REPLY_TLS_REQUIRED: u32 = REPLY_ERROR + 5;
pub const REPLY_UNKNOWN: u32 = REPLY_ERROR + 6;

pub const INFO_EXPORT: u16 = 0;
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Flags of an export.
pub const HAS_FLAGS: u16 = 1;
pub const READ_ONLY: u16 = 1 << 1;
pub const CAN_MULTI_CONN: u16 = 1 << 8;

pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

pub const COMMAND_READ: u16 = 0;
pub const COMMAND_DISCONNECT: u16 = 2;
pub const COMMAND_BLOCK_STATUS: u16 = 7;

/// The last chunk of a structured reply.
pub const CHUNK_DONE: u16 = 1;
pub const CHUNK_NONE: u16 = 0;
pub const CHUNK_DATA: u16 = 1;
pub const CHUNK_HOLE: u16 = 2;
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// Set in the type of all chunks that say an error.
pub const CHUNK_ERROR: u16 = 1 << 15;

/// Makes a request (28 bytes).
pub fn request(command: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    // No flags.
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// Reads so many bytes.
pub fn bytes<const N: usize>(from: &mut (impl Read + ?Sized)) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub fn u16_of(from: &mut (impl Read + ?Sized)) -> io::Result<u16> {
    bytes(from).map(u16::from_be_bytes)
}

pub fn u32_of(from: &mut (impl Read + ?Sized)) -> io::Result<u32> {
    bytes(from).map(u32::from_be_bytes)
}

pub fn u64_of(from: &mut (impl Read + ?Sized)) -> io::Result<u64> {
    bytes(from).map(u64::from_be_bytes)
}
