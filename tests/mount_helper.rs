//! Mounting the ways administrators do it: mount(8), fstab, mount.fuse, as root and as somebody else.
//!
//! Each test has a [`Machine`] of its own: a mount and a pid namespace in which the built programs are installed
//! (`/sbin/mount.xofs`, `/usr/bin/xofs`), with its own `/dev`, `/etc/fstab` and `/etc/fuse.conf`. It goes, with every process
//! and mount in it, when the test ends, however it ends; the machine outside sees none of it.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use support::{expected, fixture, require_root, succeed};

/// How long a process may take to end. Generous: the machines of CI are slow, not wrong.
const PATIENCE: Duration = Duration::from_secs(60);

/// Builds the inside of a machine, then waits: when standard input ends, so does the first process of the pid namespace,
/// and with it all others.
const INSIDE: &str = r#"
set -eu
xofs=$1 helper=$2 repo=$3 encrypted=$4
read -r pid rest < /proc/self/stat
mount -t proc proc /proc
# Copies of mounts outside would keep them alive after they are unmounted there.
umount --lazy --all --types fuse.xofs || :
mount -t tmpfs -o mode=0755 tmpfs /mnt
mkdir /mnt/br /mnt/encrypted /mnt/restore "/mnt/my restore" /mnt/home /mnt/dev
mount --bind -o ro "$repo" /mnt/br
mount --bind -o ro "$encrypted" /mnt/encrypted
chown 65534:65534 /mnt/home
for node in null:1:3 zero:1:5 random:1:8 urandom:1:9 tty:5:0 fuse:10:229; do
  (IFS=:; set -- $node; mknod -m 0666 "/mnt/dev/$1" c "$2" "$3")
done
ln -s /proc/self/fd /mnt/dev/fd
: > /mnt/fstab; : > /mnt/fuse.conf
mount --bind /mnt/fstab /etc/fstab
mount --bind /mnt/fuse.conf /etc/fuse.conf
mount --bind /mnt/dev /dev
# Folders of links, and the built programs among them: needs no overlay in the kernel.
install_in() {
  folder=$(readlink -f "$1"); name=$2; program=$3
  mkdir "/mnt/real-$name" "/mnt/links-$name"
  mount --bind "$folder" "/mnt/real-$name"
  ln -s "/mnt/real-$name"/* "/mnt/links-$name/"
  rm -f "/mnt/links-$name/$name"
  : > "/mnt/links-$name/$name"
  mount --bind "$program" "/mnt/links-$name/$name"
  mount --rbind "/mnt/links-$name" "$folder"
}
install_in /usr/bin xofs "$xofs"
install_in /sbin mount.xofs "$helper"
echo "$pid"
read -r end || :
"#;

/// The built `mount.xofs`. Cargo builds it for tests of its own package only.
fn helper() -> &'static Path {
    static HELPER: OnceLock<PathBuf> = OnceLock::new();
    HELPER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_BIN_EXE_xofs")).parent().expect("a file lies in a folder");
        let mut command = Command::new(env!("CARGO"));
        command.args(["build", "--quiet", "--package", "mount-xofs"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        command.arg("--target-dir").arg(folder.parent().expect("target/PROFILE"));
        if folder.file_name() == Some(OsStr::new("release")) {
            command.arg("--release");
        }
        succeed(&mut command);
        folder.join("mount-xofs")
    })
}

/// How a script in a [`Machine`] ended, and what it said.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn ok(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{}", self.out);
        self.out
    }

    /// Panics unless it ended with `code` and said one line that holds `part`, and returns the line.
    fn fails(self, code: i32, part: &str) -> String {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        assert!(self.err.contains(part), "'{part}' is not in: {}", self.err);
        assert_eq!(self.err.lines().count(), 1, "{}", self.err);
        self.err
    }
}

/// The inside described at [`INSIDE`]; the repository `main` is at `/mnt/br`, an encrypted one at `/mnt/encrypted`.
struct Machine {
    inside: Child,
    /// Of the first process inside, as the machine outside numbers it.
    pid: String,
}

impl Machine {
    fn new() -> Self {
        require_root();
        let mut inside = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "sh", "-c", INSIDE, "sh"])
            .arg(env!("CARGO_BIN_EXE_xofs"))
            .arg(helper())
            .arg(fixture("main").join("repo"))
            .arg(fixture("encrypted-aes-256-gcm").join("repo"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare is in util-linux");
        let mut pid = String::new();
        let output = inside.stdout.as_mut().expect("it is piped");
        BufReader::new(output).read_line(&mut pid).expect("it is text");
        assert!(pid.ends_with('\n'), "the machine could not be built: see above");
        Self { inside, pid: pid.trim().to_owned() }
    }

    fn command(&self, user: &[&str], script: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid, "--mount", "--pid", "--"]).args(user).args(["sh", "-c", script]);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// Runs a shell script inside, as root. Returns only when nobody holds its output any more.
    fn run(&self, script: &str) -> Ran {
        ran(self.command(&[], script).output().expect("nsenter is in util-linux"))
    }

    /// As [`Machine::run`], as nobody.
    fn run_as_nobody(&self, script: &str) -> Ran {
        let user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"];
        ran(self.command(&user, script).output().expect("nsenter is in util-linux"))
    }

    /// The processes inside that run `xofs`, as the machine outside numbers them.
    fn servers(&self) -> Vec<rustix::process::Pid> {
        let namespace = fs::read_link(format!("/proc/{}/ns/pid", self.pid)).expect("the first process lives");
        let processes = fs::read_dir("/proc").expect("/proc is mounted").filter_map(|entry| {
            let path = entry.ok()?.path();
            // One that ended and was not waited for yet runs nothing.
            let program = fs::read_link(path.join("exe")).ok()?;
            let is_ours = program.file_name()? == "xofs" && fs::read_link(path.join("ns/pid")).ok()? == namespace;
            is_ours.then(|| path.file_name()?.to_str()?.parse().ok()).flatten().and_then(rustix::process::Pid::from_raw)
        });
        processes.collect()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let servers = self.servers();
        assert_eq!(servers.len(), 1, "one mount, one process");
        rustix::process::kill_process(servers[0], signal).expect("it runs");
    }

    /// Waits until no process of ours runs inside, and checks that none of our mounts is left.
    fn is_idle(&self) {
        let start = Instant::now();
        while !self.servers().is_empty() {
            assert!(start.elapsed() < PATIENCE, "still running after {PATIENCE:?}: {:?}", self.servers());
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(self.mounts(), "");
    }

    /// Our mounts: place, type and source, a line each.
    fn mounts(&self) -> String {
        self.run("grep -E ' - fuse[.]xofs ' /proc/self/mountinfo | sed -E 's/^([^ ]+ ){4}([^ ]+) .* - ([^ ]+) ([^ ]+) .*/\\2 \\3 \\4/'").ok()
    }

    fn fstab(&self, line: &str) {
        fs::write(format!("/proc/{}/root/mnt/fstab", self.pid), line).expect("the table is a plain file");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.inside.stdin.take());
        let _ = self.inside.wait();
    }
}

fn ran(output: Output) -> Ran {
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

/// A disk below a mount, and the SHA-256 that it has.
fn disk() -> (String, String) {
    let truth = expected(&fixture("main"));
    let vm = truth["vms"].as_array().and_then(|vms| vms.iter().find(|vm| vm["name"] == "web01")).expect("web01");
    let backup = &vm["backups"][0];
    let folder = support::folder_name(backup["metadata"].as_str().expect("a path"));
    let path = format!("by-uuid/{}/{folder}/disks/xvda.raw", vm["uuid"].as_str().expect("a uuid"));
    (path, backup["disks"][0]["sha256"].as_str().expect("a sum").to_owned())
}

/// A script that succeeds if the disk below `directory` reads right.
fn reads(directory: &str) -> String {
    let (path, sum) = disk();
    format!("test \"$(sha256sum < '{directory}/{path}')\" = '{sum}  -'")
}

#[test]
fn mount_by_type_returns_when_the_disks_can_be_read_and_umount_ends_the_process() {
    let machine = Machine::new();
    for (mount, directory) in [
        ("mount -t xofs /mnt/br /mnt/restore", "/mnt/restore"),
        ("mount -t xofs /mnt/br /mnt/restore -o ro,_netdev,noatime,cache=16MiB,umask=077", "/mnt/restore"),
        ("mount -v -t xofs file:///mnt/br '/mnt/my restore' 2> /dev/null > /dev/null", "/mnt/my restore"),
        ("mount -t fuse.xofs /mnt/br /mnt/restore", "/mnt/restore"),
        ("mount -t fuse.xofs /mnt/br '/mnt/my restore' -o ro,nodev,nosuid,umask=077", "/mnt/my restore"),
        ("mount.xofs /mnt/br /mnt/restore -n -o ro", "/mnt/restore"),
        ("cd /mnt && mount -t xofs br restore", "/mnt/restore"),
    ] {
        let said = machine.run(&format!("{mount} && {}", reads(directory))).ok();
        assert_eq!(said, "", "{mount}");
        let mounts = machine.mounts();
        assert!(mounts.starts_with(&directory.replace(' ', "\\040")), "{mount}: {mounts}");
        assert_eq!(machine.run(&format!("umount '{directory}'")).ok(), "", "{mount}");
        machine.is_idle();
    }
}

#[test]
fn a_line_of_fstab_is_mounted_by_its_directory_and_only_once() {
    let machine = Machine::new();
    machine.fstab(
        "/mnt/br /mnt/restore xofs ro,_netdev,nofail,noauto,x-systemd.automount,x-systemd.idle-timeout=10min 0 0\n\
         /mnt/br /mnt/my\\040restore fuse.xofs ro,nofail,x-systemd.requires=network-online.target,allow_other 0 0\n",
    );
    machine.run(&format!("mount /mnt/restore && {} && umount /mnt/restore", reads("/mnt/restore"))).ok();
    machine.is_idle();
    // All that is not noauto; a second time changes nothing.
    machine.run(&format!("mount -a && {}", reads("/mnt/my restore"))).ok();
    assert_eq!(machine.mounts(), "/mnt/my\\040restore fuse.xofs /mnt/br\n");
    machine.run("mount -a").ok();
    assert_eq!(machine.mounts(), "/mnt/my\\040restore fuse.xofs /mnt/br\n");
    machine.run("umount '/mnt/my restore'").ok();
    machine.is_idle();
}

#[test]
fn the_helper_has_help_with_an_example() {
    let help = ran(Command::new(helper()).arg("--help").output().expect("the built helper starts")).ok();
    assert!(help.contains("mount -t xofs") && help.contains("/etc/fstab"), "{help}");
}

#[test]
fn why_a_mount_failed_reaches_the_terminal_with_code_32() {
    let machine = Machine::new();
    machine.run("echo 0123456789abcdef0123456789abcdef > /mnt/wrong; echo x > /mnt/file; mkdir /mnt/empty").ok();
    for (arguments, part) in [
        ("/mnt/absent /mnt/restore", "/mnt/absent"),
        ("/mnt/empty /mnt/restore", "/mnt/empty"),
        ("/mnt/br /mnt/restore -o ro,colour=blue", "unknown mount option 'colour'"),
        ("/mnt/br /mnt/restore -o umask=9", "umask"),
        ("/mnt/br /mnt/restore -o cache=much", "cache"),
        ("/mnt/br /mnt/restore -o password=hunter2", "password_file=PATH"),
        ("/mnt/encrypted /mnt/restore", "key"),
        ("/mnt/encrypted /mnt/restore -o password_file=/mnt/wrong", "key"),
        ("/mnt/encrypted /mnt/restore -o password_file=/mnt/absent", "/mnt/absent"),
        ("/mnt/encrypted /mnt/restore -o password_command=false", "exit status: 1"),
        ("s3://key:hunter2@host/bucket /mnt/restore", "not supported yet"),
    ] {
        for kind in ["xofs", "fuse.xofs"] {
            let said = machine.run(&format!("mount -t {kind} {arguments}")).fails(32, part);
            assert!(!said.contains("hunter2"), "{said}");
        }
        machine.is_idle();
    }
    // These mount(8) finds itself.
    for directory in ["/mnt/nowhere", "/mnt/file"] {
        let ran = machine.run(&format!("mount -t xofs /mnt/br {directory}"));
        assert_eq!(ran.code, Some(32), "{ran:?}");
        assert!(ran.err.contains(directory), "{ran:?}");
    }
    machine.run("mount -t xofs /mnt/br /mnt/restore").ok();
    machine.run("mount -t xofs /mnt/encrypted/../br /mnt/restore").fails(32, "mounted there already");
    machine.run("xofs mount --daemon /mnt/br /mnt/restore").fails(1, "mounted there already");
    machine.run("umount /mnt/restore").ok();
    machine.is_idle();
    machine.run("xofs mount /mnt/absent /mnt/restore --daemon").fails(10, "/mnt/absent");
    machine.run("xofs mount /mnt/encrypted /mnt/restore --daemon").fails(12, "key");
    machine.run("xofs mount /mnt/br /mnt/nowhere --daemon").fails(1, "/mnt/nowhere");
    machine.is_idle();
}

#[test]
fn options_reach_the_mount() {
    let machine = Machine::new();
    let key = expected(&fixture("encrypted-aes-256-gcm"))["remote"]["encryptionKey"].as_str().expect("text").to_owned();
    machine.run(&format!("umask 077; echo {key} > /mnt/key; mkdir -p /mnt/config/xofs; printf '[repositories.main]\\npath = \"/mnt/br\"\\n' > /mnt/config/xofs/config.toml")).ok();
    let modes = "stat -c '%u %g %a' /mnt/restore && umount /mnt/restore";
    for (options, expected) in [
        ("/mnt/br", "0 0 500\n"),
        ("/mnt/br -o uid=5,gid=6,umask=027", "5 6 550\n"),
        ("/mnt/encrypted -o password_file=/mnt/key", "0 0 500\n"),
        ("/mnt/encrypted -o 'password_command=\"cat /mnt/key\"'", "0 0 500\n"),
    ] {
        for kind in ["xofs", "fuse.xofs"] {
            let said = machine.run(&format!("mount -t {kind} /mnt/restore --source {options} && {modes}")).ok();
            assert_eq!(said, expected, "{kind} {options}");
            machine.is_idle();
        }
    }
    // A name of the configuration.
    let said = machine.run(&format!(
        "export XDG_CONFIG_HOME=/mnt/config; mount -t xofs main /mnt/restore && {}",
        reads("/mnt/restore")
    ));
    said.ok();
    assert_eq!(machine.mounts(), "/mnt/restore fuse.xofs main\n");
    machine.run("umount /mnt/restore").ok();
    // mount(8) asks for writing unless told otherwise; nothing can be written all the same.
    machine.run("mount -t xofs -o rw /mnt/br /mnt/restore").ok();
    machine.run("touch /mnt/restore/x").fails(1, "Read-only file system");
    machine.run("umount /mnt/restore").ok();
    machine.is_idle();
    // Of mount(8) itself: only looked at, and unknown options only warned of.
    machine.run("mount -f -t xofs /mnt/br /mnt/restore").ok();
    machine.run("mount -fv -t xofs /mnt/br /mnt/restore > /dev/null").fails(0, "mount.xofs: runs ");
    machine.is_idle();
    machine.run("mount -s -t xofs /mnt/br /mnt/restore -o colour=blue").fails(0, "'colour'; ignored");
    machine.run("umount /mnt/restore").ok();
    machine.is_idle();
}

#[test]
fn a_signal_unmounts() {
    use rustix::process::Signal;
    let machine = Machine::new();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        machine.run("mount -t xofs /mnt/br /mnt/restore").ok();
        machine.signal(signal);
        machine.is_idle();
    }
    // Also with a file open, which reads on until it is closed.
    let (path, sum) = disk();
    machine.run("mount -t xofs /mnt/br /mnt/restore").ok();
    let held = format!("exec 3< /mnt/restore/{path}; echo; read -r go; sha256sum <&3");
    let mut holder = machine.command(&[], &held).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
    let mut lines = BufReader::new(holder.stdout.take().expect("it is piped"));
    let mut line = String::new();
    lines.read_line(&mut line).expect("text");
    machine.signal(Signal::TERM);
    let start = Instant::now();
    while !machine.mounts().is_empty() {
        assert!(start.elapsed() < PATIENCE, "still mounted");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(holder.stdin.take());
    line.clear();
    lines.read_line(&mut line).expect("text");
    assert_eq!(line, format!("{sum}  -\n"));
    holder.wait().expect("it is our child");
    machine.is_idle();
}

#[test]
fn what_a_killed_process_left_is_cleaned_by_the_next_mount_and_by_unmount() {
    let machine = Machine::new();
    machine.fstab("/mnt/br /mnt/restore xofs ro,noauto 0 0\n");
    let kill = || {
        machine.signal(rustix::process::Signal::KILL);
        let start = Instant::now();
        while !machine.servers().is_empty() {
            assert!(start.elapsed() < PATIENCE, "survived SIGKILL");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(machine.run("ls /mnt/restore").code, Some(2), "the mount is dead");
    };
    machine.run("mount /mnt/restore").ok();
    for again in [
        "xofs mount --daemon /mnt/br /mnt/restore",
        "mount -t xofs /mnt/br /mnt/restore",
        "mount -t fuse.xofs /mnt/br /mnt/restore",
    ] {
        kill();
        let ran = machine.run(&format!("{again} && {}", reads("/mnt/restore")));
        assert_eq!(ran.code, Some(0), "{again}: {ran:?}");
        assert_eq!(machine.mounts(), "/mnt/restore fuse.xofs /mnt/br\n", "{again}");
    }
    kill();
    machine.run("xofs unmount /mnt/restore").ok();
    machine.is_idle();
    machine.run("mount /mnt/restore").ok();
    kill();
    machine.run("umount /mnt/restore").ok();
    machine.is_idle();
    machine.run("xofs unmount /mnt/restore").fails(1, "nothing is mounted at '/mnt/restore'");
}

#[test]
fn other_users_read_only_what_they_were_let_into() {
    let machine = Machine::new();
    let read = reads("/mnt/restore");
    machine.run("mount -t xofs /mnt/br /mnt/restore -o umask=022").ok();
    machine.run_as_nobody("ls /mnt/restore").fails(2, "Permission denied");
    machine.run("umount /mnt/restore && mount -t xofs /mnt/br /mnt/restore -o allow_other").ok();
    // Let in, but not by the modes.
    machine.run_as_nobody("ls /mnt/restore").fails(2, "Permission denied");
    for options in ["allow_other,umask=022", "allow_other,uid=65534"] {
        machine.run(&format!("umount /mnt/restore && mount -t xofs /mnt/br /mnt/restore -o {options}")).ok();
        machine.run_as_nobody(&read).ok();
    }
    machine.run("umount /mnt/restore").ok();
    machine.is_idle();
}

#[test]
fn an_ordinary_user_mounts_reads_and_unmounts() {
    let machine = Machine::new();
    // XO writes for root alone; what is tested here is who mounts.
    machine.run("cp -r --sparse=always /mnt/br /mnt/own && chown -R 65534:65534 /mnt/own").ok();
    let read = reads("/mnt/home");
    for (mount, unmount) in [
        ("xofs mount --daemon /mnt/own /mnt/home", "xofs unmount /mnt/home"),
        ("xofs mount --daemon /mnt/own /mnt/home", "fusermount3 -u /mnt/home"),
        ("xofs mount --daemon /mnt/own /mnt/home", "umount /mnt/home"),
    ] {
        assert_eq!(
            machine.run_as_nobody(&format!("{mount} && {read} && stat -c %u:%a /mnt/home && {unmount}")).ok(),
            "65534:500\n"
        );
        machine.is_idle();
    }
    machine.run_as_nobody("xofs mount --daemon /mnt/own /mnt/home").ok();
    assert_eq!(machine.mounts(), "/mnt/home fuse.xofs /mnt/own\n");
    machine.signal(rustix::process::Signal::TERM);
    machine.is_idle();
    // What died is theirs to clean, too.
    machine.run_as_nobody("xofs mount --daemon /mnt/own /mnt/home").ok();
    machine.signal(rustix::process::Signal::KILL);
    machine.run_as_nobody(&format!("xofs mount --daemon /mnt/own /mnt/home 2> /dev/null && {read}")).ok();
    machine.signal(rustix::process::Signal::KILL);
    machine.run_as_nobody("xofs unmount /mnt/home").ok();
    machine.is_idle();
    // A place of somebody else, and users let in without the administrator's leave.
    machine.run_as_nobody("xofs mount --daemon /mnt/own /mnt/restore").fails(1, "/mnt/restore");
    machine.run_as_nobody("xofs mount --daemon --allow-other /mnt/own /mnt/home").fails(1, "'user_allow_other'");
    machine.run("echo user_allow_other > /mnt/fuse.conf").ok();
    machine.run_as_nobody("xofs mount --daemon --allow-other /mnt/own /mnt/home").ok();
    machine.run(&format!("{read} && umount /mnt/home")).ok();
    machine.is_idle();
    // A line of fstab that the administrator made for them.
    machine.fstab("/mnt/own /mnt/home xofs user,noauto,ro 0 0\n");
    machine.run_as_nobody(&format!("mount /mnt/home && {read} && umount /mnt/home")).ok();
    machine.is_idle();
    machine.run("chmod 600 /dev/fuse").ok();
    machine.run_as_nobody("xofs mount --daemon /mnt/own /mnt/home").fails(1, "/dev/fuse may not be opened");
}

#[test]
fn the_log_of_a_background_mount_goes_to_syslog() {
    let machine = Machine::new();
    let syslog = UnixDatagram::bind(format!("/proc/{}/root/mnt/dev/log", machine.pid)).expect("a new socket");
    syslog.set_read_timeout(Some(PATIENCE)).expect("the time is not zero");
    let said = |part: &str| {
        let mut buffer = [0; 4096];
        let len = syslog.recv(&mut buffer).unwrap_or_else(|error| panic!("'{part}' was not logged: {error}"));
        let line = String::from_utf8_lossy(&buffer[..len]).into_owned();
        // Facility daemon, severity info.
        assert!(line.starts_with("<30>xofs[") && line.contains(part), "'{part}' is not in: {line}");
    };
    machine.run("mount -t xofs /mnt/br /mnt/restore").ok();
    said("mounted mountpoint=/mnt/restore repository=/mnt/br");
    machine.run("umount /mnt/restore").ok();
    said("unmounted mountpoint=/mnt/restore");
    machine.is_idle();
}

#[test]
fn systemd_is_told_when_the_mount_can_be_read() {
    let machine = Machine::new();
    let socket = UnixDatagram::bind(format!("/proc/{}/root/mnt/notify", machine.pid)).expect("a new socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("the time is not zero");
    let mut foreground = machine.command(&[], "cd /mnt && exec xofs mount br restore");
    let mut foreground = foreground.env("NOTIFY_SOCKET", "/mnt/notify").stderr(Stdio::null()).spawn().expect("starts");
    let mut buffer = [0; 64];
    let len = socket.recv(&mut buffer).expect("told in time");
    assert_eq!(&buffer[..len], b"READY=1\n");
    machine.run(&reads("/mnt/restore")).ok();
    machine.signal(rustix::process::Signal::TERM);
    assert_eq!(foreground.wait().expect("it is our child").code(), Some(0));
    machine.is_idle();
}

#[test]
fn the_example_units_are_what_systemd_accepts() {
    let analyze = Path::new("/usr/bin/systemd-analyze");
    assert!(analyze.exists(), "systemd-analyze is missing: scripts/setup installs it (package systemd)");
    let machine = Machine::new();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/systemd");
    for unit in fs::read_dir(&units).expect("the examples are in docs/systemd") {
        let unit = unit.expect("readable").path();
        machine.run(&format!("systemd-analyze verify --man=no '{}'", unit.display())).ok();
    }
}
