//! Closing what a process was started with.

#![expect(
    unsafe_code,
    reason = "closing files that nobody in this process opened is a system call without a safe wrapper"
)]

use std::ffi::OsString;
use std::io;

/// Closes all files but standard input, output and error.
///
/// To be called first in a process: nothing of it may have opened a file that it still uses.
///
/// # Errors
/// What the system says.
pub(super) fn close_all() -> io::Result<()> {
    // SAFETY: no descriptor above 2 is owned by anything in this process yet.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        // Linux before 5.9 has no such call.
        _ => close_listed(),
    }
}

/// Closes each that the system lists.
fn close_listed() -> io::Result<()> {
    for number in listed()?.into_iter().filter(|number| *number > 2) {
        // SAFETY: as above; the one that listed them is closed already.
        unsafe { libc::close(number) };
    }
    Ok(())
}

/// Returns the numbers of all open files, and of the folder that says them, which is closed by then.
fn listed() -> io::Result<Vec<libc::c_int>> {
    let number = |name: OsString| name.to_str().and_then(|name| name.parse().ok()).ok_or(io::ErrorKind::InvalidData);
    std::fs::read_dir("/proc/self/fd")?.map(|entry| Ok(number(entry?.file_name())?)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn where_the_system_cannot_close_them_all_each_is_found() {
        let files: Vec<_> = (0..50).map(|_| tempfile::tempfile().unwrap()).collect();
        let found = listed().unwrap();
        assert!(files.iter().all(|file| found.contains(&file.as_raw_fd())), "{found:?}");
    }
}
