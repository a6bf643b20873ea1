//! Signals that ask the process to end: taken by a thread that waits for them, so that it can clean up with ordinary code.

#![expect(unsafe_code, reason = "masking signals and waiting for them are system calls without a safe wrapper here")]

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{io, ptr, thread};

use anyhow::Context;

/// The signals that ask to end.
const ENDING: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Keeps the ending signals from ending this thread and those it starts from now on, and runs `act` in a thread of its
/// own for each that comes.
///
/// Call it before other threads are started: one that is running already would still be ended by a signal, and with it
/// the process.
///
/// # Errors
/// What the system says.
pub fn handle(mut act: impl FnMut() + Send + 'static) -> io::Result<()> {
    let set = ending_set();
    // SAFETY: `set` is initialised; the old mask is not asked for.
    let code = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if code != 0 {
        return Err(io::Error::from_raw_os_error(code));
    }
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        loop {
            let mut signal = 0;
            // SAFETY: `set` is initialised and `signal` is valid for writes.
            if unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
                act();
            }
        }
    })?;
    Ok(())
}

/// Has the ending signals set what is returned, from now on; see [`handle`].
///
/// # Errors
/// What the system says.
pub fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let is_stopped = Arc::new(AtomicBool::new(false));
    let stop = is_stopped.clone();
    handle(move || stop.store(true, Ordering::Relaxed)).context("wait for signals")?;
    Ok(is_stopped)
}

fn ending_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set; the signals are valid numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in ENDING {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}
