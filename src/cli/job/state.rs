//! Where the state is that runs of jobs leave.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::exit::Failure;
use crate::pool::State;

/// The folder of the state.
#[derive(Debug, Args)]
pub struct StateArgs {
    /// Folder for what is remembered between runs [default: /var/lib/xofs for root, else ~/.local/state/xofs]
    #[arg(long, value_name = "FOLDER", env = "XOFS_STATE_DIR", hide_env_values = true)]
    state_dir: Option<PathBuf>,
}

impl StateArgs {
    /// Returns the folder, if it is said.
    pub fn folder(&self) -> Option<PathBuf> {
        self.state_dir.clone()
    }

    /// Opens it.
    ///
    /// # Errors
    /// `Usage` if there is none; if it cannot be used.
    pub fn open(&self) -> Result<State> {
        let folder = self.state_dir.clone().or_else(State::default_folder);
        let folder = folder.ok_or_else(|| Failure::usage("this user has no folder of its own: give --state-dir"))?;
        Ok(State::open(&folder)?)
    }
}
