//! Images of other formats (qcow2, VMDK, VHDX, VDI, ...), served by `qemu-nbd` to this process alone.
//!
//! ```text
//! first bytes ─► qemu-img info: which format, and what else it names ─► qemu-nbd, read-only, of that format
//! ```
//!
//! The socket is connected to before the server is started, and is gone from its folder by then: nobody else can use it, and
//! nothing of it is left whatever happens. The server ends with its last client, or when who started it dies before that.
//!
//! What an image says of other files is not followed unless that is allowed: whoever made the image could have any file of
//! this machine put into a backup.

use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nbd::Connection;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{Error, ErrorKind, Result};
use super::nbd::{CONNECTIONS, NbdDisk, of_nbd, options};
use super::source::ImageOptions;
use crate::repository::random_uuid;

/// Formats that are read so, as QEMU calls them. A VHD is not among them: QEMU may take it for another size than it has.
const FORMATS: [&str; 7] = ["qcow2", "qcow", "vmdk", "vhdx", "vdi", "qed", "parallels"];
/// Those of them that may have a backing file.
const LAYERED: [&str; 4] = ["qcow2", "qcow", "vmdk", "qed"];
/// Starts the server on a socket that is its standard input, as systemd would (sd_listen_fds), to end when its parent does.
const START: &str = "LISTEN_PID=$$ LISTEN_FDS=1; export LISTEN_PID LISTEN_FDS
if setpriv --pdeathsig KILL true 2>/dev/null; then set -- setpriv --pdeathsig KILL \"$@\"; fi
exec \"$@\" 3<&0 </dev/null";
/// Longest text of an error that is passed on (bytes).
const SAID: usize = 2000;

/// What `qemu-img info` tells of an image.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    format: String,
    backing_filename: Option<String>,
    #[serde(default)]
    encrypted: bool,
    format_specific: Option<Specific>,
}

#[derive(Debug, Deserialize)]
struct Specific {
    data: Data,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Data {
    data_file: Option<String>,
    corrupt: bool,
    bitmaps: Vec<Bitmap>,
    extents: Vec<ExtentFile>,
}

#[derive(Debug, Deserialize)]
struct Bitmap {
    name: String,
    flags: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct ExtentFile {
    filename: Option<String>,
}

impl Info {
    /// Returns the format if all that the image needs may be read, and what it needs can be told.
    fn check(&self, image: &Path, options: &ImageOptions) -> Result<&str> {
        let refuse = |reason: String| {
            Err(Error::new(ErrorKind::Source, format!("the image '{}' is not read: {reason}", image.display())))
        };
        let Some(format) = FORMATS.iter().find(|format| **format == self.format) else {
            return refuse(format!(
                "QEMU takes it for '{}', one of {} was expected",
                self.format.escape_debug(),
                FORMATS.join(", ")
            ));
        };
        let nothing = Data::default();
        let data = self.format_specific.as_ref().map_or(&nothing, |specific| &specific.data);
        let own = image.to_str();
        let extents = data.extents.iter().filter_map(|extent| extent.filename.as_deref());
        let others = [("backing file", self.backing_filename.as_deref()), ("data file", data.data_file.as_deref())];
        let others = others.into_iter().filter_map(|(what, name)| Some((what, name?)));
        let other = others.chain(extents.filter(|name| Some(*name) != own).map(|name| ("part", name))).next();
        if let Some((what, name)) = other.filter(|_| !options.allow_backing) {
            return refuse(format!(
                "it names the {what} '{}': whoever made the image could have named any file. If that is yours and meant, say \
                 --allow-backing",
                name.escape_debug()
            ));
        }
        if self.encrypted {
            return refuse("it is encrypted".to_owned());
        }
        if data.corrupt {
            return refuse("it is marked as corrupt: repair it with 'qemu-img check -r all'".to_owned());
        }
        let Some(wanted) = &options.bitmap else { return Ok(format) };
        let shown = wanted.escape_debug();
        let names = data.bitmaps.iter().map(|bitmap| format!("'{}'", bitmap.name.escape_debug())).collect::<Vec<_>>();
        let Some(bitmap) = data.bitmaps.iter().find(|bitmap| bitmap.name == *wanted) else {
            let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return refuse(format!("it has no dirty bitmap '{shown}'; there are {there}"));
        };
        let has = |flag: &str| bitmap.flags.iter().any(|found| found == flag);
        if has("in-use") || !has("auto") || data.data_file.is_some() {
            return refuse(format!(
                "its dirty bitmap '{shown}' may lack changes: it was not closed properly, does not record, or the data is in \
                 another file; leave --bitmap out"
            ));
        }
        Ok(format)
    }
}

/// Opens an image as a disk.
///
/// # Errors
/// [`ErrorKind::Source`] if it cannot be opened, needs files that may not be read, or QEMU's programs are missing.
pub(super) fn open(path: &Path, image_options: &ImageOptions) -> Result<NbdDisk> {
    let failed = |reason: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Source, format!("the image '{}' cannot be opened: {reason}", path.display()))
    };
    // QEMU would take a relative name with a colon for an address.
    let path = path.canonicalize().map_err(|error| failed(&error))?;
    let info = probe(&path)?;
    let format = info.check(&path, image_options)?;
    let address = address(&path, format, image_options.allow_backing).map_err(|error| failed(&error))?;
    let (mut server, streams) =
        Server::start(&address, image_options.bitmap.as_deref()).map_err(|error| failed(&error))?;
    let shown = format!("of '{}'", path.display());
    let options = options(image_options.bitmap.as_deref());
    let connect = |stream| Connection::over(Box::new(stream), "", &shown, &options);
    match streams.into_iter().map(connect).collect::<nbd::Result<Vec<_>>>() {
        Ok(connections) => NbdDisk::new(connections, Some(server)),
        Err(error) => match server.said() {
            said if said.is_empty() => Err(of_nbd(&error)),
            said => Err(failed(&said)),
        },
    }
}

/// Returns what QEMU is to open, with nothing left to its guesses: a backing file that was not there when the image was looked
/// at is not opened either.
fn address(path: &Path, format: &str, allow_backing: bool) -> io::Result<String> {
    let name = path.to_str().ok_or_else(|| io::Error::other("its path is not UTF-8"))?;
    let is_device = path.metadata()?.file_type().is_block_device();
    let driver = if is_device { "host_device" } else { "file" };
    let mut image = json!({ "driver": format, "read-only": true, "file": { "driver": driver, "filename": name } });
    if !allow_backing && LAYERED.contains(&format) {
        image["backing"] = Value::Null;
    }
    Ok(format!("json:{image}"))
}

/// Asks QEMU what an image is.
fn probe(path: &Path) -> Result<Info> {
    let failed = |reason: &dyn std::fmt::Display| {
        let shown = path.display();
        Error::new(ErrorKind::Source, format!("the image '{shown}' cannot be opened: qemu-img info: {reason}"))
    };
    let output = Command::new("qemu-img")
        .args(["info", "--output=json", "--"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(&missing(&error)))?;
    if !output.status.success() {
        return Err(failed(&one_line(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(&error))
}

fn missing(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "it is not installed: install the package qemu-utils (qemu-img)".to_owned(),
        _ => error.to_string(),
    }
}

/// Makes one line of what a program said.
fn one_line(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    said.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// A `qemu-nbd` that was started here, ended when this is dropped.
pub(super) struct Server {
    child: Child,
    /// What it says to its standard error.
    said: File,
}

impl Server {
    /// Starts one for what QEMU opens by an address; returns the connections to it, which it takes once it is ready.
    fn start(address: &str, bitmap: Option<&str>) -> io::Result<(Self, Vec<UnixStream>)> {
        let folder = Folder::new()?;
        // The path of a socket must be short, which that of the folder need not be.
        let entered = File::open(&folder.0)?;
        let socket = PathBuf::from(format!("/proc/self/fd/{}/nbd", entered.as_raw_fd()));
        let listener = UnixListener::bind(&socket)?;
        let streams = (0..CONNECTIONS).map(|_| UnixStream::connect(&socket)).collect::<io::Result<Vec<_>>>()?;
        drop(folder);
        let mut command = Command::new("sh");
        command.args(["-c", START, "sh", "qemu-nbd", "--read-only"]);
        command.arg(format!("--shared={CONNECTIONS}"));
        command.args(bitmap.map(|bitmap| format!("--bitmap={bitmap}")));
        command.args(["--", address]);
        // In memory, since nobody reads it unless something fails.
        let said = File::from(memfd_create("qemu-nbd", MemfdFlags::CLOEXEC)?);
        let listener = Stdio::from(OwnedFd::from(listener));
        let child = command.stdin(listener).stdout(Stdio::null()).stderr(Stdio::from(said.try_clone()?)).spawn()?;
        Ok((Self { child, said }, streams))
    }

    /// Ends it, and returns what it complained about.
    fn said(&mut self) -> String {
        // It may have ended by itself: then it said why.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut said = vec![0; SAID];
        let len = self.said.read_at(&mut said, 0).unwrap_or(0);
        one_line(&said[..len])
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It reads only; nothing is lost.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder that only we can enter, removed with all that is in it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("xofs-{}", random_uuid()?));
        DirBuilder::new().mode(0o700).create(&path)?;
        let folder = Self(path);
        // Whatever mask there is.
        std::fs::set_permissions(&folder.0, Permissions::from_mode(0o700))?;
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, folder = %self.0.display(), "a temporary folder is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(info: &Value, options: &ImageOptions) -> std::result::Result<String, String> {
        let info: Info = serde_json::from_value(info.clone()).unwrap();
        info.check(Path::new("/disk.img"), options).map(str::to_owned).map_err(|error| error.to_string())
    }

    #[test]
    fn an_image_is_read_only_if_all_that_it_needs_is_known_and_its_own() {
        let data = |data: Value| json!({ "format": "qcow2", "format-specific": { "data": data } });
        let bitmap = |flags: &[&str]| data(json!({ "bitmaps": [{ "name": "b", "flags": flags }] }));
        let plain = ImageOptions::default();
        let with_bitmap = ImageOptions { bitmap: Some("b".to_owned()), ..ImageOptions::default() };
        let own = data(json!({ "extents": [{ "filename": "/disk.img" }, {}] }));
        for (info, options) in [
            (json!({ "format": "qcow2" }), &plain),
            (own, &plain),
            (bitmap(&["auto"]), &with_bitmap),
            (bitmap(&["in-use"]), &plain),
            (data(json!({ "data-file": "d" })), &ImageOptions { allow_backing: true, ..ImageOptions::default() }),
        ] {
            assert_eq!(checked(&info, options), Ok("qcow2".to_owned()), "{info}");
        }
        for (info, options, part) in [
            (json!({ "format": "raw" }), &plain, "QEMU takes it for 'raw'"),
            (json!({ "format": "luks" }), &plain, "QEMU takes it for 'luks'"),
            (json!({ "format": "vmdk", "backing-filename": "/etc/shadow" }), &plain, "the backing file '/etc/shadow'"),
            (data(json!({ "data-file": "/etc/shadow" })), &plain, "the data file '/etc/shadow'"),
            (data(json!({ "extents": [{ "filename": "/etc/shadow" }] })), &plain, "the part '/etc/shadow'"),
            (json!({ "format": "qcow2", "encrypted": true }), &plain, "encrypted"),
            (data(json!({ "corrupt": true })), &plain, "qemu-img check -r all"),
            (json!({ "format": "qcow2" }), &with_bitmap, "there are none"),
            (bitmap(&["auto", "in-use"]), &with_bitmap, "may lack changes"),
            (bitmap(&[]), &with_bitmap, "may lack changes"),
        ] {
            let refused = checked(&info, options).unwrap_err();
            assert!(refused.contains(part), "{info}: {refused}");
        }
    }

    #[test]
    fn what_qemu_opens_is_said_in_full() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a, \"b\".img");
        std::fs::write(&path, "").unwrap();
        for (format, allow_backing, has_null) in
            [("qcow2", false, true), ("qcow2", true, false), ("vhdx", false, false)]
        {
            let address = address(&path, format, allow_backing).unwrap();
            let image: Value = serde_json::from_str(address.strip_prefix("json:").unwrap()).unwrap();
            assert_eq!((&image["driver"], &image["file"]["driver"]), (&json!(format), &json!("file")));
            assert_eq!(image["file"]["filename"].as_str(), path.to_str());
            assert_eq!(image.get("backing"), has_null.then_some(&Value::Null), "{format}");
        }
    }
}
