//! Taking from this process all that reading a disk does not need: files, network, other processes, privileges, memory.
//!
//! What remains is one open socket, memory up to a limit, and the system calls below; any other ends the process.

use std::io;

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};
use rustix::time::{ClockId, clock_gettime};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Address space of a worker (bytes): the program itself, what a reader keeps of a volume, and a directory's entries.
const MEMORY: u64 = 1 << 30;

/// Stack of a worker (bytes).
const STACK: u64 = 8 << 20;

/// Time on a processor that a request may take, in seconds; at the end of it the system ends the process.
const PROCESSOR_SECONDS: u64 = 30;

/// Time on a processor that a worker may take in all its life, in seconds: one that ignores that its mount is gone ends, too.
const LIFE_SECONDS: u64 = 3600;

/// The user and group that own nothing. Source: Linux, `DEFAULT_OVERFLOWUID`.
const NOBODY: u32 = 65_534;

/// What a process needs that computes, has memory and speaks through one socket; and to end.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Confines the process, for good. It must have one thread, and no open file that it should not keep.
///
/// # Errors
/// What the system says; the process must then read nothing.
pub(super) fn enter() -> io::Result<()> {
    limit(Resource::As, MEMORY)?;
    limit(Resource::Stack, STACK)?;
    limit(Resource::Cpu, LIFE_SECONDS)?;
    for resource in [Resource::Core, Resource::Fsize, Resource::Nofile, Resource::Nproc] {
        limit(resource, 0)?;
    }
    if rustix::process::geteuid().is_root() {
        let (user, group) = (rustix::process::Uid::from_raw(NOBODY), rustix::process::Gid::from_raw(NOBODY));
        set_thread_groups(&[])?;
        set_thread_res_gid(group, group, group)?;
        drop_bounding()?;
        set_thread_res_uid(user, user, user)?;
    }
    // Also of who was given rights without being root: then a change of user takes none away. What is in no permitted set leaves the
    // ambient one, too. Source: capabilities(7).
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // The first look at a clock asks the system where it is, which is not allowed later.
    begin_request()?;
    // Sets no_new_privs, too.
    seccompiler::apply_filter(&filter().map_err(io::Error::other)?).map_err(io::Error::other)
}

/// Lets no program that is started from here have any right: none can be started, and if one could, it would be nobody's.
fn drop_bounding() -> rustix::io::Result<()> {
    for capability in CapabilitySet::all() {
        match remove_capability_from_bounding_set(capability) {
            // An older kernel that does not know it, or a container that may not.
            Err(Errno::INVAL | Errno::PERM) => {}
            removed => removed?,
        }
    }
    Ok(())
}

/// Gives the request that begins its time on a processor.
///
/// # Errors
/// What the system says.
pub(super) fn begin_request() -> io::Result<()> {
    let used = clock_gettime(ClockId::ProcessCPUTime).tv_sec;
    let maximum = getrlimit(Resource::Cpu).maximum;
    let end = u64::try_from(used).unwrap_or(0) + PROCESSOR_SECONDS;
    let current = maximum.map_or(end, |maximum| maximum.min(end));
    Ok(setrlimit(Resource::Cpu, Rlimit { current: Some(current), maximum })?)
}

/// Lowers a limit; what is lower already stays.
fn limit(resource: Resource, most: u64) -> io::Result<()> {
    let maximum = getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most));
    Ok(setrlimit(resource, Rlimit { current: Some(maximum), maximum: Some(maximum) })?)
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let condition = |argument, compare, value| SeccompCondition::new(argument, SeccompCmpArgLen::Qword, compare, value);
    let mut rules: Vec<(i64, Vec<SeccompRule>)> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // Memory that is no program.
    let executable = u64::try_from(libc::PROT_EXEC).expect("a flag");
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let plain = condition(2, SeccompCmpOp::MaskedEq(executable), 0)?;
        rules.push((call, vec![SeccompRule::new(vec![plain])?]));
    }
    // The time of a request, within the time of the process.
    let time = u64::from(libc::RLIMIT_CPU);
    let own_time = vec![condition(0, SeccompCmpOp::Eq, 0)?, condition(1, SeccompCmpOp::Eq, time)?];
    rules.push((libc::SYS_prlimit64, vec![SeccompRule::new(own_time)?]));
    // Builds with checks look whether a descriptor is open before they close it.
    let flags = u64::try_from(libc::F_GETFD).expect("a command");
    rules.push((libc::SYS_fcntl, vec![SeccompRule::new(vec![condition(1, SeccompCmpOp::Eq, flags)?])?]));
    // abort(3): a signal to itself.
    let own = u64::from(std::process::id());
    rules.push((libc::SYS_tgkill, vec![SeccompRule::new(vec![condition(0, SeccompCmpOp::Eq, own)?])?]));
    let architecture = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules.into_iter().collect(), SeccompAction::KillProcess, SeccompAction::Allow, architecture)?
        .try_into()
}
