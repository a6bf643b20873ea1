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

use compare::image::{FileDisk, scratch, sparse, succeed};
use compare::machine::Machine;
use disk::Disk;
use guest::{Part, Survey, survey};

const MIB: u64 = 1 << 20;

const MODULES: &[&str] = &[
    "dm-mod",
    "dm-thin-pool",
    "dm-snapshot",
    "dm-cache",
    "dm-cache-smq",
    "dm-mirror",
    "dm-raid",
    "raid0",
    "raid1",
    "raid10",
];

/// What every script begins with: LVM without udev and daemons, and `write DEVICE KIB COUNT`, which writes pages there.
const SETTINGS: &str = r#"
mkdir -p /run/lvm /run/lock
mount -t tmpfs tmpfs /etc/lvm
cat > /etc/lvm/lvm.conf <<'END'
devices { dir="/dev" scan=["/dev"] use_devicesfile=0 hints="none" obtain_device_list_from_udev=0 }
global { use_lvmpolld=0 event_activation=0 locking_dir="/run/lock" use_lvmlockd=0 }
activation { udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=0 }
backup { backup=0 archive=0 }
END
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
    Machine::run(MODULES, &disks, &format!("{SETTINGS}{script}"));
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
        lvm vgchange -ay -K vg
        lvm lvs --noheadings -o lv_dm_path vg | while read -r path; do
            sum=$(sha256sum < $path) || sum=unreadable
            echo \"${path#/dev/mapper/} ${sum%% *}\" >> $out/sums
        done";
    let output = Machine::run(MODULES, &disks, &format!("{SETTINGS}{script}"));
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
    let kernel: BTreeMap<_, _> = kernel
        .into_iter()
        .filter(|(name, _)| !named.iter().any(|(named, _)| *name == format!("vg-{named}")))
        .map(|(name, sum)| (name, sum.ok_or_else(|| "the kernel cannot read it".to_owned())))
        .collect();
    assert_eq!(shown, kernel, "{what}: {:?}", found.problems);
    assert!(!shown.is_empty(), "{what}");
    found
}

const POOL: (&str, &str) = ("pool", "a pool of thin volumes, which holds no files itself");

#[test]
fn thin_volumes_and_their_snapshots_are_what_the_kernel_reads() {
    let folder = scratch();
    let disks = disks(folder.path(), &[400 * MIB, 300 * MIB]);
    run(
        &disks,
        "
        lvm pvcreate /dev/ubda /dev/ubdb
        lvm vgcreate -s 1M vg /dev/ubda /dev/ubdb
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

        lvm lvcreate -T vg/striped -L 80M -i 2 -I 64K -c 192K --poolmetadatasize 4M
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
        lvm lvs -a
        ",
    );
    let named = [POOL, ("striped", POOL.1), ("large", POOL.1)];
    let found = compare("thin", &disks, &named);
    assert_eq!(found.problems, []);
    let content = |name: &str| found.volumes.iter().find(|volume| volume.name == name).map(|volume| volume.content);
    assert_eq!(content("vg-s1"), Some(guest::Content::Ext4));
    let layers = found.volumes.iter().filter_map(|volume| volume.stack.as_ref()).filter(|stack| stack.map().is_none());
    assert_eq!(layers.clone().count(), 8);
    let most = layers.map(|stack| stack.parts().len()).max();
    assert_eq!(most, Some(4), "an external origin");
    let is_layer = |part: &&Part| matches!(part, Part::Layer { .. });
    assert!(
        found.volumes.iter().filter_map(|v| v.stack.as_ref()).all(|s| s.parts().iter().filter(is_layer).count() < 2)
    );
}

#[test]
#[ignore = "a task of those above, in machines of their own"]
fn inside_a_machine() {
    compare::machine::task();
}
