//! The pools of a run, and their machines. All are asked side by side, and end with the run; one that does not answer is asked again
//! while the machines of the others are backed up, as often as a machine is tried again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use xapi::Pool;

use super::machines::{Machines, is_worth_another};
use crate::cli::pool::{Named, PoolArgs};
use crate::cli::replicas::ReplicaPools;
use crate::cli::text::Shown;
use crate::job::{self, Kind, Machine, select};
use crate::pool::{self, Limits, Mode, Options, USUAL_REPLICAS};

/// The pools that have answered.
#[derive(Default)]
pub struct Pools(Mutex<Answered>);

#[derive(Default)]
struct Answered {
    connected: BTreeMap<String, Arc<Connected>>,
    machines: Vec<Machine>,
    /// Whether one never did.
    has_failed: bool,
}

/// A pool that is logged in to.
pub struct Connected {
    pub pool: Pool,
    pub options: Options,
}

/// A pool that is asked.
pub struct Asked<'a> {
    pub name: &'a str,
    login: Named,
}

impl Pools {
    /// Asks all pools once. Returns those that are worth to be asked again.
    pub fn ask<'a>(&self, run: &Machines<'a>) -> Vec<Asked<'a>> {
        let mut all = Vec::with_capacity(run.job.pools.len());
        // One after the other: a person may be asked for a password.
        for name in &run.job.pools {
            match PoolArgs::configured(name, run.state_dir.clone()).named() {
                Ok(login) => all.push(Asked { name, login }),
                Err(error) => self.fail(run, name, &format!("{error:#}")),
            }
        }
        let answers = side_by_side(&all, |asked| asked.connect(run));
        let tried = all.into_iter().zip(answers);
        tried.filter_map(|(asked, answer)| self.take(run, &asked, answer, 0).then_some(asked)).collect()
    }

    /// Asks a pool again that did not answer. Returns which of its machines the job means.
    pub fn ask_again(&self, run: &Machines, asked: &Asked) -> Vec<Machine> {
        for tries in 1..=run.job.retries.vm {
            // Where that is ended, so is what follows.
            let _ = run.until.token().sleep(run.job.retries.pause, "wait before the next try");
            if !self.take(run, asked, asked.connect(run), tries) {
                break;
            }
        }
        let (mut meant, _) = select(&run.job.vms, &self.machines());
        meant.retain(|machine| machine.pool == asked.name);
        meant
    }

    /// Takes what a pool answered. Returns whether it is to be asked again.
    fn take(&self, run: &Machines, asked: &Asked, answer: pool::Result<(Connected, Vec<Machine>)>, tries: u32) -> bool {
        let name = asked.name;
        match answer {
            Ok((connected, machines)) => {
                let mut answered = self.lock();
                answered.connected.insert(name.to_owned(), Arc::new(connected));
                answered.machines.extend(machines);
            }
            Err(error) => match run.until.ended() {
                Some(ended) => self.fail(run, name, &ended.reason()),
                None if is_worth_another(&error) && tries < run.job.retries.vm => {
                    let pause = run.job.retries.pause.as_secs();
                    say!("xofs: {}: {}; it is asked again in {pause} s", Shown(name), Shown(&error.to_string()));
                    return true;
                }
                None => self.fail(run, name, &error.to_string()),
            },
        }
        false
    }

    /// Notes why a pool never answers.
    pub fn fail(&self, run: &Machines, name: &str, reason: &str) {
        self.lock().has_failed = true;
        run.recorder.never_tried(&format!("pool {name}"), name, reason);
    }

    /// Returns a pool that has answered.
    pub fn get(&self, name: &str) -> Option<Arc<Connected>> {
        self.lock().connected.get(name).cloned()
    }

    /// Returns all machines of those that have answered.
    pub fn machines(&self) -> Vec<Machine> {
        self.lock().machines.clone()
    }

    /// Whether a pool never answered.
    pub fn has_failed(&self) -> bool {
        self.lock().has_failed
    }

    fn lock(&self) -> MutexGuard<'_, Answered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Asked<'_> {
    /// Logs in, and lists what can be backed up there.
    fn connect(&self, run: &Machines) -> pool::Result<(Connected, Vec<Machine>)> {
        let pool = self.login.connect(&run.until.token())?;
        let machine = |vm: xapi::Record<xapi::record::Vm>| Machine {
            pool: self.name.to_owned(),
            uuid: vm.uuid.clone(),
            name: vm.name_label.clone(),
            tags: vm.tags.clone(),
            power_state: vm.power_state.clone(),
        };
        let mut machines: Vec<Machine> = pool::all_vms(&pool)?.into_iter().map(machine).collect();
        // A pool lists them in no order.
        machines.sort_by(|a, b| (&a.name, &a.uuid).cmp(&(&b.name, &b.uuid)));
        Ok((Connected { pool, options: options(run, &self.login) }, machines))
    }
}

/// Logs in to the pools that replicas are kept in, where that was not done. What cannot be used is said of each machine, as its
/// destination.
pub fn connect_replicas(run: &Machines, replicas: &mut ReplicaPools) {
    let names = replicas.missing(&run.job.srs);
    let logins: Vec<anyhow::Result<Named>> =
        names.iter().map(|name| PoolArgs::configured(name, run.state_dir.clone()).named()).collect();
    let answers = side_by_side(&logins, |login| match login {
        Ok(named) => named.connect(&run.until.token()),
        Err(error) => Err(pool::Error::new(pool::ErrorKind::Usage, format!("{error:#}"))),
    });
    names.into_iter().zip(answers).for_each(|(name, answer)| replicas.put(name, answer));
}

/// Does something with each of several at once.
fn side_by_side<T: Sync, R: Send>(all: &[T], act: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let act = &act;
    thread::scope(|scope| {
        let begin = |one| thread::Builder::new().name("job-pool".to_owned()).spawn_scoped(scope, move || act(one));
        let begun: Vec<_> = all.iter().map(|one| (one, begin(one))).collect();
        let end = |(one, thread): (&T, std::io::Result<thread::ScopedJoinHandle<R>>)| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            // Where the system refuses another thread, it is done by this one.
            Err(_) => act(one),
        };
        begun.into_iter().map(end).collect()
    })
}

fn options(run: &Machines, named: &Named) -> Options {
    let job = run.job;
    let replicas_kept = run.timed.map_or(USUAL_REPLICAS, |timed| timed.replicas);
    let (mode, incremental) = match &job.kind {
        Kind::Full(full) => (Mode::Full(full.compression), None),
        Kind::Incremental(incremental) => (Mode::Incremental, Some(incremental)),
    };
    Options {
        mode,
        job: Some(job.id.clone()),
        keeps_base: incremental.is_none_or(|how| how.keeps_base),
        tracks_changes: incremental.is_some_and(|how| how.tracks_changes),
        purges_data: incremental.is_some_and(|how| how.purges_data),
        nbd_connections: incremental.and_then(|how| usize::try_from(how.nbd_connections?).ok()),
        sr_paths: named.sr_paths.clone(),
        chain_patience: job.timeouts.chain,
        patience: job.timeouts.lock,
        replicas_kept: usize::try_from(replicas_kept).unwrap_or(usize::MAX),
        limits: limits(&job.limits),
    }
}

/// Returns what is done at once in pools, together with all other runs of this machine.
fn limits(of_job: &job::Limits) -> Limits {
    let count = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
    Limits {
        exports: count(of_job.exports),
        snapshots: count(of_job.snapshots),
        transfers: of_job.transfers.map(count),
        bandwidth: of_job.bandwidth,
    }
}
