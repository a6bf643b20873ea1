//! What Rock Ridge adds to a record: everything that a file has on Unix.
//!
//! ```text
//! record: ... name │ SP (of the root) │ NM │ PX │ TF │ SL ... │ CE ──▶ more, elsewhere │ CE ──▶ ...
//! ```
//!
//! Each field is two letters, its length, its version, and data. Names and targets go on in further fields.
//! Sources: IEEE P1281 (SUSP) 1.12; IEEE P1282 (RRIP) 1.12, and 1991A for what it calls otherwise; Linux `fs/isofs/rock.c` for
//! what is believed of fields that contradict each other.

use disk::Disk;

use super::time;
use crate::read::read_within;
use crate::{Error, ErrorKind, Fields, Result, Time};

/// Areas that fields of one record go on in at most, as in Linux.
const MAX_AREAS: usize = 32;

/// Bytes of an area, which does not leave its sector.
const MAX_AREA: u32 = 2048;

/// Bytes of a name at most; Linux has 253, other systems 255.
const MAX_NAME: usize = 1024;

/// Bytes of a target at most; the kernel takes a path of 4,095.
const MAX_TARGET: usize = 4095;

/// Bytes of a field before its data.
const HEAD: usize = 4;

/// Bytes of other attributes (CD-ROM XA) that fields may follow.
const XA: usize = 14;

/// Owner and kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Posix {
    /// With the kind.
    pub(super) mode: u32,
    pub(super) links: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// How a file is stored that is compressed (zisofs).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Compression {
    pub(super) algorithm: [u8; 2],
    /// In words of four bytes.
    pub(super) header_words: u8,
    /// Blocks have 2^this bytes.
    pub(super) block_shift: u8,
    /// Bytes of what is compressed.
    pub(super) size: u32,
}

/// All fields of one record.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rock {
    /// Areas in which the fields go on.
    pub(super) areas: usize,
    /// Whether a field says that this is Rock Ridge.
    pub(super) is_named: bool,
    pub(super) name: Option<Vec<u8>>,
    pub(super) posix: Option<Posix>,
    pub(super) device: (u32, u32),
    pub(super) target: Target,
    pub(super) created: Option<Time>,
    pub(super) modified: Option<Time>,
    pub(super) accessed: Option<Time>,
    pub(super) changed: Option<Time>,
    /// The block of the directory that is elsewhere, and has this name.
    pub(super) child: Option<u32>,
    /// Whether it is a directory that has its name elsewhere.
    pub(super) is_relocated: bool,
    pub(super) compression: Option<Compression>,
    pub(super) is_sparse: bool,
}

/// The target of a symbolic link, as far as it was put together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) bytes: Vec<u8>,
    /// Whether what comes next is another name.
    has_ended: bool,
    /// Whether part of it is what no path can say: the root of the volume, or the name of the host.
    pub(super) is_unknown: bool,
}

/// Returns how many bytes of each record's fields are to be skipped, and at which its root's begin, if it has any.
pub(super) fn begin(root: &[u8]) -> Option<(usize, usize)> {
    [0, XA].into_iter().find_map(|at| {
        let field = Fields(root).bytes(at, 7)?;
        (field.starts_with(b"SP") && field[4..6] == [0xbe, 0xef]).then(|| (field[6].into(), at))
    })
}

impl Rock {
    /// Reads the fields of a record and the areas in which they go on; `block_size` is in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if those have no end, are not on the disk or too long; [`ErrorKind::TooMuch`] for a name or a target.
    pub(super) fn read(disk: &dyn Disk, block_size: u64, fields: &[u8]) -> Result<Self> {
        let mut rock = Self::default();
        let mut next = rock.area(fields)?;
        while let Some(Area { block, offset, len }) = next {
            let areas = rock.areas + 1;
            rock.areas = areas;
            if areas > MAX_AREAS || len > MAX_AREA {
                let what =
                    format!("the fields of Rock Ridge go on for {len} bytes in area {areas} of {MAX_AREAS} at most");
                return Err(Error::damaged(what));
            }
            let place = u64::from(block) * block_size + u64::from(offset);
            let bytes = read_within(disk, place, usize::try_from(len).unwrap_or_default())?;
            if u32::try_from(bytes.len()) != Ok(len) {
                return Err(Error::damaged(format!(
                    "fields of Rock Ridge go on at {place}, past the end of the volume"
                )));
            }
            next = rock.area(&bytes)?;
        }
        Ok(rock)
    }

    /// Adds the fields of an area; returns the one in which they go on.
    fn area(&mut self, mut bytes: &[u8]) -> Result<Option<Area>> {
        let mut next = None;
        while let Some(len) = bytes.get(2).map(|len| usize::from(*len)).filter(|len| *len >= HEAD) {
            let Some((field, rest)) = bytes.split_at_checked(len) else { break };
            bytes = rest;
            let (name, data) = (&field[..2], Fields(&field[HEAD..]));
            match name {
                b"CE" => next = Area::parse(data),
                b"ST" => break,
                _ => self.field(name, data)?,
            }
        }
        Ok(next)
    }

    fn field(&mut self, name: &[u8], data: Fields) -> Result<()> {
        match name {
            b"ER" => self.is_named = true,
            b"NM" => self.add_name(data)?,
            b"PX" => self.posix = posix(data).or(self.posix),
            b"PN" => self.device = device(data).unwrap_or_default(),
            b"SL" => self.target.add(data)?,
            b"TF" => self.add_times(data),
            b"CL" => self.child = data.le32(0),
            b"RE" => self.is_relocated = true,
            b"ZF" | b"Z2" => self.compression = compression(data).or(self.compression),
            b"SF" => self.is_sparse = true,
            // Of others, or of no use.
            _ => {}
        }
        Ok(())
    }

    fn add_name(&mut self, data: Fields) -> Result<()> {
        /// The only flag of what is a name: it goes on in the next field.
        const CONTINUES: u8 = 1;
        let Some((_, part)) = data.0.split_first().filter(|(flags, _)| **flags & !CONTINUES == 0) else {
            return Ok(());
        };
        let name = self.name.get_or_insert_default();
        name.extend(part.iter().take_while(|byte| **byte != 0));
        if name.len() > MAX_NAME {
            return Err(Error::new(ErrorKind::TooMuch, format!("a name has more than {MAX_NAME} bytes")));
        }
        Ok(())
    }

    fn add_times(&mut self, data: Fields) {
        const IS_LONG: u8 = 0x80;
        let Some(flags) = data.u8(0) else { return };
        let is_long = flags & IS_LONG != 0;
        let len = if is_long { time::LONG } else { 7 };
        let kept = [&mut self.created, &mut self.modified, &mut self.accessed, &mut self.changed];
        let mut at = 1;
        for (bit, kept) in kept.into_iter().enumerate() {
            if flags >> bit & 1 == 0 {
                continue;
            }
            let found = if is_long { data.array(at).and_then(time::long) } else { data.array(at).map(time::short) };
            *kept = found.or(*kept);
            at += len;
        }
    }
}

/// Where fields go on.
struct Area {
    block: u32,
    offset: u32,
    len: u32,
}

impl Area {
    fn parse(data: Fields) -> Option<Self> {
        Some(Self { block: data.le32(0)?, offset: data.le32(8)?, len: data.le32(16)? })
    }
}

fn posix(data: Fields) -> Option<Posix> {
    // In 1.12 a number follows that files of several names have in common; Linux does not look at it.
    Some(Posix { mode: data.le32(0)?, links: data.le32(8)?, uid: data.le32(16)?, gid: data.le32(24)? })
}

/// Returns major and minor as Linux takes them: apart, or both in the lower half as in 16 bits.
fn device(data: Fields) -> Option<(u32, u32)> {
    let (high, low) = (data.le32(0)?, data.le32(8)?);
    let (major, minor) = if high == 0 && low > 0xff { (low >> 8, low & 0xff) } else { (high, low) };
    let device = major << 20 | minor;
    Some((device >> 20, device & 0xf_ffff))
}

fn compression(data: Fields) -> Option<Compression> {
    Some(Compression {
        algorithm: data.array(0)?,
        header_words: data.u8(2)?,
        block_shift: data.u8(3)?,
        size: data.le32(4)?,
    })
}

impl Target {
    /// Adds the components of a field: flags, length, text.
    fn add(&mut self, data: Fields) -> Result<()> {
        const CONTINUES: u8 = 0x01;
        let mut rest = data.0.get(1..).unwrap_or_default();
        while let [flags, len, after @ ..] = rest {
            let Some((text, next)) = after.split_at_checked((*len).into()) else { break };
            rest = next;
            if self.has_ended {
                self.bytes.push(b'/');
            }
            self.has_ended = flags & CONTINUES == 0;
            match flags & !CONTINUES {
                0x00 => self.bytes.extend(text),
                0x02 => self.bytes.extend(b"."),
                0x04 => self.bytes.extend(b".."),
                0x08 => {
                    self.bytes.push(b'/');
                    self.has_ended = false;
                }
                _ => self.is_unknown = true,
            }
            if self.bytes.len() > MAX_TARGET {
                return Err(Error::new(ErrorKind::TooMuch, format!("a target has more than {MAX_TARGET} bytes")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    fn field(name: &[u8; 2], data: &[u8]) -> Vec<u8> {
        [name, &[u8::try_from(HEAD + data.len()).unwrap(), 1][..], data].concat()
    }

    /// A number in both byte orders.
    fn both(number: u32) -> Vec<u8> {
        [number.to_le_bytes(), number.to_be_bytes()].concat()
    }

    fn more(block: u32, offset: u32, len: u32) -> Vec<u8> {
        field(b"CE", &[both(block), both(offset), both(len)].concat())
    }

    fn read(fields: &[Vec<u8>]) -> Result<Rock> {
        Rock::read(&Memory::new(1 << 20), 2048, &fields.concat())
    }

    #[test]
    fn names_and_targets_go_on_in_further_fields_and_areas() {
        let mut disk = Memory::new(1 << 20);
        let area = [field(b"NM", b"\0 longer"), field(b"SL", b"\0\0\x02cd\x04\0\0\x01e"), vec![0, 0, 0]].concat();
        disk.write(20 * 1024 + 100, &area);
        let len = u32::try_from(area.len()).unwrap();
        let first =
            [field(b"NM", b"\x01a name"), more(20, 100, len), field(b"SL", b"\x01\x08\0\0\x01a\x02\0\x01\x01b")]
                .concat();
        let rock = Rock::read(&disk, 1024, &first).unwrap();
        assert_eq!(rock.name.as_deref(), Some(&b"a name longer"[..]));
        assert_eq!((rock.target.bytes.as_slice(), rock.target.is_unknown), (&b"/a/./bcd/../e"[..], false));
    }

    #[test]
    fn what_follows_the_end_of_fields_is_none() {
        let zeroes = vec![0; 9];
        for end in [field(b"ST", b""), zeroes, b"NM\x03\x01".to_vec(), b"NM\xff\x01\0x".to_vec()] {
            let rock = read(&[field(b"NM", b"\0a"), end.clone(), field(b"NM", b"\0b")]).unwrap();
            assert_eq!(rock.name.as_deref(), Some(&b"a"[..]), "{}", end.escape_ascii());
        }
        let none = [field(b"NM", b""), field(b"NM", b"\x02"), field(b"NM", b"\x20host"), field(b"PX", &[1; 27])];
        assert_eq!(read(&none), Ok(Rock::default()));
    }

    #[test]
    fn areas_that_never_end_are_damage_and_what_grows_for_ever_is_too_much() {
        let mut disk = Memory::new(1 << 20);
        disk.write(40_960, &[field(b"NM", &[&[0][..], &[b'n'; 199]].concat()), more(20, 0, 300)].concat());
        let kind = |start: Vec<u8>| Rock::read(&disk, 2048, &start).unwrap_err().kind();
        assert_eq!(kind(more(20, 0, 300)), ErrorKind::TooMuch);
        assert_eq!(kind(more(20, 204, 96)), ErrorKind::TooMuch);
        for astray in [more(20, 0, 2049), more(20, 0, u32::MAX), more(512, 0, 1), more(u32::MAX, u32::MAX, 2048)] {
            assert_eq!(kind(astray), ErrorKind::Damaged);
        }
        disk.write(81_920, &more(40, 0, 28));
        let error = Rock::read(&disk, 2048, &more(40, 0, 28)).unwrap_err();
        let expected = "the fields of Rock Ridge go on for 28 bytes in area 33 of 32 at most";
        assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Damaged, expected));
        let long = vec![field(b"SL", &[&b"\x01\0\xf0"[..], &[b't'; 240]].concat()); 18];
        assert_eq!(read(&long).unwrap_err().kind(), ErrorKind::TooMuch);
    }

    #[test]
    fn times_are_in_the_order_of_their_bits() {
        let short = |second: u8| [70, 1, 1, 0, 0, second, 0];
        let moment = |seconds| Some(Time { seconds, nanoseconds: 0 });
        let data = [&[0x1b][..], &short(1), &short(2), &short(3), &short(4)].concat();
        let rock = read(&[field(b"TF", &data)]).unwrap();
        assert_eq!((rock.created, rock.modified, rock.accessed, rock.changed), (moment(1), moment(2), None, moment(3)));
        let rock =
            read(&[field(b"TF", b"\x821970-01-01000000\0"), field(b"TF", &[&[4][..], &short(9)].concat())]).unwrap();
        assert_eq!((rock.modified, rock.accessed), (None, moment(9)));
        let rock = read(&[field(b"TF", b"\x821970010100000500\0")]).unwrap();
        assert_eq!(rock.modified, moment(5));
    }

    #[test]
    fn devices_are_apart_or_in_sixteen_bits() {
        let cases = [((8, 1), (8, 1)), ((0, 0x801), (8, 1)), ((0, 5), (0, 5)), ((1, 0x12_3456), (1, 0x2_3456))];
        for ((high, low), expected) in cases {
            let rock = read(&[field(b"PN", &[both(high), both(low)].concat())]).unwrap();
            assert_eq!(rock.device, expected, "{high} {low}");
        }
    }

    #[test]
    fn fields_begin_where_the_root_says() {
        let mut root = field(b"SP", &[0xbe, 0xef, 3]);
        assert_eq!(begin(&root), Some((3, 0)));
        root.splice(0..0, [0; XA]);
        assert_eq!(begin(&root), Some((3, XA)));
        root[XA + 4] = 0;
        assert_eq!((begin(&root), begin(&root[..6])), (None, None));
    }
}
