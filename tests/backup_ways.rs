//! Twenty increments of several disks, read in each way that there is: every disk of every backup is what the machine held at its
//! snapshot, and no more is moved and stored than was written since the one before.
//!
//! `XOFS_SEED=17` has the guest write something else.

mod pool;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use pool::{BLOCK, MIB, World, is_key, read};
use serde_json::{Value, json};
use support::{Mounted, scratch};
use uuid::Uuid;
use xapi::Ref;
use xapi_simulator::content::Content;
use xapi_simulator::guest::Guest;
use xapi_simulator::random::Random;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::value::Reference;
use xapi_simulator::{Class, Upset};
use xofs::repository::{OpenOptions, Repository};

/// Bytes of the pieces that changed block tracking knows.
const PIECE: u64 = 64 << 10;
/// Bytes of a disk that are read although they are said not to have changed: a piece of eight blocks, however large it is.
const SPOTS: u64 = 8 * PIECE;
/// How many increments there are, and at which of them something happens to the disks.
const INCREMENTS: u64 = 20;
const GROWS: u64 = 5;
const COMES: u64 = 9;
const GOES: u64 = 14;

/// A way to read the disks of a snapshot.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Stream,
    BlockList,
    ChangedBlocks,
    Files,
}

impl Way {
    /// How reports call it, for a key and for an increment.
    fn name(self, is_key: bool) -> &'static str {
        match self {
            Self::Stream => "VHD stream",
            Self::ChangedBlocks if !is_key => "NBD + CBT",
            Self::BlockList | Self::ChangedBlocks => "NBD + block list",
            Self::Files => "files of the SR",
        }
    }
}

/// What happened to a disk since its last backup; to one that has none, since it was made.
struct Changed {
    is_key: bool,
    /// Blocks of 2 MiB that were written to, or that are there.
    blocks: u64,
    /// Pieces of 64 KiB that were written to.
    pieces: u64,
}

/// What a machine does, and what its disks held at each backup.
struct History {
    world: World,
    way: Way,
    arguments: Vec<String>,
    random: Random,
    /// Of disks that have a backup, what was written since.
    written: BTreeMap<Reference, Vec<Range<u64>>>,
    held: Vec<BTreeMap<String, Content>>,
}

impl History {
    fn new(way: Way, world: World, arguments: &[&str]) -> Self {
        // What is merged is merged between two runs.
        world.lab.simulator.settings(|settings| settings.coalesce_interval = None);
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let random = Random::new(world.seed);
        let mut history = Self { world, way, arguments, random, written: BTreeMap::new(), held: Vec::new() };
        // Storages round sizes up to whole blocks; a disk that came otherwise need not have one.
        let data = history.disk("xvdc");
        let grown = history.world.lab.simulator.write(&data, |content| content.grow(10 * MIB + 3 * 512));
        grown.expect("there").expect("larger");
        history.guest_writes(&data, 2);
        history
    }

    fn disk(&self, name: &str) -> Reference {
        self.world.lab.disks(&self.world.machine())[name].clone()
    }

    fn guest_writes(&mut self, vdi: &Reference, writes: u64) {
        let mut guest = Guest::new(self.random.number());
        let ranges = self.world.lab.simulator.write(vdi, |content| guest.work(content, writes)).expect("there");
        if let Some(written) = self.written.get_mut(vdi) {
            written.extend(ranges.expect("in range"));
        }
    }

    /// What the guest and who owns it do before the backup of this number.
    fn goes_on(&mut self, number: u64) {
        let client = self.world.lab.client();
        match number {
            GROWS => {
                let vm = json!(self.world.machine().as_str());
                client.run("VM.hard_shutdown", &[vm]).expect("off");
                let data = self.disk("xvdc");
                client.resize_vdi(&Ref::new(data.as_str()), 15 * MIB).expect("resized");
                // Stored exploded, it begins anew.
                self.written.remove(&data);
            }
            COMES => self.adds_a_disk(),
            GOES => {
                let vbds = self.world.lab.field(Class::Vdi, &self.disk("xvdc"), "VBDs");
                let vbd = vbds[0].as_str().expect("it has one").to_owned();
                client.destroy_vbd(&Ref::new(&vbd)).expect("destroyed");
            }
            _ => {}
        }
        let machine = self.world.machine();
        for (name, vdi) in self.world.lab.disks(&machine) {
            // Each backup has something to store.
            let least = u64::from(name == "xvda");
            let writes = least + self.random.below(3);
            self.guest_writes(&vdi, writes);
        }
        let left_out = self.world.lab.simulator.only(Class::Vdi, "[NOBAK] scratch");
        self.guest_writes(&left_out, 1);
        self.world.lab.simulator.happen(&Upset::Coalesce);
    }

    fn adds_a_disk(&mut self) {
        let client = self.world.lab.client();
        let sr = self.world.lab.field(Class::Vdi, &self.disk("xvda"), "SR");
        let fields = json!({
            "name_label": "more", "name_description": "", "SR": sr, "virtual_size": 7 * MIB, "type": "user",
            "sharable": false, "read_only": false, "other_config": {},
        });
        let more = client.create_vdi(fields.as_object().expect("an object")).expect("made");
        let fields = json!({
            "VM": self.world.machine().as_str(), "VDI": more, "userdevice": "3", "bootable": false, "mode": "RW",
            "type": "Disk", "unpluggable": true, "empty": false, "other_config": {}, "qos_algorithm_type": "",
            "qos_algorithm_params": {},
        });
        client.create_vbd(fields.as_object().expect("an object")).expect("made");
        self.guest_writes(&Reference::from(more.as_str()), 3);
    }

    /// What changed of a disk since its last backup.
    fn changed(&self, vdi: &Reference) -> Changed {
        match self.written.get(vdi) {
            None => {
                let content = self.world.lab.simulator.content(vdi).expect("there");
                Changed { is_key: true, blocks: content.present().len() as u64, pieces: 0 }
            }
            Some(ranges) => {
                let touched = |unit: u64| {
                    let of = |range: &Range<u64>| range.start / unit..range.end.div_ceil(unit);
                    ranges.iter().flat_map(of).collect::<BTreeSet<u64>>().len() as u64
                };
                Changed { is_key: false, blocks: touched(BLOCK), pieces: touched(PIECE) }
            }
        }
    }

    fn backs_up(&mut self, number: u64) {
        let lab = &self.world.lab;
        let disks = lab.disks(&self.world.machine());
        let content = |vdi| lab.simulator.content(vdi).expect("there");
        self.held.push(disks.iter().map(|(name, vdi)| (name.clone(), content(vdi))).collect());
        let changed: Vec<Changed> = disks.values().map(|vdi| self.changed(vdi)).collect();
        let before = images(&self.world.repository);
        lab.simulator.log().clear();
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let said = self.world.back_up(&arguments);
        lab.listened_to_tasks_alone();
        for (index, ((name, vdi), changed)) in disks.iter().zip(&changed).enumerate() {
            let when = format!("backup {number}, {name}: {:#}", said["backup"]["reads"][index]);
            assert_eq!(is_key(&said, index), changed.is_key, "{when}");
            self.check_moved(vdi, changed, read(&said, index), &when);
        }
        // Bitmaps, headers, tables and digests are part of the twentieth.
        let (stored, blocks) =
            (images(&self.world.repository) - before, changed.iter().map(|it| it.blocks).sum::<u64>());
        assert!(stored * 20 <= blocks * BLOCK * 21, "backup {number}: {stored} bytes stored of {blocks} blocks");
        for vdi in disks.into_values() {
            self.written.insert(vdi, Vec::new());
        }
    }

    /// Compares what the pool sent of a disk with what there was to be sent.
    fn check_moved(&self, vdi: &Reference, changed: &Changed, (bytes, way): (u64, String), when: &str) {
        let lab = &self.world.lab;
        assert!(way.starts_with(self.way.name(changed.is_key)), "{when}");
        let snapshots = lab.field(Class::Vdi, vdi, "snapshots");
        let snapshots = snapshots.as_array().map(Vec::as_slice).unwrap_or_default();
        let [Value::String(snapshot)] = snapshots else { panic!("{when}: one snapshot stays: {snapshots:?}") };
        let uuid = lab.field(Class::Vdi, &Reference::from(snapshot.as_str()), "uuid");
        let uuid: Uuid = uuid.as_str().and_then(|uuid| uuid.parse().ok()).expect("a uuid");
        let exported = lab.simulator.log().exported(uuid);
        let moved = lab.simulator.log().bytes(uuid) - exported;
        // A key is compared with nothing.
        let spots = if changed.is_key { 0 } else { SPOTS };
        let (blocks, pieces) = (changed.blocks * BLOCK, changed.pieces * PIECE);
        let (by_exports, otherwise) = match self.way {
            Way::Stream => (blocks, 0),
            Way::ChangedBlocks if !changed.is_key => (0, pieces + spots),
            // The export that lists the blocks is broken off behind its list.
            Way::BlockList | Way::ChangedBlocks => (in_flight(), blocks + spots),
            Way::Files => (0, 0),
        };
        assert!(exported <= by_exports, "{exported} bytes exported, {by_exports} expected at most; {when}");
        assert!(moved <= otherwise, "{moved} bytes by NBD, {otherwise} expected at most; {when}");
        assert!(bytes <= if self.way == Way::Files { blocks + spots } else { by_exports.max(otherwise) }, "{when}");
    }

    /// Compares all of all disks of all backups, as a mount shows them.
    fn compare(&self) {
        let mounted = Mounted::new(&self.world.repository, None);
        let repository = Repository::open(&self.world.repository, OpenOptions::default()).expect("a repository");
        let vm = repository.vms().expect("listed").first().cloned().expect("it has backups");
        let backups = repository.backups(&vm.id).expect("listed");
        assert_eq!(backups.len(), self.held.len());
        for (number, (backup, held)) in backups.iter().zip(&self.held).enumerate() {
            let folder = mounted.backup(vm.id.as_str(), backup.metadata.as_str()).join("disks");
            let names = fs::read_dir(&folder).expect("listed").map(|entry| entry.expect("listed").path());
            let shown: BTreeSet<String> = names
                .filter(|path| path.extension().is_some_and(|end| end == "raw"))
                .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
                .collect();
            assert_eq!(shown, held.keys().cloned().collect(), "backup {number}");
            for (name, content) in held {
                let file = File::open(folder.join(format!("{name}.raw"))).expect("it is there");
                compare_disk(file, content, &format!("backup {number}, {name}"));
            }
        }
    }

    /// Makes all backups, and compares them.
    fn unfold(mut self) {
        self.world.lab.simulator.happen(&Upset::Coalesce);
        self.backs_up(0);
        for number in 1..=INCREMENTS {
            self.goes_on(number);
            self.backs_up(number);
        }
        assert_eq!(self.held.iter().map(BTreeMap::len).max(), Some(3), "disks came and went");
        self.world.is_at_rest(1, 2);
        self.compare();
    }
}

/// Bytes that a connection may take of an export that nobody reads on: what both ends keep, and the block that is being sent.
fn in_flight() -> u64 {
    let largest = |name: &str| -> u64 {
        let limits = fs::read_to_string(Path::new("/proc/sys/net/ipv4").join(name)).expect("this is Linux");
        limits.split_whitespace().nth(2).and_then(|limit| limit.parse().ok()).expect("three numbers")
    };
    largest("tcp_wmem") + largest("tcp_rmem") + BLOCK
}

/// The bytes of all images of a repository, with all that belongs to them.
fn images(repository: &Path) -> u64 {
    let (mut bytes, mut folders) = (0, vec![repository.join("xo-vm-backups")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("listed") {
            let path = entry.expect("listed").path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.components().any(|part| part.as_os_str() == "vdis") => {
                    bytes += fs::metadata(&path).expect("it is there").len();
                }
                false => {}
            }
        }
    }
    bytes
}

fn compare_disk(mut file: File, content: &Content, what: &str) {
    assert_eq!(file.metadata().expect("it is there").len(), content.size(), "{what}");
    let (mut found, mut held) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for start in (0..content.size()).step_by(1 << 20) {
        let len = usize::try_from((content.size() - start).min(1 << 20)).expect("small");
        file.read_exact(&mut found[..len]).expect("it can be read");
        content.read(start, &mut held[..len]).expect("in range");
        let differs = found[..len].iter().zip(&held[..len]).position(|(found, held)| found != held);
        assert_eq!(differs, None, "{what}: the first byte that differs, from {start} on");
    }
}

/// A running machine with two disks and one that is left out.
fn machine() -> Machine {
    let machine = Machine::new("web01").running().disk(Disk::new("system", 16 * MIB).filled(50));
    machine.disk(Disk::new("[NOBAK] scratch", 4 * MIB)).disk(Disk::new("data", 10 * MIB).filled(50))
}

#[test]
fn increments_by_stream_are_what_was_written_and_nothing_more() {
    History::new(Way::Stream, World::new(|scene| scene.vm(machine())), &["--no-nbd"]).unfold();
}

#[test]
fn increments_by_nbd_are_what_was_written_and_nothing_more() {
    History::new(Way::BlockList, World::new(|scene| scene.vm(machine())), &[]).unfold();
}

#[test]
fn increments_by_changed_block_tracking_are_what_was_written_and_nothing_more() {
    History::new(Way::ChangedBlocks, World::new(|scene| scene.vm(machine())), &["--cbt"]).unfold();
}

#[test]
fn increments_out_of_the_files_of_the_sr_are_what_was_written_and_nothing_more() {
    let folder = tempfile::Builder::new().prefix("sr-").tempdir_in(scratch()).expect("a folder");
    let sr = Sr::new("share", Storage::Nfs).folder(folder.path());
    let world = World::new(|scene| scene.sr(sr).vm(machine()));
    let path = world.lab.sr_path("share", folder.path());
    History::new(Way::Files, world, &["--sr-path", &path]).unfold();
}
