//! Linux with drivers that the host's may not have: a kernel that runs as a process (User-mode Linux), whose root is the host's.
//!
//! It has XFS of version 4, device mapper with thin volumes and snapshots, md, ISO 9660, UDF, FAT, NFS and more, and all programs
//! of the host. What it does to a disk is in the image at once, so that a copy made meanwhile is of a running machine.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::churn::Churn;
use super::generator::{self, Amount};
use super::image::scratch;
use super::tree::{self, Tree};

/// A machine that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);
/// What the kernel of a machine is called; Debian's package user-mode-linux has it.
const KERNEL: &str = "linux.uml";
/// Where that package has its modules.
const MODULES: &str = "/usr/lib/uml/modules";
/// The test in each binary that uses machines, in which [`task`] runs.
const TASK: &str = "inside_a_machine";

/// The modules that LVM needs for volumes of all kinds.
pub const LVM_MODULES: &[&str] = &[
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

/// The beginning of a script that uses LVM: without udev, daemons, and the host's settings.
pub const LVM: &str = r#"
mkdir -p /run/lvm /run/lock
mount -t tmpfs tmpfs /etc/lvm
cat > /etc/lvm/lvm.conf <<'END'
devices { dir="/dev" scan=["/dev"] use_devicesfile=0 hints="none" obtain_device_list_from_udev=0 }
global { use_lvmpolld=0 event_activation=0 locking_dir="/run/lock" use_lvmlockd=0 }
activation { udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=0 }
backup { backup=0 archive=0 }
END
"#;

/// A machine at work.
pub struct Machine {
    process: Child,
    folder: TempDir,
}

impl Machine {
    /// Starts one that loads modules, has images as `/dev/ubda`, `/dev/ubdb` and so on (16 at most), and runs a script of Bash
    /// there until it fails or ends.
    ///
    /// In the script `$out` is a folder that [`Machine::finish`] reads from, `/mnt` is free for mounts, and `task` runs a [`task`].
    pub fn start(modules: &[&str], images: &[&Path], script: &str) -> Self {
        assert!(images.len() <= 16, "a machine has at most 16 disks");
        let folder = scratch();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("out")).expect("a new folder");
        fs::create_dir(at("kernel")).expect("a new folder");
        // Where modprobe looks for them.
        fs::create_dir(at("lib")).expect("a new folder");
        symlink(MODULES, at("lib/modules")).expect("a new folder");
        let root = folder.path().display();
        let modprobe: String = modules.iter().map(|module| format!("modprobe -d {root} {module}\n")).collect();
        let (out, said, ended) = (at("out"), at("said"), at("ended"));
        let program = std::env::current_exe().expect("a path");
        let text = format!(
            "#!/bin/bash\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin out={out}\n\
             mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /mnt\n\
             task() {{ XOFS_TASK=\"$*\" {program} --ignored --exact {TASK} --nocapture; }}\n\
             (set -eux\n{modprobe}{script}\n) > {said} 2>&1 < /dev/null\n\
             echo $? > {ended}\nsync\necho o > /proc/sysrq-trigger\nsleep 60\n",
            out = out.display(),
            program = program.display(),
            said = said.display(),
            ended = ended.display(),
        );
        fs::write(at("init"), text).expect("room");
        fs::set_permissions(at("init"), fs::Permissions::from_mode(0o700)).expect("it is ours");
        let console = File::create(at("console")).expect("room");
        let mut command = Command::new(KERNEL);
        command
            .args(["mem=384M", "rootfstype=hostfs", "root=/dev/root", "rw", "quiet", "panic=-1", "umid=machine"])
            .args(["con=null", "con0=null,fd:1", "ssl=null"])
            .arg(format!("uml_dir={}", at("kernel").display()))
            .arg(format!("init={}", at("init").display()))
            .args(images.iter().enumerate().map(|(index, image)| format!("ubd{index}={}", absolute(image).display())))
            .env("TMPDIR", folder.path())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(console.try_clone().expect("a descriptor"))
            .stderr(console);
        let process = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {KERNEL}: {error}; scripts/setup installs user-mode-linux"));
        Self { process, folder }
    }

    /// Runs a script in a machine, to its end; see [`Machine::start`].
    pub fn run(modules: &[&str], images: &[&Path], script: &str) -> Output {
        Self::start(modules, images, script).finish()
    }

    /// Where the script has `$out`.
    pub fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// Waits until a file is in `$out`, and panics if the machine ends or hangs.
    pub fn wait_for(&mut self, name: &str) {
        let start = Instant::now();
        while !self.out().join(name).exists() {
            let ended = self.process.try_wait().expect("it is ours");
            assert!(ended.is_none() && start.elapsed() < PATIENCE, "no {name}: {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the end, and panics with all that was said unless the script succeeded.
    pub fn finish(mut self) -> Output {
        let start = Instant::now();
        while self.process.try_wait().expect("it is ours").is_none() {
            assert!(start.elapsed() < PATIENCE, "the machine hangs: {}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
        let ended = fs::read_to_string(self.folder.path().join("ended")).unwrap_or_default();
        assert_eq!(ended.trim(), "0", "{}", self.said());
        let folder = std::mem::replace(&mut self.folder, scratch());
        Output(folder)
    }

    fn said(&self) -> String {
        let read = |name: &str| {
            let bytes = fs::read(self.folder.path().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        format!("{}\n{}", read("console"), read("said"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.process.try_wait().is_ok_and(|ended| ended.is_some()) {
            return;
        }
        // The kernel is several processes.
        let group = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        let _ = self.process.wait();
    }
}

/// What a script left.
pub struct Output(TempDir);

impl Output {
    /// Returns a path in what was `$out`.
    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join("out").join(name)
    }

    /// Returns the tree that `task tree` wrote to a file in `$out`.
    pub fn tree(&self, name: &str) -> Tree {
        let bytes = fs::read(self.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        postcard::from_bytes(&bytes).expect("a tree")
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).expect("a path")
}

/// Does what a script's `task` asks for:
///
/// - `task tree ROOT FILE` writes what the machine's kernel shows below ROOT, for [`Output::tree`];
/// - `task fill ROOT` fills a filesystem with one of each thing;
/// - `task churn ROOT SEED STOP` is a guest at work until the file STOP exists.
pub fn task() {
    let task = std::env::var("XOFS_TASK").expect("XOFS_TASK: this is run by other tests, in a machine of their own");
    let words: Vec<_> = task.split(' ').collect();
    match words[..] {
        ["tree", root, file] => {
            let bytes = postcard::to_stdvec(&tree::of_kernel(Path::new(root))).expect("in memory");
            fs::write(file, bytes).expect("room");
        }
        ["fill", root] => generator::fill(Path::new(root), Amount { names: 2500, holes: 700 }),
        ["churn", root, seed, stop] => {
            let mut churn = Churn::new(Path::new(root), seed.parse().expect("a number"));
            while !Path::new(stop).exists() {
                churn.work(20);
            }
        }
        _ => panic!("unknown task: {task}"),
    }
}
