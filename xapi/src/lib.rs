//! A client of XAPI, the interface of XCP-ng and XenServer pools: blocking, with a token to stop whatever waits.

mod address;
mod cancel;
mod connections;
mod error;
mod event;
mod export;
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
mod storage;
mod task;
mod tls;
mod transfer;
mod trust;
mod wire;

pub use address::Address;
pub use cancel::Cancel;
pub use error::{Error, ErrorKind, Result};
pub use event::{Event, Operation};
pub use export::{Compression, Export, ExportOptions};
pub use import::Import;
pub use listen::{Events, Listener, Subject};
pub use pool::{Pool, Settings};
pub use record::{Class, Record};
pub use reference::Ref;
pub use task::{Outcome, Task};
pub use tls::{Tls, TlsStream};
pub use transfer::Format;
pub use trust::{Fingerprint, Trust, Untrusted};
