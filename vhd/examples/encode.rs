//! Encodes a disk image in blocks on all cores, and prints how many MB (1,000,000 bytes) a second that gave.
//!
//! usage: encode FILTER FILE        FILTER: none, gzip or brotli
//!
//! It is the limit for writing an exploded VHD: benches compare a backup with it. The image is read into memory before, so only
//! the first 256 MiB of it count. Nothing is written.

use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, error, fs, hint, thread};

use uuid::Uuid;
use vhd::{BlockIndex, BlockSize, Filter, Format, NewLayer};

const LIMIT_BYTES: u64 = 256 << 20;

type Failure = Box<dyn error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    const USAGE: &str = "usage: encode none|gzip|brotli FILE";
    let filter = match env::args().nth(1).as_deref() {
        Some("none") => Filter::None,
        Some("gzip") => Filter::Gzip,
        Some("brotli") => Filter::Brotli,
        _ => return Err(USAGE.into()),
    };
    let mut image = Vec::new();
    fs::File::open(env::args_os().nth(2).ok_or(USAGE)?)?.take(LIMIT_BYTES).read_to_end(&mut image)?;
    let uuid = Uuid::from_u128(0x1111_1111_1111_4111_8111_1111_1111_1111);
    let layer = NewLayer::new(uuid, u64::try_from(image.len())?, 0).map_err(|error| error.reason)?;
    let blocks: Vec<&[u8]> = image.chunks(BlockSize::DEFAULT.len()).collect();
    let start = Instant::now();
    encode(&layer, Format::Exploded(filter), &blocks)?;
    let megabytes = f64::from(u32::try_from(image.len() / 1_000_000)?);
    println!("{:.0}", megabytes / start.elapsed().as_secs_f64());
    Ok(())
}

fn encode(layer: &NewLayer, format: Format, blocks: &[&[u8]]) -> Result<(), Failure> {
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(block) = blocks.get(index) else { return Ok(()) };
            let encoded = layer.encode(format, BlockIndex(u32::try_from(index)?), block);
            hint::black_box(encoded.map_err(|error| error.reason)?);
        }
    };
    thread::scope(|scope| {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("encoding does not panic"))
    })
}
