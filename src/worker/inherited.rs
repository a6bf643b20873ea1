//! Closing what a process was started with.

#![expect(
    unsafe_code,
    reason = "closing files that nobody in this process opened is a system call without a safe wrapper"
)]

use std::io;

/// Closes all files but standard input, output and error.
///
/// To be called first in a process: nothing of it may have opened a file that it still uses.
///
/// # Errors
/// What the system says: Linux before 5.9 has no such call.
pub(super) fn close_all() -> io::Result<()> {
    // SAFETY: no descriptor above 2 is owned by anything in this process yet.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
