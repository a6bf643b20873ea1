//! Metadata that no guest's own driver would write: bytes of it are changed at random, and everything is asked for.

use std::time::{Duration, Instant};

use super::Random;
use super::subject::Subject;
pub use super::subject::{Checksum, Open};

fn below(random: &mut Random, bound: usize) -> usize {
    usize::try_from(random.below(bound as u64)).expect("less than bound")
}

/// Changes bytes of an image that a reader reads, again and again, and panics unless reading ends soon each time.
pub fn change(what: &str, image: Vec<u8>, open: Open, checksum: Checksum, random: &mut Random, time: Duration) {
    change_where(what, image, open, checksum, random, time, |_| true);
}

/// The same, of only those reads of which the bytes are such.
pub fn change_where(
    what: &str,
    image: Vec<u8>,
    open: Open,
    checksum: Checksum,
    random: &mut Random,
    time: Duration,
    is_such: fn(&[u8]) -> bool,
) {
    println!("{what}");
    let subject = Subject::new(image, open, checksum);
    assert!(subject.files > 500, "{what}: {} files", subject.files);
    let (read, such) = (subject.read(), subject.read_where(is_such));
    let start = Instant::now();
    let (mut mutants, mut opened, mut slowest, mut reads) = (0, 0, Duration::ZERO, 0);
    while start.elapsed() < time {
        let outcome = subject.try_with(|change| {
            for _ in 0..1 + random.below(24) {
                let range = such[below(random, such.len())];
                let at = below(random, read[range].len());
                match [1, 1, 2, 4, 8, 32][below(random, 6)] {
                    1 => {
                        let byte = [0, 1, 0x7f, 0xff, random.bytes(1)[0]][below(random, 5)];
                        change(range, at, &|_| vec![byte]);
                    }
                    // A number or a record from elsewhere leads to something that exists.
                    len => {
                        let other = &read[below(random, read.len())];
                        let from = other.start + below(random, other.len()) / len * len;
                        change(range, at / len * len, &|bytes| bytes[from..other.end.min(from + len)].to_vec());
                    }
                }
            }
        });
        mutants += 1;
        opened += usize::from(outcome.files > 0);
        slowest = slowest.max(outcome.took);
        reads = reads.max(outcome.reads);
    }
    println!("{what}: {mutants} mutants, {opened} of them opened, {slowest:?} and {reads} reads at most");
    assert!(opened > 0, "{what}");
}
