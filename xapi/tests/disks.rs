//! Disks of a simulated pool, read by NBD as a backup does, with what its hosts and its sessions go through meanwhile.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use xapi::record::{Network, PoolObject, Vdi, Vm};
use xapi::{Budget, Cancel, Changes, ErrorKind, NbdExport, NbdOptions, Pool, Ref, Settings, Trust};
use xapi_simulator::scene::{Disk, Machine, Repository, Storage};
use xapi_simulator::{Act, Class, Fault, Scene, Simulator, Site, Upset};
use zeroize::Zeroizing;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

fn scene() -> Scene {
    let machine = Machine::new("web01").running().disk(Disk::new("system", SIZE).filled(60));
    Scene::new(7).host("first").host("second").sr(Repository::new("shared", Storage::Nfs)).vm(machine)
}

fn start(scene: Scene) -> (Simulator, Pool) {
    let simulator = Simulator::start(scene).unwrap();
    let address = format!("https://{}", simulator.address()).parse().unwrap();
    let trust = Trust::Pinned(vec![simulator.fingerprint().parse().unwrap()]);
    let settings = Settings::new(address, &simulator.user(), Zeroizing::new(simulator.password()), trust);
    let settings = Settings { pause: Duration::from_millis(50), ..settings };
    let pool = Pool::connect(settings, &Cancel::within(Duration::from_secs(120))).unwrap();
    (simulator, pool)
}

fn machine(pool: &Pool) -> Ref<Vm> {
    pool.by_name("web01").unwrap()[0].clone()
}

fn disk_of(pool: &Pool, vm: &Ref<Vm>) -> Ref<Vdi> {
    let vbds = pool.record(vm).unwrap().fields.vbds;
    pool.records_of(&vbds).unwrap()[0].vdi.clone()
}

fn snapshot(pool: &Pool) -> Ref<Vdi> {
    disk_of(pool, &pool.snapshot_vm(&machine(pool), "snapshot", &[]).unwrap())
}

fn content(simulator: &Simulator, vdi: &Ref<Vdi>) -> Vec<u8> {
    let content = simulator.content(&vdi.as_str().into()).unwrap();
    let mut bytes = vec![0; usize::try_from(content.size()).unwrap()];
    content.read(0, &mut bytes).unwrap();
    bytes
}

fn options(folder: &tempfile::TempDir) -> NbdOptions {
    let pause = Duration::from_millis(10);
    NbdOptions { pause, patience: Duration::from_secs(1), ..NbdOptions::new(Budget::new(folder.path())) }
}

/// Reads a disk by several threads.
fn read(export: &NbdExport) -> Vec<u8> {
    let len = usize::try_from(export.size()).unwrap();
    let (mut bytes, done) = (vec![0; len], AtomicU64::new(0));
    thread::scope(|scope| {
        for (index, part) in bytes.chunks_mut(8 << 20).enumerate() {
            let done = &done;
            scope.spawn(move || {
                for (piece, buffer) in part.chunks_mut(1 << 20).enumerate() {
                    let at = (index as u64 * 8 + piece as u64) * MIB;
                    export.read_at(at, buffer).unwrap();
                    done.fetch_add(buffer.len() as u64, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(done.into_inner(), export.size());
    bytes
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_snapshot_is_read_by_nbd_and_nothing_holds_it_afterwards() {
    let (simulator, pool) = start(scene());
    let (vdi, folder) = (snapshot(&pool), tempfile::tempdir().unwrap());
    let export = pool.nbd(&vdi, options(&folder)).unwrap();
    assert!(read(&export) == content(&simulator, &vdi));
    drop(export);
    until("the hosts let go of it", || pool.control_domain_vbds(&vdi).unwrap().is_empty());
}

#[test]
fn what_changed_is_all_that_differs_and_no_more_than_64_kib_around_it() {
    let (simulator, pool) = start(scene());
    pool.enable_cbt(&disk_of(&pool, &machine(&pool))).unwrap();
    let from = snapshot(&pool);
    simulator.guest_writes(&machine(&pool).as_str().into(), 3, 40).unwrap();
    let to = snapshot(&pool);
    let Changes::Known(changed) = pool.changed_blocks(&from, &to, SIZE).unwrap() else { panic!("they are tracked") };
    let (mut patched, newer) = (content(&simulator, &from), content(&simulator, &to));
    assert!(patched != newer && changed.bytes() > 0 && changed.bytes() < SIZE);
    let folder = tempfile::tempdir().unwrap();
    let export = pool.nbd(&to, options(&folder)).unwrap();
    for run in changed.runs() {
        let place = usize::try_from(run.start).unwrap()..usize::try_from(run.end).unwrap();
        export.read_at(run.start, &mut patched[place]).unwrap();
    }
    assert!(patched == newer);
    // A disk that a connection holds is not asked about.
    let Changes::Unknown(reason) = pool.changed_blocks(&from, &to, SIZE).unwrap() else { panic!("it is in use") };
    assert!(reason.contains("VDI_IN_USE"), "{reason}");
    drop(export);
    until("the hosts let go of it", || pool.control_domain_vbds(&to).unwrap().is_empty());
    // Any doubt is a reason, no error.
    for (from, to, size, part) in [
        (&to, &to, SIZE, "with itself"),
        (&from, &to, SIZE + MIB, "bytes of changed blocks were expected"),
        (&to, &from, SIZE, "SR_BACKEND_FAILURE"),
    ] {
        match pool.changed_blocks(from, to, size).unwrap() {
            Changes::Unknown(reason) => assert!(reason.contains(part), "{reason}"),
            Changes::Known(changed) => panic!("{part}: {changed:?}"),
        }
    }
}

#[test]
fn changes_that_nobody_tracked_are_not_known() {
    let (_simulator, pool) = start(scene());
    let (from, to) = (snapshot(&pool), snapshot(&pool));
    let Changes::Unknown(reason) = pool.changed_blocks(&from, &to, SIZE).unwrap() else {
        panic!("nothing was tracked")
    };
    assert!(reason.contains("not tracked for the older"), "{reason}");
}

#[test]
fn a_lost_session_and_connections_that_break_do_not_end_a_read() {
    let (simulator, pool) = start(scene());
    let (vdi, folder) = (snapshot(&pool), tempfile::tempdir().unwrap());
    simulator.fault(Fault::new(Site::Nbd, Act::Cut).after(3 * MIB).times(6));
    let export = pool.nbd(&vdi, options(&folder)).unwrap();
    simulator.happen(&Upset::LoseSessions);
    assert!(read(&export) == content(&simulator, &vdi));
    assert_eq!(simulator.faults_left(), 0);
}

#[test]
fn a_pool_without_a_network_for_nbd_says_so() {
    let (_simulator, pool) = start(scene().network("storage", &[]));
    let (vdi, folder) = (snapshot(&pool), tempfile::tempdir().unwrap());
    let error = pool.nbd(&vdi, options(&folder)).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("the purpose 'nbd'"), "{error}");
}

#[test]
fn where_a_network_is_set_apart_for_backups_no_other_is_read_over() {
    let (simulator, pool) = start(scene().network("storage", &["nbd"]).network("backups", &[]));
    let backups = pool.record(&pool.by_name::<Network>("backups").unwrap()[0]).unwrap();
    let (vdi, folder) = (snapshot(&pool), tempfile::tempdir().unwrap());
    let pools = pool.records::<PoolObject>().unwrap();
    pool.set_entry(&pools[0].reference, "other_config", "xo:backupNetwork", &backups.uuid).unwrap();
    // Each network has an address of a host there, and the simulated hosts have only one each.
    drop(pool.nbd(&vdi, options(&folder)).unwrap());
    simulator.change(|state| {
        for pif in &backups.pifs {
            state.store.set(Class::Pif, &pif.as_str().into(), "IP", "192.0.2.1").unwrap();
        }
    });
    let error = pool.nbd(&vdi, options(&folder)).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("sets apart for backups"), "{error}");
    // One that was destroyed sets nothing apart.
    pool.set_entry(&pools[0].reference, "other_config", "xo:backupNetwork", &pools[0].uuid).unwrap();
    drop(pool.nbd(&vdi, options(&folder)).unwrap());
}
