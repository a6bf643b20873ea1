//! What goes wrong in a round: one thing of each kind, at a moment that a seed says.

use std::time::Duration;

use rustix::process::Signal;
use xapi_simulator::failure::Failure;
use xapi_simulator::value::Reference;
use xapi_simulator::{Act, Fault, Site, Upset};

use crate::pool::MIB;
use crate::seeds::Random;

/// Longer than any run lasts.
const FOR_EVER: Duration = Duration::from_secs(3600);
/// How far a transfer comes at most before something goes wrong with it (bytes): increments are small.
const SOON: u64 = MIB;
/// How many calls pass at most before something goes wrong with one: as many as a run makes.
const CALLS: usize = 100;

/// A kind of what goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The pool stops answering in the middle of a transfer or a call, and somebody ends the run.
    Stall,
    /// A transfer's connection ends.
    Cut,
    /// A transfer fails.
    Fails,
    /// It waits now and then.
    Slow,
    LoseSessions,
    RestartToolstack,
    LoseTasks,
    Reboot,
    NewMaster,
    Coalesce,
    /// Nothing more fits into the SR from some moment on.
    Fill,
    /// The snapshot does not fit.
    FullSnapshot,
    /// What is imported does not fit.
    FullImport,
    /// Somebody destroys the snapshot that the next increment is relative to.
    DropBase,
    /// Somebody destroys all snapshots.
    DropSnapshots,
    NoChangedBlocks,
    WrongBitmap,
    /// Others have all connections that the hosts serve by NBD, for a while.
    Taken,
    /// A call is done, and its answer lost.
    CallCut,
    /// A call is not done, and its connection ends.
    CallRefused,
    CallFails,
    CallSlow,
    /// A snapshot is taken, or a disk made, and the answer is lost.
    MadeUnknown,
    /// Something holds a disk that is to be destroyed.
    InUse,
    Terminated,
    Killed,
    /// Killed between the snapshot and its entries.
    KilledAtSnapshot,
    /// Killed while disks are taken from a halted machine.
    KilledDetached,
    /// Killed while a backup becomes visible.
    KilledAtPublish,
    /// Killed while bytes go into the pool, or just afterwards.
    KilledAtImport,
}

impl Kind {
    /// What a backup meets.
    pub const OF_BACKUPS: [Self; 28] = [
        Self::Stall,
        Self::Cut,
        Self::Fails,
        Self::Slow,
        Self::LoseSessions,
        Self::RestartToolstack,
        Self::LoseTasks,
        Self::Reboot,
        Self::NewMaster,
        Self::Coalesce,
        Self::Fill,
        Self::FullSnapshot,
        Self::DropBase,
        Self::DropSnapshots,
        Self::NoChangedBlocks,
        Self::WrongBitmap,
        Self::Taken,
        Self::CallCut,
        Self::CallRefused,
        Self::CallFails,
        Self::CallSlow,
        Self::MadeUnknown,
        Self::InUse,
        Self::Terminated,
        Self::Killed,
        Self::KilledAtSnapshot,
        Self::KilledDetached,
        Self::KilledAtPublish,
    ];
    /// What a restore meets.
    pub const OF_RESTORES: [Self; 18] = [
        Self::Stall,
        Self::Cut,
        Self::Fails,
        Self::Slow,
        Self::LoseSessions,
        Self::RestartToolstack,
        Self::LoseTasks,
        Self::Reboot,
        Self::NewMaster,
        Self::Fill,
        Self::FullImport,
        Self::CallCut,
        Self::CallRefused,
        Self::CallFails,
        Self::MadeUnknown,
        Self::Terminated,
        Self::Killed,
        Self::KilledAtImport,
    ];

    /// Whether it may end the run without a word.
    pub fn is_kill(self) -> bool {
        matches!(
            self,
            Self::Killed | Self::KilledAtSnapshot | Self::KilledDetached | Self::KilledAtPublish | Self::KilledAtImport
        )
    }

    /// Whether it may end the run as somebody wants it.
    pub fn is_termination(self) -> bool {
        matches!(self, Self::Stall | Self::Terminated)
    }
}

/// When a process gets its signal.
#[derive(Debug, Clone)]
pub enum Moment {
    /// After so many requests.
    Requests(usize),
    /// After one like this.
    Request(&'static str),
    /// When something has changed among what a repository has of the machine.
    Publish,
}

/// What goes wrong.
#[derive(Debug, Clone)]
pub enum Trouble {
    /// Something of the simulator's list.
    Fault(Fault),
    /// The same, after which somebody ends the run.
    Stall(Fault),
    /// A signal, this long after a moment.
    Signal(Signal, Moment, Duration),
    /// The bases are removed after so many requests.
    NoBase(usize),
    /// The connections by NBD are taken until so long after somebody asked where they are.
    Taken(Duration),
}

impl Trouble {
    /// Makes one of a kind; transfers are at one of these sites, if there are any.
    pub fn of(kind: Kind, random: &mut Random, transfers: &[Site]) -> Self {
        let bytes = |random: &mut Random| random.below(usize::try_from(SOON).expect("small")) as u64;
        let transfer = |random: &mut Random, act| match transfers {
            // What is read out of files goes through no server.
            [] => Fault::call("*", act).after(random.below(CALLS) as u64),
            sites => Fault::new(sites[random.below(sites.len())].clone(), act).after(bytes(random)),
        };
        let millis = |random: &mut Random, most| Duration::from_millis(random.below(most) as u64);
        let upset = |random: &mut Random, upset| {
            let is_at_call = random.below(2) == 0;
            let fault = transfer(random, Act::Upset(upset));
            if is_at_call {
                return Self::Fault(Fault {
                    site: Site::Call("*".to_owned()),
                    after: random.below(CALLS) as u64,
                    ..fault
                });
            }
            Self::Fault(fault)
        };
        let call = |random: &mut Random, act| Self::Fault(Fault::call("*", act).after(random.below(CALLS) as u64));
        let signal = |signal, moment, delay| Self::Signal(signal, moment, delay);
        match kind {
            Kind::Stall => Self::Stall(transfer(random, Act::Delay(FOR_EVER))),
            Kind::Cut => {
                let times = [1, 1, 2, 3][random.below(4)];
                Self::Fault(transfer(random, Act::Cut).times(times))
            }
            Kind::Fails => Self::Fault(transfer(random, Act::Fail(Failure::device()))),
            Kind::Slow => {
                let time = millis(random, 300);
                Self::Fault(transfer(random, Act::Delay(time)).times(3))
            }
            Kind::LoseSessions => upset(random, Upset::LoseSessions),
            Kind::RestartToolstack => upset(random, Upset::RestartToolstack),
            Kind::LoseTasks => upset(random, Upset::LoseTasks),
            Kind::Reboot => {
                let (host, away) = (random.below(2), Duration::from_millis(100) + millis(random, 400));
                upset(random, Upset::Reboot(host, away))
            }
            Kind::NewMaster => upset(random, Upset::ChangeMaster(1)),
            Kind::Coalesce => upset(random, Upset::Coalesce),
            Kind::Fill => upset(random, Upset::FillStorage),
            Kind::FullSnapshot => Self::Fault(Fault::call("VM.snapshot", Act::Fail(Failure::no_space()))),
            Kind::FullImport => Self::Fault(transfer(random, Act::Fail(Failure::no_space()))),
            Kind::DropBase => Self::NoBase(random.below(CALLS)),
            Kind::DropSnapshots => upset(random, Upset::DropSnapshots),
            Kind::NoChangedBlocks => {
                let failure = Failure::storage(460, "Failed to calculate changed blocks for given VDIs.");
                let act = if random.below(2) == 0 { Act::Fail(failure) } else { Act::Cut };
                Self::Fault(Fault::call("VDI.list_changed_blocks", act).times([1, 2, 3][random.below(3)]))
            }
            // No disk here has as many pieces.
            Kind::WrongBitmap => {
                let size = if random.below(2) == 0 { random.below(8) } else { 64 + random.below(64) };
                Self::Fault(Fault::call("VDI.list_changed_blocks", Act::Bitmap(size)))
            }
            Kind::Taken => Self::Taken(Duration::from_millis(100) + millis(random, 900)),
            Kind::CallCut => call(random, Act::Cut),
            Kind::CallRefused => call(random, Act::Refuse),
            Kind::CallFails => call(random, Act::Fail(Failure::internal("not now"))),
            Kind::CallSlow => {
                let time = millis(random, 800);
                call(random, Act::Delay(time))
            }
            Kind::MadeUnknown => {
                let restores = transfers.iter().any(|site| matches!(site, Site::Import | Site::ImportVm));
                let methods = if restores { ["VDI.create", "VM.create"] } else { ["VM.snapshot"; 2] };
                Self::Fault(Fault::call(methods[random.below(2)], Act::Cut))
            }
            Kind::InUse => {
                let failure = Failure::in_use(&Reference::from("OpaqueRef:1"), "destroy");
                Self::Fault(Fault::call("VDI.destroy", Act::Fail(failure)).times([1, 4][random.below(2)]))
            }
            Kind::Terminated => signal(Signal::TERM, Moment::Requests(random.below(CALLS)), millis(random, 60)),
            Kind::Killed => signal(Signal::KILL, Moment::Requests(random.below(CALLS)), millis(random, 60)),
            Kind::KilledAtSnapshot => signal(Signal::KILL, Moment::Request("Async.VM.snapshot"), millis(random, 40)),
            Kind::KilledDetached => signal(Signal::KILL, Moment::Request("VBD.destroy"), millis(random, 40)),
            Kind::KilledAtPublish => signal(Signal::KILL, Moment::Publish, millis(random, 40)),
            Kind::KilledAtImport => {
                let path = if transfers == [Site::ImportVm] { "PUT /import/" } else { "PUT /import_raw_vdi/" };
                signal(Signal::KILL, Moment::Request(path), millis(random, 250))
            }
        }
    }
}
