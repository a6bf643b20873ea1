//! Envelopes, names, arguments and sessions, as sockets see them.

#![allow(clippy::cloned_ref_to_slice_refs, reason = "lists of arguments look alike, however long they are")]

mod client;

use client::{Client, call_raw, parse, pool, request, send};
use serde_json::{Value, json};
use xapi_simulator::failure::Failure;
use xapi_simulator::{Act, Fault, Scene};

fn post(client: &Client, path: &str, body: &str) -> client::Answer {
    request(client.http(), &format!("POST {path} HTTP/1.1\r\ncontent-length: {}", body.len()), body.as_bytes())
}

#[test]
fn each_envelope_has_its_content_type_and_its_way_to_say_errors() {
    let client = pool();
    let second = post(&client, "/jsonrpc", r#"{"jsonrpc":"2.0","method":"VM.get_all","params":["x"],"id":7}"#);
    assert_eq!(second.header("content-type").as_deref(), Some("application/json"));
    let answer: Value = serde_json::from_slice(&second.body).unwrap();
    let error = json!({"code": 1, "message": "SESSION_INVALID", "data": ["x"]});
    assert_eq!(answer, json!({"jsonrpc": "2.0", "error": error, "id": 7}));

    let first = post(&client, "/json", r#"{"method":"VM.get_all","params":["x"],"id":7}"#);
    let answer: Value = serde_json::from_slice(&first.body).unwrap();
    assert_eq!(answer, json!({"result": null, "error": ["SESSION_INVALID", "x"], "id": 7}));

    let call = "<?xml version='1.0'?><methodCall><methodName>VM.get_all</methodName>\
                <params><param><value><string>x</string></value></param></params></methodCall>";
    for path in ["/", "/RPC2", "/xmlrpc"] {
        let answer = post(&client, path, call);
        assert_eq!(answer.header("content-type").as_deref(), Some("text/xml"));
        let expected = "<member><name>ErrorDescription</name><value><array><data><value>SESSION_INVALID</value>\
                        <value>x</value></data></array></value></member>";
        assert!(answer.text().contains(expected), "{}", answer.text());
    }
}

#[test]
fn bodies_that_are_no_calls_get_a_page() {
    let client = pool();
    let long = "x".repeat((300 << 10) + 1);
    for (head, body) in [
        ("POST /jsonrpc HTTP/1.1", "{}"),
        ("POST /jsonrpc HTTP/1.1\r\ntransfer-encoding: chunked", "0\r\n\r\n"),
        ("POST /jsonrpc HTTP/1.1\r\ncontent-length: 5", "{\"a\":"),
        ("POST / HTTP/1.1\r\ncontent-length: 4", "<a/>"),
        (&*format!("POST / HTTP/1.1\r\ncontent-length: {}", long.len()), &*long),
    ] {
        let answer = request(client.http(), head, body.as_bytes());
        assert_eq!(answer.status, 500, "{head}");
        assert_eq!(answer.header("content-type").as_deref(), Some("text/html"), "{head}");
        assert!(answer.text().starts_with("<html>"), "{head}");
    }
}

#[test]
fn a_connection_serves_several_calls_until_it_is_told_to_end() {
    let client = pool();
    let body = r#"{"jsonrpc":"2.0","method":"system.listMethods","params":[],"id":1}"#;
    let one = format!("POST /jsonrpc HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let two = format!("POST /jsonrpc HTTP/1.1\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    let answers = send(client.http(), format!("{one}{two}").as_bytes());
    assert_eq!(String::from_utf8(answers).unwrap().matches("HTTP/1.1 200 OK").count(), 2);
}

#[test]
fn names_have_a_point_or_an_underscore_and_only_those_with_a_point_are_asynchronous() {
    let client = pool();
    let vm = client.vm();
    assert_eq!(client.text("VM_get_name_label", &[vm.clone()]), "vm");
    assert_eq!(client.code("VM_guest_metrics_get_record", &[vm.clone()]), "HANDLE_INVALID");
    assert!(client.text("Async.VM.update_allowed_operations", &[vm.clone()]).starts_with("OpaqueRef:"));
    assert_eq!(client.code("Async.VM_update_allowed_operations", &[vm.clone()]), "MESSAGE_METHOD_UNKNOWN");
    assert_eq!(client.code("Async.VDI.get_nbd_info", &[client.disk()]), "MESSAGE_METHOD_UNKNOWN");
    assert_eq!(client.code("VM.set_uuid", &[vm, json!("x")]), "MESSAGE_METHOD_UNKNOWN");
}

#[test]
fn arguments_are_counted_and_typed() {
    let client = pool();
    let vm = client.vm();
    let mismatch = client.call("VM.get_record", &[]).unwrap_err();
    assert_eq!(mismatch, ["MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.get_record", "1", "0"]);
    assert_eq!(client.code("VM.get_record", &[vm.clone(), vm.clone()]), "MESSAGE_PARAMETER_COUNT_MISMATCH");
    assert_eq!(client.code("VM.set_tags", &[vm.clone(), json!("x")]), "FIELD_TYPE_ERROR");
    assert_eq!(client.code("VM.set_order", &[vm.clone(), json!("x")]), "FIELD_TYPE_ERROR");
    // Integers may be texts, as in XML.
    client.call("VM.set_order", &[vm.clone(), json!("7")]).unwrap();
    assert_eq!(client.call("VM.get_order", &[vm]), Ok(json!(7)));
}

#[test]
fn entries_of_maps_are_added_once_and_removed_as_often_as_one_likes() {
    let client = pool();
    let vm = client.vm();
    client.call("VM.add_to_other_config", &[vm.clone(), json!("a"), json!("1")]).unwrap();
    let twice = client.call("VM.add_to_other_config", &[vm.clone(), json!("a"), json!("2")]).unwrap_err();
    assert_eq!(twice, ["MAP_DUPLICATE_KEY", "VM", "other_config", vm.as_str().unwrap(), "a"]);
    for _ in 0..2 {
        client.call("VM.remove_from_other_config", &[vm.clone(), json!("a")]).unwrap();
    }
    client.call("VM.add_tags", &[vm.clone(), json!("t")]).unwrap();
    client.call("VM.add_tags", &[vm.clone(), json!("t")]).unwrap();
    assert_eq!(client.call("VM.get_tags", &[vm]), Ok(json!(["t"])));
}

#[test]
fn what_is_asked_for_without_a_session_is_the_list_of_methods_and_a_session() {
    let client = pool();
    let methods = call_raw(client.http(), "system.listMethods", &json!([])).unwrap();
    let methods: Vec<&str> = methods.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    for known in
        ["VM.get_all_records", "Async.VM.snapshot", "VM.add_to_other_config", "VM_guest_metrics.get_all_records"]
    {
        assert!(methods.contains(&known), "{known}");
    }
    assert!(!methods.contains(&"session.get_all_records"));
    let wrong = call_raw(client.http(), "session.login_with_password", &json!(["root", "wrong"])).unwrap_err();
    assert_eq!(wrong[..2], ["SESSION_AUTHENTICATION_FAILED".to_owned(), "root".to_owned()]);
    client.call("session.logout", &[]).unwrap();
    assert_eq!(client.code("VM.get_all", &[]), "SESSION_INVALID");
}

#[test]
fn a_slave_says_who_the_master_is_and_how_it_proves_itself() {
    let client = Client::start(Scene::new(1).host("a").host("b"));
    let slave = std::net::SocketAddr::new(client.simulator.address_of(1).ip(), client.http().port());
    let body = r#"{"jsonrpc":"2.0","method":"session.login_with_password","params":["root","simulated"],"id":1}"#;
    let head = "POST /jsonrpc HTTP/1.1\r\nx-xenapi-request-host-certificate-thumbprint: sha-256:master";
    let answer = request(slave, &format!("{head}\r\ncontent-length: {}", body.len()), body.as_bytes());
    let error: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(error["error"]["message"], "HOST_IS_SLAVE");
    assert_eq!(error["error"]["data"], json!([client.simulator.address().ip().to_string()]));
    let thumbprint = answer.header("x-xenapi-response-host-certificate-thumbprint");
    assert_eq!(thumbprint.as_deref(), Some(client.simulator.fingerprint()));
}

#[test]
fn a_call_can_fail_be_lost_or_not_be_done_on_demand() {
    let client = pool();
    let vm = client.vm();
    client
        .simulator
        .fault(Fault::call("VM.get_uuid", Act::Fail(Failure::new("TOO_MANY_PENDING_TASKS", ["x"]))).times(2));
    for _ in 0..2 {
        assert_eq!(client.code("VM.get_uuid", &[vm.clone()]), "TOO_MANY_PENDING_TASKS");
    }
    client.text("VM.get_uuid", &[vm.clone()]);

    for (act, name) in [(Act::Refuse, "vm"), (Act::Cut, "renamed")] {
        client.simulator.fault(Fault::call("VM.set_name_label", act));
        let body = json!({"jsonrpc": "2.0", "method": "VM.set_name_label", "params": [client.session, vm, "renamed"], "id": 1});
        let body = body.to_string();
        let request = format!("POST /jsonrpc HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        assert_eq!(send(client.http(), request.as_bytes()), b"");
        assert_eq!(client.text("VM.get_name_label", &[vm.clone()]), name);
    }
    assert_eq!(client.simulator.faults_left(), 0);
}

#[test]
fn the_log_has_no_secrets() {
    let client = pool();
    client.call("VM.get_record", &[client.vm()]).unwrap();
    let shown = format!("{:?}", client.simulator.log().requests());
    assert!(shown.contains("VM.get_record") && shown.contains("session.login_with_password"), "{shown}");
    assert!(!shown.contains("simulated") && !shown.contains(&client.session), "{shown}");
}

#[test]
fn an_unknown_verb_or_path_gets_a_page() {
    let client = pool();
    assert_eq!(request(client.http(), "GET /nothing HTTP/1.1", b"").status, 404);
    assert_eq!(request(client.http(), "BREW / HTTP/1.1", b"").status, 405);
    assert_eq!(parse(&send(client.http(), b"GET /exports HTTP/1.0\r\n\r\n")).status, 404);
}
