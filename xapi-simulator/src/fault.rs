//! What goes wrong on demand: where, and what then.
//!
//! As text (`--fault`): `SITE [of NAME] [after SIZE] ACT [xTIMES]`, for example
//!
//! ```text
//! call VDI.list_changed_blocks fail SR_BACKEND_FAILURE_460 x2      the first two calls fail
//! export of web01 after 6MiB page                                  an error page in the third block of a disk of web01
//! nbd after 1MiB cut x3                                            three connections close in the middle of a read
//! import after 4MiB full                                           the SR has no more room
//! export after 2MiB restart                                        the toolstack restarts while a disk is exported
//! ```

use crate::failure::Failure;
use crate::upset::Upset;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Where something goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Site {
    /// A call by its name (`VM.snapshot`), whether asynchronous or not; `*` is any.
    Call(String),
    /// `/export_raw_vdi`.
    Export,
    /// `/import_raw_vdi`.
    Import,
    /// `/export`.
    ExportVm,
    /// `/import`.
    ImportVm,
    /// Reads over NBD; bytes count for one connection.
    Nbd,
}

/// What goes wrong there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// A call, or the task of a transfer, fails with this; a transfer gets its error page.
    Fail(Failure),
    /// It takes longer.
    Delay(Duration),
    /// A call is done, and its answer is lost with the connection; a transfer's connection ends.
    Cut,
    /// A call is not done, and its connection ends.
    Refuse,
    /// `VDI.list_changed_blocks` answers so many bytes instead of its own number.
    Bitmap(usize),
    /// Something happens to the pool; who was there when it happened goes on, if it can.
    Upset(Upset),
}

/// Something that goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub site: Site,
    /// Only for the disk whose name or uuid this is or that belongs to a machine of that name; for calls, with an argument like this.
    pub of: Option<String>,
    /// For transfers, how many bytes pass before; for calls, how many calls.
    pub after: u64,
    /// What then.
    pub act: Act,
    /// How often.
    pub times: u32,
}

impl Fault {
    /// Returns a fault that strikes once, at once.
    pub fn new(site: Site, act: Act) -> Fault {
        Fault { site, of: None, after: 0, act, times: 1 }
    }

    /// Returns a fault of a call.
    pub fn call(method: &str, act: Act) -> Fault {
        Fault::new(Site::Call(method.to_owned()), act)
    }

    /// Has it strike after so many bytes of a transfer, or calls.
    pub fn after(mut self, after: u64) -> Fault {
        self.after = after;
        self
    }

    /// Has it strike so often.
    pub fn times(mut self, times: u32) -> Fault {
        self.times = times;
        self
    }

    /// Has it strike only what has this name or uuid.
    pub fn of(mut self, name: &str) -> Fault {
        self.of = Some(name.to_owned());
        self
    }
}

/// The faults that have not struck yet, and how often others did.
#[derive(Debug, Default)]
pub struct Faults(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    waiting: Vec<Fault>,
    struck: u64,
}

impl Faults {
    /// Adds one; the older ones strike first.
    pub fn add(&self, fault: Fault) {
        self.state().waiting.push(fault);
    }

    /// Removes all.
    pub fn clear(&self) {
        self.state().waiting.clear();
    }

    /// Returns how many have not struck as often as they should.
    pub fn count(&self) -> usize {
        self.state().waiting.len()
    }

    /// Returns how often any has struck.
    pub fn struck(&self) -> u64 {
        self.state().struck
    }

    /// Returns what strikes a call that has `names` in its arguments.
    pub fn at_call(&self, method: &str, names: &[&str]) -> Option<Act> {
        let mut state = self.state();
        for position in 0..state.waiting.len() {
            let fault = &mut state.waiting[position];
            let Site::Call(site) = &fault.site else { continue };
            if (site != "*" && site != method) || !is_of(fault, names) {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
                continue;
            }
            return state.take(position);
        }
        None
    }

    /// Returns what strikes a transfer of what has `names`, after `done` bytes.
    pub fn at_transfer(&self, site: &Site, names: &[&str], done: u64) -> Option<Act> {
        let mut state = self.state();
        let is_due = |fault: &Fault| fault.site == *site && fault.after <= done && is_of(fault, names);
        let position = state.waiting.iter().position(is_due)?;
        state.take(position)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, position: usize) -> Option<Act> {
        let fault = self.waiting.get_mut(position)?;
        let act = fault.act.clone();
        fault.times = fault.times.saturating_sub(1);
        if fault.times == 0 {
            self.waiting.remove(position);
        }
        self.struck += 1;
        Some(act)
    }
}

fn is_of(fault: &Fault, names: &[&str]) -> bool {
    fault.of.as_deref().is_none_or(|of| names.contains(&of))
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Fault, String> {
        let mut words = text.split_whitespace().peekable();
        let mut next = |what: &str| words.next().ok_or_else(|| format!("{what} is missing in the fault {text:?}"));
        let site = match next("its site")? {
            "call" => Site::Call(next("the method")?.to_owned()),
            "export" => Site::Export,
            "import" => Site::Import,
            "export-vm" => Site::ExportVm,
            "import-vm" => Site::ImportVm,
            "nbd" => Site::Nbd,
            other => {
                return Err(format!("{other:?} is no site of faults: call, export, import, export-vm, import-vm, nbd"));
            }
        };
        let mut fault = Fault::new(site, Act::Cut);
        let mut word = next("what happens")?;
        loop {
            match word {
                "of" => fault.of = Some(next("the name")?.to_owned()),
                "after" => fault.after = parse_size(next("the number")?)?,
                _ => break,
            }
            word = next("what happens")?;
        }
        fault.act = match word {
            "fail" => {
                let mut code = next("the error")?.split(',');
                Act::Fail(Failure::new(code.next().unwrap_or_default(), code))
            }
            "page" => Act::Fail(Failure::device()),
            "full" => Act::Fail(Failure::no_space()),
            "cut" => Act::Cut,
            "refuse" => Act::Refuse,
            "stall" => Act::Delay(Duration::from_secs(3600)),
            "delay" => Act::Delay(parse_seconds(next("the seconds")?)?),
            "bitmap" => Act::Bitmap(next("the bytes")?.parse().map_err(|_| format!("no number of bytes in {text:?}"))?),
            "lose-sessions" => Act::Upset(Upset::LoseSessions),
            "lose-tasks" => Act::Upset(Upset::LoseTasks),
            "restart" => Act::Upset(Upset::RestartToolstack),
            "reboot" => Act::Upset(Upset::Reboot(0, parse_seconds(next("the seconds")?)?)),
            "new-master" => Act::Upset(Upset::ChangeMaster(1)),
            "coalesce" => Act::Upset(Upset::Coalesce),
            "fill" => Act::Upset(Upset::FillStorage),
            "drop-snapshots" => Act::Upset(Upset::DropSnapshots),
            other => {
                return Err(format!(
                    "{other:?} is nothing that happens: fail CODE[,TEXT...], page, full, cut, refuse, stall, delay SECONDS, \
                     bitmap BYTES, lose-sessions, lose-tasks, restart, reboot SECONDS, new-master, coalesce, \
                     fill, drop-snapshots"
                ));
            }
        };
        if let Some(times) = words.next() {
            let number = times.strip_prefix('x').and_then(|digits| digits.parse().ok());
            fault.times = number.ok_or_else(|| format!("{times:?} in the fault {text:?} is not like x3"))?;
        }
        match words.next() {
            Some(word) => Err(format!("{word:?} in the fault {text:?} is too much")),
            None => Ok(fault),
        }
    }
}

/// Parses a size in bytes, with KiB, MiB, GiB or TiB behind it.
///
/// # Errors
/// If it is none, with a text that says so.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|last: char| last.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return Err(format!("{text:?} is no size: a number of bytes, or with KiB, MiB, GiB, TiB")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no size: it has no number"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

/// Parses a number of seconds, with a fraction or without.
///
/// # Errors
/// If it is none, with a text that says so.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("{text:?} is no number of seconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_from_text() {
        let fault: Fault = "export of web01 after 6MiB page x2".parse().unwrap();
        assert_eq!(fault, Fault::new(Site::Export, Act::Fail(Failure::device())).of("web01").after(6 << 20).times(2));
        let fault: Fault = "call VM.snapshot fail A,b,c".parse().unwrap();
        assert_eq!(fault, Fault::call("VM.snapshot", Act::Fail(Failure::new("A", ["b", "c"]))));
        for wrong in
            ["", "call", "export", "export after", "nbd after x cut", "nbd cut y", "nbd cut x1 x", "elsewhere cut"]
        {
            assert!(wrong.parse::<Fault>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_fault_strikes_as_often_as_it_should_and_only_what_it_should() {
        let faults = Faults::default();
        faults.add(Fault::new(Site::Nbd, Act::Cut).of("a").after(100).times(2));
        assert_eq!(faults.at_transfer(&Site::Nbd, &["b"], 100), None);
        assert_eq!(faults.at_transfer(&Site::Nbd, &["a"], 99), None);
        assert_eq!(faults.at_transfer(&Site::Nbd, &["a"], 100), Some(Act::Cut));
        assert_eq!(faults.at_transfer(&Site::Nbd, &["a"], 100), Some(Act::Cut));
        assert_eq!((faults.count(), faults.struck()), (0, 2));
        faults.add(Fault::call("*", Act::Cut).after(1));
        assert_eq!(faults.at_call("VM.start", &[]), None);
        assert_eq!(faults.at_call("VM.start", &[]), Some(Act::Cut));
    }
}
