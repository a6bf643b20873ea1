//! Names of guests' files as one component of a path: the guest's own bytes, unless Linux has such a name in no folder.
//!
//! | the guest's name                                      | is shown as                                                    |
//! |-------------------------------------------------------|----------------------------------------------------------------|
//! | any other                                             | itself                                                         |
//! | has a `/` or a zero byte in it                        | with `%2F` and `%00` for those, and `%25` for each `%`         |
//! | `.` and `..`                                          | `%2E` and `%2E.`                                               |
//! | reads like one of these                               | with `%25` for each `%`: `a%2Fb` is `a%252Fb`                  |
//! | longer than 1000 bytes by then                        | cut, with `%~` and 16 digits that differ where the cut parts do |
//!
//! So no two names are shown as one, and all but those that were cut can be turned back: a name in which `%2F`, `%00` or `%25`
//! stands, or which is `%2E` or `%2E.`, was escaped, and no other.

use std::borrow::Cow;

/// Longest name that is shown (bytes). The kernel takes 1024 of a FUSE file system, and a folder with a longer one cannot be listed
/// at all; what is left is for the numbers of names that come twice. Source: Linux, `FUSE_NAME_MAX`.
const LONGEST: usize = 1000;

/// Returns the name under which a guest's file is shown.
pub(super) fn shown(name: &[u8]) -> Cow<'_, [u8]> {
    let is_dots = matches!(name, b"." | b"..");
    let reads_escaped =
        matches!(name, b"%2E" | b"%2E.") || name.windows(3).any(|part| matches!(part, b"%2F" | b"%00" | b"%25"));
    let is_component = !is_dots && !name.contains(&b'/') && !name.contains(&0);
    if is_component && !reads_escaped && name.len() <= LONGEST {
        return Cow::Borrowed(name);
    }
    let is_escaped = !is_component || reads_escaped;
    let mark = format!("%~{:016x}", digest(name));
    let mut shown = Vec::with_capacity(name.len());
    // Where it can be cut so that the mark still fits, and no character is halved.
    let mut cut = 0;
    for (at, byte) in name.iter().enumerate() {
        if byte & 0xc0 != 0x80 && shown.len() + mark.len() <= LONGEST {
            cut = shown.len();
        }
        match byte {
            b'/' | 0 | b'%' if is_escaped => shown.extend(format!("%{byte:02X}").bytes()),
            b'.' if is_dots && at == 0 => shown.extend(b"%2E"),
            _ => shown.push(*byte),
        }
    }
    if shown.len() > LONGEST {
        shown.truncate(cut);
        shown.extend(mark.bytes());
    }
    Cow::Owned(shown)
}

/// FNV-1a, 64 bits: tells cut names apart, no more.
fn digest(name: &[u8]) -> u64 {
    name.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Turns back what is shown.
    fn original(shown: &[u8]) -> Vec<u8> {
        match shown {
            b"%2E" => return b".".to_vec(),
            b"%2E." => return b"..".to_vec(),
            _ => {}
        }
        let (mut name, mut rest) = (Vec::new(), shown);
        while let Some((byte, after)) = rest.split_first() {
            let (byte, after) = match rest.split_at_checked(3) {
                Some((b"%2F", after)) => (b'/', after),
                Some((b"%00", after)) => (0, after),
                Some((b"%25", after)) => (b'%', after),
                _ => (*byte, after),
            };
            name.push(byte);
            rest = after;
        }
        name
    }

    #[test]
    fn a_name_is_escaped_if_it_is_none_or_reads_like_one_that_was() {
        for (name, expected) in [
            (&b"passwd"[..], &b"passwd"[..]),
            (b".", b"%2E"),
            (b"..", b"%2E."),
            (b"...", b"..."),
            (b"../etc", b"..%2Fetc"),
            (b"..%2Fetc", b"..%252Fetc"),
            (b"..%252Fetc", b"..%25252Fetc"),
            (b"x\0%", b"x%00%25"),
            (b"x%00%25", b"x%2500%2525"),
            (b"100%", b"100%"),
            (b"a%20b", b"a%20b"),
            (b"%2e", b"%2e"),
            (b"%2E", b"%252E"),
            (b"%2E.", b"%252E."),
            (b"%2E..", b"%2E.."),
            (b"caf\xe9", b"caf\xe9"),
        ] {
            let found = shown(name);
            assert_eq!(&*found, expected, "{:?}", name.escape_ascii().to_string());
            assert_eq!(original(&found), name);
        }
    }

    #[test]
    fn a_name_that_the_kernel_would_not_take_is_cut_and_still_differs() {
        assert!(matches!(shown(&[b'a'; 1000]), Cow::Borrowed(_)));
        let long = |last: &str| format!("{}{last}", "/é".repeat(400)).into_bytes();
        let (one, two) = (long("1"), long("2"));
        for name in [&one, &two] {
            let shown = String::from_utf8(shown(name).into_owned()).unwrap();
            assert!((990..=1000).contains(&shown.len()) && shown.starts_with("%2Fé%2Fé"), "{shown}");
            assert_eq!(&shown[shown.len() - 18..][..2], "%~");
        }
        assert_ne!(shown(&one), shown(&two));
        assert_eq!(shown(&[b'%'; 1024]).len(), 1000);
    }

    proptest! {
        // Promise 20: "is escaped, reversibly (`%2F`)"
        #[test]
        fn every_name_is_one_component_that_can_be_turned_back(
            name in vec(prop_oneof![Just(b'%'), Just(b'2'), Just(b'5'), Just(b'0'), Just(b'F'), Just(b'E'), Just(b'.'),
                Just(b'/'), Just(0), any::<u8>()], 1..300)
        ) {
            let shown = shown(&name);
            prop_assert!(!matches!(&*shown, b"" | b"." | b"..") && !shown.contains(&b'/') && !shown.contains(&0));
            prop_assert_eq!(original(&shown), name);
        }

        #[test]
        fn no_name_is_longer_than_the_kernel_takes(name in vec(any::<u8>(), 900..1500)) {
            prop_assert!(shown(&name).len() <= LONGEST);
        }
    }
}
