//! What is done to which requests, the commands that say so, and the waiting.

use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use nix::errno::Errno;

/// How often a stalled request looks whether its caller was killed.
const TICK: Duration = Duration::from_millis(100);

/// The operations that rules and counts can name.
#[rustfmt::skip]
pub(crate) const OPERATIONS: [&str; 23] = [
    "copy_file_range", "create", "fallocate", "flush", "fsync", "fsyncdir", "getattr", "link", "lookup", "lseek", "mkdir", "mknod", "open",
    "opendir", "read", "readdir", "readlink", "rename", "setattr", "statfs", "symlink", "unlink", "write",
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Effect {
    Delay(Duration),
    Stall,
    Fail(Errno),
    /// Where the file ends for reads.
    Cut(u64),
}

#[derive(Debug, PartialEq)]
struct Rule {
    effect: Effect,
    pattern: Vec<u8>,
    /// All if empty.
    operations: Vec<String>,
}

impl Rule {
    fn concerns(&self, operation: &str, paths: &[PathBuf]) -> bool {
        (self.operations.is_empty() || self.operations.iter().any(|name| name == operation))
            && paths.iter().any(|path| matches(&self.pattern, path.as_os_str().as_bytes()))
    }
}

/// Whether a pattern describes all of a path: `*` is any bytes (`/` too), `?` one byte, the rest is itself.
fn matches(pattern: &[u8], path: &[u8]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, _) => path.is_empty(),
        (Some((b'*', rest)), _) => (0..=path.len()).any(|taken| matches(rest, &path[taken..])),
        (Some((wanted, pattern)), Some((byte, path))) => (*wanted == b'?' || wanted == byte) && matches(pattern, path),
        (Some(_), None) => false,
    }
}

/// The rules in force and what they hold up, for all threads.
#[derive(Default)]
pub(crate) struct Rules {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    /// Grows with each `release`: what began to wait in an earlier one goes on.
    epoch: u64,
    is_ending: bool,
    stalled: usize,
    counts: HashMap<&'static str, u64>,
}

impl State {
    /// The latest of the rules that concern the request, of those that `pick` knows.
    fn latest<T>(&self, operation: &str, paths: &[PathBuf], pick: impl Fn(Effect) -> Option<T>) -> Option<T> {
        self.rules.iter().rev().filter(|rule| rule.concerns(operation, paths)).find_map(|rule| pick(rule.effect))
    }
}

impl Rules {
    /// Counts a request of the thread `pid` and holds it up as long as the rules say.
    ///
    /// # Errors
    /// What the rules say, EINTR if the caller was killed while stalled, EIO once [`Rules::end`] was called.
    pub(crate) fn begin(&self, operation: &'static str, paths: &[PathBuf], pid: u32) -> Result<(), Errno> {
        let mut state = self.state();
        *state.counts.entry(operation).or_default() += 1;
        let delay = state.latest(operation, paths, |effect| match effect {
            Effect::Delay(delay) => Some(delay),
            _ => None,
        });
        if let Some(delay) = delay {
            let epoch = state.epoch;
            let is_waiting = |state: &mut State| state.epoch == epoch && !state.is_ending;
            state = self.changed.wait_timeout_while(state, delay, is_waiting).expect("nothing panics under it").0;
        }
        if state.latest(operation, paths, |effect| (effect == Effect::Stall).then_some(())).is_some() {
            let epoch = state.epoch;
            let mut is_killed = false;
            state.stalled += 1;
            while state.epoch == epoch && !state.is_ending && !is_killed {
                drop(self.changed.wait_timeout(state, TICK).expect("nothing panics under it"));
                is_killed = has_fatal_signal(pid);
                state = self.state();
            }
            state.stalled -= 1;
            if is_killed {
                return Err(Errno::EINTR);
            }
        }
        if state.is_ending {
            return Err(Errno::EIO);
        }
        let failure = state.latest(operation, paths, |effect| match effect {
            Effect::Fail(errno) => Some(errno),
            _ => None,
        });
        failure.map_or(Ok(()), Err)
    }

    /// Where the content of this path ends for reads, in bytes.
    pub(crate) fn end_of_reads(&self, path: &Path) -> u64 {
        let cut = self.state().latest("read", &[path.to_owned()], |effect| match effect {
            Effect::Cut(bytes) => Some(bytes),
            _ => None,
        });
        cut.unwrap_or(u64::MAX)
    }

    /// Answers what waits, and all that comes, with EIO.
    pub(crate) fn end(&self) {
        self.state().is_ending = true;
        self.changed.notify_all();
    }

    /// Obeys one line of the control socket, and returns the answer.
    pub(crate) fn obey(&self, line: &str) -> String {
        self.try_obey(line.trim()).unwrap_or_else(|problem| format!("error: {problem}"))
    }

    fn try_obey(&self, line: &str) -> Result<String, String> {
        let mut state = self.state();
        match line.split_once(' ').unwrap_or((line, "")) {
            ("release", "") => {
                state.rules.clear();
                state.epoch += 1;
                self.changed.notify_all();
            }
            ("stalled", "") => return Ok(state.stalled.to_string()),
            ("count", "") => return Ok(state.counts.values().sum::<u64>().to_string()),
            ("count", operation) => {
                let operation = known(operation)?;
                return Ok(state.counts.get(operation).copied().unwrap_or_default().to_string());
            }
            ("reset", "") => state.counts.clear(),
            (verb, arguments) => state.rules.push(parse(verb, arguments)?),
        }
        Ok("ok".to_owned())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under it")
    }
}

fn known(operation: &str) -> Result<&str, String> {
    let is_known = OPERATIONS.contains(&operation);
    is_known.then_some(operation).ok_or_else(|| format!("no operation '{operation}'; there are {OPERATIONS:?}"))
}

fn parse(verb: &str, arguments: &str) -> Result<Rule, String> {
    let (arguments, operations) = arguments.rsplit_once(" ops=").unwrap_or((arguments, ""));
    let first_and_rest = || arguments.split_once(' ').unwrap_or((arguments, ""));
    let number = |text: &str| text.parse::<u32>().map_err(|error| format!("'{text}': {error}"));
    let (effect, pattern) = match verb {
        "delay" => {
            let (ms, pattern) = first_and_rest();
            (Effect::Delay(Duration::from_millis(number(ms)?.into())), if pattern.is_empty() { "*" } else { pattern })
        }
        "stall" => (Effect::Stall, arguments),
        "fail" => {
            let (name, pattern) = first_and_rest();
            let errno = (1..=133).map(Errno::from_raw).find(|errno| format!("{errno:?}") == name);
            (Effect::Fail(errno.ok_or_else(|| format!("no error '{name}'"))?), pattern)
        }
        "cut" => {
            let (pattern, bytes) = arguments.rsplit_once(' ').ok_or("usage: cut GLOB BYTES")?;
            (Effect::Cut(number(bytes)?.into()), pattern)
        }
        _ => return Err(format!("no command '{verb}'")),
    };
    if pattern.is_empty() {
        return Err("a pattern is missing; '/' is the root".to_owned());
    }
    let operations = operations.split(',').filter(|name| !name.is_empty());
    let operations = operations.map(|name| known(name).map(str::to_owned)).collect::<Result<_, _>>()?;
    Ok(Rule { effect, pattern: pattern.trim_start_matches('/').into(), operations })
}

/// Whether a thread waits to die of SIGKILL, as any fatal signal becomes unless it is caught. No for one we cannot see.
fn has_fatal_signal(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    pending.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok()).any(|mask| mask & (1 << (9 - 1)) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_describes_a_whole_path() {
        for (pattern, path, expected) in [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("a", "a/b", false),
            ("a/*", "a/b/c", true),
            ("*.vhd", "vms/x/1.vhd", true),
            ("*.vhd", "1.vhdx", false),
            ("?.vhd", "1.vhd", true),
            ("*b*d", "abcbd", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), path.as_bytes()), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn commands_are_answered() {
        let rules = Rules::default();
        for (command, answer) in [
            ("delay 20", "ok"),
            ("delay 20 a b/*.vhd ops=read,open", "ok"),
            ("stall /", "ok"),
            ("fail ESTALE *", "ok"),
            ("cut a b 512", "ok"),
            ("release", "ok"),
            ("stalled", "0"),
            ("count", "0"),
            ("count read", "0"),
            ("reset", "ok"),
            ("stall", "error: a pattern is missing; '/' is the root"),
            ("fail EWHAT *", "error: no error 'EWHAT'"),
            ("burn *", "error: no command 'burn'"),
        ] {
            assert_eq!(rules.obey(command), answer, "{command}");
        }
        assert!(rules.obey("stall * ops=reed").starts_with("error: no operation 'reed'"));
        let rule = parse("delay", "20 a b/*.vhd ops=read,open").expect("it was taken above");
        assert_eq!((rule.pattern.as_slice(), rule.operations.len()), (b"a b/*.vhd".as_slice(), 2));
    }
}
