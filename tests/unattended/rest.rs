//! What is compared at the end of a week: that nothing is left over, and what Xen Orchestra's own code says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use xapi_simulator::Class;

use crate::jobs::Job;
use crate::site::REPOSITORIES;
use crate::support::{run, succeed, xofs};
use crate::week::{Made, Week};

impl Week {
    /// Whether nothing is left but backups, and what the next increments are relative to.
    pub fn is_at_rest(&self) {
        let when = format!("seed {}: at the end", self.seed);
        self.site.is_at_rest(&when);
        let jobs = self.jobs.iter().filter(|job| job.increments.is_some());
        let of = |job: &Job| {
            let pair = |name: &&str| (self.site.uuid(&self.machine(name)), job.name.to_owned());
            job.machines.iter().map(pair).collect::<Vec<_>>()
        };
        let expected: BTreeMap<(String, String), usize> = jobs.flat_map(of).map(|pair| (pair, 1)).collect();
        let found: BTreeMap<_, _> =
            self.site.bases(Class::Vm).into_iter().map(|(pair, uuids)| (pair, uuids.len())).collect();
        assert_eq!(found, expected, "{when}: snapshots by VM and job");
        assert_eq!(self.site.lab.snapshots(Class::Vm), expected.len(), "{when}: snapshots");
        for (vm, job) in expected.into_keys() {
            let name = ["web01", "db01", "app01"].into_iter().find(|name| self.site.uuid(&self.machine(name)) == vm);
            let disks = self.contents(name.expect("one of them")).len();
            assert_eq!(self.site.bases(Class::Vdi)[&(vm, job)].len(), disks, "{when}: snapshots of disks");
        }
        for (number, name) in REPOSITORIES.iter().enumerate() {
            let folder = self.site.path(name);
            let (code, out, err) = run(xofs().arg("check").arg(&folder).arg("--data"));
            assert_eq!(code, 0, "{when}: {out}{err}");
            let times: BTreeSet<String> = self
                .made
                .iter()
                .filter(|(place, _)| place.0 == number)
                .map(|(_, made)| made.backup.time.stored())
                .collect();
            let found = succeed(Command::new("find").arg(&folder).args(["-mindepth", "1", "-type", "f"]));
            let is_of_none = |path: &&str| {
                let is_usual =
                    path.contains("/data/") || path.ends_with("cache.json.gz") || !path.contains("xo-vm-backups");
                !is_usual && !times.iter().any(|time| path.contains(time.as_str()))
            };
            let left: Vec<&str> = found.lines().filter(is_of_none).collect();
            assert!(left.is_empty(), "{when}: left in {name}: {left:?}");
            let images = succeed(Command::new("find").arg(&folder).args(["-path", "*/data/*.vhd", "-prune", "-print"]));
            let is_exploded = |made: &Made| {
                let job = self.jobs.iter().find(|job| job.name == made.backup.job_id).expect("one of ours");
                job.increments.is_some_and(|how| how.is_exploded)
            };
            let of_these = self.made.iter().filter(|(place, made)| place.0 == number && is_exploded(made));
            let expected: usize = of_these.map(|(_, made)| made.held.len()).sum();
            assert_eq!(images.lines().count(), expected, "{when}: images in {name}\n{images}");
            let other =
                ["-name", "*.lock", "-o", "-name", ".*", "!", "-name", "*.xofs-digests", "!", "-name", ".xofs-digests"];
            let other = succeed(Command::new("find").arg(&folder).args(["-mindepth", "1"]).args(other));
            assert_eq!(other, "", "{when}: locks and the like");
        }
    }

    /// Has Xen Orchestra's own code judge the repositories.
    pub fn judged_by_xo(&self) {
        let mut truths = serde_json::Map::new();
        for (number, (place, made)) in self.made.iter().enumerate() {
            let mut files = serde_json::Map::new();
            for (name, content) in &made.held {
                let path = self.site.path(&format!("truth-{number}-{name}"));
                let mut bytes = vec![0; usize::try_from(content.size()).expect("small")];
                content.read(0, &mut bytes).expect("in range");
                fs::write(&path, bytes).expect("written");
                files.insert(name.clone(), json!(path));
            }
            let repository = truths.entry(self.site.path(REPOSITORIES[place.0]).display().to_string());
            let vms = repository.or_insert_with(|| json!({})).as_object_mut().expect("an object");
            let vm = vms.entry(place.1.clone()).or_insert_with(|| json!({}));
            vm.as_object_mut().expect("an object").insert(place.2.clone(), Value::Object(files));
        }
        let path = self.site.path("truths.json");
        fs::write(&path, Value::Object(truths).to_string()).expect("written");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/week.mjs");
        print!("seed {}: {}", self.seed, succeed(Command::new("node").arg(script).arg(path)));
    }
}
