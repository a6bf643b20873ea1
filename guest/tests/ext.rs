//! ext2, ext3 and ext4 as the kernel shows them: clean, and as a machine leaves them that loses its power.

mod compare;

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::image::{FileDisk, Mount, Reflinks, make, scratch};
use compare::{Random, tree};
use guest::GuestFs;
use guest::ext::Ext;

/// Panics unless this crate reads of an image what the kernel showed.
fn compare(what: &str, image: &Path, kernel: &tree::Tree, mounted: Option<i64>) {
    let disk = Arc::new(FileDisk::open(image));
    let guest = Ext::open(disk.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let (shown, errors) = tree::of_guest(&guest, disk.as_ref());
    let differences = tree::differences(kernel, &shown, mounted);
    let count = errors.len() + differences.len();
    let lines: Vec<_> = errors.into_iter().chain(differences).take(10).collect();
    assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", kernel.len(), lines.join("\n"));
}

#[test]
fn every_kind_of_clean_volume_reads_as_the_kernel_shows_it() {
    let sets: [(&str, &[&str]); 14] = [
        ("ext4", &["mkfs.ext4"]),
        ("ext4", &["mkfs.ext4", "-b", "1024"]),
        ("ext4", &["mkfs.ext4", "-b", "2048"]),
        ("ext4", &["mkfs.ext4", "-O", "^metadata_csum,^64bit"]),
        ("ext4", &["mkfs.ext4", "-O", "inline_data,ea_inode"]),
        ("ext4", &["mkfs.ext4", "-O", "inline_data,large_dir", "-I", "512"]),
        ("ext4", &["mkfs.ext4", "-O", "bigalloc", "-C", "16384"]),
        ("ext4", &["mkfs.ext4", "-I", "128"]),
        ("ext4", &["mkfs.ext4", "-O", "metadata_csum_seed,orphan_file"]),
        ("ext4", &["mkfs.ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"]),
        ("ext4", &["mkfs.ext4", "-O", "mmp,encrypt,fast_commit", "-E", "mmp_update_interval=1"]),
        ("ext3", &["mkfs.ext3"]),
        ("ext2", &["mkfs.ext2"]),
        ("ext2", &["mkfs.ext2", "-b", "1024", "-O", "^filetype"]),
    ];
    for (kind, mkfs) in sets {
        let folder = scratch();
        let image = folder.path().join("image");
        make(&image, 64 << 20, mkfs);
        generator::fill(Mount::new(&image, "ext4", "noatime").path(), Amount { names: 2500, holes: 700 });
        let mount = Mount::new(&image, "ext4", "ro,noatime");
        compare(&mkfs.join(" "), &image, &tree::of_kernel(mount.path()), None);
        let facts = Ext::open(Arc::new(FileDisk::open(&image))).expect("it was opened before").facts();
        assert_eq!((facts.kind.as_str(), facts.is_replayed, facts.problems), (kind, false, vec![]), "{mkfs:?}");
    }
}

#[test]
fn a_volume_in_use_reads_as_the_kernel_shows_it_after_replaying_its_journal() {
    let seed = Random::seed();
    let variants: [(&[&str], &str); 6] = [
        (&["mkfs.ext4"], "noatime"),
        (&["mkfs.ext4"], "noatime,data=journal"),
        (&["mkfs.ext4", "-b", "1024", "-O", "^metadata_csum,^64bit"], "noatime"),
        (&["mkfs.ext4", "-b", "1024", "-O", "^metadata_csum,^64bit"], "noatime,data=journal,journal_checksum"),
        (&["mkfs.ext3"], "noatime,data=journal"),
        (&["mkfs.ext3", "-b", "1024"], "noatime"),
    ];
    let place = Reflinks::new(1 << 30);
    let mut replayed = 0;
    for (number, (mkfs, options)) in (0..).zip(variants) {
        let what = format!("{} {options}", mkfs.join(" "));
        let image = place.at("image");
        make(&image, 40 << 20, mkfs);
        let mount = Mount::new(&image, "ext4", options);
        let mut churn = Churn::new(mount.path(), seed + number);
        for round in 0..compare::rounds(3) {
            churn.work(150);
            let snapshot = place.copy(&image, "snapshot");
            let recovered = place.copy(&snapshot, "recovered");
            let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
            let kernel = {
                let mount = Mount::new(&recovered, "ext4", "noatime");
                tree::of_kernel(mount.path())
            };
            let what = format!("{what}, snapshot {round}");
            compare(&what, &snapshot, &kernel, Some(i64::try_from(now).expect("seconds")));
            let facts = Ext::open(Arc::new(FileDisk::open(&snapshot))).expect("it was opened before").facts();
            assert_eq!(facts.problems, Vec::<String>::new(), "{what}");
            replayed += u64::from(facts.is_replayed);
        }
    }
    assert_eq!(replayed, 6 * compare::rounds(3));
}
