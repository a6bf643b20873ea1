//! A client of XAPI, the interface of XCP-ng and XenServer pools: blocking, with a token to stop whatever waits.
//!
//! ```text
//! machine, storage, record ─► Pool ─► session ─► connections ─► wire ─► tls, trust    calls · who is logged in · HTTP · certificates
//!                              │         └► master, rpc                                whom to ask · the envelope of a call
//! export, import ─► transfer ──┤                                                       bytes of disks and machines
//! task ─► event ◄─ listen ─────┤                                                       what is under way, what changed
//!                              └► keeper                                               what long transfers need
//! ```
//!
//! All handles of a [`Pool`] share one session; a [`Cancel`] stops what is done by one of them. What only reads is repeated when
//! a connection breaks; what may have changed something never is: its outcome is unknown then ([`ErrorKind::Unknown`]), and the
//! objects tell. The server is not trusted: lengths, numbers and waits are bounded, and its secrets are never shown.
//! Sources of facts: XAPI (xapi-project/xen-api), by file where they are used.

mod address;
mod budget;
mod cancel;
mod changed_blocks;
mod connections;
mod error;
mod event;
mod export;
mod exports;
mod import;
mod keeper;
mod listen;
mod machine;
mod master;
mod pool;
pub mod record;
mod reference;
mod rpc;
mod session;
mod slots;
mod storage;
mod task;
mod tls;
mod transfer;
mod trust;
mod wire;

pub use address::Address;
pub use budget::Budget;
pub use cancel::Cancel;
pub use changed_blocks::{ChangedBlocks, Changes};
pub use error::{Error, ErrorKind, Result};
pub use event::{Event, Operation};
pub use export::{Compression, Export, ExportOptions};
pub use exports::{NbdExport, NbdOptions, NbdPlace};
pub use import::{IMPORT_OF_A_MACHINE, Import};
pub use listen::{Events, Listener, Subject};
pub use pool::{Pool, Settings};
pub use record::{Class, Record};
pub use reference::Ref;
pub use slots::{Slot, Slots};
pub use task::{Outcome, Task};
pub use tls::{Tls, TlsStream};
pub use transfer::Format;
pub use trust::{Fingerprint, Trust, Untrusted};
