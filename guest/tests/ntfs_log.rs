//! Volumes of NTFS that were not unmounted: what ntfs-3g did, told by a journal.

mod compare;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use compare::Random;
use compare::generator::{self, Amount};
use compare::image::{FileDisk, Mount, scratch, sparse, succeed};
use compare::journal::{self, Crash};
use compare::tree::{self, Tree};
use guest::ntfs::Ntfs;
use guest::{Facts, GuestFs};
use tempfile::TempDir;

const CRASH: Crash = Crash { is_ended: true, written: 0, version: 1, is_copied: false, is_unknown: false };

/// A volume before and after work of all kinds.
struct States {
    folder: TempDir,
    before: Vec<u8>,
    after: Vec<u8>,
}

impl States {
    fn make() -> Self {
        let folder = scratch();
        let image = folder.path().join("image");
        sparse(&image, 24 << 20);
        succeed(Command::new("mkntfs").args(["-q", "-F", "-Q", "-c", "4096"]).arg(&image));
        {
            let mount = mount(&image);
            generator::fill(mount.path(), Amount { names: 200, holes: 60 });
            for number in 0..400 {
                fs::write(mount.path().join(format!("{number:03}")), [7; 30]).expect("room");
            }
        }
        let before = fs::read(&image).expect("it was made");
        {
            let mount = mount(&image);
            let path = |name: String| mount.path().join(name);
            let new = path("new".to_owned());
            fs::create_dir(&new).expect("a new folder");
            for number in 0..400 {
                let name = format!("{number:03}");
                match number % 5 {
                    0 => fs::remove_file(path(name)).expect("it was made"),
                    1 => fs::rename(path(name), new.join(format!("{number} has another name"))).expect("it was made"),
                    2 => fs::write(path(name), vec![8; number * 40]).expect("room"),
                    3 => fs::hard_link(path(name.clone()), path(format!("{name}-too"))).expect("room"),
                    _ => fs::write(path(format!("{name}-new")), [9; 50]).expect("room"),
                }
            }
            let long = fs::File::create(path("pieces".to_owned())).expect("a new file");
            for number in 0..300 {
                long.write_all_at(&[3; 4096], number * 20_000).expect("room");
            }
        }
        let after = fs::read(&image).expect("it was changed");
        Self { folder, before, after }
    }

    fn open(&self, image: &[u8]) -> (Tree, Facts) {
        let path = self.folder.path().join("opened");
        fs::write(&path, image).expect("room");
        let disk = Arc::new(FileDisk::open(&path));
        let guest = Ntfs::open(disk.clone()).expect("a volume");
        let (tree, errors) = tree::of_guest(&guest, disk.as_ref());
        assert_eq!(errors, Vec::<String>::new(), "{:?}", guest.facts());
        (tree, guest.facts())
    }

    /// Returns what is said of a volume that was left so, of which this is what is expected to be shown.
    fn check(&self, what: &str, image: &[u8], expected: &Tree) -> Facts {
        let (tree, facts) = self.open(image);
        let differences = tree::differences(expected, &tree, None);
        assert!(differences.is_empty(), "{what}: {facts:?} {:#?}", &differences[..differences.len().min(10)]);
        facts
    }
}

fn mount(image: &Path) -> Mount {
    Mount::new(image, "ntfs-3g", "streams_interface=xattr,noatime")
}

#[test]
fn what_a_journal_tells_is_shown_whatever_of_it_was_written() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let states = States::make();
    let (before, after) = (states.open(&states.before).0, states.open(&states.after).0);
    assert!(tree::differences(&before, &after, None).len() > 300);
    for (version, is_copied) in [(1, false), (1, true), (2, false), (2, true)] {
        for written in [0, 30, 100] {
            let crash = Crash { version, is_copied, written, ..CRASH };
            let what = format!("{crash:?}");
            let (image, changes) = journal::crashed(&states.before, &states.after, crash, &mut random);
            assert!(changes > 1000, "{what}: {changes} changes");
            let facts = states.check(&what, &image, &after);
            assert_eq!(facts.problems, Vec::<String>::new(), "{what}");
            assert!(facts.is_replayed || written == 100, "{what}");
            // Of what was written and not ended, nothing is left.
            let crash = Crash { is_ended: false, ..crash };
            let what = format!("{crash:?}");
            let (image, _) = journal::crashed(&states.before, &states.after, crash, &mut random);
            let facts = states.check(&what, &image, &before);
            assert_eq!((facts.is_replayed, facts.problems), (true, vec![]), "{what}");
        }
    }
}

#[test]
fn where_something_of_the_journal_is_not_known_nothing_is_replayed_and_that_is_said() {
    let states = States::make();
    let crash = Crash { is_unknown: true, ..CRASH };
    let (image, _) = journal::crashed(&states.before, &states.after, crash, &mut Random::new(1));
    let path = states.folder.path().join("opened");
    fs::write(&path, image).expect("room");
    let facts = Ntfs::open(Arc::new(FileDisk::open(&path))).expect("a volume").facts();
    assert!(!facts.is_replayed);
    let [problem] = &facts.problems[..] else { panic!("{:?}", facts.problems) };
    assert!(
        problem.starts_with("Windows did not unmount the volume, and its journal ($LogFile) is not replayed: record ")
    );
    assert!(
        problem.ends_with(" of the journal does 0x7e; what was changed last may be missing or half done"),
        "{problem}"
    );
}
