//! Where the time of a transfer goes: what each stage moved, how long it worked, how long it waited for those before and behind
//! it; and which of them the others waited for.
//!
//! ```text
//! transfer ─► probe    one stage, counted by all its threads ─► history: its bytes over time
//!    │           └► disk, storage   what is a stage of its own, whoever uses it
//!    └► reading, at any time ─► bottleneck: the closing line
//!                            └► json
//! ```
//!
//! Invariant: a moment of a thread is counted once, when it is over. What is timed within another stage's work is not work of that one.
//! So is what happens within where nobody knows of transfers: waiting for the limit of bandwidth ([`held_back`]), the way to a source and
//! back ([`on_the_way`]), and decoding ([`::storage::decoding`]).

mod bottleneck;
mod counter;
mod disk;
mod history;
mod json;
mod small;
mod spent;
mod stage;
mod storage;
mod transfer;
mod within;

pub use self::bottleneck::Bottleneck;
pub use self::counter::Probe;
pub use self::disk::Counted;
pub use self::json::{stages_to_json, transfer_to_json};
pub use self::small::Small;
pub use self::stage::{Connections, Crew, Kind, Stage, Subject, Way};
pub use self::storage::CountedStorage;
pub use self::transfer::{Reading, StageReading, Transfer};
pub use self::within::{held_back, on_the_way};
