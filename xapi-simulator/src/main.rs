//! `xapi-simulator`: a pool to try xofs with.

use clap::Parser;
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use xapi_simulator::fault::parse_size;
use xapi_simulator::scene::{Disk, Machine, Repository, Scene, Settings, Storage};
use xapi_simulator::{Class, Fault, Simulator};

const EXAMPLES: &str = "\
Example: a pool whose machine web01 writes every ten seconds, and of which the second export breaks

  xapi-simulator --vm web01:10GiB,2GiB --vm db01:4GiB --write-every 10 --fault 'export after 4MiB cut'

  It prints where it is, its fingerprint and who may log in, and runs until it is interrupted.

A fault is SITE [of NAME] [after SIZE] ACT [xTIMES]. Sites: call METHOD, export, import, export-vm, import-vm, nbd.
Acts: fail CODE[,TEXT...], page, full, cut, refuse, stall, delay SECONDS, bitmap BYTES, lose-sessions, lose-tasks,
restart, reboot SECONDS, new-master, coalesce, fill, drop-snapshots.";

/// Simulates an XCP-ng pool: XAPI, transfers of disks and machines, NBD.
#[derive(Debug, Parser)]
#[command(name = "xapi-simulator", version, after_help = EXAMPLES)]
struct Options {
    /// Where the master serves HTTPS; further hosts have the next loopback addresses
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8443")]
    listen: SocketAddr,
    /// A running machine, with sizes of its disks; a disk with a ! behind it is called [NOBAK]
    #[arg(long = "vm", value_name = "NAME[:SIZE[!],...]")]
    machines: Vec<String>,
    /// Hosts of the pool
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    hosts: usize,
    /// What disks lie in: ext and nfs are thin, lvm is thick
    #[arg(long, value_name = "TYPE", default_value = "nfs", value_parser = ["ext", "nfs", "lvm"])]
    storage: String,
    /// Keeps disks as VHD files in this folder, too, as an SR of type ext or nfs does
    #[arg(long, value_name = "FOLDER", conflicts_with = "storage")]
    storage_folder: Option<PathBuf>,
    /// Room for disks
    #[arg(long, value_name = "SIZE", default_value = "1TiB", value_parser = parse_size)]
    storage_size: u64,
    /// How much of each disk holds random bytes, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 20, value_parser = clap::value_parser!(u64).range(0..=100))]
    filled: u64,
    /// Has machines write to their disks
    #[arg(long, value_name = "SECONDS")]
    write_every: Option<u64>,
    /// Has them write whenever a line comes on the standard input, and ends with it
    #[arg(long, conflicts_with = "write_every")]
    write_on_line: bool,
    /// How many pieces of up to 256 KiB each disk gets then
    #[arg(long, value_name = "NUMBER", default_value_t = 20)]
    writes: u64,
    /// Determines what disks hold and what is written
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Something that goes wrong
    #[arg(long = "fault", value_name = "FAULT")]
    faults: Vec<Fault>,
    /// Sends exports as slowly as real pools were seen to: 30 MiB/s, 20 each where there are several
    #[arg(long)]
    slow_exports: bool,
    /// How long bytes take to the NBD servers and back, however many at once
    #[arg(long, value_name = "MILLISECONDS")]
    nbd_round_trip: Option<u64>,
    /// How often the garbage collector merges a pair of layers; 0 is never
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    coalesce_every: u64,
    /// VM.snapshot does not know which disks to leave out, as before XCP-ng 8.3
    #[arg(long)]
    old: bool,
    /// Who may log in
    #[arg(long, value_name = "NAME", default_value = "root")]
    user: String,
    /// The password, which protects nothing here
    #[arg(long, value_name = "TEXT", default_value = "simulated")]
    password: String,
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xapi-simulator: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<(), Box<dyn std::error::Error>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let seed = options.seed.unwrap_or(now);
    let machines = options.machines.iter().map(|text| machine(text, options.filled)).collect::<Result<Vec<_>, _>>()?;
    let names: Vec<String> = options.machines.iter().map(|text| name(text).to_owned()).collect();
    let simulator = Simulator::start(scene(&options, seed, machines))?;
    let mut out = std::io::stdout();
    writeln!(out, "address:      https://{}", simulator.address())?;
    writeln!(out, "              http://{} without TLS, NBD at {}", simulator.http_address(), simulator.nbd_address())?;
    writeln!(out, "fingerprint:  {}", simulator.fingerprint())?;
    writeln!(out, "user:         {}", simulator.user())?;
    writeln!(out, "password:     {}", simulator.password())?;
    writeln!(out, "seed:         {seed}")?;
    out.flush()?;
    let mut round = 0_u64;
    loop {
        if options.write_on_line {
            if std::io::stdin().read_line(&mut String::new())? == 0 {
                return Ok(());
            }
        } else {
            std::thread::sleep(options.write_every.map_or(Duration::MAX, Duration::from_secs));
        }
        round += 1;
        for name in &names {
            let vm = simulator.only(Class::Vm, name);
            let seed = seed.wrapping_add(round);
            simulator.guest_writes(&vm, seed, options.writes).map_err(|failure| failure.to_list().join(": "))?;
            writeln!(out, "{name} wrote {} pieces to each disk (seed {seed})", options.writes)?;
        }
    }
}

fn scene(options: &Options, seed: u64, machines: Vec<Machine>) -> Scene {
    let storage = match options.storage.as_str() {
        "ext" => Storage::Ext,
        "lvm" => Storage::Lvm,
        _ => Storage::Nfs,
    };
    let mut repository = Repository::new("storage", storage).size(options.storage_size);
    if let Some(folder) = &options.storage_folder {
        repository = repository.folder(folder);
    }
    let mut scene =
        Scene::new(seed).listen(options.listen).credentials(&options.user, &options.password).sr(repository).settings(
            |settings| {
                settings.has_ignore_vdis = !options.old;
                settings.export_rate = options.slow_exports.then_some(Settings::measured_export_rate);
                settings.coalesce_interval =
                    Some(Duration::from_secs(options.coalesce_every)).filter(|interval| !interval.is_zero());
            },
        );
    if let Some(milliseconds) = options.nbd_round_trip {
        scene = scene.nbd_round_trip(Duration::from_millis(milliseconds));
    }
    for number in 1..=options.hosts.max(1) {
        scene = scene.host(&format!("host{number}"));
    }
    for fault in &options.faults {
        scene = scene.fault(fault.clone());
    }
    machines.into_iter().fold(scene, Scene::vm)
}

fn name(text: &str) -> &str {
    text.split_once(':').map_or(text, |(name, _)| name)
}

fn machine(text: &str, filled: u64) -> Result<Machine, String> {
    let name = name(text);
    let sizes = text.split_once(':').map_or("1GiB", |(_, sizes)| sizes);
    let mut machine = Machine::new(name).running().cd();
    for (number, size) in sizes.split(',').enumerate() {
        let (size, prefix) = match size.strip_suffix('!') {
            Some(size) => (size, "[NOBAK] "),
            None => (size, ""),
        };
        let disk = Disk::new(&format!("{prefix}{name} disk {number}"), parse_size(size)?);
        machine = machine.disk(disk.filled(filled));
    }
    Ok(machine)
}
