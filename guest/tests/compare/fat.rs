//! What FAT and exFAT can hold.

use std::fs::{self, File};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use super::Random;

fn folder(path: &Path) {
    fs::create_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Makes files of sizes around those of sectors and clusters.
pub fn contents(root: &Path, random: &mut Random) {
    folder(root);
    let limits = [0, 1, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 32_768, 65_535, 65_537, 300_000, 1_000_001];
    for size in limits {
        fs::write(root.join(format!("size-{size}")), random.bytes(size)).expect("room");
    }
}

/// Makes files with names of each kind, and a directory of so many.
pub fn names(root: &Path, count: u64) {
    folder(root);
    let whole = "n".repeat(255);
    let odd = [
        "README.TXT",
        "readme2.txt",
        "README3.txt",
        "readme4.TXT",
        "ReadMe5.Txt",
        "NOEXT",
        "noext2",
        "with space",
        "a.b.c",
        ".hidden",
        "x+y=z[1];,",
        "exactly-13-ch",
        "d\u{e9}j\u{e0} vu",
        "decomposed-e\u{301}",
        "\u{65e5}\u{672c}\u{8a9e}",
        "\u{41f}\u{440}\u{438}\u{432}\u{435}\u{442}",
        whole.as_str(),
    ];
    for name in odd {
        fs::write(root.join(name), name).expect("a name");
    }
    let mut deep = root.join("deep");
    folder(&deep);
    for level in 0..20 {
        deep = deep.join(format!("level-{level}"));
        folder(&deep);
    }
    let large = root.join("large");
    folder(&large);
    for number in 0..count {
        File::create(large.join(format!("a-rather-long-name-of-number-{number}"))).expect("a name");
    }
}

/// Makes files of times from about the first that there is to `last` (seconds).
pub fn times(root: &Path, last: i64) {
    folder(root);
    let moments =
        [315_532_800 + 86_400, 951_782_400, 951_868_799, 1_700_000_001, 2_147_483_648, 4_107_456_000, 4_354_732_799];
    for tv_sec in moments.into_iter().filter(|moment| *moment <= last) {
        let file = root.join(format!("moment-{tv_sec}"));
        fs::write(&file, "t").expect("room");
        let moment = Timespec { tv_sec, tv_nsec: 0 };
        let times = Timestamps { last_access: moment, last_modification: moment };
        rustix::fs::utimensat(CWD, &file, &times, AtFlags::SYMLINK_NOFOLLOW).expect("it is ours");
    }
}
