//! Which network of the pool each interface gets, and which MAC: pure.
//!
//! | asked first to last | found by |
//! |---|---|
//! | `--network OLD=NEW` | the name or uuid of the network in the backup |
//! | `--network NEW` | for all others |
//! | the network of the same uuid | it is the same pool |
//! | the only network of the same name and VLAN, else of the same name | another pool, laid out alike |
//! | none | the interface is left out, and that is said |
//!
//! A MAC is kept, as XO keeps it, unless another interface of the pool has it: two of one MAC on a network take each other's
//! traffic.

use std::collections::BTreeSet;

use super::document::{Fields, number, text};
use crate::pool::error::{Error, ErrorKind, Result};

/// A network of the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Its reference.
    pub reference: String,
    /// Its uuid.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// The VLAN of an interface of a host on it; -1 without.
    pub vlan: Option<i64>,
    /// In bytes.
    pub mtu: i64,
}

/// What was asked for: another network for one of the backup (its name or uuid), or for all that nothing else is said of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// In the backup; `None` for all.
    pub old: Option<String>,
    /// In the pool: a name or a uuid.
    pub new: String,
}

/// How MACs are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Macs {
    /// Kept, unless the pool has the same already.
    KeptIfFree,
    /// Kept.
    Kept,
    /// Made by the pool.
    New,
}

/// An interface as it will be.
#[derive(Debug, Clone, PartialEq)]
pub struct Interface {
    /// Its record in the backup.
    pub vif: Fields,
    /// The number of it in the guest.
    pub device: String,
    /// The name of its network in the backup; its uuid if it has none.
    pub old: String,
    /// The network that it gets, or why none.
    pub network: std::result::Result<Network, String>,
    /// Its MAC; empty where the pool makes one.
    pub mac: String,
}

/// Chooses for each interface. `taken` are the MACs that the pool has, in lower case.
///
/// # Errors
/// [`ErrorKind::Usage`] if a network that was asked for is not there, or several are.
pub fn choose(
    vifs: &[Fields],
    networks: &[Network],
    wishes: &[Wish],
    macs: Macs,
    taken: &BTreeSet<String>,
) -> Result<Vec<Interface>> {
    let wished = wishes
        .iter()
        .map(|wish| Ok((wish.old.as_deref(), named(networks, &wish.new)?)))
        .collect::<Result<Vec<(Option<&str>, &Network)>>>()?;
    let known: Vec<(&str, &str)> = vifs.iter().map(old_network).collect();
    for (old, _) in &wished {
        if let Some(old) = old.filter(|old| !known.iter().any(|(uuid, name)| uuid == old || name == old)) {
            let names: BTreeSet<String> = known.iter().map(|(_, name)| format!("'{}'", name.escape_debug())).collect();
            let names = names.into_iter().collect::<Vec<_>>().join(", ");
            let has = if names.is_empty() { "no network".to_owned() } else { names };
            let message = format!("--network names '{}', but the VM of the backup has {has}", old.escape_debug());
            return Err(Error::new(ErrorKind::Usage, message));
        }
    }
    let interface = |vif: &Fields| {
        let (uuid, name) = old_network(vif);
        let network = wished
            .iter()
            .find(|(old, _)| old.is_some_and(|old| old == uuid || old == name))
            .or_else(|| wished.iter().find(|(old, _)| old.is_none()))
            .map(|(_, network)| Ok((*network).clone()))
            .unwrap_or_else(|| like(networks, uuid, name, number(vif, "$network$VLAN")));
        let old = text(vif, "MAC").unwrap_or_default();
        let is_taken = taken.contains(&old.to_ascii_lowercase());
        let is_kept = macs == Macs::Kept || macs == Macs::KeptIfFree && !is_taken;
        Interface {
            vif: vif.clone(),
            device: text(vif, "device").unwrap_or_default().to_owned(),
            old: if name.is_empty() { uuid } else { name }.to_owned(),
            network,
            mac: if is_kept { old.to_owned() } else { String::new() },
        }
    };
    let mut chosen: Vec<Interface> = vifs.iter().map(interface).collect();
    chosen.sort_by_key(|interface| (interface.device.parse::<u32>().unwrap_or(u32::MAX), interface.device.clone()));
    Ok(chosen)
}

/// Returns the uuid and the name that the network of an interface had.
fn old_network(vif: &Fields) -> (&str, &str) {
    (text(vif, "$network$uuid").unwrap_or_default(), text(vif, "$network$name_label").unwrap_or_default())
}

/// Finds a network that a person named.
pub fn named<'a>(networks: &'a [Network], wanted: &str) -> Result<&'a Network> {
    if let Some(network) = networks.iter().find(|network| network.uuid == wanted.to_ascii_lowercase()) {
        return Ok(network);
    }
    let found: Vec<&Network> = networks.iter().filter(|network| network.name == wanted).collect();
    let shown = wanted.escape_debug();
    match found.as_slice() {
        [one] => Ok(one),
        [] => {
            let mut names: Vec<String> =
                networks.iter().map(|network| format!("'{}'", network.name.escape_debug())).collect();
            names.sort();
            let message = format!("the pool has no network '{shown}': it has {}", names.join(", "));
            Err(Error::new(ErrorKind::Usage, message))
        }
        several => {
            let uuids: Vec<&str> = several.iter().map(|network| network.uuid.as_str()).collect();
            let message = format!("several networks are called '{shown}': {}; say which by its uuid", uuids.join(", "));
            Err(Error::new(ErrorKind::Usage, message))
        }
    }
}

/// Finds the network that is most like that of the backup.
fn like(networks: &[Network], uuid: &str, name: &str, vlan: Option<i64>) -> std::result::Result<Network, String> {
    if let Some(network) = networks.iter().find(|network| !uuid.is_empty() && network.uuid == uuid) {
        return Ok(network.clone());
    }
    let alike: Vec<&Network> = networks.iter().filter(|network| !name.is_empty() && network.name == name).collect();
    let of_vlan: Vec<&&Network> = alike.iter().filter(|network| network.vlan == vlan).collect();
    match (alike.as_slice(), of_vlan.as_slice()) {
        ([one], _) => Ok((*one).clone()),
        (_, [one]) => Ok((**one).clone()),
        ([], _) => Err("the pool has none of this name".to_owned()),
        (several, _) => Err(format!("the pool has {} of this name", several.len())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn network(number: u32, name: &str, vlan: i64) -> Network {
        let (reference, uuid) = (format!("OpaqueRef:{number}"), format!("{number:08}-0000-4000-8000-000000000000"));
        Network { reference, uuid, name: name.into(), vlan: Some(vlan), mtu: 1500 }
    }

    fn vif(device: &str, number: u32, name: &str, vlan: i64) -> Fields {
        let uuid = network(number, name, vlan).uuid;
        let vif = json!({
            "device": device, "MAC": format!("AA:00:00:00:00:0{device}"),
            "$network$uuid": uuid, "$network$name_label": name, "$network$VLAN": vlan,
        });
        let Value::Object(vif) = vif else { panic!("an object") };
        vif
    }

    fn wish(old: Option<&str>, new: &str) -> Wish {
        Wish { old: old.map(str::to_owned), new: new.into() }
    }

    fn names(vifs: &[Fields], networks: &[Network], wishes: &[Wish]) -> Vec<std::result::Result<String, String>> {
        let chosen = choose(vifs, networks, wishes, Macs::New, &BTreeSet::new()).expect("chooses");
        chosen.into_iter().map(|interface| interface.network.map(|network| network.uuid)).collect()
    }

    #[test]
    fn a_network_is_found_by_wish_then_uuid_then_name_and_vlan_or_not_at_all() {
        let networks = [
            network(1, "lan", -1),
            network(2, "dmz", 7),
            network(3, "dmz", 8),
            network(4, "twice", 1),
            network(5, "twice", 1),
        ];
        let uuid = |number: usize| Ok(networks[number - 1].uuid.clone());
        let vifs = [
            vif("3", 99, "nowhere", -1),
            vif("10", 99, "twice", 2),
            vif("0", 2, "lan", -1),
            vif("1", 99, "lan", 5),
            vif("2", 99, "dmz", 8),
        ];
        let none = Err("the pool has none of this name".to_owned());
        let several = Err("the pool has 2 of this name".to_owned());
        assert_eq!(names(&vifs, &networks, &[]), [uuid(2), uuid(1), uuid(3), none, several.clone()]);
        let wishes = [wish(None, "lan"), wish(Some("nowhere"), &networks[3].uuid)];
        assert_eq!(names(&vifs, &networks, &wishes), [uuid(1), uuid(1), uuid(1), uuid(4), uuid(1)]);
        assert_eq!(names(&vifs[1..2], &networks, &[wish(Some("twice"), &networks[4].uuid)]), [uuid(5)]);
    }

    #[test]
    fn wishes_that_mean_nothing_are_refused_with_what_there_is() {
        let (networks, vifs) =
            ([network(1, "lan", -1), network(2, "a", 1), network(3, "a", 2)], [vif("0", 9, "old", -1)]);
        for (wish, part) in [
            (wish(None, "wan"), "it has 'a', 'a', 'lan'"),
            (wish(None, "a"), "say which by its uuid"),
            (wish(Some("other"), "lan"), "the VM of the backup has 'old'"),
        ] {
            let error = choose(&vifs, &networks, &[wish], Macs::New, &BTreeSet::new()).expect_err(part);
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn a_mac_is_kept_unless_the_pool_has_it_or_somebody_wants_otherwise() {
        let taken = BTreeSet::from(["aa:00:00:00:00:00".to_owned()]);
        let vifs = [vif("0", 1, "lan", -1), vif("1", 1, "lan", -1)];
        let macs = |macs| -> Vec<String> {
            let chosen = choose(&vifs, &[network(1, "lan", -1)], &[], macs, &taken).expect("chooses");
            chosen.into_iter().map(|interface| interface.mac).collect()
        };
        assert_eq!(macs(Macs::KeptIfFree), ["", "AA:00:00:00:00:01"]);
        assert_eq!(macs(Macs::Kept), ["AA:00:00:00:00:00", "AA:00:00:00:00:01"]);
        assert_eq!(macs(Macs::New), ["", ""]);
    }
}
