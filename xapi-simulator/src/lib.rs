//! A simulated pool: as restrictive as a real one, with faults on demand.
//!
//! What tests and programs use:
//!
//! - [`scene`]: what a pool is made of; [`simulator`]: one that runs
//! - [`fault`] and [`upset`]: what goes wrong; [`log`]: what was asked for and served
//!
//! What answers, from the outside in:
//!
//! - [`node`]: hosts with addresses and ports; [`certificate`]: what they prove themselves with
//! - [`http`]: requests and transfers; [`disk_server`]: NBD
//! - [`rpc`]: calls in JSON, and in XML by [`xml`]; [`accessor`] and [`methods`]: what they do
//! - [`session`], [`task`], [`event`], [`attach`], [`disks`], [`keeper`]: what lasts longer than a call
//! - [`world`]: what all threads share; [`builder`]: how it is made of a scene
//! - [`store`]: objects, of the classes of [`schema`], in the types of [`value`], or the errors of [`failure`]; [`clock`]: their time
//!
//! What disks hold and how it travels:
//!
//! - [`content`]: a disk, a chain of [`layer`]s; [`coalesce`] merges them, [`cbt`] logs what was written
//! - [`file_sr`]: the files that a repository keeps layers in
//! - [`guest`]: seeded writes to a disk, out of [`random`]
//! - [`vhd`] and [`raw`]: a disk as a stream, out and in
//! - [`archive`]: a VM as an XVA, out and in
//! - [`nbd`]: the server that disks are read from at random; [`mod@line`]: a long way to it
//! - [`transfer`]: what a transfer tells on its way
//!
//! ```text
//! http, disk_server → rpc → accessor, methods → world → store, disks
//! ```

pub mod accessor;
pub mod archive;
pub mod attach;
pub mod builder;
pub mod cbt;
pub mod certificate;
pub mod clock;
pub mod coalesce;
pub mod content;
pub mod disk_server;
pub mod disks;
pub mod event;
pub mod failure;
pub mod fault;
pub mod file_sr;
pub mod guest;
pub mod http;
pub mod keeper;
pub mod layer;
pub mod line;
pub mod log;
pub mod methods;
pub mod nbd;
pub mod node;
pub mod random;
pub mod raw;
pub mod rpc;
pub mod scene;
pub mod schema;
pub mod session;
pub mod simulator;
pub mod store;
pub mod task;
pub mod transfer;
pub mod upset;
pub mod value;
pub mod vhd;
pub mod world;
pub mod xml;

pub use fault::{Act, Fault, Site};
pub use scene::Scene;
pub use schema::Class;
pub use simulator::Simulator;
pub use upset::Upset;
