//! From a scene to the objects of a pool.

use crate::content::{Content, rounded_size};
use crate::failure::Outcome;
use crate::file_sr::FileSr;
use crate::guest::Guest;
use crate::methods::machine::new_mac;
use crate::methods::{lifecycle, power, tpm};
use crate::node::Nodes;
use crate::random::{Random, fresh_uuid};
use crate::scene::{Disk, Machine, Network, Repository, Scene, Storage};
use crate::schema::Class;
use crate::session::Sessions;
use crate::store::Store;
use crate::task::Tasks;
use crate::value::{Reference, Value, map};
use crate::world::State;
use std::collections::BTreeMap;

/// Makes all objects of a scene.
///
/// # Errors
/// If the disks do not fit, or an SR is named that there is not.
pub fn build(scene: &Scene, nodes: &Nodes) -> Outcome<State> {
    let mut state = State {
        store: Store::new(),
        disks: BTreeMap::new(),
        folders: BTreeMap::new(),
        tpms: BTreeMap::new(),
        sessions: Sessions::default(),
        tasks: Tasks::default(),
        clock: Default::default(),
        settings: scene.settings.clone(),
        hosts: Vec::new(),
        credentials: (scene.user.clone(), scene.password.clone()),
    };
    add_hosts(&mut state, nodes)?;
    let networks: Vec<Reference> = scene
        .networks
        .iter()
        .enumerate()
        .map(|(position, network)| add_network(&mut state, nodes, position, network))
        .collect();
    let repositories: Vec<Reference> =
        scene.repositories.iter().map(|repository| add_repository(&mut state, repository)).collect();
    add_pool(&mut state, &repositories);
    let mut random = Random::new(scene.seed);
    for machine in &scene.machines {
        add_machine(&mut state, scene, machine, &networks, &repositories, &mut random)?;
    }
    Ok(state)
}

fn add_hosts(state: &mut State, nodes: &Nodes) -> Outcome<()> {
    let started = format!("{}.", state.clock.now().as_secs());
    for node in &nodes.hosts {
        let host = state.store.create(
            Class::Host,
            [
                ("name_label", Value::from(node.name.as_str())),
                ("hostname", node.name.as_str().into()),
                ("address", node.address.to_string().into()),
                ("other_config", map([("agent_start_time", started.as_str()), ("boot_time", started.as_str())])),
                (
                    "software_version",
                    map([
                        ("product_brand", "XCP-ng"),
                        ("product_version", "8.3.0"),
                        ("product_version_text", "8.3"),
                        ("platform_version", "3.4.0"),
                        ("platform_name", "XCP"),
                        ("xapi", "24.19"),
                        ("build_number", "simulated"),
                    ]),
                ),
            ],
        );
        let domain = state.store.create(
            Class::Vm,
            [
                ("name_label", Value::from(format!("Control domain on host: {}", node.name))),
                ("is_control_domain", true.into()),
                ("power_state", "Running".into()),
                ("resident_on", (&host).into()),
                ("domid", Value::Int(0)),
                ("memory_static_max", Value::Int(4 << 30)),
            ],
        );
        state.store.set(Class::Host, &host, "control_domain", &domain)?;
        state.store.create(
            Class::Certificate,
            [
                ("host", Value::from(&host)),
                ("fingerprint", node.certificate.sha256.as_str().into()),
                ("fingerprint_sha256", node.certificate.sha256.as_str().into()),
                ("fingerprint_sha1", node.certificate.sha1.as_str().into()),
            ],
        );
        state.hosts.push(host);
    }
    Ok(())
}

fn add_network(state: &mut State, nodes: &Nodes, position: usize, network: &Network) -> Reference {
    let reference = state.store.create(
        Class::Network,
        [
            ("name_label", Value::from(network.name.as_str())),
            ("bridge", format!("xenbr{position}").into()),
            ("purpose", network.purpose.iter().map(String::as_str).collect()),
        ],
    );
    for (node, host) in nodes.hosts.iter().zip(state.hosts.clone()) {
        state.store.create(
            Class::Pif,
            [
                ("network", Value::from(&reference)),
                ("host", (&host).into()),
                ("device", format!("eth{position}").into()),
                ("MAC", new_mac().into()),
                ("IP", node.address.to_string().into()),
                ("management", (position == 0).into()),
            ],
        );
    }
    reference
}

fn add_repository(state: &mut State, repository: &Repository) -> Reference {
    let is_image = repository.storage == Storage::Iso;
    let is_shared = is_image || repository.storage == Storage::Nfs;
    let sr = state.store.create(
        Class::Sr,
        [
            ("name_label", Value::from(repository.name.as_str())),
            ("type", repository.storage.name().into()),
            ("content_type", if is_image { "iso" } else { "user" }.into()),
            ("shared", is_shared.into()),
            ("physical_size", repository.size.into()),
            ("sm_config", map(repository.storage.config().iter().copied())),
            ("allowed_operations", repository.storage.operations().iter().copied().collect()),
        ],
    );
    if let Some(folder) = &repository.folder {
        state.folders.insert(sr.clone(), FileSr::new(folder));
    }
    let all: Vec<usize> = (0..state.hosts.len()).collect();
    let seen_by = repository.hosts.clone().unwrap_or_else(|| if is_shared { all } else { vec![0] });
    for host in seen_by.into_iter().filter_map(|position| state.hosts.get(position).cloned()) {
        state.store.create(
            Class::Pbd,
            [("SR", Value::from(&sr)), ("host", (&host).into()), ("currently_attached", true.into())],
        );
    }
    if is_image {
        state.store.create(
            Class::Vdi,
            [
                ("name_label", Value::from("install.iso")),
                ("SR", (&sr).into()),
                ("read_only", true.into()),
                ("sharable", true.into()),
                ("location", "install.iso".into()),
                ("virtual_size", Value::Int(64 << 20)),
            ],
        );
    }
    sr
}

fn add_pool(state: &mut State, repositories: &[Reference]) {
    let default = repositories.first().map_or_else(|| Value::from(Reference::null()), Value::from);
    let master = state.hosts.first().map_or_else(|| Value::from(Reference::null()), Value::from);
    state.store.create(
        Class::Pool,
        [
            ("name_label", Value::from("lab pool")),
            ("master", master),
            ("default_SR", default.clone()),
            ("suspend_image_SR", default),
            ("restrictions", map([("restrict_cbt", "false"), ("restrict_vss", "true"), (tpm::RESTRICTION, "false")])),
        ],
    );
}

fn add_machine(
    state: &mut State,
    scene: &Scene,
    machine: &Machine,
    networks: &[Reference],
    repositories: &[Reference],
    random: &mut Random,
) -> Outcome<()> {
    let memory = Value::Int(1 << 30);
    let vm = state.store.create(
        Class::Vm,
        [
            ("name_label", Value::from(machine.name.as_str())),
            ("memory_static_max", memory.clone()),
            ("memory_dynamic_max", memory.clone()),
            ("memory_dynamic_min", memory.clone()),
            ("memory_static_min", memory),
            ("HVM_boot_policy", "BIOS order".into()),
            ("HVM_boot_params", map([("order", "cdn"), ("firmware", "uefi")])),
            (
                "platform",
                map([("acpi", "1"), ("apic", "true"), ("pae", "true"), ("viridian", "false"), ("timeoffset", "0")]),
            ),
            ("other_config", map([("mac_seed", fresh_uuid().to_string())])),
            ("tags", machine.tags.iter().map(String::as_str).collect()),
            ("generation_id", "".into()),
            ("bios_strings", map(machine.bios_strings.clone())),
        ],
    );
    for (position, disk) in machine.disks.iter().enumerate() {
        let vdi = add_disk(state, scene, machine, disk, repositories, random)?;
        add_drive(state, &vm, position, &vdi, "Disk");
    }
    if machine.has_cd {
        let images =
            state.store.all(Class::Vdi).find(|(_, vdi)| vdi.record["location"].as_text() == Some("install.iso"));
        if let Some(image) = images.map(|(image, _)| image.clone()) {
            add_drive(state, &vm, 3.max(machine.disks.len()), &image, "CD");
        }
    }
    if let Some(network) = networks.first() {
        state.store.create(
            Class::Vif,
            [
                ("VM", Value::from(&vm)),
                ("network", network.into()),
                ("device", "0".into()),
                ("MAC", new_mac().into()),
                ("MAC_autogenerated", true.into()),
            ],
        );
    }
    if let Some(contents) = &machine.tpm {
        let vtpm = state.store.create(Class::Vtpm, [("VM", Value::from(&vm))]);
        state.tpms.insert(vtpm, contents.clone());
    }
    lifecycle::refresh(state, &vm);
    if machine.is_running {
        let host = power::place(state, &vm, None)?;
        power::run(state, &vm, &host)?;
        let metrics = state.store.reference(Class::Vm, &vm, "guest_metrics")?;
        state.store.set(Class::GuestMetrics, &metrics, "PV_drivers_detected", true)?;
    }
    Ok(())
}

fn add_drive(state: &mut State, vm: &Reference, position: usize, vdi: &Reference, kind: &str) {
    state.store.create(
        Class::Vbd,
        [
            ("VM", Value::from(vm)),
            ("VDI", vdi.into()),
            ("userdevice", position.to_string().into()),
            ("bootable", (position == 0).into()),
            ("mode", if kind == "CD" { "RO" } else { "RW" }.into()),
            ("type", kind.into()),
            ("unpluggable", (kind == "Disk").into()),
        ],
    );
}

fn add_disk(
    state: &mut State,
    scene: &Scene,
    machine: &Machine,
    disk: &Disk,
    repositories: &[Reference],
    random: &mut Random,
) -> Outcome<Reference> {
    let position = match &disk.repository {
        Some(name) => scene.repositories.iter().position(|repository| repository.name == *name),
        None => Some(0),
    };
    let sr = position.and_then(|position| repositories.get(position)).ok_or_else(|| {
        crate::failure::Failure::internal(&format!("disk {} is on an SR that there is not", disk.name))
    })?;
    let mut content = Content::new(fresh_uuid(), rounded_size(disk.size));
    Guest::new(random.number())
        .fill(&mut content, disk.filled)
        .map_err(|error| crate::failure::Failure::internal(&format!("fill disk {}: {error}", disk.name)))?;
    let description = format!("disk of {}", machine.name);
    let fields = [("name_label", Value::from(disk.name.as_str())), ("name_description", description.into())];
    Ok(state.add_vdi(sr, content, fields))
}
