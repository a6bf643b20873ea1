//! squashfs as the kernel shows it, in all of its compressions; and whatever else stands in one.

#[path = "compare/checksums.rs"]
mod checksums;
mod compare;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use compare::generator::{self, Amount};
use compare::image::{self, FileDisk, Mount, scratch, succeed};
use compare::{Random, hostile, tree};
use guest::Kind;
use guest::squashfs::Squashfs;

/// Makes and fills a filesystem that has all of what the kernel shows of a squashfs.
fn source(folder: &Path, amount: Amount) -> Mount {
    let image = folder.join("source");
    image::make(&image, 128 << 20, &["mkfs.ext4", "-O", "ea_inode"]);
    let mount = Mount::new(&image, "ext4", "noatime");
    generator::fill(mount.path(), amount);
    for size in [100, 5000, 131_072, 131_073, 1_000_000] {
        let text: Vec<u8> = (0..).flat_map(|line| format!("line {line}\n").into_bytes()).take(size).collect();
        fs::write(mount.path().join(format!("text-{size}")), text).expect("room");
    }
    mount
}

fn make(source: &Path, image: &Path, options: &[&str]) {
    let _ = fs::remove_file(image);
    succeed(Command::new("mksquashfs").args([source, image]).args(["-quiet", "-no-progress"]).args(options));
}

/// Panics unless this crate reads of an image what the kernel showed.
fn compare(what: &str, image: &Path, mut kernel: tree::Tree) {
    let disk = Arc::new(FileDisk::open(image));
    let guest = Squashfs::open(disk.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let (mut shown, errors) = tree::of_guest(&guest, disk.as_ref());
    tree::renumber(what, &kernel, &mut shown);
    for (path, file) in &mut shown {
        let Some(truth) = kernel.get_mut(path) else { continue };
        // The kernel counts attributes, too, and believes a number that stands beside the blocks.
        if truth.attributes.kind == Kind::File || !truth.xattrs.is_empty() {
            assert!(file.attributes.allocated <= truth.attributes.size.next_multiple_of(512));
            truth.attributes.allocated = file.attributes.allocated;
        }
    }
    let differences = tree::differences(&kernel, &shown, None);
    let count = errors.len() + differences.len();
    let lines: Vec<_> = errors.into_iter().chain(differences).take(10).collect();
    assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", kernel.len(), lines.join("\n"));
}

#[test]
fn every_compression_reads_as_the_kernel_shows_it() {
    let folder = scratch();
    let source = source(folder.path(), Amount { names: 1500, holes: 60 });
    let sets: [&[&str]; 8] = [
        &["-comp", "gzip"],
        &["-comp", "xz"],
        &["-comp", "zstd"],
        &["-comp", "lz4"],
        &["-comp", "lzo"],
        &["-comp", "zstd", "-b", "16384", "-no-fragments", "-no-exports"],
        &["-comp", "gzip", "-b", "1M", "-always-use-fragments"],
        &["-noI", "-noD", "-noF", "-noX"],
    ];
    for options in sets {
        let image = folder.path().join("image");
        make(source.path(), &image, options);
        let kernel = tree::of_kernel(Mount::new(&image, "squashfs", "ro").path());
        compare(&options.join(" "), &image, kernel);
        // Two gigabytes of zeroes take mksquashfs long; once is enough.
        let _ = fs::remove_file(source.path().join("contents/far"));
    }
}

#[test]
fn reading_ends_whatever_is_in_an_image() {
    let mut random = Random::new(Random::seed());
    let folder = scratch();
    let source = source(folder.path(), Amount { names: 300, holes: 20 });
    for name in ["contents/far", "contents/size-3000000"] {
        fs::remove_file(source.path().join(name)).expect("it was made");
    }
    let sets: [&[&str]; 3] = [&["-noI", "-noX", "-comp", "zstd"], &["-comp", "gzip"], &["-comp", "xz", "-b", "4096"]];
    for options in sets {
        let image = folder.path().join("image");
        make(source.path(), &image, options);
        let bytes = fs::read(&image).expect("it was just made");
        let time = Duration::from_millis(1000 * compare::rounds(1));
        let what = options.join(" ");
        hostile::change(&what, bytes, |disk| Ok(Box::new(Squashfs::open(disk)?)), checksums::none, &mut random, time);
    }
}
