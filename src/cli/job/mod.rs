//! `xofs job`: what runs unattended.
//!
//! ```text
//! new · check · list · log · report · stop ─► files, state   where jobs and what they leave are; figures: the report
//! daemon ─► run, as processes                            by schedules
//! run ─► machines, of pools ─► merges ─► report ─► tell     one run, in this process; recorder: what is noted of it; until: its end
//! ```

mod check;
mod daemon;
mod figures;
mod files;
mod list;
mod live;
mod machines;
mod merges;
mod new;
mod pools;
mod recorder;
mod report;
mod run;
mod show;
mod state;
mod stop;
mod tell;
mod top;
mod until;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::Global;
use super::exit::Exit;

const EXAMPLES: &str = "\
A job is a file: which VMs of which pools, how, where to, and when; docs/jobs.md.

Examples:
  xofs job new nightly --pool lab --tag backup --to main --cron '0 2 * * *' --keep-last 7
  xofs job check
  xofs job run nightly
  xofs job list";

/// Jobs: which VMs are backed up, how, where to and when
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct JobArgs {
    #[command(subcommand)]
    command: JobCommand,
}

#[derive(Debug, Subcommand)]
enum JobCommand {
    New(Box<new::NewArgs>),
    Check(check::CheckArgs),
    Run(run::RunArgs),
    Stop(stop::StopArgs),
    List(list::ListArgs),
    Log(show::LogArgs),
    Report(figures::ReportArgs),
    Top(top::TopArgs),
    Daemon(daemon::DaemonArgs),
}

/// Runs the command.
///
/// # Errors
/// As the part of it that is asked for.
pub fn run(global: &Global, arguments: &JobArgs) -> Result<Exit> {
    match &arguments.command {
        JobCommand::New(arguments) => new::run(arguments),
        JobCommand::Check(arguments) => check::run(arguments),
        JobCommand::Run(arguments) => run::run(global, arguments),
        JobCommand::Stop(arguments) => stop::run(arguments),
        JobCommand::List(arguments) => list::run(arguments),
        JobCommand::Log(arguments) => show::run(arguments),
        JobCommand::Report(arguments) => figures::run(arguments),
        JobCommand::Top(arguments) => top::run(arguments),
        JobCommand::Daemon(arguments) => daemon::run(global, arguments),
    }
}
