//! Where jobs are, and which one is meant.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::cli::config::Config;
use crate::cli::exit::Failure;
use crate::cli::open;
use crate::job::{Fault, Faults, Job, Known};
use crate::whole;

/// No file of a job is longer (bytes).
const LONGEST: u64 = 1 << 20;
/// What the names of their files end in.
const EXTENSION: &str = "toml";

/// Where the files of jobs are.
#[derive(Debug, Args)]
pub struct FolderArgs {
    /// Folder of the jobs' files [default: /etc/xofs/jobs for root, else ~/.config/xofs/jobs]
    #[arg(long = "jobs", value_name = "FOLDER", env = "XOFS_JOBS", hide_env_values = true)]
    folder: Option<PathBuf>,
}

/// The files of jobs, and what they may name.
pub struct Files {
    /// The folder.
    pub folder: PathBuf,
    known: Known,
}

/// A job and its file.
pub struct Loaded {
    /// The file.
    pub path: PathBuf,
    /// The job, or what is wrong.
    pub job: Result<Job, Faults>,
}

impl FolderArgs {
    /// Finds the folder, and reads the configuration.
    ///
    /// # Errors
    /// `Usage` if there is no folder, or the configuration is wrong.
    pub fn files(&self) -> Result<Files> {
        let folder = self.folder.clone().or_else(default_folder);
        let folder = folder.ok_or_else(|| Failure::usage("this user has no folder of its own: give --jobs"))?;
        Ok(Files { folder, known: known()? })
    }
}

/// Returns what the configuration knows.
///
/// # Errors
/// `Usage` if it is wrong.
pub fn known() -> Result<Known> {
    let config = Config::load()?;
    Ok(Known { pools: config.pools.into_keys().collect(), repositories: config.repositories.into_keys().collect() })
}

fn default_folder() -> Option<PathBuf> {
    if open::is_root() {
        return Some(PathBuf::from("/etc/xofs/jobs"));
    }
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = folder("XDG_CONFIG_HOME").or_else(|| Some(folder("HOME")?.join(".config")))?;
    Some(config.join("xofs/jobs"))
}

impl Files {
    /// Reads the configuration anew.
    ///
    /// # Errors
    /// `Usage` if it is wrong; then what it knew before still counts.
    pub fn refresh(&mut self) -> Result<()> {
        self.known = known()?;
        Ok(())
    }

    /// Returns where the file of a job is: a path is meant as it is, a word is a name in the folder.
    #[must_use]
    pub fn path_of(&self, named: &OsStr) -> PathBuf {
        let path = Path::new(named);
        let is_path = path.extension() == Some(OsStr::new(EXTENSION)) || path.components().count() > 1;
        if is_path { path.to_owned() } else { self.folder.join(path).with_extension(EXTENSION) }
    }

    /// Reads the job that is meant.
    ///
    /// # Errors
    /// `Usage` if there is no such file, or something is wrong with it.
    pub fn job(&self, named: &OsStr) -> Result<(PathBuf, Job)> {
        let loaded = self.load(&self.path_of(named));
        let job = loaded.job.map_err(|faults| Failure::usage(faults.to_string()))?;
        Ok((loaded.path, job))
    }

    /// Reads a file. That it cannot be read is what is wrong with it.
    #[must_use]
    pub fn load(&self, path: &Path) -> Loaded {
        // Where the folder that a path counts from is gone, so is the file.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let job = match whole::text(&path, LONGEST) {
            Ok(text) => Job::parse(&text, &path, &self.known),
            Err(error) => Err(fault(&path, format!("it cannot be read: {error}"))),
        };
        Loaded { path, job }
    }

    /// Reads all jobs of the folder, by name; none if it is not there. Two with the same id are refused both.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn all(&self) -> Result<Vec<Loaded>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("list the jobs in '{}'", self.folder.display())),
        };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.with_context(|| format!("list the jobs in '{}'", self.folder.display()))?.path();
            let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if path.extension() == Some(OsStr::new(EXTENSION)) && !is_hidden {
                paths.push(path);
            }
        }
        paths.sort();
        let mut all: Vec<Loaded> = paths.iter().map(|path| self.load(path)).collect();
        all.retain(|loaded| loaded.job.is_ok() || !is_gone(&loaded.path));
        refuse_twins(&mut all);
        Ok(all)
    }
}

/// Whether a file was removed, or renamed, after the folder had been listed.
fn is_gone(path: &Path) -> bool {
    matches!(fs::symlink_metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

/// Makes what is wrong with a file as a whole.
fn fault(path: &Path, message: String) -> Faults {
    Faults { path: path.to_owned(), faults: vec![Fault { line: 1, message }] }
}

/// Two jobs with one id would write into each other's chains.
fn refuse_twins(all: &mut [Loaded]) {
    let ids: Vec<Option<String>> =
        all.iter().map(|loaded| loaded.job.as_ref().ok().map(|job| job.id.clone())).collect();
    for number in 0..all.len() {
        let Some(id) = &ids[number] else { continue };
        let twin = (0..all.len()).find(|other| *other != number && ids[*other].as_ref() == Some(id));
        let Some(twin) = twin.map(|twin| all[twin].path.display().to_string()) else { continue };
        let message = format!("'{twin}' has the same id, '{id}': each job needs its own");
        all[number].job = Err(fault(&all[number].path, message));
    }
}
