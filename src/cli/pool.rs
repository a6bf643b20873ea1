//! Which pool a command works on, and how it is reached: address, user, password, certificate.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use clap::Args;
use xapi::{Cancel, Pool};
use zeroize::Zeroizing;

use super::config::{Config, PoolEntry};
use super::exit::{Exit, Failure};
use super::password::{self, OF_POOL, Source};
use super::text::Shown;
use crate::pool::{self, Login, State, Unknown};

/// Held while a person is asked about a certificate: pools are logged in to side by side.
static ASKING: Mutex<()> = Mutex::new(());
/// The user that every pool has.
const ROOT: &str = "root";

/// The pool, and how to log in.
#[derive(Debug, Args)]
pub struct PoolArgs {
    /// The pool: the name or address of one of its hosts, its URL (https://HOST:8443), or a name of the configuration
    #[arg(long, value_name = "ADDRESS|NAME", env = "XOFS_POOL", hide_env_values = true)]
    pool: String,
    /// The user [default: what the configuration says, else root]
    #[arg(long)]
    user: Option<String>,
    /// File that holds the user's password; else XOFS_POOL_PASSWORD, or it is asked for
    #[arg(long, value_name = "FILE")]
    pool_password_file: Option<PathBuf>,
    /// Command that prints the user's password
    #[arg(long, value_name = "COMMAND")]
    pool_password_command: Option<String>,
    /// The SHA-256 of the pool's certificate: nothing else is accepted
    #[arg(long, value_name = "AA:BB:...", conflicts_with = "ca")]
    fingerprint: Option<String>,
    /// File with the certificates (PEM) of who signed the pool's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Accepts an unknown certificate without asking, and remembers it
    #[arg(long)]
    trust_first: bool,
    /// Folder for what is remembered between runs [default: /var/lib/xofs for root, else ~/.local/state/xofs]
    #[arg(long, value_name = "FOLDER", env = "XOFS_STATE_DIR", hide_env_values = true)]
    state_dir: Option<PathBuf>,
    /// Whether there are no such options: all is as the configuration says.
    #[arg(skip)]
    is_configured: bool,
}

/// What a command needs to log in to its pool.
pub struct Named {
    /// What the configuration calls it, if it does.
    pub name: Option<String>,
    /// How to.
    pub login: Login,
    /// Folders of SRs on this machine, by uuid, as the configuration says.
    pub sr_paths: BTreeMap<String, PathBuf>,
    /// What is remembered between runs.
    pub state: State,
    trusts_first: bool,
}

impl PoolArgs {
    /// Names a pool of which the configuration says everything.
    pub fn configured(name: &str, state_dir: Option<PathBuf>) -> Self {
        Self {
            pool: name.to_owned(),
            user: None,
            pool_password_file: None,
            pool_password_command: None,
            fingerprint: None,
            ca: None,
            trust_first: false,
            state_dir,
            is_configured: true,
        }
    }

    /// Finds the pool in the configuration, and its password.
    ///
    /// # Errors
    /// `Usage` if something named cannot be read; `Key` if there is no password.
    pub fn named(&self) -> Result<Named> {
        let (entry, is_named) = entry(&self.pool)?;
        let ca = self.ca.as_ref().or(entry.authority.as_ref().filter(|_| self.fingerprint.is_none()));
        let authority = ca.map(|path| certificates(path)).transpose()?;
        let fingerprint = self.fingerprint.clone().or(entry.fingerprint.clone().filter(|_| ca.is_none()));
        let user = self.user.clone().or(entry.user.clone()).unwrap_or_else(|| ROOT.to_owned());
        let shown = if is_named { &self.pool } else { &entry.address };
        let password = password(&entry, &user, shown, self.password_places(), |name| std::env::var(name).ok())?;
        let name = is_named.then(|| self.pool.clone());
        let only_entry = name.clone().filter(|_| self.is_configured);
        let login = Login { address: entry.address, user, password, fingerprint, authority, entry: only_entry };
        Ok(Named { name, ..self.of(login, entry.sr_paths)? })
    }

    /// Finds another pool, by its name in the configuration or its address. What the configuration does not say of it is as for the
    /// first, but for the certificate.
    ///
    /// # Errors
    /// As [`PoolArgs::named`].
    pub fn another(&self, name: &str) -> Result<Named> {
        let (entry, is_named) = entry(name)?;
        let only_entry = is_named.then(|| name.to_owned());
        let authority = entry.authority.as_ref().map(|path| certificates(path)).transpose()?;
        let fingerprint = entry.fingerprint.clone();
        let is_own = entry.password() != (None, None);
        let user = entry.user.clone().or(self.user.clone().filter(|_| !is_own)).unwrap_or_else(|| ROOT.to_owned());
        let command_line = if is_own { (None, None) } else { self.password_places() };
        let environment = |name: &str| std::env::var(name).ok().filter(|_| !is_own);
        let password = password(&entry, &user, name, command_line, environment)?;
        let login = Login { address: entry.address, user, password, fingerprint, authority, entry: only_entry };
        self.of(login, entry.sr_paths)
    }

    fn password_places(&self) -> (Option<&Path>, Option<&str>) {
        (self.pool_password_file.as_deref(), self.pool_password_command.as_deref())
    }

    fn of(&self, login: Login, sr_paths: BTreeMap<String, PathBuf>) -> Result<Named> {
        let folder = self.state_dir.clone().or_else(State::default_folder);
        let folder = folder.ok_or_else(|| Failure::usage("this user has no folder of its own: give --state-dir"))?;
        let state = State::open(&folder)?;
        Ok(Named { name: None, login, sr_paths, state, trusts_first: self.trust_first })
    }
}

/// Finds a pool in the configuration; one that is not there is an address. Returns whether it is.
fn entry(name: &str) -> Result<(PoolEntry, bool)> {
    let entry = Config::load()?.pools.remove(name);
    let is_named = entry.is_some();
    Ok((entry.unwrap_or_else(|| PoolEntry { address: name.to_owned(), ..PoolEntry::default() }), is_named))
}

/// Reads who signed the certificate of a pool.
fn certificates(path: &Path) -> Result<String> {
    let act = || format!("read the certificates in '{}'", path.display());
    fs::read_to_string(path).map_err(|error| Failure::usage(format!("{}: {error}", act())).into())
}

/// Finds the password of a user of a pool, which a person calls `shown`.
fn password(
    entry: &PoolEntry,
    user: &str,
    shown: &str,
    command_line: (Option<&Path>, Option<&str>),
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Zeroizing<String>> {
    if let Some(source) = Source::choose(&OF_POOL, command_line, environment, entry.password()) {
        return source.line();
    }
    let (user, shown) = (Shown(user), Shown(shown));
    match password::ask_text(&format!("Password of {user} at {shown}: "))? {
        Some(password) => Ok(password),
        None => Err(Failure::new(
            Exit::Key,
            format!(
                "no password is given for {user} at {shown}: give --pool-password-file, --pool-password-command, \
                 XOFS_POOL_PASSWORD, or one in the configuration"
            ),
        )
        .into()),
    }
}

impl Named {
    /// Logs in.
    ///
    /// # Errors
    /// What [`pool::connect`] says.
    pub fn connect(&self, cancel: &Cancel) -> pool::Result<Pool> {
        pool::connect(&self.login, &self.state, cancel, |unknown| {
            self.accepts(unknown).map_err(|error| pool::Error::new(pool::ErrorKind::Untrusted, format!("{error:#}")))
        })
    }

    /// Decides about a certificate that nobody vouched for yet: accepts it if that was asked for, or a person says so.
    ///
    /// # Errors
    /// If the terminal cannot be used.
    pub fn accepts(&self, unknown: &Unknown) -> Result<bool> {
        let shown = Shown(&unknown.address);
        if self.trusts_first {
            say!("xofs: {shown}: its certificate {} is accepted and remembered", unknown.fingerprint);
            return Ok(true);
        }
        let _one = ASKING.lock().unwrap_or_else(PoisonError::into_inner);
        if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            return Ok(false);
        }
        let asked = write!(
            io::stderr(),
            "The certificate of {shown} is not known yet. Its SHA-256 fingerprint is\n  {}\nCompare it with what\n  {}\n\
             prints on that host. Accept and remember it (yes/no)? ",
            unknown.fingerprint,
            Unknown::COMMAND
        );
        asked.context("ask about the certificate")?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).context("ask about the certificate")?;
        Ok(matches!(answer.trim(), "yes" | "y"))
    }
}
