//! `event.from` as it blocks and wakes.

#![allow(clippy::cloned_ref_to_slice_refs, reason = "lists of arguments look alike, however long they are")]

mod client;

use client::{Client, pool};
use serde_json::{Value, json};
use std::sync::mpsc;
use std::time::Duration;
use xapi_simulator::Upset;

fn told(client: &Client, classes: &[&str], token: &str, timeout: f64) -> Value {
    client.call("event.from", &[json!(classes), json!(token), json!(timeout)]).unwrap()
}

fn of<'a>(answer: &'a Value, class: &str) -> Vec<&'a Value> {
    answer["events"].as_array().unwrap().iter().filter(|event| event["class"] == class).collect()
}

#[test]
fn nothing_new_is_an_empty_answer_with_a_token_after_the_timeout() {
    let client = pool();
    let start = told(&client, &["*"], "", 0.0);
    let token = start["token"].as_str().unwrap();
    assert_eq!(start["valid_ref_counts"]["vm"], 2);
    assert_eq!(of(&start, "vm").len(), 2);
    assert_eq!(of(&start, "session").len(), 0);
    let nothing = told(&client, &["no_such_class", "VM"], token, 0.05);
    assert_eq!(nothing["events"], json!([]));
    assert_eq!(told(&client, &["vm"], nothing["token"].as_str().unwrap(), 0.0)["events"], json!([]));
}

#[test]
fn both_sides_of_a_relation_have_events() {
    let client = pool();
    let token = client.text("event.inject", &[json!("pool"), client.call("pool.get_all", &[]).unwrap()[0].clone()]);
    let vbd = json!({"VM": client.vm(), "VDI": client.disk(), "userdevice": "5", "bootable": false, "mode": "RW", "type": "Disk",
        "empty": false, "other_config": {}, "qos_algorithm_type": "", "qos_algorithm_params": {}});
    let vbd = client.text("VBD.create", &[vbd]);
    let answer = told(&client, &["*"], &token, 10.0);
    assert_eq!(of(&answer, "pool").len(), 1, "what was injected comes back");
    assert_eq!(of(&answer, "vbd")[0]["operation"], "add");
    for class in ["vm", "vdi"] {
        let event = of(&answer, class)[0];
        assert_eq!(event["operation"], "mod");
        assert!(event["snapshot"]["VBDs"].as_array().unwrap().contains(&json!(vbd)), "{event}");
    }
    client.call("VBD.destroy", &[json!(vbd)]).unwrap();
    let answer = told(&client, &[&format!("vbd/{vbd}")], answer["token"].as_str().unwrap(), 10.0);
    assert_eq!(answer["events"].as_array().unwrap().len(), 1);
    assert_eq!(answer["events"][0]["operation"], "del");
    assert_eq!(answer["events"][0].get("snapshot"), None);
}

#[test]
fn who_waits_for_a_task_is_woken_by_it_alone() {
    let client = pool();
    let task = client.text("task.create", &[json!("x"), json!("")]);
    let token = told(&client, &["task"], "", 0.0)["token"].as_str().unwrap().to_owned();
    let (send, receive) = mpsc::channel();
    std::thread::scope(|scope| {
        let (client, task) = (&client, &task);
        scope.spawn(move || send.send(told(client, &[&format!("task/{task}")], &token, 60.0)).unwrap());
        client.text("task.create", &[json!("y"), json!("")]);
        assert!(receive.recv_timeout(Duration::from_millis(200)).is_err(), "another task is none of its business");
        client.call("task_set_status", &[json!(task), json!("success")]).unwrap();
        let answer = receive.recv_timeout(client::PATIENCE).unwrap();
        assert_eq!(answer["events"][0]["snapshot"]["status"], "success");
    });
}

#[test]
fn who_waits_when_the_session_ends_is_told() {
    let client = pool();
    let token = told(&client, &["vm"], "", 0.0)["token"].as_str().unwrap().to_owned();
    std::thread::scope(|scope| {
        let waiting =
            scope.spawn(|| client.call("event.from", &[json!(["vm"]), json!(token), json!(60.0)]).unwrap_err());
        client::until("it waits", || (client.simulator.log().count("event.from") == 2).then_some(()));
        client.simulator.happen(&Upset::LoseSessions);
        assert_eq!(waiting.join().unwrap(), ["SESSION_INVALID".to_owned(), client.session.clone()]);
    });
}

#[test]
fn what_is_no_token_or_no_subscription_is_an_error() {
    let client = pool();
    let code = |classes: Value, token: &str| client.code("event.from", &[classes, json!(token), json!(0.0)]);
    assert_eq!(code(json!(["vm"]), "nonsense"), "EVENT_FROM_TOKEN_PARSE_FAILURE");
    assert_eq!(code(json!(["vm/a/b"]), ""), "EVENT_SUBSCRIPTION_PARSE_FAILURE");
    assert_eq!(client.simulator.log().subscriptions(), ["vm", "vm/a/b"]);
}
