//! Logging in and out, and events.

use super::Method;
use crate::event::{self, Subscription};
use crate::failure::{Failure, Outcome};
use crate::rpc::{Arguments, Call, argument, optional};
use crate::schema::Class;
use crate::schema::Kind::{Float, Reference, Set, Text};
use crate::value::Value;
use std::time::Duration;

pub(super) const METHODS: &[Method] = &[
    Method::new(
        "session.login_with_password",
        &[argument("uname", Text), argument("pwd", Text), optional("version", Text), optional("originator", Text)],
        login,
    )
    .only_synchronous()
    .without_session(),
    Method::new("session.logout", &[], logout).only_synchronous(),
    Method::new("event.from", &[argument("classes", Set), argument("token", Text), argument("timeout", Float)], from)
        .only_synchronous(),
    Method::new("event.inject", &[argument("class", Text), argument("ref", Reference)], inject).only_synchronous(),
];

fn login(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let (user, password) = (arguments.text(0), arguments.text(1));
    let (is_right, delay) = {
        let access = call.world.lock();
        (access.credentials == (user.to_owned(), password.to_owned()), access.settings.login_delay)
    };
    if !is_right {
        call.world.pause(delay);
        return Err(Failure::new("SESSION_AUTHENTICATION_FAILED", [user, "Authentication failure"]));
    }
    let mut access = call.world.lock();
    let state = &mut *access;
    let host = state.hosts[call.host].clone();
    let session = state.sessions.open(&mut state.store, &state.clock, &host, user, arguments.text(3));
    Ok(session.into())
}

fn logout(call: &Call, _: &Arguments) -> Outcome<Value> {
    let mut access = call.world.lock();
    let state = &mut *access;
    state.sessions.close(&mut state.store, &call.session);
    Ok(Value::void())
}

fn from(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let subscriptions =
        arguments.texts(0).into_iter().map(Subscription::parse).collect::<Outcome<Vec<Subscription>>>()?;
    let token = event::parse_token(arguments.text(1))?;
    let timeout = Duration::try_from_secs_f64(arguments.float(2)).unwrap_or(Duration::ZERO);
    call.world.events(&call.session, &subscriptions, token, timeout)
}

fn inject(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let object = arguments.reference(1);
    let class = Class::find_in_any_case(arguments.text(0)).ok_or_else(|| Failure::kind("class"))?;
    let mut access = call.world.lock();
    access.store.object(class, &object)?;
    let before = access.store.generation();
    access.store.touch(class, &object);
    Ok(event::token(before).into())
}
