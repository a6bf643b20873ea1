//! A client of the NBD protocol that reads, blocking, over one connection that many threads share.
//!
//! ```text
//! Uri ─► Address ─► Stream ─► handshake ─► Connection ─► reply       where an export is · bytes both ways · options ·
//!                                              └► wire               requests and who waits for them · what answers them
//! ```
//!
//! Spoken is the fixed newstyle negotiation with `NBD_OPT_GO` (else `NBD_OPT_EXPORT_NAME`), structured replies and
//! metadata contexts where the server has them, `NBD_CMD_READ`, `NBD_CMD_BLOCK_STATUS` and `NBD_CMD_DISC`. Nothing here
//! writes. A [`Stream`] may be anything that carries bytes; what encrypts one ([`Upgrade`]) belongs to who makes it.
//!
//! The server is not trusted: no length is believed before it was compared with what was asked for, and what does not fit
//! ends the connection. Source of every fact: NetworkBlockDevice, `doc/proto.md`.

mod connection;
mod error;
mod handshake;
mod reply;
mod stream;
mod uri;
mod wire;

pub use connection::{Connection, Status};
pub use error::{Error, ErrorKind, Result};
pub use handshake::{ALLOCATION, Export, Options, dirty_bitmap};
pub use stream::{Stream, Upgrade};
pub use uri::{Address, Uri};
