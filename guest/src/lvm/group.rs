//! A volume group, as its metadata describes it. Source: lvm2 `lib/format_text/import_vsn1.c`, and the `text_import` of each
//! segment type.

use std::collections::HashMap;

use super::text::{Section, Value};
use crate::{Error, Result};

/// Sizes and offsets of LVM are in sectors of this many bytes, whatever those of the disk are.
const SECTOR: u64 = 512;

/// A volume group.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) id: Vec<u8>,
    /// Counts changes: of two descriptions the one with the higher number is current.
    pub(super) sequence: u64,
    /// In bytes, never 0.
    pub(super) extent_size: u64,
    /// By the names that segments have for them.
    pub(super) physical: HashMap<String, Physical>,
    pub(super) logical: Vec<Logical>,
    /// Where in `logical` each name is.
    by_name: HashMap<String, usize>,
}

/// What a group says of one of its physical volumes.
#[derive(Debug)]
pub(super) struct Physical {
    pub(super) uuid: [u8; 32],
    /// Where its first extent starts, in bytes.
    pub(super) start: u64,
    /// Number of its extents.
    pub(super) count: u64,
    /// Whether it was away when the group last changed, so that what it holds may be old.
    pub(super) is_missing: bool,
}

/// A logical volume.
#[derive(Debug)]
pub(super) struct Logical {
    pub(super) name: String,
    /// Whether the guest sees it; others are parts of such.
    pub(super) is_visible: bool,
    /// Its segments in order, without gaps.
    pub(super) segments: Result<Vec<Segment>>,
}

/// A run of extents of a logical volume.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub(super) start: u64,
    pub(super) count: u64,
    pub(super) kind: Kind,
}

/// How the bytes of a segment lie.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    /// In turn in each of several areas, or all in one.
    Striped { stripe_size: u64, areas: Vec<Area> },
    /// All in each of several areas, of which the first is always complete.
    Mirror(Vec<Area>),
    /// Kept by dm-raid: rows of as many `columns`, each of which is in several legs that follow each other.
    Raid { stripe_size: u64, columns: usize, legs: Vec<Leg> },
    /// Nowhere: zeroes.
    Zeroes,
    /// Not read; the word that LVM has for it.
    Other(String),
    /// The exceptions of a snapshot, kept in `store`; `is_merging` if they are on their way back into the origin.
    Snapshot { origin: String, store: String, is_merging: bool },
    /// A volume of a thin pool.
    Thin(Thin),
    /// What thin volumes share.
    ThinPool { metadata: String, data: String },
    /// A volume with a cache in front of it.
    Cache { origin: String, pool: String, within: Option<Within> },
    /// A cache; of one that `is_passed_through` nothing is read.
    CachePool { metadata: String, data: String, is_passed_through: bool },
}

/// A thin volume.
#[derive(Debug, Clone)]
pub(super) struct Thin {
    pub(super) pool: String,
    /// The number that the pool knows it by.
    pub(super) device: u32,
    /// What it shows where it was never written.
    pub(super) origin: Option<String>,
    /// The volume that it becomes when that is activated.
    pub(super) becomes: Option<String>,
}

/// Where a cache is within a volume that is both its metadata and its data: starts and lengths in bytes.
#[derive(Debug, Clone)]
pub(super) struct Within {
    pub(super) metadata: (u64, u64),
    pub(super) data: (u64, u64),
    pub(super) is_passed_through: bool,
}

/// Where a part of a segment starts.
#[derive(Debug, Clone)]
pub(super) struct Area {
    /// A physical volume, or a logical one.
    pub(super) name: String,
    /// Which extent of it.
    pub(super) extent: u64,
}

/// Logical volumes in which a copy of something is.
#[derive(Debug, Clone)]
pub(super) struct Leg {
    /// What the kernel knows of the copy, if that is kept.
    pub(super) metadata: Option<String>,
    pub(super) data: String,
}

impl Group {
    /// Parses the metadata of a group.
    ///
    /// # Errors
    /// What is wrong with the group as a whole; what is wrong with a logical volume is kept there.
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let all = Section::parse(text)?;
        let (name, group) =
            all.sections().next().ok_or_else(|| Error::damaged("the LVM metadata has no volume group"))?;
        let name = checked_name(name)?;
        let damaged = |what: &str| Error::damaged(format!("the LVM metadata of volume group {name} {what}"));
        let extent_size = group.number("extent_size").and_then(|sectors| sectors.checked_mul(SECTOR));
        let extent_size = extent_size.filter(|size| *size > 0).ok_or_else(|| damaged("has no size of an extent"))?;
        let id = group.text("id").ok_or_else(|| damaged("has no id"))?.to_vec();
        let sequence = group.number("seqno").ok_or_else(|| damaged("has no seqno"))?;
        let mut physical = HashMap::new();
        for (name, section) in group.section("physical_volumes").into_iter().flat_map(Section::sections) {
            let volume =
                Physical::parse(section).ok_or_else(|| damaged("has a physical volume without id or extents"))?;
            physical.entry(checked_name(name)?).or_insert(volume);
        }
        let (mut logical, mut by_name) = (vec![], HashMap::new());
        for (name, section) in group.section("logical_volumes").into_iter().flat_map(Section::sections) {
            let name = checked_name(name)?;
            by_name.entry(name.clone()).or_insert(logical.len());
            let is_visible = section.has_flag("status", "VISIBLE");
            logical.push(Logical { name, is_visible, segments: segments(section) });
        }
        Ok(Self { name, id, sequence, extent_size, physical, logical, by_name })
    }

    /// Returns the logical volume of that name.
    pub(super) fn logical(&self, name: &str) -> Option<&Logical> {
        self.by_name.get(name).map(|index| &self.logical[*index])
    }
}

impl Physical {
    fn parse(section: &Section) -> Option<Self> {
        let id: Vec<u8> = section.text("id")?.iter().copied().filter(|byte| *byte != b'-').collect();
        Some(Self {
            uuid: id.try_into().ok()?,
            start: section.number("pe_start")?.checked_mul(SECTOR)?,
            count: section.number("pe_count")?,
            is_missing: section.has_flag("flags", "MISSING") || section.has_flag("status", "MISSING"),
        })
    }
}

/// Returns a name that LVM allows: of volumes only such are shown.
fn checked_name(name: &[u8]) -> Result<String> {
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b".+_-".contains(byte);
    match std::str::from_utf8(name) {
        Ok(text) if (1..128).contains(&name.len()) && name.iter().all(is_allowed) && text != "." && text != ".." => {
            Ok(text.to_owned())
        }
        _ => Err(Error::damaged(format!(
            "the LVM metadata has a name that LVM does not allow: {:?}",
            String::from_utf8_lossy(&name[..name.len().min(128)])
        ))),
    }
}

fn segments(volume: &Section) -> Result<Vec<Segment>> {
    let segments = volume.sections().map(|(_, section)| {
        let damaged = || Error::damaged("a segment of it has no type, or numbers that cannot be");
        let start = section.number("start_extent").ok_or_else(damaged)?;
        let count = section.number("extent_count").filter(|count| *count > 0).ok_or_else(damaged)?;
        Ok(Segment { start, count, kind: kind(section)?.ok_or_else(damaged)? })
    });
    let mut segments = segments.collect::<Result<Vec<_>>>()?;
    segments.sort_by_key(|segment| segment.start);
    let mut next = 0_u64;
    for segment in &segments {
        if segment.start != next {
            return Err(Error::damaged(format!("a segment of it starts at extent {}, not at {next}", segment.start)));
        }
        next = next
            .checked_add(segment.count)
            .ok_or_else(|| Error::damaged("it has more extents than there are numbers"))?;
    }
    if segments.is_empty() {
        return Err(Error::damaged("it has no segments"));
    }
    Ok(segments)
}

/// LVM makes no shorter stripes (bytes): a page. Source: lvcreate(8).
const MIN_STRIPE: u64 = 4096;

fn kind(section: &Section) -> Result<Option<Kind>> {
    let Some(kind) = section.text("type") else { return Ok(None) };
    // What follows a plus are conditions under which older versions of LVM do not touch it.
    let (kind, _conditions) = kind.split_at(kind.iter().position(|byte| *byte == b'+').unwrap_or(kind.len()));
    let stripe_size = || {
        let bytes = section.number("stripe_size").and_then(|sectors| sectors.checked_mul(SECTOR));
        bytes.filter(|bytes| *bytes >= MIN_STRIPE)
    };
    let name = |key: &str| section.text(key).map(checked_name).transpose();
    Ok(match kind {
        b"striped" => {
            let areas = areas(section.list("stripes"))?;
            match areas.len() {
                0 => None,
                1 => Some(Kind::Striped { stripe_size: SECTOR, areas }),
                // Source: lvm2, `MAX_STRIPES`.
                2..=128 => stripe_size().map(|stripe_size| Kind::Striped { stripe_size, areas }),
                _ => None,
            }
        }
        b"mirror" => Some(areas(section.list("mirrors"))?).filter(|areas| !areas.is_empty()).map(Kind::Mirror),
        b"raid1" => {
            let legs = legs(section)?;
            (!legs.is_empty()).then_some(Kind::Raid { stripe_size: SECTOR, columns: 1, legs })
        }
        b"raid0" | b"raid0_meta" => {
            let legs = legs(section)?;
            stripe_size().map(|stripe_size| Kind::Raid { stripe_size, columns: legs.len(), legs })
        }
        // With another number of copies, or one that does not divide the legs, rows do not begin with the first leg.
        b"raid10" | b"raid10_near" if section.number("data_copies").unwrap_or(2) == 2 => {
            let legs = legs(section)?;
            match stripe_size() {
                Some(stripe_size) if legs.len().is_multiple_of(2) => {
                    Some(Kind::Raid { stripe_size, columns: legs.len() / 2, legs })
                }
                _ => Some(Kind::Other("raid10".to_owned())),
            }
        }
        b"zero" => Some(Kind::Zeroes),
        b"snapshot" => {
            let merging = name("merging_store")?;
            let is_merging = merging.is_some();
            let store = if is_merging { merging } else { name("cow_store")? };
            name("origin")?.zip(store).map(|(origin, store)| Kind::Snapshot { origin, store, is_merging })
        }
        b"thin" => thin(section)?.map(Kind::Thin),
        b"thin-pool" => name("metadata")?.zip(name("pool")?).map(|(metadata, data)| Kind::ThinPool { metadata, data }),
        b"cache" => {
            let within = section.number("metadata_start").map(|_| within(section));
            match (name("origin")?, name("cache_pool")?, within) {
                (_, _, Some(None)) => None,
                (Some(origin), Some(pool), within) => Some(Kind::Cache { origin, pool, within: within.flatten() }),
                _ => None,
            }
        }
        b"cache-pool" => {
            let is_passed_through = is_passed_through(section);
            let names = name("metadata")?.zip(name("data")?);
            names.map(|(metadata, data)| Kind::CachePool { metadata, data, is_passed_through })
        }
        other => Some(Kind::Other(String::from_utf8_lossy(&other[..other.len().min(32)]).into_owned())),
    })
}

fn thin(section: &Section) -> Result<Option<Thin>> {
    let name = |key: &str| section.text(key).map(checked_name).transpose();
    let device = section.number("device_id").and_then(|device| u32::try_from(device).ok());
    let (origin, becomes) = (name("external_origin")?, name("merge")?);
    Ok(name("thin_pool")?.zip(device).map(|(pool, device)| Thin { pool, device, origin, becomes }))
}

fn within(section: &Section) -> Option<Within> {
    let bytes = |key: &str| section.number(key).and_then(|sectors| sectors.checked_mul(SECTOR));
    Some(Within {
        metadata: (bytes("metadata_start")?, bytes("metadata_len")?),
        data: (bytes("data_start")?, bytes("data_len")?),
        is_passed_through: is_passed_through(section),
    })
}

fn is_passed_through(section: &Section) -> bool {
    section.text("cache_mode") == Some(b"passthrough")
}

/// A list of names, each with its extent.
fn areas(list: &[Value]) -> Result<Vec<Area>> {
    let areas = list.chunks(2).map(|pair| match pair {
        [Value::Text(name), Value::Number(extent)] => Ok(Area { name: checked_name(name)?, extent: *extent }),
        _ => Err(Error::damaged("a segment of it has an area that is not a name and an extent")),
    });
    areas.collect()
}

/// A list of names, each of metadata and of data, or only of data.
fn legs(section: &Section) -> Result<Vec<Leg>> {
    let list =
        ["raids", "raid0_lvs"].iter().map(|key| section.list(key)).find(|list| !list.is_empty()).unwrap_or_default();
    let texts = list.iter().filter_map(|value| match value {
        Value::Text(text) => Some(*text),
        Value::Number(_) => None,
    });
    let texts: Vec<_> = texts.collect();
    let count = ["device_count", "stripe_count"].iter().find_map(|key| section.number(key));
    let count = count.and_then(|count| usize::try_from(count).ok()).filter(|count| *count > 0);
    let leg = |metadata: &[u8], data| {
        let metadata = if metadata == b"-" { None } else { Some(checked_name(metadata)?) };
        Ok(Leg { metadata, data: checked_name(data)? })
    };
    match count {
        Some(count) if texts.len() == count => texts.iter().map(|data| leg(b"-", data)).collect(),
        Some(count) if texts.len() / 2 == count && texts.len() % 2 == 0 => {
            texts.chunks_exact(2).map(|pair| leg(pair[0], pair[1])).collect()
        }
        _ => Err(Error::damaged("a segment of it has another number of legs than it says")),
    }
}
