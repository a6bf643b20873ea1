//! What a mount makes of workers that do not do what workers do: an error, soon, and no more memory than was meant.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use disk::Disk;
use guest::{Attributes, Content, Entry, Extent, Extents, Facts, Inode, Kind, Source, Time, Xattr};

use super::liars::{Liar, Zeroes, bytes};
use super::protocol::{Message, Page};
use super::{Error, Volume, check};

const PATIENCE: Duration = Duration::from_millis(400);

/// What a request of [`PATIENCE`] may take on a machine that has other things to do.
const SOON: Duration = Duration::from_secs(8);

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % bound
    }

    fn byte(&mut self) -> u8 {
        [0, 1, 0x7f, 0x80, 0xff, u8::try_from(self.below(256)).unwrap()][self.below(6)]
    }
}

fn attributes() -> Attributes {
    let time = Time { seconds: 1_700_000_000, nanoseconds: 999_999_999 };
    Attributes {
        kind: Kind::File,
        mode: 0o644,
        uid: 1000,
        gid: 1000,
        links: 1,
        size: 300_000,
        allocated: 4096,
        device: (0, 0),
        accessed: time,
        modified: time,
        changed: time,
        created: Some(time),
    }
}

fn page(from: u32, next: Option<u32>) -> Message {
    let entries = (from..from + 50).map(|number| {
        let entry = Entry { name: format!("file-{number}").into_bytes(), inode: Inode(u64::from(number) + 11) };
        (entry, if number % 7 == 0 { Err("damaged".to_owned()) } else { Ok(attributes()) })
    });
    Message::List(Page { entries: entries.collect(), next })
}

fn map() -> Extents {
    let sources = [Source::Member(0, 4096), Source::Zeroes, Source::Bytes(vec![7; 4096]), Source::Encoded];
    let extent = |(number, source): (u64, &Source)| Extent { start: number * 8192, len: 4096, source: source.clone() };
    Extents { found: (0..).zip(sources.iter().cycle().take(36)).map(extent).collect(), until: 300_000 }
}

/// Asks for everything that this was said to, and checks what is believed.
fn ask(volume: &Volume, question: usize) -> Result<(), Error> {
    match question {
        0 => {
            let (listed, _) = volume.list(Inode(2))?;
            assert!(
                listed.len() <= 1_000_000 && listed.iter().all(|(entry, _)| (1..=1024).contains(&entry.name.len()))
            );
        }
        1 => assert!(volume.attributes(Inode(12))?.size <= i64::MAX.unsigned_abs()),
        2 => assert!((1..=4095).contains(&volume.target(Inode(12))?.len())),
        3 => assert!(volume.xattrs(Inode(12))?.iter().all(|xattr| xattr.value.len() <= 65_536)),
        4 => {
            let found = volume.extents(Inode(12), 0, &volume.patience())?;
            assert!(found.until > 0);
            for extent in found.found {
                if let Source::Member(member, at) = extent.source {
                    assert!(member == 0 && at + extent.len <= 1 << 20);
                }
            }
        }
        _ => volume.decode(Inode(12), 0, &mut [0; 5000], &volume.patience())?,
    }
    Ok(())
}

fn said(question: usize) -> Vec<u8> {
    let messages = match question {
        0 => vec![page(0, Some(50)), page(50, None)],
        1 => vec![Message::Attributes(attributes())],
        2 => vec![Message::Target(b"../elsewhere".to_vec())],
        3 => vec![Message::Xattrs(vec![Xattr { name: b"user.a".to_vec(), value: vec![1; 300] }])],
        4 => vec![Message::Read(0, 4096, 4096), Message::Extents(map())],
        _ => {
            let mut bytes = bytes(&[Message::Read(0, 0, 65_536)]);
            bytes.extend([0x89, 0x13, 0, 0, 1]);
            bytes.extend([7; 5000]);
            return bytes;
        }
    };
    bytes(&messages)
}

/// Changes what is said as a worker that was taken over might.
fn change(random: &mut Random, bytes: &mut Vec<u8>) {
    let at = random.below(bytes.len());
    match random.below(6) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes.truncate(at),
        2 => {
            let end = bytes.len().min(at + 1 + random.below(40));
            bytes[at..end].fill_with(|| random.byte());
        }
        // A number of many bytes where one of few was.
        3 => drop(bytes.splice(at..at, vec![0xff; 1 + random.below(9)])),
        4 => drop(bytes.splice(at..=at, (0..1 + random.below(3000)).map(|_| random.byte()).collect::<Vec<_>>())),
        _ => {
            let len = u32::try_from(random.below(5 << 20)).unwrap().to_le_bytes();
            bytes.splice(0..4.min(bytes.len()), len);
        }
    }
}

#[test]
fn whatever_a_worker_says_is_checked_or_an_error_and_soon() {
    let rounds = std::env::var("XOFS_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let seed = std::env::var("XOFS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let mut random = Random(seed);
    let (mut believed, mut refused, mut slowest) = (0, 0, Duration::ZERO);
    for round in 0..200 * rounds {
        println!("XOFS_SEED={seed}, round {round}");
        let question = random.below(6);
        let mut answer = said(question);
        (0..=random.below(3)).for_each(|_| {
            if !answer.is_empty() {
                change(&mut random, &mut answer)
            }
        });
        let mut liar = Liar::opened();
        liar.say(&answer);
        // One in a few closes its end; the others wait for more to be asked.
        if random.below(5) > 0 {
            liar.act("exit 0");
        }
        let volume = liar.volume(PATIENCE);
        let began = Instant::now();
        match ask(&volume, question) {
            Ok(()) => believed += 1,
            Err(_) => refused += 1,
        }
        slowest = slowest.max(began.elapsed());
        assert!(slowest < SOON, "{slowest:?}");
    }
    println!("{believed} believed, {refused} refused, {slowest:?} at most");
    assert!(believed > 0 && refused > 0);
    for question in 0..6 {
        let mut liar = Liar::opened();
        liar.say(&said(question));
        ask(&liar.volume(SOON), question).unwrap_or_else(|error| panic!("question {question}: {error}"));
    }
}

#[test]
fn one_that_takes_what_it_asked_for_a_little_at_a_time_is_not_waited_for_longer() {
    let mut liar = Liar::opened();
    liar.say(&bytes(&[Message::Read(0, 0, 1 << 20)]));
    liar.act("while :; do head -c 16384 <&0 > /dev/null; sleep 0.1; done");
    let volume = liar.volume(PATIENCE);
    let began = Instant::now();
    let error = volume.attributes(Inode(12)).unwrap_err();
    // All of it would take six seconds.
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert!(error.to_string().contains("it took more than"), "{error}");
}

#[test]
fn a_directory_that_comes_slowly_takes_three_requests_time_and_no_more() {
    let mut liar = Liar::opened();
    for number in 0..100 {
        liar.act("sleep 0.2");
        liar.say(&bytes(&[page(number * 50, Some(number * 50 + 50))]));
    }
    let volume = liar.volume(PATIENCE);
    let began = Instant::now();
    let error = volume.list(Inode(2)).unwrap_err();
    // With what is known of the files, and without: each opens the volume and takes three times the patience.
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert!(error.to_string().contains("it took more than"), "{error}");
}

#[test]
fn nobody_waits_for_a_worker_of_others_longer_than_a_request_may() {
    let mut liar = Liar::opened();
    let wait = Duration::from_millis(300);
    let workers = liar.workers(1, Duration::from_secs(3), Some(wait));
    let volume = || Volume::new(workers.clone(), Content::Ext4, vec![Arc::new(Zeroes(1 << 20)) as Arc<dyn Disk>]);
    let [one, other] = [volume(), volume()];
    one.open().unwrap();
    thread::scope(|scope| {
        let began = Instant::now();
        let asking = scope.spawn(|| one.attributes(Inode(12)).unwrap_err().to_string());
        thread::sleep(Duration::from_millis(200));
        for (volume, expected) in [(&one, "its worker is at work for others"), (&other, "all 1 workers are at work")] {
            let began = Instant::now();
            let error = volume.attributes(Inode(13)).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!((wait..Duration::from_secs(2)).contains(&began.elapsed()), "{:?}", began.elapsed());
        }
        let error = asking.join().unwrap();
        assert!(error.contains("it took more than 3 s"), "{error}");
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    });
    // What waited did no harm: the seat is free again.
    other.open().unwrap();
}

#[test]
fn what_no_file_has_is_refused() {
    let members: [Arc<dyn Disk>; 1] = [Arc::new(Zeroes(1 << 20))];
    let extent = |start, len, source| Extent { start, len, source };
    let one = |extent: Extent, until| Extents { found: vec![extent], until };
    let cases = [
        (one(extent(0, 4096, Source::Member(0, (1 << 20) - 4095)), 4096), "where nothing is"),
        (one(extent(0, 4096, Source::Member(0, u64::MAX)), 4096), "where nothing is"),
        (one(extent(0, 4096, Source::Member(1, 0)), 4096), "where nothing is"),
        (one(extent(0, 5, Source::Bytes(vec![0; 4])), 5), "where nothing is"),
        (one(extent(0, 0, Source::Zeroes), 4096), "do not follow"),
        (one(extent(u64::MAX, 2, Source::Zeroes), u64::MAX), "do not follow"),
        (one(extent(0, 1 << 63, Source::Zeroes), 1 << 63), "do not follow"),
        (Extents { found: vec![extent(0, 8, Source::Zeroes), extent(4, 8, Source::Zeroes)], until: 12 }, "not follow"),
        (Extents { found: vec![extent(0, 1, Source::Zeroes); 40_000], until: 40_000 }, "more than were asked for"),
        (Extents { found: vec![], until: 0 }, "lead nowhere"),
    ];
    for (extents, expected) in cases {
        let error = check::extents(extents.clone(), 0, &members).unwrap_err();
        assert!(error.to_string().contains(expected), "{extents:?}: {error}");
    }
    let facts = Facts { problems: vec!["\u{1b}[31m".repeat(1000); 100], ..Facts::default() };
    let facts = check::facts(facts);
    assert!(
        facts.problems.len() <= 32 && facts.problems.iter().all(|text| text.len() <= 1024 && !text.contains('\u{1b}'))
    );
}
