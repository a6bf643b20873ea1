//! Logical volumes with metadata of their own as the kernel shows them: pools, snapshots and caches that LVM makes in machines.
//!
//! The judge is another machine, which activates a copy of the disks. So what is compared is also what a guest would find that
//! lost its power, since disks are copied while volumes are written to.

mod compare;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use compare::image::{FileDisk, Reflinks, scratch, sparse, succeed};
use compare::machine::{LVM, LVM_MODULES, Machine};
use disk::Disk;
use guest::{Part, Survey, survey};

const MIB: u64 = 1 << 20;

/// What every script begins with, besides LVM: `write DEVICE KIB COUNT`, which writes pages there.
const WRITE: &str = r#"
write() { dd if=/dev/urandom of=/dev/vg/$1 bs=4K seek=$(($2 / 4)) count=$(($3 / 4)) conv=notrunc,fsync status=none; }
"#;

/// Makes a disk of zeroes for each size.
fn disks(folder: &Path, sizes: &[u64]) -> Vec<PathBuf> {
    let paths: Vec<_> = (0..sizes.len()).map(|number| folder.join(format!("disk{number}"))).collect();
    paths.iter().zip(sizes).for_each(|(path, size)| sparse(path, *size));
    paths
}

/// Runs a script of volumes on disks.
fn run(disks: &[PathBuf], script: &str) {
    let disks: Vec<_> = disks.iter().map(PathBuf::as_path).collect();
    Machine::run(LVM_MODULES, &disks, &format!("{LVM}{WRITE}{script}"));
}

/// Copies disks as they are now.
fn copies(disks: &[PathBuf], name: &str) -> Vec<PathBuf> {
    let copy = |disk: &PathBuf| {
        let path = disk.with_extension(name);
        succeed(Command::new("cp").arg("--sparse=always").arg(disk).arg(&path));
        path
    };
    disks.iter().map(copy).collect()
}

/// What the kernel reads of each volume that can be activated on disks, which are changed: its SHA-256, or `None` if it cannot be
/// read.
fn of_kernel(disks: &[PathBuf]) -> BTreeMap<String, Option<String>> {
    let disks: Vec<_> = disks.iter().map(PathBuf::as_path).collect();
    let script = "
        lvm vgchange -ay -K vg || true
        lvm lvs --noheadings -o lv_dm_path -S lv_layout!=pool vg | while read -r path; do
            sum=$(sha256sum < $path) || sum=unreadable
            echo \"${path#/dev/mapper/} ${sum%% *}\" >> $out/sums
        done";
    let output = Machine::run(LVM_MODULES, &disks, &format!("{LVM}{WRITE}{script}"));
    let sums = fs::read_to_string(output.at("sums")).expect("a file");
    let sum = |line: &str| {
        let (name, sum) = line.split_once(' ').expect("two words");
        (name.to_owned(), Some(sum.to_owned()).filter(|sum| sum != "unreadable"))
    };
    sums.lines().map(sum).collect()
}

fn sha256(disk: &dyn Disk) -> String {
    let mut sum =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sha256sum is there");
    let mut input = sum.stdin.take().expect("a pipe");
    let (mut at, mut bytes) = (0, vec![]);
    while at < disk.size() {
        let extent = disk.extent_at(at).expect("within the disk");
        bytes.resize(usize::try_from(extent.len.min(3 * MIB + 512)).expect("in memory"), 0);
        match extent.is_hole {
            true => bytes.fill(0),
            false => disk.read_at(at, &mut bytes).unwrap_or_else(|error| panic!("at {at}: {error}")),
        }
        input.write_all(&bytes).expect("it reads");
        at += bytes.len() as u64;
    }
    drop(input);
    let output = sum.wait_with_output().expect("it ends");
    String::from_utf8(output.stdout).expect("a number")[..64].to_owned()
}

/// What is found on disks, and the SHA-256 of each volume, or why it is not read.
fn of_guest(disks: &[PathBuf]) -> (BTreeMap<String, Result<String, String>>, Survey) {
    let open = |path: &PathBuf| -> Arc<dyn Disk> { Arc::new(FileDisk::open(path)) };
    let disks: Vec<_> = disks.iter().map(open).collect();
    let found = survey(&(0..).map(|number: u8| format!("xvd{number}")).zip(disks.iter().cloned()).collect::<Vec<_>>());
    let sum = |volume: &guest::Volume| {
        let Some(stack) = volume.stack.clone() else {
            return Err(volume.problem.as_ref().expect("a reason").to_string());
        };
        let disk = stack.open(&disks, |layer, size, members, _| layer.disk(size, members));
        disk.map(|disk| sha256(&*disk)).map_err(|error| error.to_string())
    };
    let volumes = found.volumes.iter().filter(|volume| volume.name.starts_with("vg-"));
    (volumes.map(|volume| (volume.name.clone(), sum(volume))).collect(), found)
}

/// Panics unless what is read of disks is what the kernel reads of a copy, but for volumes that are `named`, with the beginning of
/// why they are not read.
fn compare(what: &str, disks: &[PathBuf], named: &[(&str, &str)]) -> Survey {
    let (mut shown, found) = of_guest(disks);
    let kernel = of_kernel(&copies(disks, "judged"));
    for (name, reason) in named {
        let said = shown.remove(&format!("vg-{name}")).unwrap_or_else(|| panic!("{what}: no {name}"));
        assert!(said.as_ref().is_err_and(|said| said.starts_with(reason)), "{what}: {name}: {said:?}");
    }
    // Why something cannot be read is said in other words.
    let kernel: BTreeMap<_, _> =
        kernel.into_iter().filter(|(name, _)| !named.iter().any(|(named, _)| *name == format!("vg-{named}"))).collect();
    let read: BTreeMap<_, _> = shown.iter().map(|(name, sum)| (name.clone(), sum.clone().ok())).collect();
    assert_eq!(read, kernel, "{what}: {shown:?} {:?}", found.problems);
    assert!(read.values().flatten().count() > 1, "{what}: {shown:?}");
    found
}

#[test]
fn thin_volumes_and_their_snapshots_are_what_the_kernel_reads() {
    let folder = scratch();
    let disks = disks(folder.path(), &[400 * MIB, 300 * MIB, 450 * MIB]);
    run(
        &disks,
        r#"
        lvm pvcreate /dev/ubda /dev/ubdb /dev/ubdc
        lvm vgcreate -s 1M vg /dev/ubda /dev/ubdb /dev/ubdc
        lvm lvcreate -T vg/pool -L 60M -c 64K --poolmetadatasize 4M /dev/ubda
        lvm lvcreate -V 100M -T vg/pool -n thin
        lvm lvcreate -V 2T -T vg/pool -n never-written
        lvm lvchange -an vg/never-written
        mkfs.ext4 -q /dev/vg/thin
        mount /dev/vg/thin /mnt; cp -r /usr/sbin/l* /mnt; umount /mnt
        for at in 60 128 4096 4160 4228 77000 99999; do write thin $at 132; done
        lvm lvcreate -s -kn vg/thin -n s1
        for at in 32 4200 50000; do write thin $at 260; write s1 $((at + 500)) 68; done
        lvm lvcreate -s -kn vg/s1 -n s2
        blkdiscard -o 4194304 -l 3145728 /dev/vg/thin
        lvm lvextend -L +50M vg/pool /dev/ubdb
        for at in 100 4200 50000 88000; do write s2 $at 700; write s1 $at 8; done
        dd if=/dev/urandom of=/dev/vg/thin bs=1M seek=60 count=30 conv=notrunc,fsync status=none
        lvm lvextend -L 120M vg/s2
        lvm lvremove -y vg/never-written
        write s2 $((115 * 1024)) 300

        lvm lvcreate -T vg/striped -L 80M -i 2 -I 64K -c 192K --poolmetadatasize 4M /dev/ubda /dev/ubdb
        lvm lvcreate -V 64M -T vg/striped -n thin192
        for at in 0 180 3000 60000; do write thin192 $at 400; done
        lvm lvcreate -s -kn vg/thin192 -n s192
        for at in 188 3100 40000; do write thin192 $at 40; done

        lvm lvcreate -T vg/large -L 40M -c 1M --poolmetadatasize 4M -Zn
        lvm lvcreate -V 64M -T vg/large -n thin1024
        for at in 0 1000 33000; do write thin1024 $at 200; done

        lvm lvcreate -L 21M -n ext vg; write ext 0 21504
        lvm lvchange -an vg/ext; lvm lvchange -pr vg/ext
        lvm lvcreate -s --thinpool vg/pool vg/ext -n over-ext
        for at in 0 1000 21440; do write over-ext $at 64; done
        lvm lvextend -L 30M vg/over-ext; write over-ext 25000 64
        lvm lvcreate -s -kn vg/over-ext -n over-over; write over-over 2000 64
        sync

        lvm lvcreate -T vg/deep -L 400M -c 64K --poolmetadatasize 4M -Zn /dev/ubdc
        lvm lvcreate -V 400M -T vg/deep -n all-over
        python3 -c '
import os, random
disk = os.open("/dev/vg/all-over", os.O_WRONLY)
random.seed(1)
for chunk in random.sample(range(6400), 6000):
    os.pwrite(disk, chunk.to_bytes(4096, "big"), chunk * 65536)
os.fsync(disk)'
        "#,
    );
    let found = compare("thin", &disks, &[]);
    assert_eq!(found.problems, []);
    let content = |name: &str| found.volumes.iter().find(|volume| volume.name == name).map(|volume| volume.content);
    assert_eq!(content("vg-s1"), Some(guest::Content::Ext4));
    let layers = found.volumes.iter().filter_map(|volume| volume.stack.as_ref()).filter(|stack| stack.map().is_none());
    assert_eq!(layers.clone().count(), 9);
    let most = layers.map(|stack| stack.parts().len()).max();
    assert_eq!(most, Some(4), "an external origin");
    let is_layer = |part: &&Part| matches!(part, Part::Layer { .. });
    assert!(
        found.volumes.iter().filter_map(|v| v.stack.as_ref()).all(|s| s.parts().iter().filter(is_layer).count() < 2)
    );
}

#[test]
fn snapshots_and_their_origins_are_what_the_kernel_reads() {
    let folder = scratch();
    let disks = disks(folder.path(), &[300 * MIB, 200 * MIB]);
    run(
        &disks,
        "
        lvm pvcreate /dev/ubda /dev/ubdb
        lvm vgcreate -s 1M vg /dev/ubda /dev/ubdb
        lvm lvcreate -L 40M -n lin vg
        dd if=/dev/urandom of=/dev/vg/lin bs=1M count=40 conv=fsync status=none
        lvm lvcreate -s -L 12M -c 4K -n snap4 vg/lin /dev/ubdb
        for at in 0 8 16 1000 1004 40956; do write lin $at 4; write snap4 $((at / 2 + 8 * (at % 3))) 4; done
        lvm lvcreate -s -L 20M -c 64K -n snap64 vg/lin /dev/ubdb
        for at in 60 900 20000 36000; do write lin $at 2048; write snap64 $((at + 100)) 132; done
        lvm lvcreate -s -L 1M -c 4K -n invalid vg/lin
        write lin 4096 2048
        lvm lvcreate -s -L 4M -c 512K -n never-written vg/lin

        lvm lvcreate -T vg/pool -L 40M -c 64K --poolmetadatasize 4M
        lvm lvcreate -V 50M -T vg/pool -n thin
        write thin 0 5000
        lvm lvcreate -s -L 8M -c 16K -n of-thin vg/thin
        for at in 0 2000 4990; do write thin $at 64; write of-thin $((at + 32)) 64; done
        lvm lvcreate -s -L 8M -n second vg/thin; write second 1000 100

        lvm lvcreate -L 20M -n merged vg; write merged 0 20480
        lvm lvcreate -s -L 12M -c 4K -n gone vg/merged
        for at in 0 100 9000 20000; do write gone $at 300; write merged $((at + 200)) 200; done
        sleep 1000 < /dev/vg/merged &
        lvm lvconvert --merge vg/gone
        lvm lvcreate -s -kn vg/thin -n thin-gone; write thin-gone 3000 1000; write thin 3500 200
        sync
        ",
    );
    let found = compare("snapshots", &disks, &[("invalid", "the snapshot is invalid")]);
    let said: Vec<_> = found.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        ["LVM volume vg-merged: a snapshot of it is being merged into it: it is shown as it will be then"]
    );
    let parts = |name: &str| {
        let volume = found.volumes.iter().find(|volume| volume.name == name).expect("it is there");
        volume.stack.as_ref().expect("it is read").parts().len()
    };
    assert_eq!((parts("vg-lin"), parts("vg-snap4"), parts("vg-of--thin"), parts("vg-merged")), (1, 3, 5, 3));
}

#[test]
fn what_is_in_a_cache_is_read_there() {
    let folder = scratch();
    let disks = disks(folder.path(), &[200 * MIB, 100 * MIB]);
    run(
        &disks,
        "
        lvm pvcreate /dev/ubda /dev/ubdb
        lvm vgcreate -s 1M vg /dev/ubda /dev/ubdb
        for name in back through volume passed; do
            lvm lvcreate -L 20M -n $name vg /dev/ubda
            dd if=/dev/urandom of=/dev/vg/$name bs=1M count=20 conv=fsync status=none
        done
        for name in back through passed; do
            mode=write$name; [ $name != passed ] || mode=passthrough
            lvm lvcreate -L 8M -n data vg /dev/ubdb
            lvm lvcreate -L 8M -n meta vg /dev/ubdb
            lvm lvconvert -y --type cache-pool --poolmetadata vg/meta -c 64K vg/data
            lvm lvconvert -y --type cache --cachepool vg/data --cachemode $mode vg/$name
            lvm lvrename vg/data_cpool $name-pool
        done
        lvm lvcreate -L 20M -n fast vg /dev/ubdb
        lvm lvconvert -y --type cache --cachevol vg/fast --cachemode writeback -c 32K vg/volume
        for name in back through volume passed; do
            # So that nothing is written back meanwhile.
            dmsetup message vg-$name 0 migration_threshold 0
            # What covers a chunk goes into the cache at once.
            for at in 0 64 8960 16000; do
                dd if=/dev/urandom of=/dev/vg/$name bs=64K seek=$((at / 64)) count=2 oflag=direct conv=notrunc status=none
                write $name $((at + 8)) 16
            done
        done
        sync
        dmsetup status 
        ",
    );
    let found = compare("caches", &disks, &[]);
    // What was written back is not yet in the origin.
    let stale = |name: &str| {
        let volume = found.volumes.iter().find(|volume| volume.name == name).expect("it is there");
        let parts = volume.stack.as_ref().expect("it is read").parts().to_vec();
        let Some(Part::Layer { members, .. }) = parts.last() else { return None };
        let open = |path: &PathBuf| -> Arc<dyn Disk> { Arc::new(FileDisk::open(path)) };
        let origin = guest::Stack::new(vec![parts[usize::from(members[2])].clone()]).expect("a map");
        let disks: Vec<_> = disks.iter().map(open).collect();
        let [whole, origin] = [volume.stack.clone().expect("it is read"), origin].map(|stack| {
            let disk = stack.open(&disks, |layer, size, members, _| layer.disk(size, members));
            sha256(&*disk.expect("it was read before"))
        });
        Some(whole != origin)
    };
    assert_eq!(
        ["vg-back", "vg-through", "vg-volume", "vg-passed"].map(stale),
        [Some(true), Some(false), Some(true), None]
    );
}

#[test]
fn disks_copied_while_volumes_are_written_to_are_read_as_after_a_power_cut() {
    let reflinks = Reflinks::new(3 << 30);
    let disk = reflinks.at("disk");
    sparse(&disk, 300 * MIB);
    let script = "
        lvm pvcreate /dev/ubda
        lvm vgcreate -s 1M vg /dev/ubda
        lvm lvcreate -T vg/pool -L 60M -c 64K --poolmetadatasize 4M
        lvm lvcreate -V 60M -T vg/pool -n thin
        lvm lvcreate -L 30M -n lin vg
        lvm lvcreate -s -L 30M -c 4K -n snap vg/lin
        lvm lvcreate -L 30M -n cached vg
        lvm lvcreate -L 12M -n fast vg
        lvm lvconvert -y --type cache --cachevol vg/fast --cachemode writeback -c 64K vg/cached
        set +x
        end() { [ -e $out/stop ]; }
        anywhere() { write $1 $((RANDOM % 7000 * 4)) $((RANDOM % 20 * 4 + 4)); }
        until end; do anywhere thin; [ $((RANDOM % 5)) != 0 ] || blkdiscard -o $((RANDOM % 400 * 65536)) -l 131072 /dev/vg/thin; done &
        until end; do anywhere lin; anywhere snap; done &
        until end; do anywhere cached; done &
        set -x
        sleep 2
        touch $out/ready
        for name in a b c; do until end || lvm lvcreate -s -kn vg/thin -n $name; do :; done; sleep 1; done
        until end; do sleep 0.1; done
        wait";
    let mut machine = Machine::start(LVM_MODULES, &[&disk], &format!("{LVM}{WRITE}{script}"));
    machine.wait_for("ready");
    let copied: Vec<_> = (0..3)
        .map(|number| {
            std::thread::sleep(Duration::from_millis(1500));
            vec![reflinks.copy(&disk, &format!("copy{number}"))]
        })
        .collect();
    fs::write(machine.out().join("stop"), "").expect("room");
    machine.finish();
    for (number, copied) in copied.iter().chain([&vec![disk]]).enumerate() {
        compare(&format!("copy {number}"), copied, &[]);
    }
}

#[test]
fn volumes_that_are_only_maps_are_what_the_kernel_reads() {
    let folder = scratch();
    let disks = disks(folder.path(), &[60 * MIB, 60 * MIB, 60 * MIB, 60 * MIB]);
    run(
        &disks,
        "
        lvm pvcreate /dev/ubda /dev/ubdb /dev/ubdc /dev/ubdd
        lvm vgcreate -s 512K vg /dev/ubda /dev/ubdb /dev/ubdc /dev/ubdd
        lvm lvcreate -L 4M -n linear vg
        lvm lvcreate -L 6M -i 3 -I 4K -n striped vg
        lvm lvcreate -L 6M -i 3 -I 64K --type raid0 -n raid0 vg
        lvm lvcreate -L 6M -i 3 -I 32K --type raid0_meta -n raid0-meta vg
        lvm lvcreate -L 5M -m 2 --type raid1 -n raid1 vg
        lvm lvcreate -L 4M -m 1 --type mirror --mirrorlog core -n mirror vg
        lvm lvcreate -L 6M -i 2 -m 1 -I 64K --type raid10 -n raid10 vg
        lvm lvextend -L 7M vg/linear
        lvm lvextend -L 12M vg/striped
        lvm lvextend -L 10M vg/raid10
        lvm lvcreate -L 2M -n gap vg
        lvm lvextend -L 9M vg/linear
        for name in linear striped raid0 raid0-meta raid1 mirror raid10; do
            dd if=/dev/urandom of=/dev/vg/$name bs=512K conv=fsync status=none || true
        done
        while lvm lvs --noheadings -o sync_percent vg | grep -v 100.00 | grep -q '[0-9]'; do sleep 0.2; done
        sync
        ",
    );
    let found = compare("maps", &disks, &[]);
    assert!(found.volumes.iter().all(|volume| volume.stack.as_ref().is_some_and(|stack| stack.map().is_some())));
}

#[test]
#[ignore = "a task of those above, in machines of their own"]
fn inside_a_machine() {
    compare::machine::task();
}
