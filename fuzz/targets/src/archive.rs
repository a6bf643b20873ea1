//! An XVA in which bytes were changed.

#[allow(dead_code, reason = "each user takes its part of the module")]
#[path = "../../../xva/tests/builder/mod.rs"]
mod builder;

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use storage::{Kind, Object, Stat};
use xva::{Xva, describe};

use builder::{CHUNK, File, Manner, chunks, content, entry, ova};

/// A sound archive of two disks.
struct Sound {
    bytes: Vec<u8>,
    disks: [Vec<u8>; 2],
    /// Where its headers are.
    headers: Vec<usize>,
}

fn sound() -> &'static Sound {
    static SOUND: OnceLock<Sound> = OnceLock::new();
    SOUND.get_or_init(|| {
        let disks = [content("a.b", 1, 2 * CHUNK + 3000), content("c", 2, 70_000)];
        let names = ["Ref:3", "Ref:9"];
        let mut bytes = entry("ova.xml", ova(&[(names[0], disks[0].len()), (names[1], disks[1].len())]).as_bytes());
        let mut headers = vec![0];
        for (name, disk) in names.iter().zip(&disks) {
            let part = chunks(name, disk, &Manner::default());
            let is_header = |at: &usize| &part[*at + 257..*at + 262] == b"ustar";
            headers.extend((0..part.len()).step_by(512).filter(is_header).map(|at| bytes.len() + at));
            bytes.extend(part);
        }
        bytes.extend([0; 1024]);
        Sound { bytes, disks, headers }
    })
}

/// The sound archive with other bytes in a few places, and maybe cut off.
struct Changed {
    len: usize,
    changes: Vec<(usize, u8)>,
}

impl Changed {
    fn bytes(&self, at: usize, buffer: &mut [u8]) -> usize {
        let bytes = &sound().bytes;
        let len = self.len.saturating_sub(at).min(buffer.len());
        buffer[..len].copy_from_slice(&bytes[at.min(bytes.len())..][..len]);
        for (place, byte) in &self.changes {
            if let Some(byte_there) = place.checked_sub(at).and_then(|at| buffer[..len].get_mut(at)) {
                *byte_there = *byte;
            }
        }
        len
    }

    /// Whether some header was changed and still passes for one, or for the end.
    fn has_another_header(&self) -> bool {
        sound().headers.iter().any(|header| {
            let (mut now, sound) = ([0; 512], &sound().bytes[*header..header + 512]);
            if self.bytes(*header, &mut now) < 512 || now == sound {
                return false;
            }
            let digits = now[148..156].iter().filter(|byte| byte.is_ascii_digit());
            let stored = digits.fold(0_u64, |sum, byte| sum * 8 + u64::from(byte - b'0'));
            let field: u64 = now[148..156].iter().map(|byte| u64::from(*byte)).sum();
            let sum: u64 = now.iter().map(|byte| u64::from(*byte)).sum::<u64>() - field + 8 * 32;
            let high = now.iter().filter(|byte| **byte >= 128).count() as u64;
            now == [0; 512] || stored == sum || high > 0 && stored < sum
        })
    }
}

impl Object for Changed {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> storage::Result<usize> {
        Ok(usize::try_from(offset).map_or(0, |at| self.bytes(at, buffer)))
    }

    fn stat(&self) -> storage::Result<Stat> {
        let size = self.len as u64;
        let (modified, changed) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH);
        Ok(Stat { kind: Kind::File, size, inode: 0, links: 1, modified, changed })
    }
}

/// Any bytes as an archive; then the bytes as changes of a sound one, of which the disks are read right or not at all,
/// unless a header was replaced by another that is as good: then nothing is read that is not stored.
pub fn xva(data: &[u8]) {
    let _ = describe(File::new(data.to_vec()));
    if let Ok(xva) = Xva::open(File::new(data.to_vec())) {
        for index in 0..xva.disks().len().min(8) {
            let disk = xva.disk(index);
            let _ = disk.read_at(0, &mut [0; 1]);
            let _ = (disk.extent_at(0).is_ok(), disk.allocated().is_ok());
        }
    }

    let Some((first, data)) = data.split_first() else { return };
    let sound = sound();
    let mut changed = Changed { len: sound.bytes.len(), changes: Vec::new() };
    for change in data.chunks_exact(4).take(600) {
        let which = usize::from(change[0]) % (sound.headers.len() + 2);
        let at = usize::from(u16::from_be_bytes([change[1], change[2]]));
        match sound.headers.get(which) {
            Some(header) => changed.changes.push((header + at % 1024, change[3])),
            None if which == sound.headers.len() => changed.changes.push(((at << 8) % sound.bytes.len(), change[3])),
            None if at % 3 == 0 => changed.len = changed.len.min((at << 6) + usize::from(change[3])),
            None => {
                // The header's sum made right.
                let header = sound.headers[at % sound.headers.len()];
                let mut block = [0; 512];
                if changed.bytes(header, &mut block) == 512 {
                    block[148..156].fill(b' ');
                    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
                    let text = format!("{sum:06o}\0 ");
                    changed.changes.extend(text.bytes().enumerate().map(|(place, byte)| (header + 148 + place, byte)));
                }
            }
        }
    }
    changed.changes.retain(|(at, _)| *at < sound.bytes.len());
    let ova_end = sound.headers[1];
    let is_ova_sound = changed.len >= ova_end && changed.changes.iter().all(|(at, _)| *at >= ova_end);
    let is_strict = is_ova_sound && !changed.has_another_header();
    let mut now = vec![0; changed.len];
    changed.bytes(0, &mut now);
    let opened = Xva::open(Arc::new(changed));
    if is_ova_sound {
        assert!(opened.is_ok(), "its ova.xml is sound: {:?}", opened.err());
    }
    let Ok(xva) = opened else { return };
    match first % 3 {
        0 => xva.believe_written(now.len() as u64),
        1 => xva.believe_written(sound.bytes.len() as u64),
        _ => {}
    }
    for (index, known) in xva.disks().iter().enumerate().take(8) {
        let disk = xva.disk(index);
        let size = usize::try_from(known.size.min(4 << 20)).expect("bounded");
        let mut places: Vec<usize> = (0..size).step_by(CHUNK / 4).collect();
        if first & 4 != 0 {
            places.reverse();
        }
        for at in places {
            let mut found = vec![0xee; 512.min(size - at)];
            if disk.read_at(at as u64, &mut found).is_err() {
                continue;
            }
            let is_zero = found.iter().all(|byte| *byte == 0);
            let is_stored = || now.chunks(512).any(|sector| sector.get(..found.len()) == Some(&found[..]));
            let is_true = sound.disks.get(index).and_then(|disk| disk.get(at..at + found.len())) == Some(&found[..]);
            // The bytes of the disk themselves may be what was changed.
            let is_changed = !is_zero && is_stored();
            assert!(is_true || is_changed || (is_zero && !is_strict), "byte {at} of disk {index}");
        }
        let _ = (disk.extent_at(0).is_ok(), disk.allocated().is_ok());
        assert!(disk::data_ranges(disk.as_ref()).take(1000).count() <= 1000);
    }
}
