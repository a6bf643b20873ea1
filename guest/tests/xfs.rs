//! XFS as the kernel shows it: clean, and as a machine leaves it that loses its power.

mod compare;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::image::{FileDisk, Mount, Reflinks, scratch, sparse, succeed};
use compare::{Random, tree};
use guest::GuestFs;
use guest::xfs::Xfs;

/// Bytes of an image; mkfs.xfs makes none below 300 MiB.
const SIZE: u64 = 320 << 20;

fn make(image: &Path, options: &[&str]) {
    sparse(image, SIZE);
    succeed(Command::new("mkfs.xfs").arg("-q").args(options).arg(image));
}

fn open(what: &str, image: &Path) -> Xfs {
    Xfs::open(Arc::new(FileDisk::open(image))).unwrap_or_else(|error| panic!("{what}: {error}"))
}

fn shown(what: &str, image: &Path) -> (tree::Tree, Vec<String>) {
    tree::of_guest(&open(what, image), &FileDisk::open(image))
}

/// Panics unless this crate reads of an image what the kernel showed.
fn compare(what: &str, image: &Path, kernel: &tree::Tree) {
    let (shown, errors) = shown(what, image);
    let differences = tree::differences(kernel, &shown, None);
    let count = errors.len() + differences.len();
    let lines: Vec<_> = errors.into_iter().chain(differences).take(10).collect();
    assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", kernel.len(), lines.join("\n"));
}

#[test]
fn every_kind_of_clean_volume_reads_as_the_kernel_shows_it() {
    let sets: [&[&str]; 6] = [
        &[],
        &["-i", "nrext64=1", "-m", "rmapbt=1"],
        &["-b", "size=1024", "-n", "size=4096"],
        &["-m", "bigtime=0,reflink=0,finobt=0,inobtcount=0", "-i", "sparse=0"],
        &["-n", "size=65536", "-i", "size=2048"],
        &["-s", "size=4096", "-d", "agcount=3"],
    ];
    for options in sets {
        let what = format!("mkfs.xfs {}", options.join(" "));
        let folder = scratch();
        let image = folder.path().join("image");
        make(&image, options);
        generator::fill(Mount::new(&image, "xfs", "noatime").path(), Amount { names: 2500, holes: 700 });
        let mount = Mount::new(&image, "xfs", "ro,noatime");
        compare(&what, &image, &tree::of_kernel(mount.path()));
        let facts = open(&what, &image).facts();
        assert_eq!((facts.kind.as_str(), facts.is_replayed, facts.problems), ("xfs", false, vec![]), "{what}");
    }
}

#[test]
fn a_volume_in_use_reads_as_the_kernel_shows_it_after_replaying_its_log() {
    let seed = Random::seed();
    let variants: [(&[&str], &str); 4] = [
        (&[], "noatime"),
        (&["-b", "size=1024", "-m", "rmapbt=1"], "noatime,logbsize=256k"),
        (&["-m", "bigtime=0,reflink=0,finobt=0,inobtcount=0", "-i", "sparse=0"], "noatime"),
        (&["-l", "su=64k", "-i", "size=2048,nrext64=1", "-n", "size=16384"], "noatime"),
    ];
    let place = Reflinks::new(4 << 30);
    let mut changed = 0;
    for (number, (options, mounted)) in (0..).zip(variants) {
        let what = format!("mkfs.xfs {} {mounted}", options.join(" "));
        let image = place.at("image");
        make(&image, options);
        let mount = Mount::new(&image, "xfs", mounted);
        let mut churn = Churn::new(mount.path(), seed + number);
        for round in 0..compare::rounds(2) {
            let what = format!("{what}, snapshot {round}");
            churn.work(150);
            let snapshot = place.copy(&image, "snapshot");
            let recovered = place.copy(&snapshot, "recovered");
            let kernel = tree::of_kernel(Mount::new(&recovered, "xfs", "noatime,nouuid").path());
            compare(&what, &snapshot, &kernel);
            let facts = open(&what, &snapshot).facts();
            assert_eq!((facts.is_replayed, facts.problems), (true, vec![]), "{what}");
            changed += 1;
        }
    }
    assert_eq!(changed, 4 * compare::rounds(2));
}
