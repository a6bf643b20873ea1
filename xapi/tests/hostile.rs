//! Servers that do not keep to the protocol: each answer is right, or an error that says why, and nothing waits for ever.

mod peer;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use peer::{Answer, Peer, Request};
use serde_json::{Value, json};
use xapi::record::{Vdi, Vm};
use xapi::{Cancel, Error, ErrorKind, ExportOptions, Format, Pool, Ref};

/// Connects to a peer that is right until `act` says otherwise.
fn pool(act: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> (Peer, Pool) {
    let peer = Peer::start(act);
    let pool = Pool::connect(peer.settings(), &Cancel::within(Duration::from_secs(60))).unwrap();
    (peer, pool)
}

/// Returns the error of a call that is answered with `answer`.
fn error_of(method: &'static str, answer: impl Fn() -> Answer + Send + Sync + 'static) -> Error {
    let (_peer, pool) = pool(move |request| (request.method == method).then(&answer));
    pool.call::<Value>(method, &[]).unwrap_err()
}

fn raw(text: &str) -> Answer {
    Answer::Raw(text.as_bytes().to_vec())
}

#[test]
fn replies_that_are_no_replies_are_protocol_errors() {
    let ok = |body: &str| format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let endless = format!("HTTP/1.1 200 OK\r\n{}", "x-filler: yes\r\n".repeat(10_000));
    for (case, expected) in [
        (endless.as_str(), ""),
        ("220 mail.example ESMTP\r\n\r\n", "no HTTP server"),
        ("HTTP/1.1 500 Internal Error\r\ncontent-length: 6\r\n\r\n<html>", "status 500"),
        ("HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1/\r\ncontent-length: 0\r\n\r\n", "status 302"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "chunked"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}", "no length"),
        ("HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n{}", "no length"),
        ("HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\n{}", "no length"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n{}", "no length"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 9999999999999\r\n\r\n{}", "9999999999999 bytes"),
        (&ok("no json"), "no JSON"),
        (&ok("[]"), "no object"),
        (&ok("{}"), "another call"),
        (&ok(r#"{"jsonrpc":"2.0","id":999999,"result":""}"#), "another call"),
        (&ok(r#"{"jsonrpc":"2.0","id":1,"error":{"code":1}}"#), "without a code"),
        (&ok(r#"{"jsonrpc":"2.0","id":1,"error":7}"#), "is none"),
        (&ok(&"[".repeat(100_000)), "no JSON"),
        (&"HTTP/1.1 100 Continue\r\n\r\n".repeat(100), "again and again"),
    ] {
        let case = case.to_owned();
        let shown = case[..case.len().min(60)].to_owned();
        let error = error_of("VM.get_all", move || raw(&case));
        assert_eq!(error.kind(), ErrorKind::Protocol, "{shown}: {error}");
        assert!(error.to_string().contains(expected), "{shown}: {error}");
    }
}

#[test]
fn an_endless_reply_is_left_once_it_is_too_long() {
    let error = error_of("VM.get_all", || Answer::Endless(b"HTTP/1.1 200 OK\r\n\r\n".to_vec()));
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("more than 268435456 bytes"), "{error}");
}

#[test]
fn an_error_has_its_code_in_the_form_of_either_version() {
    for error in [
        json!({"code": 1, "message": "VDI_IN_USE", "data": ["OpaqueRef:1", "destroy"]}),
        json!(["VDI_IN_USE", "OpaqueRef:1", "destroy"]),
    ] {
        let error = error_of("VM.get_all", move || Answer::Error(error.clone()));
        assert_eq!((error.kind(), error.code()), (ErrorKind::Api, "VDI_IN_USE"), "{error}");
        assert_eq!(error.params(), ["OpaqueRef:1", "destroy"]);
    }
}

#[test]
fn no_error_shows_the_session_or_the_password() {
    let error = error_of("VM.get_all", || Answer::api(&["HANDLE_INVALID", "session", peer::SESSION]));
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert!(!format!("{error} {error:?}").contains(peer::SESSION), "{error:?}");
    let peer = Peer::start(|request| {
        let password = request.params[1].as_str().unwrap().to_owned();
        Some(Answer::api(&["INTERNAL_ERROR", &format!("cannot log in with {password}")]))
    });
    let settings = peer.settings();
    assert!(!format!("{settings:?}").contains(peer::PASSWORD));
    let error = Pool::connect(settings, &Cancel::new()).unwrap_err();
    assert!(!format!("{error} {error:?}").contains(peer::PASSWORD), "{error:?}");
}

#[test]
fn a_wrong_password_is_told_at_once_and_tried_once() {
    let peer = Peer::start(|_| Some(Answer::api(&["SESSION_AUTHENTICATION_FAILED", "root", "wrong"])));
    let error = Pool::connect(peer.settings(), &Cancel::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Credentials);
    assert_eq!(peer.methods(), ["session.login_with_password"]);
}

#[test]
fn a_call_that_reads_is_repeated_when_its_connection_breaks_and_one_that_changes_is_not() {
    for answer in ["", "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"jsonrpc\""] {
        for (method, is_read) in [("VM.get_all", true), ("VM.set_name_label", false), ("Async.VM.snapshot", false)] {
            let left = Arc::new(AtomicUsize::new(2));
            let (peer, pool) = pool(move |request| {
                let is_cut = request.method == method && left.load(Ordering::SeqCst) > 0;
                is_cut.then(|| {
                    left.fetch_sub(1, Ordering::SeqCst);
                    raw(answer)
                })
            });
            let called = pool.call::<Value>(method, &[]);
            let count = peer.methods().iter().filter(|called| *called == method).count();
            if is_read {
                assert_eq!((called.unwrap(), count), (json!(""), 3));
            } else {
                assert_eq!((called.unwrap_err().kind(), count), (ErrorKind::Unknown, 1));
            }
        }
    }
}

#[test]
fn a_lost_session_is_made_anew_once_and_the_call_repeated() {
    for (times, logins) in [(1, 2), (usize::MAX, 2)] {
        let left = Arc::new(AtomicUsize::new(times));
        let (peer, pool) = pool(move |request| {
            let is_lost = request.method == "VM.set_name_label" && left.load(Ordering::SeqCst) > 0;
            is_lost.then(|| {
                left.fetch_sub(1, Ordering::SeqCst);
                Answer::api(&["SESSION_INVALID", peer::SESSION])
            })
        });
        let before = pool.generation();
        let called = pool.act("VM.set_name_label", &[]);
        let count = peer.methods().iter().filter(|method| *method == "session.login_with_password").count();
        assert_eq!((called.is_ok(), count), (times == 1, logins));
        assert_eq!(pool.generation(), before + 1);
    }
}

#[test]
fn a_pool_with_too_many_tasks_is_asked_again() {
    let left = Arc::new(AtomicUsize::new(3));
    let (_peer, pool) = pool(move |request| {
        let is_full = request.method == "Async.VM.snapshot" && left.load(Ordering::SeqCst) > 0;
        is_full.then(|| {
            left.fetch_sub(1, Ordering::SeqCst);
            Answer::api(&["TOO_MANY_PENDING_TASKS"])
        })
    });
    assert_eq!(pool.call::<Value>("Async.VM.snapshot", &[]).unwrap(), json!(""));
}

#[test]
fn roles_and_licences_are_never_tried_again() {
    let (peer, pool) = pool(|request| {
        (request.method == "VM.get_all").then(|| Answer::api(&["RBAC_PERMISSION_DENIED", "vm.get_all", "no"]))
    });
    assert_eq!(pool.call::<Value>("VM.get_all", &[]).unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(peer.methods().iter().filter(|method| *method == "VM.get_all").count(), 1);
}

#[test]
fn a_call_that_waits_ends_soon_after_a_cancel_and_at_its_deadline() {
    let (_peer, pool) = pool(|request| (request.method == "VM.get_all").then_some(Answer::Silence));
    let cancel = Cancel::new();
    let (stopped, waiting) = (cancel.clone(), pool.with(&cancel));
    let waiting = std::thread::spawn(move || waiting.call::<Value>("VM.get_all", &[]));
    stopped.cancel();
    assert_eq!(waiting.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    let within = pool.with(&Cancel::within(Duration::from_millis(300)));
    assert_eq!(within.call::<Value>("VM.get_all", &[]).unwrap_err().kind(), ErrorKind::TimedOut);
}

#[test]
fn a_call_that_is_too_long_for_xapi_is_not_sent() {
    let (peer, pool) = pool(|_| None);
    let error = pool.act("VM.set_name_label", &[json!("x".repeat(400 << 10))]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    assert!(!peer.methods().contains(&"VM.set_name_label".to_owned()));
}

#[test]
fn the_last_handle_logs_out() {
    let (peer, pool) = pool(|_| None);
    let other = pool.with(&Cancel::new());
    drop(pool);
    assert!(!peer.methods().contains(&"session.logout".to_owned()));
    drop(other);
    assert_eq!(peer.methods().last().unwrap(), "session.logout");
}

#[test]
fn a_pool_that_does_not_answer_a_logout_holds_nobody_up() {
    let (_peer, pool) = pool(|request| (request.method == "session.logout").then_some(Answer::Silence));
    let begun = Instant::now();
    drop(pool);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[test]
fn connections_are_used_again() {
    let (peer, pool) = pool(|_| None);
    let before = peer.connections();
    for _ in 0..20 {
        pool.call::<Value>("VM.get_all", &[]).unwrap();
    }
    assert_eq!(peer.connections(), before);
}

#[test]
fn records_with_fields_of_another_type_are_refused_and_unknown_fields_are_kept() {
    let (_peer, pool) = pool(|request| match (request.method.as_str(), request.params.get(1)?.as_str()?) {
        ("VDI.get_record", "OpaqueRef:right") => {
            Some(Answer::Result(json!({"uuid": "u", "virtual_size": 5, "snapshot_of": "", "new_field": [1]})))
        }
        ("VDI.get_record", "OpaqueRef:negative") => Some(Answer::Result(json!({"virtual_size": -1}))),
        ("VDI.get_record", "OpaqueRef:text") => Some(Answer::Result(json!({"virtual_size": "5"}))),
        ("VDI.get_record", "OpaqueRef:list") => Some(Answer::Result(json!([]))),
        ("VDI.get_record", _) => Some(Answer::api(&["HANDLE_INVALID", "VDI", "OpaqueRef:gone"])),
        _ => None,
    });
    let record = pool.record::<Vdi>(&Ref::new("OpaqueRef:right")).unwrap();
    assert_eq!((record.uuid.as_str(), record.virtual_size, record.snapshot_of.is_null()), ("u", 5, true));
    assert_eq!(record.raw["new_field"], json!([1]));
    for (reference, kind) in [
        ("OpaqueRef:negative", ErrorKind::Protocol),
        ("OpaqueRef:text", ErrorKind::Protocol),
        ("OpaqueRef:list", ErrorKind::Protocol),
        ("OpaqueRef:gone", ErrorKind::Gone),
    ] {
        assert_eq!(pool.record::<Vdi>(&Ref::new(reference)).unwrap_err().kind(), kind, "{reference}");
    }
}

/// Exports a disk from a peer that answers `body`, with a task that ends as `task` says.
fn exported(body: Answer, task: Value) -> (Result<Vec<u8>, Error>, Result<(), Error>) {
    let (_peer, pool) = pool(move |request| match request.method.as_str() {
        "GET /export_raw_vdi/" => Some(body.clone()),
        "task.get_record" => Some(Answer::Result(task.clone())),
        _ => None,
    });
    let options = ExportOptions { vdi: Ref::new("OpaqueRef:vdi"), base: None, format: Format::Raw };
    let mut export = pool.export_vdi(&options).unwrap();
    let mut bytes = Vec::new();
    let read = export.read_to_end(&mut bytes).map(|_| bytes);
    let read = read.map_err(|error| error.downcast::<Error>().unwrap());
    (read, export.conclude())
}

#[test]
fn an_export_is_what_its_bytes_and_its_task_say_together() {
    let success = json!({"status": "success"});
    let failure = json!({"status": "failure", "error_info": ["VDI_IO_ERROR", "Device I/O errors"]});
    let head = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
    let page = "HTTP/1.1 500 Internal Error\r\n\r\n<html>";

    let (read, concluded) = exported(raw(&format!("{head}data")), success.clone());
    assert_eq!(read.unwrap(), b"data");
    concluded.unwrap();

    let (read, concluded) = exported(raw(&format!("{head}abc")), success.clone());
    assert_eq!((read.unwrap(), concluded.is_ok()), (b"abc".to_vec(), true));

    let (read, concluded) = exported(raw(&format!("{head}data{page}")), failure.clone());
    assert_eq!(read.unwrap(), format!("data{page}").as_bytes());
    let error = concluded.unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Failed, "VDI_IO_ERROR"), "{error}");

    for (task, kind, code) in [(failure, ErrorKind::Failed, "VDI_IO_ERROR"), (success.clone(), ErrorKind::Protocol, "")]
    {
        let (read, concluded) = exported(raw(&format!("{head}{page}")), task);
        for error in [read.unwrap_err(), concluded.unwrap_err()] {
            assert_eq!((error.kind(), error.code()), (kind, code), "{error}");
        }
    }

    let (read, _) = exported(raw("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\ndata"), success.clone());
    assert_eq!(read.unwrap_err().kind(), ErrorKind::Unreachable);

    let (read, concluded) = exported(raw(&format!("{head}data")), json!({"status": "odd"}));
    assert_eq!((read.unwrap(), concluded.unwrap_err().kind()), (b"data".to_vec(), ErrorKind::Protocol));
}

#[test]
fn an_export_whose_task_vanished_is_of_unknown_outcome() {
    let (_peer, pool) = pool(|request| match request.method.as_str() {
        "GET /export_raw_vdi/" => Some(raw("HTTP/1.1 200 OK\r\n\r\ndata")),
        "task.get_record" => Some(Answer::api(&["HANDLE_INVALID", "task", "OpaqueRef:task"])),
        _ => None,
    });
    let options = ExportOptions { vdi: Ref::new("OpaqueRef:vdi"), base: None, format: Format::Raw };
    let mut export = pool.export_vdi(&options).unwrap();
    std::io::copy(&mut export, &mut std::io::sink()).unwrap();
    assert_eq!(export.conclude().unwrap_err().kind(), ErrorKind::Unknown);
}

#[test]
fn an_export_that_is_concluded_before_its_end_is_no_success() {
    let (_peer, pool) = pool(|request| match request.method.as_str() {
        "GET /export_raw_vdi/" => Some(raw("HTTP/1.1 200 OK\r\n\r\n0123456789")),
        "task.get_record" => Some(Answer::Result(json!({"status": "success"}))),
        _ => None,
    });
    let options = ExportOptions { vdi: Ref::new("OpaqueRef:vdi"), base: None, format: Format::Raw };
    let mut export = pool.export_vdi(&options).unwrap();
    export.read_exact(&mut [0; 4]).unwrap();
    let error = export.conclude().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("after 4 bytes"), "{error}");
}

#[test]
fn a_transfer_whose_session_has_ended_begins_again_once_with_another() {
    for (times, logins) in [(1, 2), (usize::MAX, 2)] {
        let left = Arc::new(AtomicUsize::new(times));
        let (peer, pool) = pool(move |request| match request.method.as_str() {
            "GET /export_raw_vdi/" if left.load(Ordering::SeqCst) > 0 => {
                left.fetch_sub(1, Ordering::SeqCst);
                Some(raw("HTTP/1.1 401 Unauthorised\r\ncontent-length: 0\r\n\r\n"))
            }
            "GET /export_raw_vdi/" => Some(raw("HTTP/1.1 200 OK\r\n\r\n")),
            _ => None,
        });
        let options = ExportOptions { vdi: Ref::new("OpaqueRef:vdi"), base: None, format: Format::Raw };
        let begun = pool.export_vdi(&options).map(drop).map_err(|error| error.kind());
        assert_eq!(begun, if times == 1 { Ok(()) } else { Err(ErrorKind::Credentials) });
        let count = |method: &str| peer.methods().iter().filter(|called| *called == method).count();
        assert_eq!(count("GET /export_raw_vdi/"), 2);
        assert_eq!((count("task.create"), count("task.destroy")), (2, 2));
        pool.call::<Value>("VM.get_all", &[]).unwrap();
        assert_eq!(count("session.login_with_password"), logins + usize::from(times > 1));
    }
}

#[test]
fn a_session_is_never_sent_to_a_host_that_is_not_of_the_pool() {
    for location in ["http://127.0.0.9:1/x?session_id=secret", "nonsense", "", "ftp://127.0.0.1/"] {
        let (peer, pool) = pool(move |request| {
            let head = format!("HTTP/1.1 302 Found\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n");
            (request.method == "GET /export_raw_vdi/").then(|| raw(&head))
        });
        let options = ExportOptions { vdi: Ref::new("OpaqueRef:vdi"), base: None, format: Format::Raw };
        let error = pool.export_vdi(&options).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Untrusted | ErrorKind::Protocol), "{error}");
        assert!(!error.to_string().contains("secret"), "{error}");
        // The task of it is not left behind.
        assert_eq!(peer.methods().last().unwrap(), "task.destroy");
    }
}

#[test]
fn an_import_sends_exactly_what_was_said() {
    for (length, sent, kind) in
        [(4, "dat", Some(ErrorKind::OutOfRange)), (4, "data", None), (4, "data!", Some(ErrorKind::OutOfRange))]
    {
        let (_peer, pool) = pool(|request| match request.method.as_str() {
            "PUT /import_raw_vdi/" => Some(Answer::Take("HTTP/1.1 200 OK\r\n\r\n")),
            "task.get_record" => {
                Some(Answer::Result(json!({"status": "success", "result": "<value>OpaqueRef:vdi</value>"})))
            }
            _ => None,
        });
        let mut import = pool.import_vdi(&Ref::new("OpaqueRef:vdi"), Format::Raw, length).unwrap();
        let written = import.write_all(sent.as_bytes()).map_err(|error| error.downcast::<Error>().unwrap());
        let concluded = written.and_then(|()| import.conclude());
        match kind {
            Some(kind) => assert_eq!(concluded.unwrap_err().kind(), kind),
            None => assert_eq!(concluded.unwrap().reference::<Vdi>().unwrap().as_str(), "OpaqueRef:vdi"),
        }
    }
}

#[test]
fn an_import_that_the_pool_breaks_off_fails_with_what_its_task_says() {
    let (_peer, pool) = pool(|request| match request.method.as_str() {
        "PUT /import_raw_vdi/" => Some(raw("HTTP/1.1 200 OK\r\n\r\n<html>")),
        "task.get_record" => Some(Answer::Result(json!({"status": "failure", "error_info": ["VDI_IO_ERROR", "x"]}))),
        _ => None,
    });
    let mut import = pool.import_vdi(&Ref::new("OpaqueRef:vdi"), Format::Vhd, 1 << 30).unwrap();
    let block = vec![0; 1 << 20];
    let error = (0..1024).find_map(|_| import.write_all(&block).err()).unwrap();
    assert_eq!(error.downcast::<Error>().unwrap().code(), "VDI_IO_ERROR");
    assert_eq!(import.conclude().unwrap_err().code(), "VDI_IO_ERROR");
}

#[test]
fn a_snapshot_without_some_disks_is_made_of_an_old_pool_too() {
    let (peer, pool) = pool(|request| {
        let of = |index: usize| request.params.get(index).and_then(Value::as_str).unwrap_or_default().to_owned();
        Some(match request.method.as_str() {
            "Async.VM.snapshot" if request.params.len() == 4 => {
                Answer::api(&["MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.snapshot", "2", "3"])
            }
            "Async.VM.snapshot" => Answer::Result(json!("OpaqueRef:task")),
            "task.get_record" => {
                Answer::Result(json!({"status": "success", "result": "<value>OpaqueRef:snapshot</value>"}))
            }
            "VM.get_VBDs" => Answer::Result(json!(["OpaqueRef:vbd1", "OpaqueRef:vbd2"])),
            "VBD.get_record" => Answer::Result(json!({"VDI": of(1).replace("vbd", "vdi")})),
            "VDI.get_record" => {
                Answer::Result(json!({"is_a_snapshot": true, "snapshot_of": of(1).replace("vdi", "live")}))
            }
            _ => return None,
        })
    });
    let (vm, unwanted) = (Ref::<Vm>::new("OpaqueRef:vm"), Ref::new("OpaqueRef:live2"));
    let error = pool.snapshot_vm(&vm, "name", &[&unwanted]).unwrap_err();
    assert_eq!(error.code(), "MESSAGE_PARAMETER_COUNT_MISMATCH");
    let snapshot = pool.snapshot_vm(&vm, "name", &[]).unwrap();
    pool.destroy_disks_of(&snapshot, &[&unwanted]).unwrap();
    assert_eq!(snapshot.as_str(), "OpaqueRef:snapshot");
    let destroyed: Vec<_> =
        peer.requests().into_iter().filter(|request| request.method.ends_with("DI.destroy")).collect();
    assert_eq!(destroyed.len(), 1);
    assert_eq!(destroyed[0].params[1], json!("OpaqueRef:vdi2"));
}
