//! Which pool a command works on, and how it is reached: address, user, password, certificate.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use zeroize::Zeroizing;

use super::config::{Config, PoolEntry};
use super::exit::{Exit, Failure};
use super::password::{self, OF_POOL, Source};
use super::text::Shown;
use crate::pool::{Login, State, Unknown};

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
}

/// What a command needs to log in to its pool.
pub struct Named {
    /// How to.
    pub login: Login,
    /// Folders of SRs on this machine, by uuid, as the configuration says.
    pub sr_paths: BTreeMap<String, PathBuf>,
    /// What is remembered between runs.
    pub state: State,
    trusts_first: bool,
}

impl PoolArgs {
    /// Finds the pool in the configuration, and its password.
    ///
    /// # Errors
    /// `Usage` if something named cannot be read; `Key` if there is no password.
    pub fn named(&self) -> Result<Named> {
        let mut config = Config::load()?;
        let entry = config.pools.remove(&self.pool);
        let is_named = entry.is_some();
        let entry = entry.unwrap_or_else(|| PoolEntry { address: self.pool.clone(), ..PoolEntry::default() });
        let folder = self.state_dir.clone().or_else(State::default_folder);
        let folder = folder.ok_or_else(|| Failure::usage("this user has no folder of its own: give --state-dir"))?;
        let state = State::open(&folder)?;
        let ca = self.ca.as_ref().or(entry.authority.as_ref().filter(|_| self.fingerprint.is_none()));
        let authority = ca.map(|path| {
            let act = || format!("read the certificates in '{}'", path.display());
            fs::read_to_string(path).map_err(|error| Failure::usage(format!("{}: {error}", act())))
        });
        let fingerprint = self.fingerprint.clone().or(entry.fingerprint.clone().filter(|_| ca.is_none()));
        let user = self.user.clone().or(entry.user.clone()).unwrap_or_else(|| ROOT.to_owned());
        let password = self.password(&entry, &user, is_named)?;
        let login = Login { address: entry.address, user, password, fingerprint, authority: authority.transpose()? };
        Ok(Named { login, sr_paths: entry.sr_paths, state, trusts_first: self.trust_first })
    }

    fn password(&self, entry: &PoolEntry, user: &str, is_named: bool) -> Result<Zeroizing<String>> {
        let command_line = (self.pool_password_file.as_deref(), self.pool_password_command.as_deref());
        let environment = |name: &str| std::env::var(name).ok();
        if let Some(source) = Source::choose(&OF_POOL, command_line, environment, entry.password()) {
            return source.line();
        }
        let shown = Shown(if is_named { &self.pool } else { &entry.address });
        match password::ask_text(&format!("Password of {} at {shown}: ", Shown(user)))? {
            Some(password) => Ok(password),
            None => Err(Failure::new(
                Exit::Key,
                format!(
                    "no password is given for {} at {shown}: give --pool-password-file, --pool-password-command, \
                     XOFS_POOL_PASSWORD, or one in the configuration",
                    Shown(user)
                ),
            )
            .into()),
        }
    }
}

impl Named {
    /// Decides about a certificate that nobody vouched for yet: accepts it if that was asked for, or a person says so.
    ///
    /// # Errors
    /// If the terminal cannot be used.
    pub fn accepts(&self, unknown: &Unknown) -> Result<bool> {
        let shown = Shown(&unknown.address);
        if self.trusts_first {
            eprintln!("xofs: {shown}: its certificate {} is accepted and remembered", unknown.fingerprint);
            return Ok(true);
        }
        if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            return Ok(false);
        }
        eprint!(
            "The certificate of {shown} is not known yet. Its SHA-256 fingerprint is\n  {}\nCompare it with what\n  {}\n\
             prints on that host. Accept and remember it (yes/no)? ",
            unknown.fingerprint,
            Unknown::COMMAND
        );
        io::stderr().flush().context("ask about the certificate")?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).context("ask about the certificate")?;
        Ok(matches!(answer.trim(), "yes" | "y"))
    }
}
