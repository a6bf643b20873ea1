//! Encodes a disk image in blocks on all cores, and prints how many MB (1,000,000 bytes) a second that gave.
//!
//! ```text
//! encode FILTER FILE             FILTER: none, gzip or brotli. Reads the first 256 MiB of FILE before, and only encodes them
//! encode FILTER FILE FOLDER      reads, hashes and encodes each block of FILE and writes it to FOLDER, past the page cache; all
//!                                of it is durable in the end
//! ```
//!
//! Benches compare a backup with both: the first is the limit for writing an exploded VHD where all else costs nothing. The second is
//! what a backup cannot do without, each core by itself from one block to the next, and nothing is planned, compared, counted,
//! recovered from or published.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, error, fs, hint, thread};

use storage::{Existing, LocalStorage, ObjectPath, WritableStorage};
use uuid::Uuid;
use vhd::{BlockIndex, BlockSize, Digest, EncodedBlock, Filter, Format, NewLayer, WholeBlock};

const ENCODED_BYTES: u64 = 256 << 20;

type Failure = Box<dyn error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    const USAGE: &str = "usage: encode none|gzip|brotli FILE [FOLDER]";
    let filter = match env::args().nth(1).as_deref() {
        Some("none") => Filter::None,
        Some("gzip") => Filter::Gzip,
        Some("brotli") => Filter::Brotli,
        _ => return Err(USAGE.into()),
    };
    let image = fs::File::open(env::args_os().nth(2).ok_or(USAGE)?)?;
    let folder = env::args_os().nth(3);
    let len = image.metadata()?.len();
    let len = if folder.is_none() { len.min(ENCODED_BYTES) } else { len };
    let uuid = Uuid::from_u128(0x1111_1111_1111_4111_8111_1111_1111_1111);
    let layer = NewLayer::new(uuid, len, 0).map_err(|error| error.reason)?;
    let encode = |index, block: &[u8]| -> Result<EncodedBlock, Failure> {
        let whole = WholeBlock::copy_of(block, BlockSize::DEFAULT).map_err(|error| error.reason)?;
        let index = BlockIndex(u32::try_from(index)?);
        Ok(layer.encode(Format::Exploded(filter), index, &Arc::new(whole)).map_err(|error| error.reason)?)
    };
    let blocks = usize::try_from(len)?.div_ceil(BlockSize::DEFAULT.len());
    let seconds = match folder {
        None => {
            let mut bytes = vec![0; usize::try_from(len)?];
            image.read_exact_at(&mut bytes, 0)?;
            let start = Instant::now();
            on_all_cores(blocks, |index, _| {
                let block = bytes.chunks(BlockSize::DEFAULT.len()).nth(index).expect("below the count");
                hint::black_box(encode(index, block)?);
                Ok(())
            })?;
            start.elapsed()
        }
        Some(folder) => {
            let storage = LocalStorage::open(Path::new(&folder))?;
            let start = Instant::now();
            on_all_cores(blocks, |index, buffer| {
                let offset = index * BlockSize::DEFAULT.len();
                buffer.resize(BlockSize::DEFAULT.len().min(usize::try_from(len)? - offset), 0);
                image.read_exact_at(buffer, u64::try_from(offset)?)?;
                hint::black_box(Digest::of(buffer, BlockSize::DEFAULT));
                storage.write(
                    &ObjectPath::new(&index.to_string())?,
                    encode(index, buffer)?.bytes(),
                    Existing::Refuse,
                )?;
                Ok(())
            })?;
            storage.sync_tree(&ObjectPath::root(), &storage.mark()?)?;
            start.elapsed()
        }
    };
    println!("{:.0}", f64::from(u32::try_from(len / 1_000_000)?) / seconds.as_secs_f64());
    Ok(())
}

/// Does something with the number of each block, and memory that is used again.
fn on_all_cores(blocks: usize, act: impl Fn(usize, &mut Vec<u8>) -> Result<(), Failure> + Sync) -> Result<(), Failure> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut buffer = Vec::new();
        loop {
            match next.fetch_add(1, Ordering::Relaxed) {
                index if index < blocks => act(index, &mut buffer)?,
                _ => return Ok(()),
            }
        }
    };
    thread::scope(|scope| {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("encoding does not panic"))
    })
}
