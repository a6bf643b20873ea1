//! Decodes all blocks of an exploded VHD on all cores, and prints how many MB (1,000,000 bytes) a second that gave.
//!
//! usage: decode FOLDER
//!
//! It is the limit for reading the disk: `scripts/bench` compares a mount with it. Only the data counts, not the sector
//! bitmaps. Nothing may be encrypted.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, error, fs, io, thread};

use vhd::Filter;

const DATA_BYTES: usize = 2 << 20;
const BITMAP_BYTES: usize = 512;

type Failure = Box<dyn error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let folder = PathBuf::from(env::args_os().nth(1).ok_or("usage: decode FOLDER")?);
    let filter = match fs::read(folder.join("chunk-filters.json")) {
        Ok(json) => Filter::from_chunk_filters_json(&json).map_err(|error| error.reason)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Filter::None,
        Err(error) => return Err(error.into()),
    };
    let mut blocks = Vec::new();
    for thousand in fs::read_dir(folder.join("blocks"))? {
        for block in fs::read_dir(thousand?.path())? {
            blocks.push(block?.path());
        }
    }
    let start = Instant::now();
    decode(filter, &blocks)?;
    let megabytes = f64::from(u32::try_from(blocks.len() * DATA_BYTES / 1_000_000)?);
    println!("{:.0}", megabytes / start.elapsed().as_secs_f64());
    Ok(())
}

fn decode(filter: Filter, blocks: &[PathBuf]) -> Result<(), Failure> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut out = vec![0; BITMAP_BYTES + DATA_BYTES];
        while let Some(path) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
            filter.decode_exact(&fs::read(path)?, &mut out).map_err(|error| error.reason)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("decoding does not panic"))
    })
}
