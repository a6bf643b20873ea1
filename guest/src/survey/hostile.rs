//! Disks of which some bytes were changed, also where a checksum is made for what was changed.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::*;
use crate::lvm::tests::{group, linear, pv, volume};
use crate::memory::Memory;
use crate::table::tests::{Made, record, repair};

/// Mutants in scripts/test; `XOFS_ROUNDS` asks for as many times more.
const ROUNDS: u64 = 3000;
/// A round takes milliseconds of a processor; what is beyond this is a loop over what the guest says.
const PATIENCE: Duration = Duration::from_secs(2);

/// What this thread has had of a processor: a busy machine is no finding.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end).unwrap()).unwrap()
    }

    /// A number of any magnitude, often one at an end of its range.
    fn number(&mut self) -> u64 {
        match self.next() % 4 {
            0 => u64::MAX >> (self.next() % 64),
            1 => 1 << (self.next() % 64),
            2 => self.next() % 4096,
            _ => self.next() >> (self.next() % 64),
        }
    }
}

/// Metadata of a group with something of each kind.
fn text() -> String {
    let two = "start_extent = 2 extent_count = 2 type = \"striped\" stripe_count = 2 stripe_size = 128 stripes = [\"pva\", 10, \"pvb\", 20]";
    let raid = "start_extent = 0 extent_count = 2 type = \"raid1\" device_count = 2 \
                raids = [\"m0\", \"d0\", \"m1\", \"d1\"]";
    let mut volumes = volume("root", "VISIBLE", &[&linear(0, 2, "pva", 0), two]);
    volumes += &volume("raid", "VISIBLE", &[raid]);
    for (name, area, extent) in [("m0", "pva", 30), ("d0", "pva", 31), ("m1", "pvb", 30), ("d1", "pvb", 31)] {
        volumes += &volume(name, "x", &[&linear(0, 2, area, extent)]);
    }
    volumes += &volume(
        "mirror",
        "VISIBLE",
        &["start_extent = 0 extent_count = 2 type = \"mirror\" mirrors = [\"d0\", 0, \"pvb\", 5]"],
    );
    group(1, "ab", &volumes)
}

/// Changes a text at a few places: bytes, numbers, pieces left out or doubled.
fn change_text(random: &mut Random, text: &str) -> Vec<u8> {
    let mut text = text.as_bytes().to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(text.len());
        let len = random.below(40).min(text.len() - at);
        match random.next() % 4 {
            0 => text[at] = u8::try_from(random.next() % 256).unwrap(),
            1 => drop(text.drain(at..at + len)),
            2 => {
                let piece = text[at..at + len].to_vec();
                let to = random.below(text.len());
                text.splice(to..to, piece);
            }
            _ => {
                let digits = |byte: &u8| byte.is_ascii_digit();
                let Some(first) = text[at..].iter().position(digits).map(|index| at + index) else { continue };
                let len = text[first..].iter().take_while(|byte| digits(byte)).count();
                text.splice(first..first + len, random.number().to_string().into_bytes());
            }
        }
        if text.is_empty() {
            break;
        }
    }
    text
}

/// Changes bytes in sectors that are not zero.
fn change_bytes(random: &mut Random, disk: &mut Memory, sectors: &[u64]) {
    for _ in 0..=random.below(12) {
        let sector = sectors[random.below(sectors.len())];
        let at = sector * 512 + random.next() % 512;
        match random.next() % 3 {
            0 => disk.write(at, &random.number().to_le_bytes()),
            1 => disk.write(at, &u32::try_from(random.number() >> 32).unwrap().to_le_bytes()),
            _ => disk.write(at, &[u8::try_from(random.next() % 256).unwrap()]),
        }
    }
}

#[test]
fn whatever_stands_on_disks_a_survey_ends_soon_and_its_maps_can_be_read() {
    let mut with_mbr = Memory::new(8 << 20);
    with_mbr.write(0, &record(&[(0x83, 64, 1000), (0x05, 2000, 5000), (0x0c, 8000, 100), (0x42, 9000, 10)]));
    with_mbr.write(2000 * 512, &record(&[(0x83, 63, 100), (0x05, 1000, 300)]));
    with_mbr.write(3000 * 512, &record(&[(0x83, 63, 100), (0x05, 2000, 300)]));
    with_mbr.write(4000 * 512, &record(&[(0x83, 63, 100)]));
    let mut with_gpt = Memory::new(8 << 20);
    Made::default().write(&mut with_gpt, &[(0, 100, 199), (1, 200, 299), (9, 300, 399)]);
    with_gpt.write(0, &record(&[(0xee, 1, u32::MAX), (0x83, 64, 1000)]));
    let text = text();

    let mut slowest = Duration::ZERO;
    let mut shown = 0;
    let times = std::env::var("XOFS_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    for seed in 1..=ROUNDS * times {
        // Shown if what follows panics.
        println!("seed {seed}");
        let random = &mut Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (mut mbr, mut gpt) = (with_mbr.clone(), with_gpt.clone());
        let mut disks = vec![];
        match random.next() % 3 {
            0 => {
                change_bytes(random, &mut mbr, &[0, 2000, 3000, 4000]);
                mbr.write(510, &[0x55, 0xaa]);
                disks.push(mbr);
            }
            1 => {
                let last = gpt.size() / 512 - 1;
                change_bytes(random, &mut gpt, &[0, 1, 1, 2, 4, last]);
                if random.below(4) > 0 {
                    repair(&mut gpt, 1);
                    repair(&mut gpt, last);
                }
                disks.push(gpt);
            }
            _ => {
                let changed = change_text(random, &text);
                let mut first = pv('a', &changed);
                if random.below(4) == 0 {
                    change_bytes(random, &mut first, &[1, 8, 9]);
                }
                disks.push(first);
                disks.push(pv('b', &text));
            }
        }
        let disks: Vec<_> = disks.into_iter().map(|disk| Arc::new(disk) as Arc<dyn Disk>).collect();
        let named: Vec<_> =
            disks.iter().zip(["xvda", "xvdb"]).map(|(disk, name)| (name.to_owned(), disk.clone())).collect();
        let start = processor_time();
        let found = survey(&named);
        slowest = slowest.max(processor_time().saturating_sub(start));
        for volume in &found.volumes {
            let Some(stack) = volume.stack.clone() else {
                assert!(volume.problem.is_some(), "{volume:?}");
                continue;
            };
            shown += 1;
            let Ok((mapped, _)) = stack.open_here(&disks, &mut MAX_INDEX.clone()) else { continue };
            for at in [0, mapped.size() / 2, mapped.size() - 1] {
                mapped.read_at(at, &mut [0]).unwrap();
                assert!(mapped.extent_at(at).unwrap().len <= mapped.size() - at);
            }
        }
        assert!(found.volumes.len() <= MAX_VOLUMES && !found.has_unread());
    }
    println!("{} mutants, {shown} volumes, {slowest:?} at most", ROUNDS * times);
    assert!(slowest < PATIENCE, "{slowest:?}");
    assert!(shown > ROUNDS, "{shown} volumes: too few that something was changed in");
}
