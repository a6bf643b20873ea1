//! Files on thin volumes and snapshots, seen through a mount: a worker reads the filesystem, others the layers below it.

mod guest_world;
mod support;

use std::fs;
use std::process::Command;

use guest_world::compare::image::{scratch, sparse};
use guest_world::compare::machine::{self, LVM, LVM_MODULES, Machine};
use guest_world::{MIB, VM, as_of_mount, assert_same, of_mount};
use support::{Mounted, init, succeed, xofs};

#[test]
fn files_on_layers_over_layers_are_shown_as_the_kernel_does_with_one_worker() {
    let folder = scratch();
    let image = folder.path().join("xvda");
    sparse(&image, 400 * MIB);
    let script = "
        lvm pvcreate /dev/ubda
        lvm vgcreate -s 1M vg /dev/ubda
        lvm lvcreate -T vg/pool -L 250M -c 64K --poolmetadatasize 4M
        lvm lvcreate -V 120M -T vg/pool -n thin
        mkfs.ext4 -q -N 8000 /dev/vg/thin
        mount -o noatime /dev/vg/thin /mnt; task fill /mnt; umount /mnt
        lvm lvcreate -s -L 60M -c 16K -n old vg/thin
        lvm lvcreate -s -kn vg/thin -n new
        mount -o noatime /dev/vg/thin /mnt; cp -r /mnt/contents /mnt/more; umount /mnt
        for name in thin old new; do
            mount -o ro,noatime /dev/vg/$name /mnt; task tree /mnt $out/$name; umount /mnt
        done
        sha256sum < /dev/vg/old > $out/sum
        sync";
    let output = Machine::run(LVM_MODULES, &[&image], &format!("{LVM}{script}"));
    let repository = init(folder.path(), "repository", &[]);
    let disk = format!("xvda={}", image.display());
    let mut ingest = xofs();
    ingest.args(["ingest", "--vm", VM, "--name", "web01", "--time", "20260801T020003Z", "--disk", &disk]);
    succeed(ingest.arg("--repository").arg(&repository));

    let mounted = Mounted::with_arguments(&repository, None, &["--owner", "guest", "--guest-workers", "1"]);
    let backup = mounted.path().join("by-uuid").join(VM).join("latest");
    let mut names: Vec<_> =
        fs::read_dir(backup.join("volumes")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort_unstable();
    assert_eq!(names, ["vg-new.raw", "vg-old.raw", "vg-thin.raw", "xvda.raw"]);
    for name in ["thin", "old", "new"] {
        let shown = of_mount(&backup.join(format!("files/vg-{name}")));
        assert_same(&as_of_mount(output.tree(name)), &shown);
    }
    let sum = Command::new("sha256sum").stdin(fs::File::open(backup.join("volumes/vg-old.raw")).unwrap()).output();
    assert_eq!(sum.unwrap().stdout, fs::read(output.at("sum")).unwrap());
}

#[test]
#[ignore = "a task of those above, in machines of their own"]
fn inside_a_machine() {
    machine::task();
}
