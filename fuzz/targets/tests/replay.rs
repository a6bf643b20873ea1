//! Every seed of the fuzzers and everything they ever found, again.

use std::fs;
use std::path::Path;

use fuzz_targets::TARGETS;

#[test]
fn seeds_and_findings_keep_the_promises() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for folder in ["corpus-seeds", "findings"] {
        for (name, target) in TARGETS {
            let Ok(entries) = fs::read_dir(fuzz.join(folder).join(name)) else {
                assert!(folder == "findings", "{name} has no seeds");
                continue;
            };
            for entry in entries {
                let path = entry.expect("the folder can be listed").path();
                println!("{}", path.display());
                target(&fs::read(&path).expect("a file"));
            }
        }
    }
}
