//! `xofs repair`: a plan of what can be done about faults; with `--apply` ([`apply`]) what a plan says that is given back;
//! and the trash ([`trash`]) that things are moved to.

mod apply;
mod trash;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{ArgGroup, Args, ValueEnum};

use super::exit::{Exit, Failure};
use super::text::{Shown, count};
use super::{Global, open, print, signals};
use crate::doctor::{self, Act, Explanation, Include, Kind, Plan, VmPlan};
use crate::repository::{Layout, Repository, Selection};

const EXAMPLES: &str = "\
Examples:
  xofs repair /srv/backups
  xofs repair main web01 --output plan.json
  xofs repair main --apply plan.json
  xofs repair main --list
  xofs repair main --undo 20261122T015801Z-3f9a1c2e

Without an option that says so it changes nothing. A plan is applied only when it is given back, and only if all is as it was \
when it was made; delete from it what you do not want. Nothing is deleted: what no backup needs is moved to .xofs-trash at the \
root of the repository, which --undo puts back and --purge empties.

Ends with 3 if a VM could not be judged or repaired, with 11 if the VM is being written by another program.";

/// Plans what can be done about faults, does it when the plan is given back, and undoes it
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs repair [OPTIONS] [REPO] [VM]",
    group(ArgGroup::new("act").args(["apply", "undo", "list", "purge"])))]
pub struct RepairArgs {
    /// The repository (else XOFS_REPOSITORY or --repository), and a VM to plan only for that
    #[arg(num_args = 0..=2, value_names = ["REPO", "VM"])]
    names: Vec<OsString>,
    /// Plans also what is named: broken-backups are backups of which nothing can be read
    #[arg(long, value_name = "WHAT", conflicts_with = "act")]
    include: Vec<Included>,
    /// Writes the plan to a file, as JSON
    #[arg(short, long, value_name = "FILE", conflicts_with = "act")]
    output: Option<PathBuf>,
    /// Does what the plan in this file says (- is standard input)
    #[arg(long, value_name = "PLAN")]
    apply: Option<PathBuf>,
    /// Puts back what was moved to the trash: what ID names, else what was moved last
    #[arg(long, value_name = "ID", num_args = 0..=1)]
    undo: Option<Option<String>>,
    /// Lists what is in the trash
    #[arg(long)]
    list: bool,
    /// Deletes a set of the trash for good
    #[arg(long, value_name = "ID")]
    purge: Option<String>,
    /// How long to wait for another program that writes a backup of the same VM
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u64,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// What a plan may include beyond what nobody needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Included {
    BrokenBackups,
}

/// Runs the command.
///
/// # Errors
/// If the repository cannot be opened or listed, or what is asked for cannot be done at all.
pub fn run(global: &Global, arguments: &RepairArgs) -> Result<Exit> {
    let (address, what) = open::split_names(global, &arguments.names);
    let what = open::text_of(what)?;
    let is_plan = arguments.apply.is_none() && arguments.undo.is_none() && !arguments.list && arguments.purge.is_none();
    if !what.is_empty() && !is_plan {
        return Err(Failure::usage("a VM is named for a plan only; a plan, and the trash, say themselves which").into());
    }
    // Before there are other threads.
    let is_stopped = arguments.apply.is_some().then(signals::stop_on_signals).transpose()?;
    let place = open::place(global, address)?;
    let plan = arguments.apply.as_deref().map(read_plan).transpose()?;
    let storage = open::writable(global, &place)?;
    if let Some((plan, is_stopped)) = plan.zip(is_stopped) {
        return apply::run(arguments, &storage, &plan, &is_stopped);
    }
    if let Some(id) = &arguments.undo {
        return trash::undo(arguments, &storage, id.as_deref());
    }
    if let Some(id) = &arguments.purge {
        return trash::purge(arguments, &storage, id);
    }
    if arguments.list {
        return trash::list(arguments, &storage);
    }
    let include = Include { broken_backups: arguments.include.contains(&Included::BrokenBackups) };
    let repository = Repository::to_change(storage.clone().reader(), 0);
    if repository.layout() == Layout::Disks {
        return Err(Failure::new(Exit::Failed, "VHDs without metadata belong to no backup that could be judged").into());
    }
    let vms = match what.as_str() {
        "" => doctor::vms(&repository)?,
        what => match repository.select(what)? {
            Selection::Vm(vm) => vec![vm],
            _ => return Err(Failure::usage(format!("'{what}' is one backup or disk: a plan is made for a VM")).into()),
        },
    };
    let all = vms.iter().map(|vm| {
        // Of its own, so that the disks of the last one are not kept open.
        let repository = Repository::to_change(storage.clone().reader(), 0);
        doctor::examine(&repository, Some(&storage), vm, include)
    });
    let vms = all.filter(|vm| !vm.actions.is_empty() || !vm.explanations.is_empty()).collect();
    let plan = Plan::new(&place.name, include, vms);
    report(arguments, &plan)
}

fn read_plan(path: &std::path::Path) -> Result<Plan> {
    let shown = path.display();
    let bytes = match path.as_os_str() == "-" {
        true => {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut std::io::stdin(), &mut bytes)
                .context("read the plan from standard input")?;
            bytes
        }
        false => std::fs::read(path).with_context(|| format!("read the plan '{shown}'"))?,
    };
    Plan::parse(&bytes).with_context(|| format!("read the plan '{shown}'"))
}

fn report(arguments: &RepairArgs, plan: &Plan) -> Result<Exit> {
    let value = serde_json::to_value(plan).context("write the plan")?;
    if let Some(path) = &arguments.output {
        std::fs::write(path, format!("{value:#}\n")).with_context(|| format!("write the plan '{}'", path.display()))?;
    }
    if arguments.json {
        print::json(&value)?;
    } else {
        print::text(&to_text(plan, arguments))?;
    }
    let is_unread = |vm: &VmPlan| vm.explanations.iter().any(|said| matches!(said.kind, Kind::Unread | Kind::Busy));
    Ok(if plan.vms.iter().any(is_unread) { Exit::Partial } else { Exit::Done })
}

fn to_text(plan: &Plan, arguments: &RepairArgs) -> String {
    let mut text = String::new();
    for vm in &plan.vms {
        // Writing to a String cannot fail.
        let _ = write_vm(&mut text, vm);
    }
    let actions = plan.actions();
    let hint = match (&arguments.output, actions) {
        (_, 0) => String::new(),
        (Some(path), _) => format!("; to do it: xofs repair {} --apply {}", plan.repository, path.display()),
        (None, _) => "; --output FILE writes the plan, --apply FILE does it".to_owned(),
    };
    let _ = writeln!(text, "{} planned; nothing was changed{}", count(actions, "action"), Shown(&hint));
    text
}

fn write_vm(text: &mut String, vm: &VmPlan) -> std::fmt::Result {
    let name = if vm.name.is_empty() { "(name unknown)" } else { &vm.name };
    writeln!(text, "{}  {}  good: {}", Shown(name), Shown(&vm.uuid), count(vm.good.len(), "backup"))?;
    for Explanation { kind, path, message, backups } in &vm.explanations {
        let touched = touched(backups);
        writeln!(text, "  {}: {}: {}{touched}", kind, Shown(path), Shown(message))?;
    }
    for action in &vm.actions {
        let touched = touched(&action.backups);
        let (id, kind, reason) = (&action.id, action.kind, &action.reason);
        writeln!(text, "  [{}] {kind}: {}{touched}", Shown(id), Shown(reason))?;
        let act = match action.act {
            Act::Trash => "to the trash",
            Act::FinishMerge => "finish",
            Act::TakeLock => "release",
        };
        for path in &action.paths {
            writeln!(text, "      {act}: {}", Shown(path))?;
        }
    }
    Ok(())
}

fn touched(backups: &[String]) -> String {
    if backups.is_empty() { String::new() } else { format!("; touches {}", Shown(&backups.join(", "))) }
}
