//! Writing past the page cache (`O_DIRECT` of open(2)).
//!
//! What a backup stores nobody reads soon. In the page cache it would displace what is read, take a copy into memory that has to
//! be found first, and leave the disk idle until it is written back.

use std::cell::RefCell;
use std::fs::File;
use std::io;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, pwrite};

/// From how many bytes on a file is worth it: the disk is waited for, which takes longer than to copy few.
pub(crate) const WORTH: usize = 64 << 10;
/// What offsets, lengths and addresses are multiples of: what nearly all disks and file systems ask for, or a multiple of it.
const GRAIN: usize = 4096;
/// The most that is written at once, more than a block of an exploded VHD.
const PIECE: usize = 4 << 20;

thread_local! {
    /// Has room for a piece that begins at a multiple of [`GRAIN`].
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Writes the beginning of a file, which must be empty, and returns how many bytes that are: all but what is left of whole
/// [`GRAIN`]s, or less, down to none, where the file system cannot.
///
/// # Errors
/// What pwrite(2) says but for that.
pub(crate) fn write(file: &File, bytes: &[u8]) -> io::Result<usize> {
    let flags = fcntl_getfl(file)?;
    if fcntl_setfl(file, flags | OFlags::DIRECT).is_err() {
        return Ok(0);
    }
    let written = BUFFER.with_borrow_mut(|buffer| write_pieces(file, &bytes[..bytes.len() / GRAIN * GRAIN], buffer));
    fcntl_setfl(file, flags)?;
    written
}

fn write_pieces(file: &File, bytes: &[u8], buffer: &mut Vec<u8>) -> io::Result<usize> {
    let is_aligned = bytes.as_ptr().align_offset(GRAIN) == 0;
    if !is_aligned {
        buffer.resize(bytes.len().min(PIECE) + GRAIN, 0);
    }
    let start = buffer.as_ptr().align_offset(GRAIN);
    let mut done = 0;
    for piece in bytes.chunks(PIECE) {
        let aligned = if is_aligned {
            piece
        } else {
            let aligned = &mut buffer[start..start + piece.len()];
            aligned.copy_from_slice(piece);
            aligned
        };
        let written = loop {
            match pwrite(file, aligned, done as u64) {
                Err(Errno::INTR) => {}
                written => break written,
            }
        };
        match written {
            Ok(written) => {
                done += written;
                if written < piece.len() {
                    break;
                }
            }
            Err(Errno::INVAL | Errno::OPNOTSUPP) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};
    use std::path::PathBuf;

    use super::*;

    /// Numbers that repeat at no piece or grain.
    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
    }

    #[test]
    fn files_of_any_length_hold_what_was_written() {
        for folder in [PathBuf::from("/dev/shm"), std::env::temp_dir()] {
            let folder = tempfile::tempdir_in(folder).unwrap();
            for len in [0, 1, GRAIN - 1, GRAIN, GRAIN + 1, 2 << 20, (2 << 20) + 511, PIECE, PIECE + 1, 2 * PIECE + 4097]
            {
                let path = folder.path().join(len.to_string());
                let mut memory = vec![0; GRAIN + len + 1];
                let start = memory.as_ptr().align_offset(GRAIN);
                for start in [start, start + 1] {
                    memory[start..start + len].copy_from_slice(&bytes(len));
                    let mut file = File::create(&path).unwrap();
                    let done = write(&file, &memory[start..start + len]).unwrap();
                    assert!(done == 0 || done == len / GRAIN * GRAIN, "{done} of {len}");
                    file.set_len(done as u64).unwrap();
                    file.seek(SeekFrom::End(0)).unwrap();
                    // It takes any length again.
                    file.write_all(&bytes(len)[done..]).unwrap();
                    assert!(std::fs::read(&path).unwrap() == bytes(len), "{len} in {}", folder.path().display());
                }
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "").unwrap();
        assert!(write(&File::open(&path).unwrap(), &bytes(WORTH)).is_err());
        assert!(std::fs::read(&path).unwrap().is_empty());
    }
}
