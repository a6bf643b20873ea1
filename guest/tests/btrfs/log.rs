//! Machines that lost their power: what was synced after the last commit is read as the kernel recovers it.

use std::time::{Duration, SystemTime};

use guest::Time;

use super::compare::machine::Machine;
use super::synced::Synced;
use super::*;

/// Panics unless a snapshot reads as what the kernel makes of a copy of it; returns whether it had a log.
fn compare_recovered(what: &str, place: &Reflinks, snapshot: PathBuf) -> bool {
    let copy = place.copy(&snapshot, "recovered");
    // The kernel's clock for files is a few milliseconds behind.
    let since = SystemTime::now() - Duration::from_millis(10);
    let since = since.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    let seconds = i64::try_from(since.as_secs()).expect("before 2^63");
    let mut kernel = of_kernel(Mount::new(&copy, "btrfs", OPTIONS).path());
    kernel.recovered = Some(Time { seconds, nanoseconds: since.subsec_nanos() });
    fs::remove_file(copy).expect("it is ours");
    let facts = open(std::slice::from_ref(&snapshot)).1.unwrap_or_else(|error| panic!("{what}: {error}")).facts();
    assert_eq!(facts.problems, Vec::<String>::new(), "{what}");
    compare(what, std::slice::from_ref(&snapshot), kernel);
    fs::remove_file(snapshot).expect("it is ours");
    facts.is_replayed
}

#[test]
fn a_volume_in_use_reads_as_the_kernel_recovers_it() {
    let seed = Random::seed();
    let variants: [(&[&str], &str); 4] = [
        (&[], "commit=5"),
        (&["-M"], "commit=300,compress-force=zstd"),
        (&["--csum", "xxhash", "-n", "4096"], "commit=300"),
        (&["--csum", "sha256", "-O", "^no-holes"], "commit=1,compress-force=lzo"),
    ];
    let place = Reflinks::new(2 << 30);
    let mut logs = 0;
    for (number, (mkfs, options)) in (0..).zip(variants) {
        let image = place.at("image");
        make(std::slice::from_ref(&image), SIZE, mkfs);
        let mut snapshots = Vec::new();
        {
            let mount = Mount::new(&image, "btrfs", &format!("{OPTIONS},{options}"));
            let mut churn = Churn::new(mount.path(), seed + number);
            for round in 0..compare::rounds(3) {
                if round % 2 == 0 {
                    churn.work(150)
                } else {
                    churn.work_fast(100)
                }
                snapshots.push(place.copy(&image, &format!("snapshot-{round}")));
            }
        }
        for snapshot in snapshots {
            let what = format!("{} {options}, {}", mkfs.join(" "), snapshot.display());
            logs += u64::from(compare_recovered(&what, &place, snapshot));
        }
    }
    assert!(logs > 0, "nothing had a log");
    println!("{logs} had logs");
}

#[test]
fn what_was_synced_is_shown_whatever_became_of_its_names() {
    let seed = Random::seed();
    let variants: [(&[&str], &str); 5] = [
        (&[], "commit=300"),
        (&["-n", "4096"], "commit=300,compress-force=zstd"),
        (&["-O", "^no-holes"], "commit=300,compress-force=lzo"),
        (&["-M"], "commit=300,max_inline=0"),
        (&["-O", "^extref", "-n", "65536"], "commit=2,nodatacow"),
    ];
    let place = Reflinks::new(2 << 30);
    let (mut logs, mut all) = (0, 0);
    for (number, (mkfs, options)) in (0..).zip(variants) {
        let image = place.at("image");
        make(std::slice::from_ref(&image), SIZE, mkfs);
        let mut snapshots = Vec::new();
        {
            let mount = Mount::new(&image, "btrfs", &format!("{OPTIONS},{options}"));
            let subvolume = mount.path().join("subvolume");
            btrfs(&["subvolume", "create"], &[&subvolume]);
            let seed = (seed + number) * 1000;
            let mut guests = [Synced::new(mount.path(), seed), Synced::new(&subvolume, seed + 1)];
            for round in 0..compare::rounds(3) * 10 {
                for guest in &mut guests {
                    guest.work(5 + round * 7 % 40);
                }
                snapshots.push(place.copy(&image, &format!("snapshot-{round}")));
            }
        }
        for snapshot in snapshots {
            let what = format!("{seed}: {} {options}, {}", mkfs.join(" "), snapshot.display());
            logs += u64::from(compare_recovered(&what, &place, snapshot));
            all += 1;
        }
    }
    println!("{logs} of {all} had logs");
    assert!(logs * 3 > all, "{logs} of {all} had logs");
}

#[test]
fn the_log_of_an_older_kernel_reads_as_this_one_recovers_it() {
    let place = Reflinks::new(2 << 30);
    let image = place.at("image");
    make(std::slice::from_ref(&image), SIZE, &["-n", "4096"]);
    let seed = Random::seed();
    let script = format!(
        "mount -o noatime,commit=300 /dev/ubda /mnt; touch $out/mounted; task churn /mnt {seed} $out/enough; umount /mnt"
    );
    let mut machine = Machine::start(&[], &[&image], &script);
    machine.wait_for("mounted");
    let mut snapshots = Vec::new();
    for round in 0..compare::rounds(3) * 2 {
        std::thread::sleep(Duration::from_millis(300));
        snapshots.push(place.copy(&image, &format!("snapshot-{round}")));
    }
    File::create(machine.out().join("enough")).expect("room");
    machine.finish();
    let mut logs = 0;
    for snapshot in snapshots {
        logs += u64::from(compare_recovered(&snapshot.display().to_string(), &place, snapshot));
    }
    assert!(logs > 0, "nothing had a log");
}

#[test]
fn of_a_log_that_is_damaged_nothing_is_shown_and_that_is_said() {
    let place = Reflinks::new(1 << 30);
    let image = place.at("image");
    make(std::slice::from_ref(&image), SIZE, &["-n", "4096"]);
    let snapshot = {
        let mount = Mount::new(&image, "btrfs", &format!("{OPTIONS},commit=300"));
        let mut guest = Synced::new(mount.path(), Random::seed());
        guest.work(60);
        // Syncing may commit, and then there is no log.
        loop {
            guest.work(5);
            let snapshot = place.copy(&image, "snapshot");
            if open(std::slice::from_ref(&snapshot)).1.expect("it is sound").facts().is_replayed {
                break snapshot;
            }
            fs::remove_file(snapshot).expect("it is ours");
        }
    };
    let bytes = fs::read(&snapshot).expect("it was just made");
    let file = File::options().write(true).open(&snapshot).expect("it was just made");
    let mut damaged = 0;
    for (block, at) in bytes.chunks(4096).zip((0..).step_by(4096)) {
        let is_of_log =
            block[32..48] == bytes[(64 << 10) + 32..][..16] && block[88..96] == 6_u64.wrapping_neg().to_le_bytes();
        // That of the logs themselves has root items.
        if is_of_log && block[101 + 8] != 132 {
            file.write_all_at(&[!block[2000]], at + 2000).expect("room");
            damaged += 1;
        }
    }
    assert!(damaged > 0);
    let facts = open(std::slice::from_ref(&snapshot)).1.expect("the rest is sound").facts();
    assert!(!facts.is_replayed);
    let [problem] = &facts.problems[..] else { panic!("{:?}", facts.problems) };
    let expected = "files in subvolume 5 that programs synced in the last seconds before the backup (30 at most, unless the \
                    guest set more) are shown as they were before that, since its log cannot be replayed: ";
    assert!(problem.starts_with(expected), "{problem}");
    let kernel = of_kernel(Mount::new(&snapshot, "btrfs", &format!("{OPTIONS},ro,rescue=nologreplay")).path());
    compare("without its log", std::slice::from_ref(&snapshot), kernel);
}
