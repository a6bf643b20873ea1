//! Jobs by the built binary: their files are checked and made; their runs against a simulated pool do what they say, and what they say is
//! true, whatever ends them.

mod job;
mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use jiff::Timestamp;
use job::{MIB, PATIENCE, Pool, World, wait_for, words};
use serde_json::{Value, json};
use support::loop_mount::{FileSystem, LoopMount};
use support::{init, run, succeed, xofs};
use uuid::Uuid;
use xapi_simulator::failure::Failure;
use xapi_simulator::{Act, Class, Fault, Site};
use xofs::job::Starts;
use xofs::job::log::{Event, History, Log, Record, RunStatus};

const RIGHT: &str = "\
pools = ['lab']
vms.tags = ['backup']
to.repositories = ['main']

[[schedules]]
name = 'night'
cron = '0 2 * * *'
timezone = 'UTC'
";

#[test]
fn check_names_each_mistake_of_each_file_and_says_when_the_others_run() {
    let world = World::new();
    assert_eq!(run(&mut world.command(&["check"])).0, 0);
    world.write("right.toml", RIGHT);
    world.write("wrong.toml", &RIGHT.replace("'lab'", "'lob'").replace("cron", "corn"));
    let (code, out, err) = run(&mut world.command(&["check"]));
    assert_eq!(code, 2, "{out}{err}");
    let file = world.path("jobs/wrong.toml");
    let file = file.display();
    let expected = [
        format!(
            "{file}:1: 'lob' is no pool of the configuration; did you mean 'lab'?; it needs an entry [pools.NAME] there"
        ),
        format!("{file}:5: cron is missing: it says when, like cron = \"0 2 * * *\" for two o'clock each night"),
        format!("{file}:7: 'corn' is no key of [[schedules]]; did you mean 'cron'?"),
    ];
    assert_eq!(err.lines().collect::<Vec<_>>(), expected);
    assert!(out.starts_with("right: right, 1 schedule\n  night  0 2 * * *  next 20"), "{out}");
    assert!(out.trim_end().ends_with(" 02:00 UTC"), "{out}");
    assert_eq!(run(&mut world.command(&["check", "right"])).0, 0);
    let (code, out, _) = run(&mut world.command(&["check", "wrong", "--json"]));
    let said: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((code, &said["jobs"][0]["faults"][2]["line"]), (2, &Value::from(7)), "{out}");
    let (code, _, err) = run(&mut world.command(&["check", "absent"]));
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("jobs/absent.toml:1: it cannot be read: No such file"), "{err}");
}

#[test]
fn two_jobs_with_one_id_are_refused_both() {
    let world = World::new();
    world.write("one.toml", RIGHT);
    world.write("two.toml", &format!("id = 'one'\n{RIGHT}"));
    let (code, _, err) = run(&mut world.command(&["check"]));
    assert_eq!((code, err.matches("has the same id, 'one'").count()), (2, 2), "{err}");
}

#[test]
fn new_writes_a_job_that_is_right_and_never_over_another() {
    let world = World::new();
    let arguments = [
        "new",
        "nightly",
        "--pool",
        "lab",
        "--vm",
        "web \"01\"",
        "--tag",
        "backup",
        "--to",
        "main",
        "--to",
        "/srv/other",
        "--cron",
        "30 1 * * mon-fri",
        "--timezone",
        "Europe/Paris",
        "--keep-last",
        "7",
        "--keep-weekly",
        "4",
    ];
    let (code, out, err) = run(&mut world.command(&arguments));
    assert_eq!(code, 0, "{out}{err}");
    let text = fs::read_to_string(world.path("jobs/nightly.toml")).expect("written");
    for line in [
        "pools = [\"lab\"]",
        "names = ['web \"01\"']",
        "tags = [\"backup\"]",
        "repositories = [\"main\", \"/srv/other\"]",
        "cron = \"30 1 * * mon-fri\"",
        "keep = { last = 7, weekly = 4 }",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    let (code, out, err) = run(&mut world.command(&["check", "nightly"]));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    // Of a job that has only SRs.
    let arguments_of = ["new", "replicas", "--pool", "lab", "--all", "--to-sr", "spare", "--to-sr", "lab=fast"];
    succeed(world.command(&arguments_of).args(["--cron", "@daily", "--keep-last", "5"]));
    let of = fs::read_to_string(world.path("jobs/replicas.toml")).expect("written");
    assert!(of.contains("\n# repositories = [\"NAME\"]\nsrs = [\"spare\", \"lab=fast\"]\n"), "{of}");
    assert!(of.contains("\nreplicas = 5\n") && !of.contains("keep ="), "{of}");
    let (code, _, err) = run(&mut world.command(&arguments));
    assert_eq!(code, 2);
    assert!(err.contains("is there already: it is never written over"), "{err}");
    assert_eq!(fs::read_to_string(world.path("jobs/nightly.toml")).expect("there"), text);
}

#[test]
fn new_says_without_a_terminal_what_it_would_ask_for_and_writes_nothing_that_is_wrong() {
    let world = World::new();
    let (code, _, err) = run(&mut world.command(&["new", "nightly", "--pool", "lab"]));
    assert_eq!(code, 2);
    assert_eq!(
        err,
        "xofs: there is no terminal to ask on: give --vm, --tag or --all, --to or --to-sr, --cron or --no-schedule\n"
    );
    let wrong = ["new", "nightly", "--pool", "lab", "--all", "--to", "mian", "--cron", "0 2 30 2 *"];
    let (code, _, err) = run(&mut world.command(&wrong));
    assert_eq!(code, 2);
    assert!(
        err.contains("nothing was written: 'mian' is no repository of the configuration; did you mean 'main'?"),
        "{err}"
    );
    assert!(err.contains("there is no such day"), "{err}");
    assert_eq!(fs::read_dir(world.path("jobs")).expect("listed").count(), 0);
}

/// `xofs job` on a terminal, where somebody writes as soon as something is to be seen, in turn; returns how it ended, and what was to be
/// seen.
fn on_terminal(world: &World, arguments: &[&str], dialogue: &[(&str, &str)]) -> (i32, String) {
    let command = world.command(arguments);
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let line = words.map(|word| word.to_str().expect("text")).collect::<Vec<_>>().join(" ");
    // What is awaited in vain ends, too.
    let mut terminal = Command::new("timeout");
    terminal
        .args([
            "--foreground",
            &PATIENCE.as_secs().to_string(),
            "script",
            "--quiet",
            "--return",
            "--command",
            &line,
            "/dev/null",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => terminal.env(name, value),
            None => terminal.env_remove(name),
        };
    }
    let mut child = terminal.spawn().expect("script is in util-linux");
    let mut keys = child.stdin.take().expect("piped");
    let mut shown = child.stdout.take().expect("piped");
    let (mut seen, mut answered) = (Vec::new(), 0);
    let mut part = [0; 4096];
    let mut left = dialogue.iter();
    let mut turn = left.next();
    loop {
        let new: &[u8] = &seen[answered..];
        let found = turn.and_then(|(awaited, written)| {
            let at = new.windows(awaited.len()).position(|part| part == awaited.as_bytes())?;
            Some((at + awaited.len(), written))
        });
        if let Some((end, written)) = found {
            answered += end;
            keys.write_all(written.as_bytes()).expect("it reads");
            turn = left.next();
            continue;
        }
        match shown.read(&mut part).expect("it shows") {
            0 => break,
            count => seen.extend_from_slice(&part[..count]),
        }
    }
    let seen = String::from_utf8(seen).expect("text");
    assert_eq!(turn, None, "{seen}");
    let code = child.wait().expect("it is our child").code().expect("it ended by itself");
    drop(keys);
    (code, seen)
}

#[test]
fn new_asks_on_a_terminal_for_what_is_missing() {
    let world = World::new();
    let answers = "lab\nweb01, tag:backup\nmain, /srv/other\n\n\n0 2 * * *\n7\n";
    let (code, seen) = on_terminal(&world, &["new", "nightly"], &[("Pools, of lab: ", answers)]);
    assert_eq!(code, 0, "{seen}");
    for question in
        ["Pools, of lab: ", "VMs: names or uuids, tag:NAME, or all: ", "Repositories: paths, or of main; ", "SRs for "]
    {
        assert!(seen.contains(question), "{question}\n{seen}");
    }
    let text = fs::read_to_string(world.path("jobs/nightly.toml")).expect("written");
    for line in [
        "pools = [\"lab\"]",
        "names = [\"web01\"]",
        "tags = [\"backup\"]",
        "repositories = [\"main\", \"/srv/other\"]",
        "cron = \"0 2 * * *\"",
        "keep = { last = 7 }",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    // Only for what is missing: here which VMs, and how.
    let given = ["new", "replicas", "--pool", "lab", "--to-sr", "spare", "--cron", "@daily"];
    let (code, seen) = on_terminal(&world, &given, &[("all: ", "all\nfull\n")]);
    assert!(code == 0 && seen.matches("VMs: ").count() == 1 && !seen.contains("Pools"), "{seen}");
    let text = fs::read_to_string(world.path("jobs/replicas.toml")).expect("written");
    assert!(text.contains("\nmode = \"full\"") && text.contains("\nall = true\n"), "{text}");
    assert_eq!(fs::read_dir(world.path("jobs")).expect("listed").count(), 2);
}

#[test]
fn new_checks_each_answer_at_once_and_asks_again() {
    let world = World::new();
    let dialogue = [
        ("Pools, of lab: ", "zzz\n"),
        ("'zzz' is no pool of the configuration, which has lab; it needs", ""),
        ("Pools, of lab: ", "lab\n"),
        ("VMs: ", "\n"),
        ("[vms] names no machine: give names, uuids, tags", ""),
        ("VMs: ", "all\n"),
        ("Repositories: ", "mian\n"),
        ("'mian' is no repository of the configuration; did you mean 'main'?", ""),
        ("Repositories: ", "\n"),
        ("SRs for replicas: ", "\n"),
        ("[to] names neither a repository nor an SR", ""),
        ("SRs for replicas: ", "zzz=fast\n"),
        ("'zzz' is no pool of the configuration, which has lab", ""),
        ("SRs for replicas: ", "fast\n"),
        ("Incremental or full", "zzz\n"),
        ("'zzz' is no kind of backups; expected incremental or full", ""),
        ("Incremental or full", "Full\n"),
        ("When: ", "0 2 30 2 *\n"),
        ("'0 2 30 2 *' is no pattern of cron: there is no such day; expected minute, hour", ""),
        ("When: ", "0 2 * * *\n"),
        ("How many backups", "zz\n"),
        ("'zz' is no number of backups; expected one like 7", ""),
        ("How many backups", "101\n"),
        ("'replicas' is 101; expected a number from 1 to 100", ""),
        ("How many backups", "5\n"),
    ];
    let (code, seen) = on_terminal(&world, &["new", "nightly"], &dialogue);
    assert_eq!(code, 0, "{seen}");
    let text = fs::read_to_string(world.path("jobs/nightly.toml")).expect("written");
    for line in ["pools = [\"lab\"]", "mode = \"full\"", "all = true", "srs = [\"fast\"]", "replicas = 5"] {
        assert!(text.lines().any(|found| found.starts_with(line)), "{line}\n{text}");
    }
    // What options say is checked before anything is asked.
    let (code, seen) = on_terminal(&world, &["new", "wrong", "--to", "mian"], &[]);
    assert!(code == 2 && seen.contains("nothing was written: 'mian' is no repository"), "{code}\n{seen}");
    assert!(!seen.contains("Pools"), "{seen}");
    assert_eq!(fs::read_dir(world.path("jobs")).expect("listed").count(), 1);
}

#[test]
fn new_writes_nothing_for_who_has_enough_of_its_questions() {
    let world = World::new();
    for (key, name) in [("\u{3}", "Ctrl-C"), ("\u{4}", "Ctrl-D"), ("half an answer\u{3}", "Ctrl-C after a part")] {
        let dialogue = [("Pools, of lab: ", "lab\n"), ("or all: ", key)];
        let (code, seen) = on_terminal(&world, &["new", "ended"], &dialogue);
        assert_eq!(code, 130, "{name}\n{seen}");
        assert!(seen.ends_with("\nxofs: interrupted; nothing was written\r\n"), "{name}\n{seen}");
        assert_eq!(fs::read_dir(world.path("jobs")).expect("listed").count(), 0);
    }
}

#[test]
fn a_run_backs_up_what_is_meant_and_forgets_what_expired() {
    let pool = Pool::new();
    pool.job("[[schedules]]\nname = 'night'\ncron = '0 2 * * *'\nkeep.last = 2\n");
    for round in 1..=3 {
        let report = pool.run(&[], 0);
        assert_eq!((&report["status"], &report["schedule"]), (&json!("done"), &json!("night")), "{report:#}");
        assert_eq!(words(&report, "status"), ["web01 \"done\"", "web02 \"done\""], "{report:#}");
        let merges: Vec<_> =
            report["merges"].as_array().expect("a list").iter().map(|merge| merge["isDone"].clone()).collect();
        assert_eq!(merges, [json!(true), json!(true)], "{report:#}");
        for repository in ["main", "other"] {
            let expected = [("web01".to_owned(), round.min(2)), ("web02".to_owned(), round.min(2))];
            assert_eq!(pool.backups(repository), expected);
        }
        pool.is_at_rest(2);
    }
    assert_eq!(pool.status(), "done");
    let lines = pool.log();
    let events: Vec<&str> = lines.iter().filter_map(|line| line["event"].as_str()).collect();
    assert_eq!((events[0], events[events.len() - 1], events.len()), ("runStart", "runEnd", 3 * 10));
    let (code, out, err) = run(&mut pool.command(&["log", "nightly", "--last", "1"]));
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("nightly (night): done, 2 VMs in ") && out.contains("\n  web01  done, "), "{out}");
}

#[test]
fn a_machine_that_fails_is_tried_again_after_the_others_and_stops_none_of_them() {
    let pool = Pool::new();
    pool.job("limits.vms = 1\n");
    pool.simulator.fault(Fault::call("VM.snapshot", Act::Fail(Failure::internal("no"))));
    let report = pool.run(&[], 0);
    assert_eq!(words(&report, "attempt"), ["web01 2", "web02 1"], "{report:#}");
    let ends: Vec<_> = pool.log().into_iter().filter(|line| line["event"] == "vmEnd").collect();
    let tries: Vec<_> =
        ends.iter().map(|end| (end["name"].as_str().unwrap(), end["status"].as_str().unwrap())).collect();
    assert_eq!(tries, [("web01", "failed"), ("web02", "done"), ("web01", "done")]);
    assert_eq!(ends[0]["next"], "it is tried again after the others, in 0 s");

    pool.simulator.fault(Fault::call("VM.snapshot", Act::Fail(Failure::internal("no"))).times(2));
    pool.job("limits.vms = 1\nretries.vm = 0\n");
    let report = pool.run(&[], 1);
    assert_eq!(words(&report, "status"), ["web01 \"failed\"", "web02 \"failed\""], "{report:#}");
    pool.simulator.fault(Fault::call("VM.snapshot", Act::Fail(Failure::internal("no"))));
    let report = pool.run(&[], 3);
    assert_eq!(words(&report, "status"), ["web01 \"failed\"", "web02 \"done\""], "{report:#}");
    assert!(report["vms"][0]["reason"].as_str().expect("words").contains("no"), "{report:#}");
    assert!(report["vms"][0]["next"].as_str().expect("words").contains("the next run tries again"), "{report:#}");
    assert_eq!(pool.status(), "partial");
    pool.is_at_rest(2);
}

#[test]
fn what_is_named_in_vain_is_told_and_the_rest_is_backed_up() {
    let pool = Pool::new();
    pool.job("vms.uuids = ['00000000-0000-0000-0000-000000000001']\n");
    let report = pool.run(&[], 3);
    assert_eq!(
        words(&report, "status"),
        ["00000000-0000-0000-0000-000000000001 \"failed\"", "web01 \"done\"", "web02 \"done\""]
    );
    let text = fs::read_to_string(pool.world.path("jobs/nightly.toml")).expect("there");
    pool.world.write(
        "nightly.toml",
        &text.replace("vms.names = ['web01', 'web02']", "vms.tags = ['none']").replace("vms.uuids", "vms.exclude"),
    );
    let report = pool.run(&[], 1);
    assert_eq!(report["reason"], "no VM of the pools is one that the job means");
}

#[test]
fn a_repository_that_cannot_be_written_or_opened_leaves_the_other_with_its_backups() {
    let pool = Pool::new();
    pool.job("retries.vm = 0\n");
    let web01 = pool.simulator.only(Class::Vm, "web01");
    let uuid =
        pool.simulator.look(|store| store.text(Class::Vm, &web01, "uuid").map(str::to_owned)).expect("it has one");
    // What is to be a folder is a file there.
    fs::create_dir_all(pool.world.path("other/xo-vm-backups")).expect("made");
    fs::write(pool.world.path("other/xo-vm-backups").join(uuid), "").expect("written");
    let report = pool.run(&[], 3);
    assert_eq!(words(&report, "status"), ["web01 \"partial\"", "web02 \"done\""], "{report:#}");
    assert!(report["vms"].to_string().contains("other: "), "{report:#}");
    assert_eq!(pool.backups("main"), [("web01".to_owned(), 1), ("web02".to_owned(), 1)]);
    pool.is_at_rest(1);
    fs::rename(pool.world.path("other"), pool.world.path("away")).expect("moved");
    let report = pool.run(&[], 3);
    let expected = ["repository other \"failed\"", "web01 \"done\"", "web02 \"done\""];
    assert_eq!(words(&report, "status"), expected, "{report:#}");
    assert_eq!(pool.backups("main"), [("web01".to_owned(), 2), ("web02".to_owned(), 2)]);
}

#[test]
fn a_timeout_ends_a_stalled_transfer_and_leaves_nothing() {
    let pool = Pool::new();
    let ways = [
        (Site::Export, "incremental.nbd = false"),
        (Site::Nbd, "incremental.nbd = true"),
        (Site::ExportVm, "mode = 'full'\nfull.compression = 'none'"),
    ];
    for (site, how) in ways {
        pool.job(&format!("retries.vm = 0\nvms.exclude = ['web02']\n{how}\ntimeouts.vm = '10s'\n"));
        if site == Site::ExportVm {
            let text = fs::read_to_string(pool.world.path("jobs/nightly.toml")).expect("there");
            pool.world.write("nightly.toml", &text.replace("incremental.compression = 'none'\n", ""));
        }
        // On a machine that does other things it may take longer, but hardly each time.
        let is_soon = (0..3).any(|_| {
            pool.simulator.fault(Fault::new(site.clone(), Act::Delay(PATIENCE)).after(MIB));
            let report = pool.run(&[], 1);
            let reason = &report["vms"][0]["reason"];
            assert_eq!(*reason, "it was ended: a VM may take 10 s by the job's timeouts", "{report:#}");
            let seconds = report["vms"][0]["seconds"].as_f64().expect("a number");
            println!("{site:?}: over {:.1} s after the timeout", seconds - 10.0);
            assert!(seconds >= 10.0, "{site:?}: {seconds} s");
            // Nothing is left that would go by itself.
            assert_eq!(pool.tasks_and_devices(), (0, 0));
            pool.is_at_rest(0);
            seconds < 15.0
        });
        assert!(is_soon, "{site:?}: three times over more than 5 s after the timeout");
    }
}

#[test]
fn what_is_left_when_a_run_ends_early_is_told_as_it_is() {
    let pool = Pool::new();
    let last_of = |name: &str| -> Value {
        let lines = pool.log();
        lines.iter().rev().find(|line| line["event"] == "vmEnd" && line["name"] == name).expect("it is told").clone()
    };
    let next = "its backups of before are as they were; the next run tries again";
    // The time is over while the first one is read.
    pool.job("limits.vms = 1\nincremental.nbd = false\ntimeouts.job = '10s'\n");
    pool.simulator.fault(Fault::new(Site::Export, Act::Delay(PATIENCE)).after(MIB));
    let report = pool.run(&[], 1);
    assert_eq!(words(&report, "attempt"), ["web01 1", "web02 0"], "{report:#}");
    assert_eq!(words(&report, "next"), [format!("web01 \"{next}\""), format!("web02 \"{next}\"")]);
    assert_eq!(last_of("web01")["reason"], "it was ended: the job may take 10 s by the job's timeouts");
    assert_eq!(last_of("web02")["reason"], "it never was its turn: the job may take 10 s by the job's timeouts");
    pool.is_at_rest(0);
    // It is stopped before the second round.
    pool.job("limits.vms = 1\nincremental.nbd = false\nvms.exclude = ['web02']\n");
    let text = fs::read_to_string(pool.world.path("jobs/nightly.toml")).expect("there");
    pool.world.write("nightly.toml", &text.replace("retries.pause = '0s'", "retries.pause = '1h'"));
    pool.simulator.fault(Fault::call("VM.snapshot", Act::Fail(Failure::internal("no"))));
    let mut child = pool.start();
    wait_for("the first try", || last_of("web01")["next"] == "it is tried again after the others, in 3600 s");
    succeed(&mut pool.command(&["stop", "nightly"]));
    assert_eq!(child.wait().expect("it is our child").code(), Some(130));
    let last = last_of("web01");
    assert_eq!((&last["status"], &last["attempt"], &last["next"]), (&json!("failed"), &json!(1), &json!(next)));
    let reason = last["reason"].as_str().expect("words");
    assert!(reason.contains("INTERNAL_ERROR") && reason.ends_with("; it is not tried again: the run was stopped"));
    pool.is_at_rest(0);
}

/// Fills a filesystem to its last block.
fn fill(folder: &Path) {
    let mut file = fs::File::create(folder.join("filler")).expect("made");
    for piece in [1 << 20, 4096, 1] {
        while file.write_all(&vec![1; piece]).is_ok() {}
    }
    file.sync_all().expect("what was written fits");
}

#[test]
fn a_run_whose_log_has_no_room_goes_on_and_the_log_has_its_end_and_no_half_line() {
    let pool = Pool::new();
    let place = LoopMount::new(FileSystem::Ext4, 16 << 20);
    fs::create_dir_all(pool.state().join("jobs")).expect("made");
    std::os::unix::fs::symlink(place.path(), pool.state().join("jobs/nightly")).expect("linked");
    pool.job("limits.vms = 1\nincremental.nbd = false\n");
    let stalls = || pool.simulator.fault(Fault::new(Site::Export, Act::Delay(Duration::from_secs(3))).after(MIB));
    let events = || -> Vec<String> {
        let name = |line: &Value| line["event"].as_str().expect("a word").to_owned();
        pool.log().iter().map(name).collect()
    };
    let whole = ["runStart", "vmStart", "vmEnd", "vmStart", "vmEnd", "runEnd"];
    // It becomes full while the run works: room for its end was set aside.
    stalls();
    let mut child = pool.start();
    wait_for("the export", || pool.simulator.faults_left() == 0);
    fill(&place.path());
    assert_eq!(child.wait().expect("it is our child").code(), Some(0));
    assert_eq!((events(), pool.status()), (whole.map(str::to_owned).to_vec(), "done".to_owned()));
    // It is full from the beginning to the end: the room stays set aside between runs.
    fill(&place.path());
    let web01 = pool.simulator.only(Class::Vm, "web01");
    pool.simulator.guest_writes(&web01, 7, 8).expect("written");
    stalls();
    let mut child = pool.start();
    wait_for("the export", || pool.simulator.faults_left() == 0);
    assert_eq!(pool.status(), "running");
    assert_eq!(child.wait().expect("it is our child").code(), Some(0));
    assert_eq!(events(), [whole, whole].concat());
    fs::remove_file(place.path().join("filler")).expect("there");
    // A line that a crash cut off costs only itself.
    let log = place.path().join("log.jsonl");
    let length = fs::metadata(&log).expect("there").len();
    fs::OpenOptions::new().write(true).open(&log).and_then(|file| file.set_len(length - 20)).expect("cut off");
    assert_eq!(pool.status(), "interrupted");
    pool.run(&[], 0);
    assert_eq!(pool.status(), "done");
    let text = fs::read_to_string(&log).expect("there");
    let is_whole = |line: &&str| serde_json::from_str::<Value>(line).is_ok();
    assert_eq!((text.lines().count(), text.lines().filter(is_whole).count()), (18, 17));
    assert!(text.ends_with('\n'), "{text}");

    // It was full before the first run: the run says that the log tells nothing of it.
    fs::remove_file(&log).expect("there");
    fill(&place.path());
    let (code, out, err) = run(&mut pool.command(&["run", "nightly"]));
    assert_eq!(code, 0, "{out}{err}");
    assert!(err.contains("the log does not tell all of this run"), "{err}");
    assert_eq!(pool.status(), "none");
    fs::remove_file(place.path().join("filler")).expect("there");
}

#[test]
fn of_lines_that_wait_for_room_the_start_of_the_run_stays_and_a_torn_line_before_them_costs_only_itself() {
    let place = LoopMount::new(FileSystem::Ext4, 16 << 20);
    let (path, filler) = (place.path().join("log.jsonl"), place.path().join("filler"));
    // Longer than a block of the filesystem: it needs room.
    let host = "h".repeat(10_000);
    let start = Event::RunStart { job: "nightly".into(), schedule: Some("night".into()), due: None, host, process: 7 };
    let merge = |number: u32| Event::MergeStart { repository: format!("{number}{}", "-".repeat(100_000)) };
    let end = Event::RunEnd { status: RunStatus::Done, reason: None, seconds: 1.5 };
    for (has_reserve, newest) in [(true, 2), (false, 10)] {
        fs::write(&path, "{\"version\":1,\"ti").expect("written");
        let append = |log: &mut Log, event: &Event| log.append(&Record::now(Uuid::from_u128(1), event.clone())).is_ok();
        if !has_reserve {
            fill(&place.path());
        }
        let mut log = Log::open(place.path().as_path()).expect("it opens");
        if has_reserve {
            fill(&place.path());
        }
        assert_eq!(append(&mut log, &start), has_reserve);
        (1..=20).for_each(|number| assert!(!append(&mut log, &merge(number))));
        // What was set aside is for its end.
        if !has_reserve {
            fs::remove_file(&filler).expect("there");
        }
        assert!(append(&mut log, &end));
        drop(log);
        let history = History::read(&place.path(), &|_| false).expect("read");
        assert_eq!((history.unread, history.runs.len()), (1, 1));
        let events: Vec<&Event> = history.runs[0].records.iter().map(|record| &record.event).collect();
        let numbers = events.iter().filter_map(|event| match event {
            Event::MergeStart { repository } => repository.trim_end_matches('-').parse().ok(),
            _ => None,
        });
        assert_eq!(numbers.collect::<Vec<u32>>(), (21 - newest..=20).collect::<Vec<u32>>());
        assert_eq!((events[0], events[events.len() - 1]), (&start, &end));
        assert!(Starts::of(&history).last("night", Timestamp::MAX).is_some());
        let _ = fs::remove_file(&filler);
    }
}

/// How each pass over the first disk of a machine began and ended in the last run: by which way, since a base, given up.
fn passes(pool: &Pool, name: &str) -> Vec<(String, bool, bool)> {
    let lines = pool.log();
    let end = lines.iter().rev().find(|line| line["event"] == "vmEnd" && line["name"] == name).expect("it was tried");
    let passes = end["backup"]["reads"][0]["passes"].as_array().cloned().unwrap_or_default();
    let of = |pass: &Value| {
        let way = pass["way"].as_str().expect("words").split(" (").next().expect("one").to_owned();
        (way, pass["base"].is_string(), pass["givenUp"].is_string())
    };
    passes.iter().map(of).collect()
}

#[test]
fn a_disk_whose_transfer_broke_is_read_again_from_the_same_snapshot_and_base() {
    let pool = Pool::new();
    let web01 = pool.simulator.only(Class::Vm, "web01");
    let stream = |is_since, is_given_up| ("VHD stream".to_owned(), is_since, is_given_up);
    let job = |more: &str| pool.job(&format!("vms.exclude = ['web02']\nretries.vm = 0\n{more}"));
    let broken = || pool.simulator.fault(Fault::new(Site::Export, Act::Cut).after(MIB));
    job("incremental.nbd = false\n");
    for is_since in [false, true] {
        pool.simulator.guest_writes(&web01, 7, 8).expect("written");
        pool.simulator.log().clear();
        broken();
        let report = pool.run(&[], 0);
        assert_eq!(words(&report, "attempt"), ["web01 1"], "{report:#}");
        assert_eq!(passes(&pool, "web01"), [stream(is_since, true), stream(is_since, false)]);
        let log = pool.simulator.log();
        assert_eq!(log.count("VM.snapshot") + log.count("Async.VM.snapshot"), 1);
        assert_eq!(pool.simulator.faults_left(), 0);
    }
    let (_, out, _) = run(&mut pool.command(&["log", "--last", "1"]));
    assert!(out.contains("\n    disk xvda was read again: the export broke: "), "{out}");
    // As often as it is said, and no more. What differs cannot be had then, but the disk can.
    job("incremental.nbd = false\nretries.disk = 0\n");
    pool.simulator.guest_writes(&web01, 8, 8).expect("written");
    broken();
    pool.run(&[], 0);
    assert_eq!(passes(&pool, "web01"), [stream(true, true), stream(false, false)]);
    broken();
    pool.run(&["--full"], 1);
    assert_eq!(passes(&pool, "web01"), []);
    // By NBD it is read by the next way.
    job("retries.disk = 1\n");
    pool.simulator.fault(Fault::new(Site::Nbd, Act::Cut).times(u32::MAX));
    pool.run(&["--full"], 0);
    pool.simulator.clear_faults();
    assert_eq!(passes(&pool, "web01"), [("NBD + block list".to_owned(), false, true), stream(false, false)]);
    pool.is_at_rest(1);
    for repository in ["main", "other"] {
        assert_eq!(pool.backups(repository), [("web01".to_owned(), 4)]);
        succeed(xofs().args(["check", "--data"]).arg(pool.world.path(repository)));
    }
}

#[test]
fn stop_ends_a_run_which_removes_what_it_made() {
    let pool = Pool::new();
    pool.job("limits.vms = 1\nincremental.nbd = false\n");
    let (code, out, _) = run(&mut pool.command(&["stop", "nightly"]));
    assert_eq!((code, out.as_str()), (0, "nightly: does not run\n"));
    pool.simulator.fault(Fault::new(Site::Export, Act::Delay(PATIENCE)).after(MIB));
    let mut child = pool.start();
    wait_for("the export", || pool.simulator.faults_left() == 0);
    assert_eq!(pool.status(), "running");
    let (code, _, err) = run(&mut pool.command(&["run", "nightly"]));
    assert_eq!(code, 11, "{err}");
    let (code, out, err) = run(&mut pool.command(&["stop", "nightly"]));
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.starts_with("nightly: stopped, after "), "{out}");
    assert_eq!(child.wait().expect("it is our child").code(), Some(130));
    assert_eq!(pool.status(), "interrupted");
    pool.is_at_rest(0);
    let lines = pool.log();
    assert_eq!(lines[lines.len() - 1]["status"], "interrupted");
}

#[test]
fn a_run_whose_messages_cannot_be_written_goes_on_and_is_stopped_as_any_other() {
    let full = || Stdio::from(File::options().write(true).open("/dev/full").expect("it is there"));
    let pool = Pool::new();
    pool.job("retries.vm = 0\nlimits.vms = 1\nincremental.nbd = false\n");
    let begin = || {
        let mut command = pool.command(&["run", "nightly"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(full()).spawn().expect("it starts")
    };
    pool.simulator.fault(Fault::new(Site::Export, Act::Delay(PATIENCE)).after(MIB));
    let mut child = begin();
    wait_for("the export", || pool.simulator.faults_left() == 0);
    let (code, out, err) = run(pool.command(&["stop", "nightly"]).stderr(full()));
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(child.wait().expect("it is our child").code(), Some(130));
    pool.is_at_rest(0);

    fs::rename(pool.world.path("other"), pool.world.path("away")).expect("moved");
    assert_eq!(begin().wait().expect("it is our child").code(), Some(3));
    assert_eq!(pool.backups("main"), [("web01".to_owned(), 1), ("web02".to_owned(), 1)]);
    assert_eq!(pool.status(), "partial");
}

#[test]
fn a_run_that_was_killed_is_interrupted_for_whoever_looks_and_the_next_one_removes_what_it_left() {
    let pool = Pool::new();
    pool.job("limits.vms = 1\nincremental.nbd = false\n");
    pool.simulator.fault(Fault::new(Site::Export, Act::Delay(PATIENCE)).after(MIB));
    let mut child = pool.start();
    wait_for("the export", || pool.simulator.faults_left() == 0);
    child.kill().expect("it is our child");
    child.wait().expect("it is our child");
    assert_eq!(pool.status(), "interrupted");
    let (_, out, _) = run(&mut pool.command(&["log"]));
    assert!(
        out.contains("nightly: interrupted, 1 VM\n  web01  interrupted, 0.0 s: the process of the run ended"),
        "{out}"
    );
    let report = pool.run(&[], 0);
    assert_eq!(words(&report, "status"), ["web01 \"done\"", "web02 \"done\""]);
    assert_eq!(pool.status(), "done");
    pool.is_at_rest(2);
}

#[test]
fn a_merge_that_fails_leaves_good_backups_and_the_next_run_goes_on_with_it() {
    let pool = Pool::new();
    pool.job("timeouts.lock = '1s'\n[[schedules]]\nname = 'night'\ncron = '0 2 * * *'\nkeep.last = 1\n");
    pool.run(&[], 0);
    // A merge needs what the folder's owner may not do any more: nothing is forgotten in 'other'.
    let stop = pool.world.path("other/immutability.json");
    fs::write(&stop, "{").expect("written");
    let report = pool.run(&[], 4);
    assert_eq!(report["status"], "mergePending", "{report:#}");
    let merges = report["merges"].as_array().expect("a list");
    assert_eq!((&merges[0]["isDone"], &merges[1]["isDone"]), (&json!(true), &json!(false)), "{report:#}");
    assert_eq!(merges[1]["next"], "the new backups are good; the next run goes on with it");
    assert_eq!(pool.backups("other"), [("web01".to_owned(), 2), ("web02".to_owned(), 2)]);
    fs::remove_file(&stop).expect("there");
    pool.run(&[], 0);
    assert_eq!(pool.backups("other"), [("web01".to_owned(), 1), ("web02".to_owned(), 1)]);
}

#[test]
fn keys_are_made_as_often_as_the_job_says() {
    let pool = Pool::new();
    pool.job("incremental.key_every = 3\n");
    let is_key = |arguments: &[&str]| {
        pool.run(arguments, 0);
        let lines = pool.log();
        let last = lines.iter().rev().find(|line| line["event"] == "vmEnd" && line["name"] == "web01").expect("it ran");
        last["backup"]["repositories"][1]["disks"][0]["isKey"] == true
    };
    let mut keys: Vec<bool> = [&[] as &[&str], &[], &[], &[], &["--full"], &[]].map(is_key).into();
    assert_eq!(keys, [true, false, false, true, true, false]);
    // Also where the log has only the last run, and so many later where nothing is known.
    let folder = pool.state().join("jobs/nightly");
    keys.clear();
    for is_lost in [false, false, true, false, false] {
        let lines = pool.log();
        let last = lines[lines.len() - 1]["run"].clone();
        let of_last = lines.iter().filter(|line| line["run"] == last && !is_lost);
        fs::write(folder.join("log.jsonl"), of_last.map(|line| format!("{line}\n")).collect::<String>())
            .expect("written");
        if is_lost {
            fs::remove_file(folder.join("keys.json")).expect("there");
        }
        keys.push(is_key(&[]));
    }
    assert_eq!(keys, [false, true, false, false, true]);
}

#[test]
fn a_program_is_told_of_runs_that_failed() {
    let pool = Pool::new();
    let told = pool.world.path("told");
    let report = format!("[report]\ncommand = ['sh', '-c', 'cat > {}']\nto = 'backup@example.org'\n", told.display());
    pool.job(&format!("retries.vm = 0\n{report}"));
    pool.run(&[], 0);
    assert!(!told.exists());
    pool.simulator.fault(Fault::call("VM.snapshot", Act::Fail(Failure::internal("no"))));
    pool.run(&[], 3);
    let mail = fs::read_to_string(&told).expect("told");
    assert!(mail.starts_with("To: backup@example.org\nSubject: xofs: nightly: partly failed\n"), "{mail}");
    assert!(mail.contains("; its backups of before are as they were; the next run tries again\n"), "{mail}");
    pool.job(&format!("{}format = 'json'\nwhen = 'always'\n", report.replace("to = 'backup@example.org'\n", "")));
    pool.run(&[], 0);
    assert_eq!(json_of(&told)["status"], "done");
}

#[test]
fn a_template_says_what_is_told_and_what_became_of_the_program_is_in_the_log() {
    let pool = Pool::new();
    let told = pool.world.path("told");
    let job = |command: &str, more: &str| {
        let report = format!("[report]\nwhen = 'always'\ncommand = [{command}]\n{more}");
        pool.job(&format!("retries.vm = 0\nincremental.nbd = false\n{report}"));
    };
    let cat = format!("'sh', '-c', 'cat > {}'", told.display());
    let last = || pool.log().pop().expect("it has lines");
    let failed = "{% for vm in vms if vm.status != 'done' %}{{ [vm.name, vm.reason, vm.next] }}{% endfor %}";
    pool.world.write("chat.json", &format!("{{\"text\": {{{{ job ~ ': ' ~ statusName }}}}, \"failed\": {failed}}}"));
    job(&cat, "template = 'chat.json'\n");
    pool.simulator.fault(Fault::call("VM.snapshot", Act::Fail(Failure::internal("\"no\""))));
    pool.run(&[], 3);
    let chat = json_of(&told);
    assert_eq!(chat["text"], "nightly: partly failed");
    let said: Vec<&str> = chat["failed"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert!(["web01", "web02"].contains(&said[0]) && said[1].contains("INTERNAL_ERROR"), "{chat:#}");
    assert_eq!(said[2], "its backups of before are as they were; the next run tries again");
    assert_eq!((&last()["event"], &last()["isDone"]), (&json!("reportEnd"), &json!(true)));

    // A mistake of the template keeps nobody from being told.
    pool.world.write("mail.txt", "Subject: {{ jbo }}\n");
    job(&cat, "template = 'mail.txt'\n");
    pool.run(&[], 0);
    let mail = fs::read_to_string(&told).expect("told");
    assert!(
        mail.contains("nightly: done, 2 VMs in ") && mail.contains("mail.txt':1 is wrong: undefined value"),
        "{mail}"
    );
    assert!(last()["reason"].as_str().is_some_and(|why| why.contains("undefined value")), "{:#}", last());

    for (command, more, expected) in [
        ("'false'", "", "'false' ended with exit status: 1"),
        ("'/nowhere/sendmail'", "", "run '/nowhere/sendmail': No such file or directory"),
        (
            "'sh', '-c', 'sleep 98765.4 & sleep 98765.4'",
            "timeout = '500ms'\n",
            "'sh' was ended: it took more than 0.5 s",
        ),
    ] {
        job(command, &format!("{more}format = 'json'\n"));
        pool.run(&[], 0);
        let last = last();
        let reason = last["reason"].as_str().expect("words");
        assert!(reason.starts_with("nobody was told of the run: ") && reason.contains(expected), "{last:#}");
        assert_eq!(pool.status(), "done");
    }
    wait_for("the end of what the program started", || !is_running("98765.4"));
}

/// Whether a process has this among its arguments.
fn is_running(argument: &str) -> bool {
    let processes = fs::read_dir("/proc").expect("listed").flatten();
    let arguments = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    arguments.into_iter().any(|line| line.split(|byte| *byte == 0).any(|word| word == argument.as_bytes()))
}

fn json_of(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).expect("there")).expect("JSON")
}

#[test]
fn what_a_run_advises_can_be_done_in_a_job_or_in_the_configuration() {
    let pool = Pool::new();
    let reason = |code| {
        let report = pool.run(&[], code);
        report["vms"][0]["reason"].as_str().expect("words").to_owned()
    };
    // A repository that is too small, and one that cannot be written.
    let place = LoopMount::new(FileSystem::Tmpfs, 3 << 20);
    let small = init(&place.path(), "small", &[]);
    pool.job_to(&format!("to.repositories = ['{}']", small.display()), "mode = 'full'\n");
    let said = reason(1);
    assert!(said.contains("too little room") && said.ends_with("; forget old backups or make room"), "{said}");
    place.remount(true);
    let said = reason(1);
    assert!(said.contains("Read-only file system") && !said.contains("full") && !said.contains("room"), "{said}");
    place.remount(false);
    // A certificate that is another, and one of which nothing is said.
    let path = pool.world.path("config/xofs/config.toml");
    let config = fs::read_to_string(&path).expect("there");
    let right = format!("fingerprint = '{}'\n", pool.simulator.fingerprint());
    for other in [format!("fingerprint = '{}'\n", ["AA"; 32].join(":")), String::new()] {
        fs::write(&path, config.replace(&right, &other)).expect("written");
        let said = reason(1);
        assert!(said.contains(pool.simulator.fingerprint()), "{said}");
        assert!(said.ends_with("and give it as fingerprint in [pools.lab] of the configuration"), "{said}");
    }
}

#[test]
fn a_pool_that_fails_is_told_and_is_no_machine_and_the_log_that_has_a_wrong_line_is_named() {
    let pool = Pool::new();
    pool.job("retries.vm = 0\n");
    let path = pool.world.path("config/xofs/config.toml");
    let config = fs::read_to_string(&path).expect("there");
    fs::write(&path, config.replace(pool.simulator.fingerprint(), &["AA"; 32].join(":"))).expect("written");
    let report = pool.run(&[], 1);
    let entry = &report["vms"][0];
    let said = [&entry["vm"], &entry["name"], &entry["pool"], &entry["attempt"], &entry["remarks"]];
    assert_eq!(json!(said), json!(["", "pool lab", "lab", 0, []]), "{report:#}");
    let folder = pool.state().join("jobs/nightly");
    let mut log = fs::OpenOptions::new().append(true).open(folder.join("log.jsonl")).expect("there");
    log.write_all(b"{\"half\n").expect("written");
    for arguments in [&["log", "nightly"][..], &["report", "nightly"], &["report", "nightly", "--since", "1d"]] {
        let (code, out, err) = run(&mut pool.command(arguments));
        assert!(code == 0 && (out.contains("failed, 0 VMs") || out.contains("(1 failed), 0 VMs")), "{out}");
        let named = format!("xofs: 1 line of the log in '{}' could not be understood", folder.display());
        assert!(err.starts_with(&named), "{err}");
    }
    assert_eq!(run(&mut pool.command(&["report", "nightly", "--last", "0"])).0, 2);
}

/// `xofs job daemon`; killed when it is dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_a_schedule_missed_is_run_once_however_often_the_daemon_is_killed() {
    let pool = Pool::new();
    pool.job("incremental.nbd = false\n[[schedules]]\nname = 'year'\ncron = '0 0 1 1 *'\ntimezone = 'UTC'\n");
    fs::create_dir_all(pool.state().join("jobs/nightly")).expect("made");
    let known = json!({ "year": { "cron": "0 0 1 1 *", "timezone": "UTC", "since": "2020-06-01T00:00:00Z" } });
    fs::write(pool.state().join("jobs/nightly/schedules.json"), known.to_string()).expect("written");
    let daemon = || {
        Daemon(
            pool.command(&["daemon"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("it starts"),
        )
    };
    pool.simulator.fault(Fault::new(Site::Export, Act::Delay(Duration::from_secs(5))).after(MIB));
    let first = daemon();
    wait_for("the export", || pool.simulator.faults_left() == 0);
    assert_eq!(pool.status(), "running");
    let (code, _, err) = run(&mut pool.command(&["daemon"]));
    let expected = format!("xofs: a daemon runs already for the state in '{}'\n", pool.state().display());
    assert_eq!((code, err), (11, expected));
    drop(first);
    let mut second = daemon();
    wait_for("the end of the run", || pool.status() == "done");
    // Several looks at what is due.
    std::thread::sleep(Duration::from_secs(3));
    let begun = pool.log().iter().filter(|line| line["event"] == "runStart").count();
    assert_eq!(begun, 1);
    pool.is_at_rest(2);
    succeed(Command::new("kill").args(["-TERM", &second.0.id().to_string()]));
    assert_eq!(second.0.wait().expect("it is our child").code(), Some(0));
}
