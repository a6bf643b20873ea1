//! The configuration: TOML, `/etc/xofs/config.toml` and the user's, whose entries win.
//!
//! ```toml
//! [repositories.main]
//! path = "/srv/backups"
//! password_file = "/etc/xofs/main.key"       # or password_command = "..."
//! quota = "500GiB"
//!
//! [pools.lab]
//! address = "pool.example.org"
//! user = "backup"                             # root, if nothing is said
//! password_file = "/etc/xofs/lab.password"    # or password_command = "..."
//! fingerprint = "AA:BB:..."                   # or authority = "/etc/xofs/lab.pem"
//! sr_paths = { "<uuid of the SR>" = "/mnt/sr" }
//! ```

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Deserialize;

use super::exit::Failure;
use super::password::Places;
use crate::size::parse_size;
use crate::whole;

/// No configuration is longer (bytes).
const LONGEST: u64 = 1 << 20;

/// What the configuration files say.
#[derive(Debug, Clone, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Repositories by name.
    #[serde(default)]
    pub repositories: BTreeMap<String, Entry>,
    /// Pools by name.
    #[serde(default)]
    pub pools: BTreeMap<String, PoolEntry>,
}

/// One repository.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Where it lies: a path or `file:///path`.
    pub path: String,
    /// File that holds the encryption key.
    pub password_file: Option<PathBuf>,
    /// Command that prints the encryption key.
    pub password_command: Option<String>,
    /// What all its files may have together, like `500GiB`; an ingest that would exceed it is refused.
    pub quota: Option<String>,
}

/// One pool.
#[derive(Debug, Clone, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct PoolEntry {
    /// The name or address of one of its hosts; `https` unless it says `http://`.
    pub address: String,
    /// The user.
    pub user: Option<String>,
    /// File that holds the password.
    pub password_file: Option<PathBuf>,
    /// Command that prints the password.
    pub password_command: Option<String>,
    /// The SHA-256 of its certificate.
    pub fingerprint: Option<String>,
    /// File with the certificates of who signed its certificate.
    pub authority: Option<PathBuf>,
    /// Where the folder of an SR is on this machine, by the SR's uuid.
    #[serde(default)]
    pub sr_paths: BTreeMap<String, PathBuf>,
}

impl PoolEntry {
    /// Returns where its password is.
    pub fn password(&self) -> Places<'_> {
        (self.password_file.as_deref(), self.password_command.as_deref())
    }
}

impl Entry {
    /// Returns where its encryption key is.
    pub fn password(&self) -> Places<'_> {
        (self.password_file.as_deref(), self.password_command.as_deref())
    }

    /// Returns the quota in bytes.
    ///
    /// # Errors
    /// `Usage` if it is no size.
    pub fn quota(&self) -> Result<Option<u64>> {
        let wrong = |reason| Failure::usage(format!("'quota' of a repository in the configuration: {reason}"));
        Ok(self.quota.as_deref().map(parse_size).transpose().map_err(wrong)?)
    }
}

impl Config {
    /// Reads the files that exist.
    ///
    /// # Errors
    /// `Usage`, naming the file, if one cannot be read or understood.
    pub fn load() -> Result<Self> {
        let mut config = Self::default();
        for path in files() {
            match whole::text(&path, LONGEST) {
                Ok(text) => {
                    let Self { repositories, pools } = Self::parse(&text, &path)?;
                    config.repositories.extend(repositories);
                    config.pools.extend(pools);
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                Err(error) => {
                    return Err(Failure::usage(format!("read configuration '{}': {error}", path.display())).into());
                }
            }
        }
        Ok(config)
    }

    fn parse(text: &str, path: &Path) -> Result<Self> {
        toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].lines().count().max(1));
            // Only the message: the line itself may hold a secret.
            Failure::usage(format!("configuration '{}', line {line}: {}", path.display(), error.message())).into()
        })
    }
}

fn files() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/xofs/config.toml")];
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let user = folder("XDG_CONFIG_HOME").or_else(|| Some(folder("HOME")?.join(".config")));
    files.extend(user.map(|folder| folder.join("xofs/config.toml")));
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("/etc/xofs/config.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn repositories_are_read_by_name() {
        let config = parse("[repositories.main]\npath = '/srv/br'\npassword_file = '/k'\n").expect("parses");
        let main =
            Entry { path: "/srv/br".into(), password_file: Some("/k".into()), password_command: None, quota: None };
        assert_eq!(config.repositories, BTreeMap::from([("main".to_owned(), main)]));
        assert_eq!(parse(""), Ok(Config::default()));
    }

    #[test]
    fn pools_are_read_by_name() {
        let text = "[pools.lab]\naddress = 'lab'\nuser = 'u'\nsr_paths = { abc = '/mnt/sr' }\n";
        let lab = PoolEntry {
            address: "lab".into(),
            user: Some("u".into()),
            sr_paths: BTreeMap::from([("abc".to_owned(), "/mnt/sr".into())]),
            ..PoolEntry::default()
        };
        assert_eq!(parse(text).expect("parses").pools, BTreeMap::from([("lab".to_owned(), lab)]));
        assert!(parse("[pools.lab]\nuser = 'u'\n").expect_err("no address").contains("address"));
        assert!(parse("[pools.lab]\naddress = 'a'\npassword = 'p'\n").expect_err("a secret").contains("password"));
    }

    #[test]
    fn a_mistake_is_named_with_its_file_and_line() {
        let error = parse("[repositories.main]\npath = '/srv/br'\npasword_file = 'x'\n").expect_err("misspelt");
        assert!(error.starts_with("configuration '/etc/xofs/config.toml', line "), "{error}");
        assert!(error.contains("pasword_file"), "{error}");
        assert!(parse("[repositories.main]\n").expect_err("no path").contains("path"));
    }
}
