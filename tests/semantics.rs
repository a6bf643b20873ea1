//! Holds `docs/semantics.md` and the tests together: every promise is quoted, word for word, by a test that proves it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The folders whose tests may prove something.
const FOLDERS: [&str; 8] = ["src", "tests", "guest", "vhd", "xva", "storage", "disk", "mount-helper"];

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The promises by number, each as one line.
fn promises(document: &str) -> BTreeMap<u32, String> {
    let mut found: BTreeMap<u32, String> = BTreeMap::new();
    for line in document.lines() {
        let start = line.split_once(". ").and_then(|(number, text)| Some((number.parse().ok()?, text)));
        match (start, found.last_entry()) {
            (Some((number, text)), _) => drop(found.insert(number, text.to_owned())),
            (None, Some(mut last)) if line.starts_with("   ") => {
                last.get_mut().push(' ');
                last.get_mut().push_str(line);
            }
            _ => {}
        }
    }
    found.into_iter().map(|(number, text)| (number, words(&text).replace("**", ""))).collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("node_modules") {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_promise_is_quoted_by_a_test_and_no_test_quotes_another() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let promises = promises(&fs::read_to_string(root.join("docs/semantics.md")).unwrap());
    assert_eq!(promises.keys().copied().collect::<Vec<_>>(), (1..=24).collect::<Vec<_>>());
    let mut files = Vec::new();
    FOLDERS.iter().for_each(|folder| sources(&root.join(folder), &mut files));
    let mut quoted = BTreeSet::new();
    for file in files {
        for line in fs::read_to_string(&file).unwrap().lines() {
            let Some((number, quote)) =
                line.trim_start().strip_prefix("// Promise ").and_then(|quote| quote.split_once(": "))
            else {
                continue;
            };
            let number = number.parse().unwrap();
            let promise = promises.get(&number).unwrap_or_else(|| panic!("{}: no promise {number}", file.display()));
            let quote = quote.trim().trim_matches('"');
            assert!(promise.contains(quote), "{}: promise {number} does not say '{quote}': {promise}", file.display());
            quoted.insert(number);
        }
    }
    let unproved: Vec<_> = promises.keys().filter(|number| !quoted.contains(*number)).collect();
    assert!(unproved.is_empty(), "no test quotes promises {unproved:?}");
}
