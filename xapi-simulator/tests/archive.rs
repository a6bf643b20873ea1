//! XVA archives, out and in.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};
use xapi_simulator::archive::ova::{Object, Ova};
use xapi_simulator::archive::{ArchiveError, Compression, Disk, Export, Import, Options};
use xapi_simulator::content::Content;
use xapi_simulator::guest::Guest;
use xapi_simulator::random::fresh_uuid;
use xapi_simulator::transfer::unhindered;

const MIB: u64 = 1 << 20;

fn map(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => panic!("an object is expected"),
    }
}

/// Returns a VM with values of every kind.
fn ova() -> Ova {
    let vm = json!({
        "uuid": "3c5d4a5e-1111-4111-8111-111111111111",
        "name_label": "web <1> & \"co\"",
        "name_description": "",
        "memory_static_max": 2_147_483_648_u64,
        "version": 0,
        "HVM_shadow_multiplier": 1.5,
        "is_a_template": false,
        "is_a_snapshot": true,
        "snapshot_time": "20260102T03:04:05Z",
        "other_config": { "xo:backup:datetime": "20260102T03:04:05Z", "n": "5" },
        "tags": ["a", "b"],
        "VBDs": ["Ref:2"],
        "empty": [],
    });
    let vdi = json!({ "virtual_size": 20 * MIB, "name_label": "12", "version": "x" });
    Ova {
        version: map(json!({ "hostname": "host", "export_vsn": "2" })),
        objects: vec![
            Object { class: "VM".into(), reference: "Ref:0".into(), record: map(vm) },
            Object { class: "VDI".into(), reference: "Ref:4".into(), record: map(vdi) },
        ],
    }
}

fn send(disks: Vec<Disk<'_>>, options: Options) -> Vec<u8> {
    let mut bytes = Vec::new();
    Export::new(&ova(), disks, options).send(&mut bytes, &mut unhindered).unwrap();
    bytes
}

/// Runs a program over bytes.
fn through(program: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program[0])
        .args(&program[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program[0]));
    let mut pipe = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || pipe.write_all(input).unwrap());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{program:?}");
        output.stdout
    })
}

/// Imports into disks of 20 MiB.
fn receive(bytes: &[u8], force: bool) -> Result<BTreeMap<String, Content>, ArchiveError> {
    let import = Import::begin(bytes)?;
    assert_eq!(import.ova(), &ova());
    let mut disks = BTreeMap::new();
    let mut sink = |reference: &str, offset: u64, bytes: &[u8]| {
        let disk = disks.entry(reference.to_owned()).or_insert_with(|| Content::new(fresh_uuid(), 20 * MIB));
        disk.write(offset, bytes)
    };
    import.disks(&mut sink, force, &mut unhindered)?;
    Ok(disks)
}

#[test]
fn records_become_xml_and_come_back() {
    let xml = ova().to_xml();
    assert!(xml.starts_with("<?xml version='1.0'?><value><struct><member><name>version</name><value><struct>"));
    for part in [
        "<name>memory_static_max</name><value>2147483648</value>",
        "<name>HVM_shadow_multiplier</name><value><double>1.5</double></value>",
        "<name>is_a_snapshot</name><value><boolean>1</boolean></value>",
        "<name>snapshot_time</name><value><dateTime.iso8601>20260102T03:04:05Z</dateTime.iso8601></value>",
        "<name>xo:backup:datetime</name><value>20260102T03:04:05Z</value>",
        "<name>name_label</name><value>web &lt;1&gt; &amp; &quot;co&quot;</value>",
        "<name>tags</name><value><array><data><value>a</value><value>b</value></data></array></value>",
    ] {
        assert!(xml.contains(part), "{part} in {xml}");
    }
    assert_eq!(Ova::from_xml(&xml).unwrap(), ova());
    assert_eq!(Ova::from_xml("<value>x</value>"), Err("is no struct".into()));
    assert!(Ova::from_xml("<!DOCTYPE x [<!ENTITY a 'b'>]><value>&a;</value>").is_err());
    let deep = format!("{}x{}", "<value><array><data>".repeat(40), "</data></array></value>".repeat(40));
    assert!(Ova::from_xml(&deep).is_err());
}

#[test]
fn pieces_of_zeroes_are_left_out_but_the_first_and_the_last() {
    let mut disk = Content::new(fresh_uuid(), 7 * MIB + 512);
    disk.write(5 * MIB + 1, b"x").unwrap();
    let other = Content::new(fresh_uuid(), MIB);
    let disks = vec![Disk { reference: "Ref:4", content: &disk }, Disk { reference: "Ref:30", content: &other }];
    let names = |bytes: &[u8]| String::from_utf8(through(&["tar", "-tf", "-"], bytes)).unwrap();
    let plain = send(disks.clone(), Options::default());
    assert_eq!(plain.len() % 512, 0);
    assert_eq!(plain[plain.len() - 1024..], [0; 1024]);
    let listed = names(&plain);
    let pieces: Vec<&str> = listed.lines().filter(|name| !name.ends_with(".xxhash")).collect();
    assert_eq!(pieces, ["ova.xml", "Ref:30/00000000", "Ref:4/00000000", "Ref:4/00000005", "Ref:4/00000007"]);
    assert_eq!(listed.lines().count(), 9);
    let read = |name: &str| through(&["tar", "-xOf", "-", name], &plain);
    assert_eq!(read("Ref:4/00000000.xxhash"), through(&["tar", "-xOf", "-", "Ref:30/00000000.xxhash"], &plain));
    assert_eq!(read("Ref:4/00000007").len(), 512);
    assert_eq!(read("ova.xml"), ova().to_xml().into_bytes());

    // An empty piece takes a number and no place.
    let options = Options { empty_piece_after: Some(2), ..Options::default() };
    let listed = names(&send(disks, options));
    let pieces: Vec<&str> = listed.lines().filter(|name| !name.ends_with(".xxhash")).collect();
    let expected = [
        "ova.xml",
        "Ref:30/00000000",
        "Ref:4/00000000",
        "Ref:4/00000003",
        "Ref:4/00000006",
        "Ref:4/00000007",
        "Ref:4/00000009",
    ];
    assert_eq!(pieces, expected);
}

#[test]
fn checksums_are_those_of_xxh64() {
    let disk = Content::new(fresh_uuid(), 512);
    let bytes = send(vec![Disk { reference: "Ref:4", content: &disk }], Options::default());
    let sum = through(&["tar", "-xOf", "-", "Ref:4/00000000.xxhash"], &bytes);
    // Of 512 zeroes, as the reference implementation says.
    assert_eq!(String::from_utf8(sum).unwrap(), "8BBF7F68E8C3B87C");
}

#[test]
fn disks_come_back_whatever_the_compression_and_the_empty_pieces() {
    for seed in 0..2 {
        let mut disks = [Content::new(fresh_uuid(), 20 * MIB), Content::new(fresh_uuid(), 20 * MIB - 512)];
        Guest::new(seed).work(&mut disks[0], 20).unwrap();
        Guest::new(seed).fill(&mut disks[1], 30).unwrap();
        let sent =
            || vec![Disk { reference: "Ref:7", content: &disks[0] }, Disk { reference: "Ref:10", content: &disks[1] }];
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            for empty_piece_after in [None, Some(2)] {
                let bytes = send(sent(), Options { compression, empty_piece_after });
                let plain = match compression {
                    Compression::None => bytes.clone(),
                    Compression::Gzip => through(&["gzip", "-dc"], &bytes),
                    Compression::Zstd => through(&["zstd", "-dc"], &bytes),
                };
                assert!(plain == send(sent(), Options { empty_piece_after, ..Options::default() }));
                let received = receive(&bytes, false).unwrap();
                assert_eq!(received.keys().collect::<Vec<_>>(), ["Ref:10", "Ref:7"]);
                assert_eq!(received["Ref:7"].digest(), disks[0].digest(), "seed {seed} {compression:?}");
                let mut expected = disks[1].clone();
                expected.grow(20 * MIB).unwrap();
                assert_eq!(received["Ref:10"].digest(), expected.digest(), "seed {seed} {compression:?}");
            }
        }
    }
}

#[test]
fn zstd_of_another_program_in_several_frames_is_read() {
    let mut disk = Content::new(fresh_uuid(), 20 * MIB);
    Guest::new(3).work(&mut disk, 10).unwrap();
    let plain = send(vec![Disk { reference: "Ref:4", content: &disk }], Options::default());
    let (first, second) = plain.split_at((1 << 20) + 77);
    let frames = [through(&["zstd", "-c"], first), through(&["zstd", "-c", "-19"], second)].concat();
    assert_eq!(receive(&frames, false).unwrap()["Ref:4"].digest(), disk.digest());
}

#[test]
fn an_archive_that_is_cut_or_changed_is_refused() {
    let mut disk = Content::new(fresh_uuid(), 20 * MIB);
    disk.write(0, b"first").unwrap();
    disk.write(9 * MIB, b"second").unwrap();
    let good = send(vec![Disk { reference: "Ref:4", content: &disk }], Options::default());
    assert_eq!(receive(&good, false).unwrap()["Ref:4"].digest(), disk.digest());
    for length in [0, 3, 100, 600, good.len() / 2, good.len() - 1024] {
        assert!(matches!(receive(&good[..length], false), Err(ArchiveError::Truncated)), "{length}");
    }
    let at = good.windows(6).position(|window| window == b"second").unwrap();
    let mut changed = good.clone();
    changed[at] = b'S';
    let error = receive(&changed, false).unwrap_err();
    assert_eq!(error.to_string(), "'Ref:4/00000009' is not what its checksum says");
    assert!(receive(&changed, true).is_ok());
    let mut unnamed = good.clone();
    unnamed[0] = b'x';
    assert!(matches!(receive(&unnamed, true), Err(ArchiveError::Invalid(_))));
    assert!(receive(b"HTTP/1.1 500 Internal Error\r\n\r\n", false).is_err());
    for compression in [Compression::Gzip, Compression::Zstd] {
        let options = Options { compression, ..Options::default() };
        let bytes = send(vec![Disk { reference: "Ref:4", content: &disk }], options);
        assert!(receive(&bytes[..bytes.len() / 2], false).is_err(), "{compression:?}");
    }
}

#[test]
fn archives_of_older_servers_and_other_programs_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    std::fs::create_dir(folder.path().join("Ref:4")).unwrap();
    put("ova.xml", ova().to_xml().as_bytes());
    // Pieces that are shorter than usual; the number that is left out is as long as the first.
    put("Ref:4/00000000", &[1; 512]);
    put("Ref:4/00000000.checksum", b"8f6abf0ba4b2b3a3aa6b2e3a2a4ff2b0f4b5a1d2");
    put("Ref:4/00000002", &[2; 100]);
    let names = ["ova.xml", "Ref:4/00000000", "Ref:4/00000000.checksum", "Ref:4/00000002"];
    let folder = folder.path().to_str().unwrap();
    let tar = [&["tar", "--format=ustar", "--force-local", "-C", folder, "-cf", "-"][..], &names].concat();
    let disk = receive(&through(&tar, &[]), false).unwrap().remove("Ref:4").unwrap();
    let mut read = [0; 1200];
    disk.read(0, &mut read).unwrap();
    assert_eq!(read, [&[1; 512][..], &[0; 512], &[2; 100], &[0; 76]].concat()[..]);
}

#[test]
fn a_writer_that_goes_away_ends_the_export() {
    struct Gone(usize);
    impl std::io::Write for Gone {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or(std::io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut disk = Content::new(fresh_uuid(), 20 * MIB);
    Guest::new(1).fill(&mut disk, 100).unwrap();
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let options = Options { compression, ..Options::default() };
        let export = Export::new(&ova(), vec![Disk { reference: "Ref:4", content: &disk }], options);
        let error = export.send(&mut Gone(3 << 20), &mut unhindered).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe, "{compression:?}");
    }
}
