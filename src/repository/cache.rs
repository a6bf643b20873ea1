//! XO's listing cache, `cache.json.gz`: all metadata of one VM in one file.
//!
//! A gzip of one JSON object: paths with a leading slash → metadata. XO trusts it blindly; we believe it only if
//! [`is_current`] says so and it names exactly the backups that the folder holds.
//!
//! Source: XO, `@xen-orchestra/backups/RemoteAdapter.mjs`.

use std::collections::HashMap;
use std::fmt;
use std::io::{BufReader, Read};
use std::time::SystemTime;

use flate2::read::MultiGzDecoder;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use storage::{ObjectPath, Stat, Storage};

use super::fields::Fields;
use super::metadata::Metadata;

/// The name of the cache in a VM's folder.
pub(super) const NAME: &str = "cache.json.gz";
/// Longest cache read (bytes, compressed); a longer one is not believed.
pub(super) const STORED_LIMIT: u64 = 64 << 20;
/// Most it is decompressed to (bytes), as a stream; a longer one is not believed.
pub(super) const PLAIN_LIMIT: u64 = 256 << 20;
/// Up to so many bytes it is decompressed whole and then parsed, which takes half the time; 300 backups fit.
const WHOLE_LIMIT: u64 = 4 << 20;

/// Whether a cache may be believed, as far as times tell: it is not older than its folder nor any metadata file.
///
/// XO writes a metadata file first and the cache after it, in place. That first changes the folder (the new name), then
/// the file, then the cache: right after XO wrote it, the cache is the youngest of all, or of equal age where the clock
/// of the file system is coarse, so equal times are allowed. What comes later makes it older: a metadata file written
/// again (after a merge, with another size) and any name added to or removed from the folder. A change within the same
/// grain of the clock is caught by the comparison of names, unless it only rewrote a metadata file, whose size and kind
/// are then shown as they were before.
pub(super) fn is_current(cache: SystemTime, folder: SystemTime, files: impl IntoIterator<Item = SystemTime>) -> bool {
    folder <= cache && files.into_iter().all(|file| file <= cache)
}

/// Reads the cache of the VM's folder `directory`, if it holds exactly the file names `names`; by file name.
///
/// `stat` is what was known of it when it was judged: a cache that changed since is not believed. Any fault of the cache
/// only means that it is not believed.
pub(super) fn read(
    storage: &dyn Storage,
    directory: &ObjectPath,
    stat: &Stat,
    names: &[&str],
) -> Option<HashMap<String, Metadata>> {
    let path = directory.join(NAME).ok()?;
    let stored = storage.read(&path, STORED_LIMIT).ok()?;
    let entries = match parse(&stored, directory, names.len(), PLAIN_LIMIT) {
        Ok(entries) => entries,
        Err(reason) => {
            tracing::debug!(%path, reason, "listing cache not believed");
            return None;
        }
    };
    let is_unchanged = storage.stat(&path).is_ok_and(|now| now == *stat);
    let is_complete = entries.len() == names.len() && names.iter().all(|name| entries.contains_key(*name));
    (is_unchanged && is_complete).then_some(entries)
}

/// Parses a cache of at most `most` entries; more would take more memory than the backups there are.
fn parse(stored: &[u8], directory: &ObjectPath, most: usize, limit: u64) -> Result<HashMap<String, Metadata>, String> {
    let prefix = format!("/{directory}/");
    let entries = EntriesOf { prefix: &prefix, most };
    let mut whole = Vec::new();
    let whole_limit = WHOLE_LIMIT.min(limit);
    MultiGzDecoder::new(stored).take(whole_limit).read_to_end(&mut whole).map_err(|error| error.to_string())?;
    // Where the end was reached, the checksum of the gzip was verified.
    if (whole.len() as u64) < whole_limit {
        return entries_in(entries, serde_json::Deserializer::from_slice(&whole));
    }
    drop(whole);
    // A stream that ends at the limit is no complete JSON, so a bomb is an error like any other.
    let plain = BufReader::with_capacity(64 << 10, MultiGzDecoder::new(stored).take(limit));
    entries_in(entries, serde_json::Deserializer::from_reader(plain))
}

fn entries_in<'de, R: serde_json::de::Read<'de>>(
    entries: EntriesOf,
    mut deserializer: serde_json::Deserializer<R>,
) -> Result<HashMap<String, Metadata>, String> {
    let entries = entries.deserialize(&mut deserializer).map_err(|error| error.to_string())?;
    // Reads to the end, which verifies the checksum of the gzip.
    deserializer.end().map_err(|error| error.to_string())?;
    Ok(entries)
}

/// What of an entry decides: by these XO chooses what it keeps, deletes and mirrors, and shows what there is.
///
/// Of them every entry that XO makes says what the file says, whichever of its three ways it is made in, unless it could not
/// write the file. Of the rest it need not: full listings add `isImmutable`, and make booleans of the numbers that XenServer
/// before 7.1 gave in XAPI's records.
const DECISIVE: [&str; 9] =
    ["mode", "timestamp", "jobId", "scheduleId", "vhds", "xva", "isVhdDifferencing", "size", "tags"];
/// What an entry has beside the metadata: its own key. XO deletes the file that `_filename` names.
const KEYS: [&str; 2] = ["_filename", "id"];

/// Returns a field of which an entry says something else than the metadata file that its key names, as JavaScript compares;
/// `None` also if the file is no JSON object, since a cache tells nothing of that.
pub(super) fn difference(key: &str, stored: &[u8], entry: &RawValue) -> Option<&'static str> {
    type Raw<'a> = HashMap<String, &'a RawValue>;
    let file: Raw = serde_json::from_slice(stored).ok()?;
    let entry: Raw = serde_json::from_str(entry.get()).unwrap_or_default();
    let value = |fields: &Raw, field: &str| {
        fields.get(field).and_then(|raw| serde_json::from_str::<Value>(raw.get()).ok()).unwrap_or_default()
    };
    let is_same = |field: &&'static str| {
        let (file, entry) = (value(&file, field), value(&entry, field));
        // 1, 1.0 and 1e0 are one number there.
        file == entry || file.as_f64().zip(entry.as_f64()).is_some_and(|(file, entry)| file.total_cmp(&entry).is_eq())
    };
    // Metadata that has such a field itself overrides the key in an entry that XO makes after cleaning.
    let is_key = |field: &&'static str| value(&entry, field) == key || is_same(field) && file.contains_key(*field);
    KEYS.into_iter().find(|field| !is_key(field)).or_else(|| DECISIVE.into_iter().find(|field| !is_same(field)))
}

struct EntriesOf<'a> {
    prefix: &'a str,
    most: usize,
}

impl<'de> DeserializeSeed<'de> for EntriesOf<'_> {
    type Value = HashMap<String, Metadata>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntriesOf<'_> {
    type Value = HashMap<String, Metadata>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of metadata by path")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = HashMap::new();
        while let Some(key) = map.next_key::<String>()? {
            let Some(name) = key.strip_prefix(self.prefix) else {
                return Err(serde::de::Error::custom(format_args!("'{}' is of another folder", key.escape_debug())));
            };
            entries.insert(name.to_owned(), map.next_value::<Fields<Metadata>>()?.0);
            if entries.len() > self.most {
                return Err(serde::de::Error::custom(format_args!("it has more than {} entries", self.most)));
            }
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    fn gzip(plain: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_cache_is_current_unless_the_folder_or_a_file_is_younger() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert!(is_current(at(5), at(4), [at(3), at(5)]));
        assert!(is_current(at(5), at(5), []));
        assert!(!is_current(at(5), at(6), [at(3)]));
        assert!(!is_current(at(5), at(4), [at(3), at(6)]));
    }

    #[test]
    fn entries_are_known_by_the_names_of_their_files() {
        let directory = ObjectPath::new("xo-vm-backups/vm").unwrap();
        let stored = gzip(br#"{"/xo-vm-backups/vm/1.json":{"vm":{"name_label":"web"}},"/xo-vm-backups/vm/2.json":7}"#);
        assert!(parse(&stored, &directory, 1, 1 << 20).is_err());
        let mut entries = parse(&stored, &directory, 2, 1 << 20).unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries.remove("1.json").unwrap().vm_name(), "web");
        assert_eq!(entries.remove("2.json").unwrap().vm_name(), "");
    }

    #[test]
    fn a_cache_that_is_damaged_or_of_another_folder_is_not_believed() {
        let directory = ObjectPath::new("xo-vm-backups/vm").unwrap();
        let good = gzip(br#"{"/xo-vm-backups/vm/1.json":{}}"#);
        assert!(parse(&good, &directory, 1, 1 << 20).is_ok());
        let mut flipped = good.clone();
        let last = flipped.len() - 6;
        flipped[last] ^= 1;
        for stored in [
            &good[..good.len() - 9],
            &flipped,
            b"",
            b"{}",
            &gzip(b"[]"),
            &gzip(b"{"),
            &gzip(br#"{"/xo-vm-backups/other/1.json":{}}"#),
            &gzip(br#"{"xo-vm-backups/vm/1.json":{}}"#),
        ] {
            assert!(parse(stored, &directory, 1, 1 << 20).is_err());
        }
    }

    #[test]
    fn an_entry_that_says_of_a_backup_what_its_file_does_not_is_found_whatever_the_spelling() {
        let key = "/xo-vm-backups/vm/1.json";
        let file = r#"{"mode":"delta","jobId":"j","timestamp":1785549603000,"size":7,"vhds":{"a":"1.vhd","b":"2.vhd"},
            "vm":{"is_a_template":0},"n":1e999}"#;
        let fields =
            r#""mode":"delta","jobId":"j","timestamp":1785549603000,"size":7,"vhds":{"a":"1.vhd","b":"2.vhd"}"#;
        let keys = format!(r#""_filename":"{key}","id":"{key}""#);
        let changed = |from: &str, to: &str| {
            assert!(fields.contains(from));
            format!("{{{},{keys}}}", fields.replace(from, to))
        };
        for (entry, expected) in [
            (format!("{{{fields},{keys}}}"), None),
            (
                format!(
                    r#"{{{fields},"vm":{{"is_a_template":false}},"_filename":"{key}","isImmutable":true,"id":"{key}"}}"#
                ),
                None,
            ),
            (format!(r#"{{ {keys} , {fields}, "vm":7, "dirty":true, "xva":null }}"#), None),
            (changed(r#""a":"1.vhd","b":"2.vhd""#, r#""b" : "2.vhd","\u0061":"1.vhd""#), None),
            (changed("1785549603000", "1785549603e3"), None),
            (changed(":7", ":7.0"), None),
            (changed(":7", ":8"), Some("size")),
            (changed("1785549603000", "1785549603001"), Some("timestamp")),
            (changed("delta", "full"), Some("mode")),
            (changed(r#""j""#, r#""k""#), Some("jobId")),
            (changed("1.vhd", "3.vhd"), Some("vhds")),
            (changed(r#","b":"2.vhd""#, ""), Some("vhds")),
            (changed(r#""size":7"#, r#""size":7,"isVhdDifferencing":{"a":true}"#), Some("isVhdDifferencing")),
            (changed(r#""size":7"#, r#""size":7,"scheduleId":"s""#), Some("scheduleId")),
            (changed(r#""size":7"#, r#""size":7,"xva":"./1.xva""#), Some("xva")),
            (changed(r#""size":7"#, r#""size":7,"tags":["daily=2026-08-01"]"#), Some("tags")),
            (format!(r#"{{{fields},"_filename":"/xo-vm-backups/vm/2.json","id":"{key}"}}"#), Some("_filename")),
            (format!(r#"{{{fields},"_filename":"{key}"}}"#), Some("id")),
            ("7".to_owned(), Some("_filename")),
        ] {
            let raw = RawValue::from_string(entry).unwrap();
            assert_eq!(difference(key, file.as_bytes(), &raw), expected, "{raw}");
        }
        let raw = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        assert_eq!(difference(key, b"{\"mode\":", &raw("{}")), None);
        assert_eq!(difference(key, br#"{"_filename":"x","id":"y"}"#, &raw(r#"{"_filename":"x","id":"y"}"#)), None);
    }

    #[test]
    fn a_bomb_is_given_up_at_the_limit() {
        let stored = gzip(&[" ".repeat(1 << 20).as_bytes(), b"{}"].concat());
        assert!(parse(&stored, &ObjectPath::root(), 0, (1 << 20) + 2).is_ok());
        assert!(parse(&stored, &ObjectPath::root(), 0, 1 << 20).is_err());
        // Past what is decompressed whole.
        let stored = gzip(&[" ".repeat(5 << 20).as_bytes(), b"{}"].concat());
        assert!(parse(&stored, &ObjectPath::root(), 0, 6 << 20).is_ok());
        assert!(parse(&stored, &ObjectPath::root(), 0, 5 << 20).is_err());
    }
}
