//! What guests do between two runs, and who owns them.

use serde_json::json;
use xapi::Ref;
use xapi_simulator::value::Reference;
use xapi_simulator::{Class, Upset};

use crate::pool::MIB;
use crate::week::Week;

impl Week {
    /// What the guests do until the next run, and who owns them.
    pub fn goes_on(&mut self) {
        for name in ["web01", "db01", "app01"] {
            let machine = self.machine(name);
            self.guest += 1;
            let writes = self.random.below(4) as u64;
            self.site.lab.simulator.guest_writes(&machine, self.guest << 20, writes).expect("written");
            match self.random.below(24) {
                0 => self.resize(&machine),
                1 => self.add_disk(&machine),
                2 => self.remove_disk(&machine),
                _ => {}
            }
        }
        self.site.lab.simulator.happen(&Upset::Coalesce);
    }

    fn shut_down(&self, machine: &Reference) {
        if self.site.lab.field(Class::Vm, machine, "power_state") != "Halted" {
            self.site.lab.client().run("VM.hard_shutdown", &[json!(machine.as_str())]).expect("off");
        }
    }

    fn resize(&mut self, machine: &Reference) {
        self.shut_down(machine);
        let disks: Vec<Reference> = self.site.lab.disks(machine).into_values().collect();
        let vdi = &disks[self.random.below(disks.len())];
        let size = self.site.lab.simulator.content(vdi).expect("there").size();
        let more = (1 + self.random.below(4)) as u64 * MIB;
        self.site.lab.client().resize_vdi(&Ref::new(vdi.as_str()), size + more).expect("resized");
    }

    fn add_disk(&mut self, machine: &Reference) {
        let disks = self.site.lab.disks(machine);
        let place = ('a'..='d').position(|letter| !disks.contains_key(&format!("xvd{letter}")));
        let Some(place) = place else { return };
        self.shut_down(machine);
        let client = self.site.lab.client();
        let sr = self.site.lab.field(Class::Vdi, &disks["xvda"], "SR");
        let fields = json!({
            "name_label": format!("more {}", self.guest), "name_description": "", "SR": sr, "virtual_size": 5 * MIB,
            "type": "user", "sharable": false, "read_only": false, "other_config": {},
        });
        let more = client.create_vdi(fields.as_object().expect("an object")).expect("made");
        let fields = json!({
            "VM": machine.as_str(), "VDI": more, "userdevice": place.to_string(), "bootable": false, "mode": "RW",
            "type": "Disk", "unpluggable": true, "empty": false, "other_config": {}, "qos_algorithm_type": "",
            "qos_algorithm_params": {},
        });
        client.create_vbd(fields.as_object().expect("an object")).expect("made");
    }

    fn remove_disk(&mut self, machine: &Reference) {
        let disks = self.site.lab.disks(machine);
        let Some((_, vdi)) = disks.iter().rfind(|(name, _)| *name != "xvda") else { return };
        self.shut_down(machine);
        let vbds = self.site.lab.field(Class::Vdi, vdi, "VBDs");
        let vbd = vbds[0].as_str().expect("it has one").to_owned();
        self.site.lab.client().destroy_vbd(&Ref::new(&vbd)).expect("destroyed");
    }
}
