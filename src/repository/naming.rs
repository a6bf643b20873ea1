//! Names that stand in the tree: made of names that anybody may have chosen, reversible, never leading out of it.

use std::collections::HashMap;

use super::Vm;

/// Longest name a directory entry may have (bytes), on Linux.
const NAME_LIMIT: usize = 255;
/// Hexadecimal digits of the uuid in the name of a VM's folder, at least.
const DIGITS: usize = 8;

/// Returns `name` as one component of a path: what cannot stand in one is written `%XX`, byte by byte.
///
/// Escaped are `/`, `%`, control characters (NUL too), and a leading `.`; the empty name becomes `%`. A result longer
/// than 255 bytes is cut, and ends in `%~` and 8 digits that differ where the cut parts do: only such a name cannot be
/// turned back.
#[must_use]
pub fn escape_name(name: &str) -> String {
    escape_within(name, NAME_LIMIT)
}

fn escape_within(name: &str, limit: usize) -> String {
    if name.is_empty() {
        return "%".to_owned();
    }
    let mut escaped = String::with_capacity(name.len());
    let mark = format!("%~{:08x}", digest(name));
    // Where the name can be cut so that the mark still fits.
    let mut cut = 0;
    for (at, character) in name.char_indices() {
        if escaped.len() + mark.len() <= limit {
            cut = escaped.len();
        }
        if matches!(character, '/' | '%') || character.is_control() || (at == 0 && character == '.') {
            for byte in character.encode_utf8(&mut [0; 4]).bytes() {
                escaped.push_str(&format!("%{byte:02X}"));
            }
        } else {
            escaped.push(character);
        }
    }
    if escaped.len() > limit {
        escaped.truncate(cut);
        escaped.push_str(&mark);
    }
    escaped
}

/// Returns the name that [`escape_name`] turned into `escaped`; `None` if there is none, or it was cut.
#[must_use]
pub fn unescape_name(escaped: &str) -> Option<String> {
    if escaped == "%" {
        return Some(String::new());
    }
    let mut bytes = Vec::with_capacity(escaped.len());
    let mut rest = escaped.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            bytes.push(digit(digits[0])? << 4 | digit(digits[1])?);
            rest = after;
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// FNV-1a, 32 bits: tells cut names apart, no more.
fn digest(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Returns the names of the folders of `vms`, in their order: `web01~1f2e3d4c`.
///
/// A name is followed by as many digits of the uuid, 8 or more, as make it unique among `vms`; a VM whose name is not
/// known has the digits alone, as `~1f2e3d4c`.
#[must_use]
pub fn vm_directory_names(vms: &[Vm]) -> Vec<String> {
    let digits: Vec<String> =
        vms.iter().map(|vm| vm.id.as_str().chars().filter(|digit| *digit != '-').collect()).collect();
    let longest = digits.iter().map(|digits| digits.chars().count()).max().unwrap_or(0);
    let mut names = vec![String::new(); vms.len()];
    let mut open: Vec<usize> = (0..vms.len()).collect();
    for count in DIGITS..=longest.max(DIGITS) {
        let mut taken: HashMap<&str, u32> = HashMap::new();
        for &index in &open {
            names[index] = directory_name(&vms[index].name, &digits[index], count);
        }
        for name in &names {
            *taken.entry(name).or_default() += 1;
        }
        let repeated: Vec<usize> = open.iter().copied().filter(|&index| taken[names[index].as_str()] > 1).collect();
        open = repeated;
        if open.is_empty() {
            break;
        }
    }
    // Folders that differ in nothing but dashes: only their whole names tell them apart.
    for index in open {
        names[index] = directory_name(&vms[index].name, vms[index].id.as_str(), usize::MAX);
    }
    names
}

fn directory_name(name: &str, digits: &str, count: usize) -> String {
    let digits: String = digits.chars().take(count).collect();
    let tail = escape_within(&digits, NAME_LIMIT / 2);
    if name.is_empty() {
        return format!("~{tail}");
    }
    format!("{}~{tail}", escape_within(name, NAME_LIMIT - 1 - tail.len()))
}

/// Returns whether a device name found in metadata can name a disk of the tree as it is.
pub(crate) fn is_device_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=32).contains(&name.len()) && name.bytes().all(is_plain) && !name.eq_ignore_ascii_case("memory")
}

/// Returns the device a guest sees for a `userdevice` of XAPI: `0` is `xvda`, `26` is `xvdaa`; a device name stays.
pub(super) fn device_of_user_device(user_device: &str) -> Option<String> {
    if is_device_name(user_device) && !user_device.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some(user_device.to_owned());
    }
    let mut number = user_device.parse::<u16>().ok()?;
    let mut letters = Vec::new();
    loop {
        letters.push(char::from(b'a' + u8::try_from(number % 26).ok()?));
        match (number / 26).checked_sub(1) {
            Some(rest) => number = rest,
            None => break,
        }
    }
    Some(format!("xvd{}", letters.iter().rev().collect::<String>()))
}

/// What is known of a disk before it is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Device {
    /// The guest sees it by this name.
    Named(String),
    /// The memory of a suspended VM.
    Memory,
    /// Neither is known.
    Unknown,
}

/// Names the disks of one backup, in their order: devices by their names, a memory image `memory`.
///
/// The others, and those whose name two or more claim, are `disk0`, `disk1`, ...
pub(super) fn disk_names(devices: &[Device]) -> Vec<String> {
    let claimed = |device: &Device| devices.iter().filter(|other| *other == device).count();
    let mut names: Vec<Option<String>> = devices
        .iter()
        .map(|device| match device {
            Device::Named(name) if claimed(device) == 1 => Some(name.clone()),
            Device::Memory if claimed(device) == 1 => Some("memory".to_owned()),
            _ => None,
        })
        .collect();
    let mut number = 0;
    for index in 0..names.len() {
        while names[index].is_none() {
            let name = format!("disk{number}");
            number += 1;
            if !names.iter().flatten().any(|taken| *taken == name) {
                names[index] = Some(name);
            }
        }
    }
    names.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::repository::VmId;

    // Promise 15: "are escaped, reversibly"
    #[test]
    fn an_escaped_name_is_one_component_and_can_be_turned_back() {
        for (name, escaped) in [
            ("web01", "web01"),
            ("", "%"),
            (".", "%2E"),
            ("..", "%2E."),
            ("../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd"),
            ("a/b", "a%2Fb"),
            ("100%", "100%25"),
            ("a\0b\n\u{85}", "a%00b%0A%C2%85"),
            ("été ~ v1.2", "été ~ v1.2"),
        ] {
            assert_eq!(escape_name(name), escaped);
            assert_eq!(unescape_name(escaped).as_deref(), Some(name));
        }
        for escaped in ["%2", "%", "a%", "%zz", "%FF", "%+1"] {
            assert_eq!(unescape_name(escaped).is_some(), escaped == "%", "{escaped:?}");
        }
    }

    proptest! {
        #[test]
        fn every_name_that_fits_can_be_turned_back(name in "[%/.a2F~\\PC\\x00-\\x1f]{0,60}") {
            let escaped = escape_name(&name);
            prop_assert!(!matches!(&*escaped, "" | "." | "..") && !escaped.contains('/'));
            prop_assert!(!escaped.chars().any(char::is_control));
            prop_assert!(unescape_name(&escaped) == Some(name) || escaped.contains("%~"));
        }
    }

    #[test]
    fn a_long_name_is_cut_to_what_a_folder_takes_and_still_differs() {
        let fits = "é".repeat(127);
        assert_eq!(escape_name(&fits), fits);
        let (one, two) = (format!("{}1", "/é".repeat(200)), format!("{}2", "/é".repeat(200)));
        for name in [&one, &two] {
            let escaped = escape_name(name);
            assert!((240..=255).contains(&escaped.len()) && !escaped.contains('/'), "{escaped}");
            assert_eq!(unescape_name(&escaped), None);
        }
        assert_ne!(escape_name(&one), escape_name(&two));
        assert_eq!(escape_name(&"a".repeat(255)).len(), 255);
        assert_eq!(escape_name(&"a".repeat(256)).len(), 255);
    }

    #[test]
    fn a_folder_has_as_many_digits_as_make_it_unique() {
        let vm = |id: &str, name: &str| Vm { id: VmId::new(id).unwrap(), name: name.to_owned() };
        let vms = [
            vm("1f2e3d4c-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "web01"),
            vm("1f2e3d4c-aabb-4aaa-8aaa-aaaaaaaaaaaa", "web01"),
            vm("1f2e3d4c-aaaa-4aaa-8aaa-aaaaaaaaaaab", "a/b"),
            vm("99999999-aaaa-4aaa-8aaa-aaaaaaaaaaab", ""),
            vm("x-y", "odd"),
            vm("xy", "odd"),
        ];
        assert_eq!(
            vm_directory_names(&vms),
            ["web01~1f2e3d4caaa", "web01~1f2e3d4caab", "a%2Fb~1f2e3d4c", "~99999999", "odd~x-y", "odd~xy"]
        );
        assert_eq!(vm_directory_names(&[vm("1f2e3d4c-aaaa", &"n".repeat(300))])[0].len(), 255);
    }

    #[test]
    fn user_devices_count_through_the_alphabet() {
        for (user_device, device) in [
            ("0", Some("xvda")),
            ("25", Some("xvdz")),
            ("26", Some("xvdaa")),
            ("701", Some("xvdzz")),
            ("702", Some("xvdaaa")),
            ("hda", Some("hda")),
            ("", None),
            ("-1", Some("-1")),
            ("a/b", None),
            ("70000", None),
        ] {
            assert_eq!(device_of_user_device(user_device).as_deref(), device, "{user_device:?}");
        }
    }

    #[test]
    fn disks_without_a_name_of_their_own_are_numbered() {
        let named = |name: &str| Device::Named(name.to_owned());
        let devices = [named("xvda"), Device::Unknown, named("xvdb"), named("xvdb"), Device::Memory, named("disk1")];
        assert_eq!(disk_names(&devices), ["xvda", "disk0", "disk2", "disk3", "memory", "disk1"]);
        assert_eq!(disk_names(&[]), [""; 0]);
    }
}
