//! What goes wrong in a night.

use std::time::Duration;

use xapi_simulator::failure::Failure;
use xapi_simulator::{Act, Fault, Site, Upset};

use crate::pool::MIB;
use crate::seeds::Random;

/// Longer than any run lasts.
const FOR_EVER: Duration = Duration::from_secs(3600);
/// How many requests pass at most before something goes wrong: about as many as a run makes.
const REQUESTS: usize = 250;
/// Times of machines, where a transfer stands still.
pub const LIMIT: &str = "6s";

/// When a run is ended.
#[derive(Debug, Clone)]
pub enum Moment {
    /// After so many requests of the pool.
    Requests(usize),
    /// When something has become visible in a repository.
    Publish,
    /// When a merge has begun.
    Merge,
}

/// What goes wrong.
#[derive(Debug, Clone)]
pub enum Trouble {
    Nothing,
    /// Something of the simulator's list.
    Fault(Fault),
    /// A transfer stands still, and the time of its machine is over.
    Stall(Fault),
    /// Somebody destroyed the snapshots that the next increments are relative to.
    NoBase,
    /// Nothing fits into the pool's storage.
    FullStorage,
    /// The machine goes down, or the process of the run alone is killed.
    Killed {
        moment: Moment,
        is_machine: bool,
        delay: Duration,
    },
    /// Somebody ends the run.
    Terminated(Moment),
    /// A repository, by its number, is not there.
    Away(usize),
    /// Nothing may be forgotten in it.
    Kept(usize),
    /// Another program holds the locks of all machines in it.
    Locked(usize),
}

impl Trouble {
    /// Draws one; less than half of the nights are quiet.
    pub fn any(random: &mut Random, transfers: &[Site]) -> Self {
        let millis = |random: &mut Random, most| Duration::from_millis(random.below(most) as u64);
        let bytes = |random: &mut Random| random.below(usize::try_from(MIB).expect("small")) as u64;
        let site = |random: &mut Random| transfers[random.below(transfers.len())].clone();
        let transfer = |random: &mut Random, act| Fault::new(site(random), act).after(bytes(random));
        let call = |random: &mut Random, act| Fault::call("*", act).after(random.below(REQUESTS) as u64);
        let moment = |random: &mut Random| match random.below(4) {
            0 => Moment::Merge,
            1 => Moment::Publish,
            _ => Moment::Requests(random.below(REQUESTS)),
        };
        let refused = Failure::internal("not now");
        match random.below(26) {
            0 => Self::Fault(transfer(random, Act::Cut).times(2)),
            1 => Self::Fault(transfer(random, Act::Fail(Failure::device()))),
            2 => Self::Stall(transfer(random, Act::Delay(FOR_EVER))),
            3 => Self::Fault(call(random, Act::Upset(Upset::LoseSessions))),
            4 => Self::Fault(call(random, Act::Upset(Upset::RestartToolstack))),
            5 => Self::Fault(transfer(random, Act::Upset(Upset::RestartToolstack))),
            6 => Self::Fault(Fault::call("VM.snapshot", Act::Fail(refused)).times([1, 4][random.below(2)])),
            7 => Self::NoBase,
            8 => Self::Fault(transfer(random, Act::Upset(Upset::DropSnapshots))),
            9 => Self::FullStorage,
            10 | 11 => {
                let (moment, delay) = (moment(random), millis(random, 60));
                Self::Killed { moment, is_machine: random.below(2) == 0, delay }
            }
            12 => Self::Terminated(moment(random)),
            13 => Self::Away(random.below(2)),
            14 => Self::Kept(random.below(2)),
            15 => Self::Locked(random.below(2)),
            _ => Self::Nothing,
        }
    }

    /// Whether it may end the run before its report.
    pub fn is_kill(&self) -> bool {
        matches!(self, Self::Killed { .. })
    }
}
