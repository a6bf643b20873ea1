//! What job files say, and each mistake that they may have.

use std::time::Duration;

use vhd::Filter;

use super::*;
use crate::ingest::Layout;

const WHOLE: &str = r#"
description = "web servers"
pools = ["lab"]

[vms]
names = ["web01"]
uuids = ["1F2E3D4C-5B6A-4798-8A9B-0C1D2E3F4A5B"]
tags = ["nightly"]
power_states = ["running", "halted"]
exclude = ["web03"]
exclude_tags = ["test"]

[to]
repositories = ["main", "/srv/other"]
srs = ["spare", "production=fast=1"]

[incremental]
key_every = 30
compression = "gzip"
nbd = false
cbt = true

[[schedules]]
name = "nightly"
cron = "0 2 * * *"
timezone = "Europe/Paris"
keep = { last = 7, weekly = 4, tags = ["keep"] }
replicas = 3

[[schedules]]
name = "monthly"
cron = "0 4 1 * *"
timezone = "UTC"
missed = "skip"
full = true

[limits]
vms = 4
exports = 8
snapshots = 2
transfers = 6
bandwidth = "100 MiB/s"

[timeouts]
vm = "6h"
job = "1h 30m"
check_chain = false

[retries]
vm = 2
disk = 3
pause = "5s"

[report]
command = ["/usr/sbin/sendmail", "-t"]
to = "backup@example.org"
"#;

fn known() -> Known {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    Known { pools: names(&["lab", "production"]), repositories: names(&["main", "offsite"]) }
}

fn parse(text: &str) -> Result<Job, String> {
    Job::parse(text, Path::new("/jobs/web.toml"), &known()).map_err(|faults| faults.to_string())
}

#[test]
fn all_that_a_job_says_is_read() {
    let job = parse(WHOLE).expect("right");
    assert_eq!((job.id.as_str(), job.description.as_deref()), ("web", Some("web servers")));
    assert_eq!(job.pools, ["lab"]);
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<String>>();
    let vms = Which {
        all: false,
        names: texts(&["web01"]),
        uuids: texts(&["1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b"]),
        tags: texts(&["nightly"]),
        power_states: vec![PowerState::Running, PowerState::Halted],
        exclude: texts(&["web03"]),
        exclude_tags: texts(&["test"]),
    };
    assert_eq!(job.vms, vms);
    assert_eq!(job.repositories, ["main", "/srv/other"]);
    let srs = [(None, "spare"), (Some("production"), "fast=1")];
    assert_eq!(job.srs, srs.map(|(pool, sr)| SrAddress { pool: pool.map(str::to_owned), sr: sr.to_owned() }));
    assert_eq!(job.srs.iter().map(ToString::to_string).collect::<Vec<_>>(), ["spare", "production=fast=1"]);
    let incremental = Incremental {
        key_every: Some(30),
        layout: Some(Layout::Exploded(Some(Filter::Gzip))),
        nbd_connections: None,
        tracks_changes: true,
        ..Incremental::default()
    };
    assert_eq!(job.kind, Kind::Incremental(incremental));
    let [nightly, monthly] = job.schedules.as_slice() else { panic!("{:?}", job.schedules) };
    let keep = Keep { last: Some(7), weekly: Some(4), tags: texts(&["keep"]), ..Keep::default() };
    assert_eq!(
        (nightly.name.as_str(), nightly.makes_up, nightly.is_full, &nightly.keep),
        ("nightly", true, false, &Some(keep))
    );
    assert_eq!((nightly.calendar.pattern(), nightly.timezone.as_deref()), ("0 2 * * *", Some("Europe/Paris")));
    assert_eq!(
        (monthly.name.as_str(), monthly.makes_up, monthly.is_full, &monthly.keep),
        ("monthly", false, true, &None)
    );
    let limits = Limits { vms: 4, exports: 8, snapshots: 2, transfers: Some(6), bandwidth: Some(100 << 20) };
    assert_eq!(job.limits, limits);
    let timeouts = Timeouts {
        job: Some(Duration::from_secs(5400)),
        vm: Some(Duration::from_secs(6 * 3600)),
        lock: Duration::from_secs(60),
        chain: None,
    };
    assert_eq!(job.timeouts, timeouts);
    assert_eq!(job.retries, Retries { vm: 2, disk: 3, pause: Duration::from_secs(5) });
    let report = Reporting {
        command: texts(&["/usr/sbin/sendmail", "-t"]),
        form: Form::Mail("backup@example.org".to_owned()),
        always: false,
        timeout: Duration::from_secs(120),
    };
    assert_eq!(job.report, Some(report));
}

#[test]
fn a_short_job_has_usual_settings() {
    let job = parse("pools=['lab']\nmode='full'\nvms.all=true\nto.repositories=['main']\n").expect("right");
    assert_eq!(job.kind, Kind::Full(Full { compression: xapi::Compression::Zstd }));
    let limits = Limits { vms: 2, exports: 12, snapshots: 1, transfers: None, bandwidth: None };
    assert_eq!((job.limits, job.srs.as_slice()), (limits, [].as_slice()));
    assert_eq!(job.retries, Retries { vm: 1, disk: 1, pause: Duration::from_secs(60) });
    assert_eq!((job.schedules.len(), job.report), (0, None));
}

#[test]
fn a_job_may_have_only_srs() {
    let text = "pools=['lab']\nvms.all=true\nto.srs=['spare']\n[[schedules]]\nname='night'\ncron='@daily'\n";
    let job = parse(text).expect("right");
    assert!(job.repositories.is_empty());
    assert_eq!(job.schedules[0].replicas, 3);
    let said = parse(&text.replace("spare", "dr=fast")).expect_err("there is no such pool");
    assert!(said.contains("web.toml:3: 'dr' is no pool of the configuration, which has lab, production"), "{said}");
    let said = parse(&format!("{text}keep.last = 7\n")).expect_err("there is nothing to be kept");
    assert!(said.contains("web.toml:4: keep is for repositories, and the job has none"), "{said}");
}

/// The whole file with one line in place of another.
fn with(line: &str, other: &str) -> String {
    assert!(WHOLE.contains(line), "{line}");
    WHOLE.replace(line, other)
}

#[test]
fn each_mistake_is_named_with_its_line_and_what_is_expected() {
    for (line, other, expected) in [
        ("cbt = true", "ctb = true", "/jobs/web.toml:21: 'ctb' is no key of [incremental]; did you mean 'cbt'?"),
        (
            "cbt = true",
            "zzz = 1",
            "21: 'zzz' is no key of [incremental]; there are format, compression, nbd, nbd_connections,",
        ),
        ("nbd = false", "nbd = false\nnbd_connections = 8", "nbd_connections are of no use with nbd = false"),
        ("nbd = false", "nbd_connections = 13", "'nbd_connections' is 13"),
        ("cbt = true", "cbt = 'yes'", "21: 'cbt' is 'yes'; expected true or false"),
        (
            "description = \"web",
            "descriptoin = \"web",
            "2: 'descriptoin' is no key of a job; did you mean 'description'?",
        ),
        ("pools = [\"lab\"]", "", "1: pools is missing"),
        ("pools = [\"lab\"]", "pools = [\"lob\"]", "3: 'lob' is no pool of the configuration; did you mean 'lab'?"),
        ("pools = [\"lab\"]", "pools = [\"\"]", "3: 'pools' is ''; expected texts in quotes"),
        ("pools = [\"lab\"]", "pools = 7", "3: 'pools' is 7; expected a list of texts"),
        ("names = [\"web01\"]", "all = true", "5: [vms] says all = true, and names some"),
        ("names = [\"web01\"]", "names = [\"a\", \"a\"]", "6: 'a' is named twice"),
        ("[\"1F2E3D4C-5B6A-4798-8A9B-0C1D2E3F4A5B\"]", "[\"1F2E\"]", "7: '1F2E' is no uuid"),
        ("\"halted\"", "\"off\"", "9: 'off' is no state; there are running, halted, paused, suspended"),
        ("\"/srv/other\"", "\"other\"", "14: 'other' is no repository of the configuration, which has main, offsite"),
        ("key_every = 30", "key_every = 0", "18: 'key_every' is 0; expected a number from 1 to 10000"),
        ("key_every = 30", "format = 'vhd'", "19: a VHD file is not compressed"),
        ("\"gzip\"", "\"lzma\"", "19: 'compression' is 'lzma'; expected \"none\" or \"gzip\" or \"brotli\""),
        ("cbt = true", "purge_snapshot_data = true", "17: purge_snapshot_data needs cbt = true"),
        ("pools = ", "mode = 'full'\npools = ", "18: the job has mode = \"full\", to which this does not apply"),
        (
            "\"0 2 * * *\"",
            "\"0 25 * * *\"",
            "25: '0 25 * * *' is no pattern of cron: '25' is no hour, which is 0 to 23; exp",
        ),
        (
            "\"0 2 * * *\"",
            "\"0 0 31 2 *\"",
            "25: '0 0 31 2 *' is no pattern of cron: there is no such day; expected minute",
        ),
        ("Europe/Paris", "Europe/Pariss", "26: 'Europe/Pariss' is no time zone; expected one like Europe/Paris"),
        ("\"monthly\"", "\"nightly\"", "31: there are two schedules called 'nightly'"),
        ("\"monthly\"", "\"every month\"", "31: 'every month' is no name of a schedule"),
        ("last = 7, weekly = 4, ", "", "27: keep keeps nothing"),
        ("\"skip\"", "\"never\"", "34: 'missed' is 'never'; expected \"run\" or \"skip\""),
        ("vm = \"6h\"", "vm = \"6 parsecs\"", "45: 'vm' is '6 parsecs'; expected a time like"),
        ("vm = \"6h\"", "vm = \"-6h\"", "45: 'vm' is '-6h'; expected a time like"),
        ("pause = \"5s\"", "pause = \"8760h 1s\"", "52: 'pause' is '8760h 1s'; expected a time like"),
        ("pause = \"5s\"", "pause = \"99999999999999h\"", "\"6h\", of 8760h at most"),
        ("vm = \"6h\"", "vm = \"0s\"", "44: vm is no time at all"),
        ("to = \"b", "timeout = \"x\"\nto = \"b", "56: 'timeout' is 'x'; expected a time like"),
        ("to = \"b", "template = \"/nowhere\"\nto = \"b", "56: read the template '/nowhere': No such file"),
        (
            "to = \"b",
            "template = \"/nowhere\"\nto = \"b",
            "57: the template says all that the program reads: leave to out",
        ),
        ("to = \"backup@example.org\"", "", "54: to is missing: the address that a mail goes to"),
        ("\"spare\"", "\"=spare\"", "15: '=spare' names no SR: SR or POOL=SR was expected"),
        (
            "production=fast",
            "prodction=fast",
            "15: 'prodction' is no pool of the configuration; did you mean 'production'?",
        ),
        ("srs = [\"spare\", \"production=fast=1\"]", "", "23: replicas is for SRs, and the job has none"),
        ("replicas = 3", "replicas = 0", "28: 'replicas' is 0; expected a number from 1 to 100"),
        ("exports = 8", "exports = 65", "39: 'exports' is 65; expected a number from 1 to 64"),
        ("snapshots = 2", "snapshots = 0", "40: 'snapshots' is 0; expected a number from 1 to 64"),
        ("transfers = 6", "transfers = -1", "41: 'transfers' is -1; expected a number from 1 to 64"),
        ("MiB/s", "MiB", "42: 'bandwidth' is '100 MiB'; expected a rate like \"100 MiB/s\", of 64 KiB/s or more"),
        ("MiB/s", "B/s", "42: 'bandwidth' is '100 B/s'; expected a rate like"),
        ("disk = 3", "disk = 101", "51: 'disk' is 101; expected a number from 0 to 100"),
        ("cbt = true", "cbt = ", "21: no TOML: "),
        ("cbt = true", "cbt = true\ncbt = true", "22: no TOML: "),
    ] {
        let said = parse(&with(line, other)).expect_err(other);
        assert!(said.lines().any(|line| line.contains(expected)), "{other}\n{said}\nexpected: {expected}");
    }
}

#[test]
fn all_mistakes_are_named_at_once_by_line() {
    let text = with("cbt = true", "ctb = true").replace("\"lab\"", "\"lob\"").replace("vms = 4", "vms = 1000");
    let said = parse(&text).expect_err("three mistakes");
    let lines: Vec<&str> = said.lines().filter_map(|line| line.split(':').nth(1)).collect();
    assert_eq!(lines, ["3", "21", "38"], "{said}");
    assert!(parse("").expect_err("nothing").contains("[vms] is missing"));
    let named = |path| Job::parse(WHOLE, Path::new(path), &known());
    assert!(named("/jobs/my job.toml").expect_err("a space").to_string().contains("'my job', is no name of a job"));
}

#[test]
fn a_mistake_is_told_once_and_hides_no_other_and_brings_no_other_with_it() {
    let lines = |text: &str| -> Vec<String> {
        let faults = Job::parse(text, Path::new("/jobs/web.toml"), &known()).expect_err(text);
        faults.faults.into_iter().map(|fault| format!("{}: {}", fault.line, fault.message)).collect()
    };
    let both = lines(&with("Europe/Paris", "Q").replace("\"0 2 * * *\"", "\"x\""));
    let expected = [
        "25: 'x' is no pattern of cron: 5 fields are needed, and it has 1; expected minute, ",
        "26: 'Q' is no time zone",
    ];
    assert!(both.len() == 2 && both.iter().zip(expected).all(|(line, said)| line.starts_with(said)), "{both:?}");
    for (line, other, expected) in [
        ("pools = [\"lab\"]", "pools = 'lab'", "3: 'pools' is 'lab'; expected a list of texts"),
        (
            "repositories = [\"main\", \"/srv/other\"]",
            "repositories = 'main'",
            "14: 'repositories' is 'main'; expected a l",
        ),
        ("srs = [\"spare\", \"production=fast=1\"]", "srs = 'spare'", "15: 'srs' is 'spare'; expected a list of texts"),
        ("name = \"nightly\"", "name = 7", "24: 'name' is 7; expected a text in quotes"),
        ("cron = \"0 2 * * *\"", "cron = 7", "25: 'cron' is 7; expected a text in quotes"),
        ("last = 7, weekly = 4", "last = 'x'", "27: 'last' is 'x'; expected a number from 0 to 1000000"),
        ("command = [\"/usr/sbin/sendmail\", \"-t\"]", "command = 'mail'", "55: 'command' is 'mail'; expected a list"),
        ("to = \"backup@example.org\"", "to = 7", "56: 'to' is 7; expected a text in quotes"),
        ("cbt = true", "purge_snapshot_data = true\ncbt = 'yes'", "22: 'cbt' is 'yes'; expected true or false"),
    ] {
        let said = lines(&with(line, other));
        assert!(said.len() == 1 && said[0].starts_with(expected), "{said:?}\nexpected: {expected}");
    }
    let (of, to) = ("pools = ['lab']\n", "to.repositories = ['main']\n");
    assert_eq!(lines(&format!("{of}vms = 7\n{to}")), ["2: 'vms' is 7; expected a table, [vms]"]);
    let wrong = lines(&format!("{of}vms.names = 'web01'\n{to}"));
    assert_eq!(wrong, ["2: 'names' is 'web01'; expected a list of texts, like [\"one\", \"other\"]"]);
    let nested = lines(&format!("{of}vms.names = {}{}\n{to}", "[".repeat(200), "]".repeat(200)));
    assert_eq!(nested.len(), 1, "{nested:?}");
    let nested = lines(&format!("{of}vms.names = {}{}\n{to}", "[\n".repeat(200), "]\n".repeat(200)));
    assert_eq!(nested.len(), 1, "{nested:?}");
}
