//! Which machines of pools a job means. Pure.

use super::file::Which;

/// What is looked at of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its pool, as the configuration calls it.
    pub pool: String,
    /// Its uuid.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// Its state, as XAPI calls it.
    pub power_state: String,
}

/// A machine that is named, and is not to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// As it is named.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Returns those that are meant, in the order in which they are given, and what is named in vain. What is left out by its state, or
/// excluded, is not missed.
#[must_use]
pub fn select(which: &Which, machines: &[Machine]) -> (Vec<Machine>, Vec<Missing>) {
    let mut missing = Vec::new();
    for uuid in which.uuids.iter().filter(|uuid| !machines.iter().any(|machine| machine.uuid == **uuid)) {
        missing.push(Missing { name: uuid.clone(), reason: "no pool of the job has a VM with this uuid".to_owned() });
    }
    let mut ambiguous: Vec<&str> = Vec::new();
    for name in &which.names {
        let found: Vec<&str> =
            machines.iter().filter(|machine| machine.name == *name).map(|machine| machine.uuid.as_str()).collect();
        match found.as_slice() {
            [] => missing
                .push(Missing { name: name.clone(), reason: "no pool of the job has a VM of this name".to_owned() }),
            [_] => {}
            several => {
                ambiguous.push(name);
                let reason = format!("several VMs have this name: {}; name them by uuid", several.join(", "));
                missing.push(Missing { name: name.clone(), reason });
            }
        }
    }
    let is_named = |machine: &Machine| {
        let by_name = which.names.contains(&machine.name) && !ambiguous.contains(&machine.name.as_str());
        by_name || which.uuids.contains(&machine.uuid) || machine.tags.iter().any(|tag| which.tags.contains(tag))
    };
    let is_excluded = |machine: &Machine| {
        which.exclude.iter().any(|it| *it == machine.name || it.eq_ignore_ascii_case(&machine.uuid))
            || machine.tags.iter().any(|tag| which.exclude_tags.contains(tag))
    };
    let has_state = |machine: &Machine| {
        which.power_states.is_empty() || which.power_states.iter().any(|state| state.name() == machine.power_state)
    };
    let is_meant = |machine: &&Machine| (which.all || is_named(machine)) && !is_excluded(machine) && has_state(machine);
    (machines.iter().filter(is_meant).cloned().collect(), missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::file::PowerState;

    fn machine(uuid: &str, name: &str, tags: &[&str], power_state: &str) -> Machine {
        let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        let [pool, uuid, name, power_state] = ["lab", uuid, name, power_state].map(str::to_owned);
        Machine { pool, uuid, name, tags, power_state }
    }

    #[test]
    fn those_are_meant_that_are_named_and_not_excluded() {
        let machines = [
            machine("1a", "web01", &["backup"], "Running"),
            machine("2", "web02", &["backup", "test"], "Halted"),
            machine("3", "db01", &[], "Running"),
            machine("4", "twin", &[], "Running"),
            machine("5", "twin", &["backup"], "Suspended"),
        ];
        let of = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<String>>();
        let all = Which { all: true, ..Which::default() };
        let tagged = Which { tags: of(&["backup"]), ..Which::default() };
        let cases: [(Which, &[&str], &[&str]); 8] = [
            (all.clone(), &["1a", "2", "3", "4", "5"], &[]),
            (Which { power_states: vec![PowerState::Running], ..all.clone() }, &["1a", "3", "4"], &[]),
            (Which { exclude: of(&["web02", "1A"]), exclude_tags: of(&["backup"]), ..all }, &["3", "4"], &[]),
            (tagged.clone(), &["1a", "2", "5"], &[]),
            (Which { names: of(&["db01", "gone"]), ..tagged.clone() }, &["1a", "2", "3", "5"], &["gone"]),
            (Which { uuids: of(&["3", "9"]), exclude_tags: of(&["test"]), ..tagged }, &["1a", "3", "5"], &["9"]),
            (Which { names: of(&["twin"]), uuids: of(&["4"]), ..Which::default() }, &["4"], &["twin"]),
            (Which { names: of(&["web02"]), power_states: vec![PowerState::Running], ..Which::default() }, &[], &[]),
        ];
        for (which, expected, missed) in cases {
            let (found, missing) = select(&which, &machines);
            let found: Vec<&str> = found.iter().map(|machine| machine.uuid.as_str()).collect();
            let missing: Vec<&str> = missing.iter().map(|missing| missing.name.as_str()).collect();
            assert_eq!((found.as_slice(), missing.as_slice()), (expected, missed), "{which:?}");
        }
    }
}
