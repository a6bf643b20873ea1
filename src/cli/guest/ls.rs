//! `xofs ls`: the volumes of a backup, or what is in a folder of a guest.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::time::SystemTime;

use anyhow::{Context, Result};
use clap::Args;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::Failures;
use super::find::{Files, Found, Volume};
use super::path::{GuestPath, split_names};
use super::walk::{Item, Step, Walk};
use crate::cli::exit::{Exit, Failure};
use crate::cli::text::{Shown, ShownBytes, size};
use crate::cli::{Global, print};
use crate::tree::{Attributes, Kind};

const EXAMPLES: &str = "\
WHAT is VM/BACKUP, which lists its volumes, or VM/BACKUP/VOLUME:/path. Names that begin with a dot are shown, too. \
Control characters in names are escaped, and bytes that are not UTF-8.

Examples:
  xofs ls /srv/backups web01/latest
  xofs ls /srv/backups web01/latest/xvda1:/etc
  xofs ls -lR main web01/2026-11-20/vg0-root:/home
  xofs ls --json main web01/latest/xvda1:/var/log | jq -r '.entries[].name'

Ends with 3 if a part of what was asked for could not be listed.";

/// Lists the volumes of a backup, or files of a guest
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs ls [OPTIONS] [REPO] <WHAT>")]
pub struct LsArgs {
    /// The repository (else XOFS_REPOSITORY or --repository), and a backup, folder or file in it
    #[arg(num_args = 1..=2, required = true, value_names = ["REPO", "WHAT"])]
    names: Vec<OsString>,
    /// Shows permissions, links, owner, size, time (UTC) and targets
    #[arg(short, long)]
    long: bool,
    /// Shows everything below a folder, by its path
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// If nothing has that name, or it cannot be listed.
pub fn run(global: &Global, arguments: &LsArgs) -> Result<Exit> {
    let (address, names) = split_names(global, &arguments.names);
    let [what] = names else {
        return Err(Failure::usage("one backup, folder or file is listed: name it after the repository").into());
    };
    let path = GuestPath::parse(what)?;
    let files = Files::open(global, address)?;
    match &path.inside {
        None => volumes(&files, &path.backup, arguments.json),
        Some(_) => entries(&files, &path, arguments),
    }
}

fn volumes(files: &Files, what: &str, is_json: bool) -> Result<Exit> {
    let backup = files.backup(what)?;
    let (volumes, problems) = files.volumes(&backup).with_context(|| format!("'{}'", Shown(what)))?;
    if is_json {
        let one = |volume: &Volume| {
            json!({
                "name": volume.name,
                "size": volume.size,
                "content": volume.content,
                "label": volume.label,
                "isRead": volume.is_read,
                "problem": volume.problem,
            })
        };
        let volumes: Vec<_> = volumes.iter().map(one).collect();
        print::json(&json!({"backup": backup.time.to_string(), "volumes": volumes, "problems": problems}))?;
    } else {
        let mut text = String::new();
        for Volume { name, size: bytes, content, label, problem, .. } in &volumes {
            let bytes = bytes.map_or("?".to_owned(), size);
            let _ = write!(text, "{:<16} {bytes:>10}  {content}", Shown(name));
            if let Some(label) = label {
                let _ = write!(text, " '{}'", Shown(label));
            }
            if let Some(problem) = problem {
                let _ = write!(text, "  problem: {}", Shown(problem));
            }
            text.push('\n');
        }
        if volumes.is_empty() {
            text.push_str("no volumes\n");
        }
        for problem in &problems {
            let _ = writeln!(text, "problem: {}", Shown(problem));
        }
        print::text(&text)?;
    }
    Ok(if problems.is_empty() { Exit::Done } else { Exit::Partial })
}

/// What is shown of a file.
struct Line {
    /// From the folder that is listed.
    path: Vec<u8>,
    attributes: Attributes,
    /// Of a link.
    target: Option<OsString>,
}

fn entries(files: &Files, path: &GuestPath, arguments: &LsArgs) -> Result<Exit> {
    let mut found = files.find(path, false)?;
    // As ls does: a link to a folder stands for it, unless it is asked what the link is.
    if found.attributes.kind == Kind::Symlink && !arguments.long && !arguments.json {
        if let Some(folder) = files.find(path, true).ok().filter(|target| target.attributes.kind == Kind::Directory) {
            found = folder;
        }
    }
    let mut failures = Failures::default();
    let mut lines = Vec::new();
    for step in Walk::new(&files.tree, found.attributes, arguments.recursive) {
        let item = match step {
            // The folder that is listed is not in itself.
            Step::Leave => continue,
            Step::Enter(item) if item.path.is_empty() => {
                failures.done();
                continue;
            }
            Step::Enter(item) | Step::Other(item) => item,
            Step::Failed(path, error) => {
                failures.add(error.context(found.place(&path)));
                continue;
            }
        };
        match line(files, &found, item) {
            Ok(line) => {
                failures.done();
                lines.push(line);
            }
            Err(error) => failures.add(error),
        }
    }
    if arguments.json {
        let entries: Vec<_> = lines.iter().map(to_json).collect();
        print::json(&json!({"path": found.place(b""), "entries": entries}))?;
    } else {
        print::text(&to_text(&lines, arguments.long))?;
    }
    failures.end()
}

fn line(files: &Files, found: &Found, item: Item) -> Result<Line> {
    let Item { mut path, attributes, .. } = item;
    let is_link = attributes.kind == Kind::Symlink;
    let target = is_link.then(|| files.tree.target(attributes.inode)).transpose();
    let target = target.with_context(|| found.place(&path))?;
    // A file that was named is not in a folder that is listed.
    if path.is_empty() {
        path = found.name().as_bytes().to_vec();
    }
    Ok(Line { path, attributes, target })
}

fn to_text(lines: &[Line], is_long: bool) -> String {
    let mut text = String::new();
    let cells = |line: &Line| {
        let Attributes { guest, size, modified, .. } = &line.attributes;
        let guest = guest.as_ref();
        let number = |of: Option<u32>| of.map_or("?".to_owned(), |number| number.to_string());
        let size = match (line.attributes.kind, guest) {
            (Kind::CharacterDevice | Kind::BlockDevice, Some(guest)) => {
                format!("{}, {}", guest.device.0, guest.device.1)
            }
            _ => size.to_string(),
        };
        let (links, uid, gid) =
            (guest.map(|guest| guest.links), guest.map(|guest| guest.uid), guest.map(|guest| guest.gid));
        let time = Timestamp::try_from(*modified).map_or("?".to_owned(), |time| time.strftime("%FT%TZ").to_string());
        [number(links), number(uid), number(gid), size, time]
    };
    let cells: Vec<_> = if is_long { lines.iter().map(cells).collect() } else { Vec::new() };
    let width = |column: usize| cells.iter().map(|cells| cells[column].len()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3].map(width);
    for (index, line) in lines.iter().enumerate() {
        if let Some([links, uid, gid, size, time]) = cells.get(index) {
            let [a, b, c, d] = widths;
            let mode = mode_text(&line.attributes);
            let _ = write!(text, "{mode} {links:>a$} {uid:>b$} {gid:>c$} {size:>d$} {time} ");
        }
        text.push_str(&ShownBytes(&line.path).to_string());
        if let (true, Some(target)) = (is_long, &line.target) {
            let _ = write!(text, " -> {}", ShownBytes(target.as_bytes()));
        }
        text.push('\n');
    }
    text
}

/// Permissions as `ls -l` writes them.
fn mode_text(attributes: &Attributes) -> String {
    let mode = attributes.guest.as_ref().map_or(0, |guest| guest.mode);
    let kind = match attributes.kind {
        Kind::Directory => 'd',
        Kind::File => '-',
        Kind::Symlink => 'l',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
        Kind::CharacterDevice => 'c',
        Kind::BlockDevice => 'b',
    };
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (false, false) => '-',
            (false, true) => 'x',
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
        });
    }
    text
}

fn to_json(line: &Line) -> Value {
    let attributes = &line.attributes;
    let time = |time: SystemTime| Timestamp::try_from(time).ok().map(|time| time.to_string());
    let name = line.path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let texts = [
        ("path", Some(&*line.path)),
        ("name", Some(name)),
        ("target", line.target.as_ref().map(|target| target.as_bytes())),
    ];
    let mut escaped = Vec::new();
    let mut value = Map::new();
    for (key, bytes) in texts {
        let text = bytes.map(|bytes| match str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                escaped.push(key);
                escape(bytes)
            }
        });
        value.insert(key.to_owned(), text.into());
    }
    let guest = attributes.guest.as_ref();
    let kind = match attributes.kind {
        Kind::Directory => "directory",
        Kind::File => "file",
        Kind::Symlink => "symlink",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
        Kind::CharacterDevice => "characterDevice",
        Kind::BlockDevice => "blockDevice",
    };
    let is_device = matches!(attributes.kind, Kind::CharacterDevice | Kind::BlockDevice);
    let facts = json!({
        "escaped": escaped,
        "kind": kind,
        "mode": guest.map(|guest| format!("{:04o}", guest.mode)),
        "uid": guest.map(|guest| guest.uid),
        "gid": guest.map(|guest| guest.gid),
        "links": guest.map(|guest| guest.links),
        "size": attributes.size,
        "allocated": attributes.allocated,
        "device": guest.filter(|_| is_device).map(|guest| [guest.device.0, guest.device.1]),
        "inode": attributes.inode.to_string(),
        "modified": time(attributes.modified),
        "accessed": guest.and_then(|guest| time(guest.accessed)),
        "changed": guest.and_then(|guest| time(guest.changed)),
        "created": guest.and_then(|guest| guest.created).and_then(time),
    });
    if let Value::Object(facts) = facts {
        value.extend(facts);
    }
    Value::Object(value)
}

/// Writes bytes that are not UTF-8 as text that leads back to them: each of those as `\xNN`, and `\` as `\\`.
fn escape(bytes: &[u8]) -> String {
    let chunk = |chunk: std::str::Utf8Chunk<'_>| {
        let invalid: String = chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")).collect();
        chunk.valid().replace('\\', "\\\\") + &invalid
    };
    bytes.utf8_chunks().map(chunk).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::GuestAttributes;

    #[test]
    fn permissions_are_written_as_ls_does() {
        for (kind, mode, text) in [
            (Kind::Directory, 0o1777, "drwxrwxrwt"),
            (Kind::File, 0o4755, "-rwsr-xr-x"),
            (Kind::File, 0o6644, "-rwSr-Sr--"),
            (Kind::File, 0o2071, "----rws--x"),
            (Kind::Symlink, 0o777, "lrwxrwxrwx"),
            (Kind::BlockDevice, 0o1660, "brw-rw---T"),
            (Kind::Socket, 0, "s---------"),
        ] {
            let time = SystemTime::UNIX_EPOCH;
            let guest = GuestAttributes {
                mode,
                uid: 0,
                gid: 0,
                links: 1,
                device: (0, 0),
                accessed: time,
                changed: time,
                created: None,
            };
            let attributes = Attributes {
                inode: 1,
                kind,
                size: 0,
                allocated: 0,
                modified: time,
                is_disk: false,
                is_constant: true,
                guest: Some(guest),
            };
            assert_eq!(mode_text(&attributes), text);
        }
    }

    #[test]
    fn escaped_bytes_lead_back() {
        assert_eq!(escape(b"a\\b\xff\xc3\xa9\xfe\xfd"), "a\\\\b\\xff\u{e9}\\xfe\\xfd");
    }
}
