//! Where the encryption key comes from: the command line, then the environment, then the configuration, then a person.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::termios::{self, LocalModes, OptionalActions};
use storage::EncryptionKey;
use zeroize::{Zeroize, Zeroizing};

use super::config::Entry;
use super::exit::{Exit, Failure};

/// No key is longer; what is longer is another file by mistake.
const LIMIT: u64 = 4096;

/// Where to take the key from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    origin: Origin,
    /// Whether the environment names it: for whatever needs a key, while the other places name it for one repository.
    pub is_ambient: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    /// The content of a file.
    File(PathBuf),
    /// What a command prints.
    Command(String),
    /// The variable `XOFS_PASSWORD`.
    Environment,
}

impl Source {
    /// Chooses among what the command line, the environment and the configuration say; a file comes before a command.
    pub fn choose(
        file: Option<&Path>,
        command: Option<&str>,
        environment: impl Fn(&str) -> Option<String>,
        entry: Option<&Entry>,
    ) -> Option<Self> {
        let of =
            |file: Option<PathBuf>, command: Option<String>| file.map(Origin::File).or(command.map(Origin::Command));
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        let named = |origin| Self { origin, is_ambient: false };
        let ambient = |origin| Self { origin, is_ambient: true };
        of(file.map(Path::to_path_buf), command.map(str::to_owned))
            .map(named)
            .or_else(|| of(set("XOFS_PASSWORD_FILE").map(PathBuf::from), set("XOFS_PASSWORD_COMMAND")).map(ambient))
            .or_else(|| set("XOFS_PASSWORD").map(|_| ambient(Origin::Environment)))
            .or_else(|| {
                entry.and_then(|entry| of(entry.password_file.clone(), entry.password_command.clone())).map(named)
            })
    }

    /// Reads the key.
    ///
    /// # Errors
    /// `Key` if it cannot be had or is no key; the error says where it was to come from, never what was found.
    pub fn read(&self) -> Result<EncryptionKey> {
        let (text, origin) = match &self.origin {
            Origin::File(path) => {
                let origin = format!("read the encryption key from '{}'", path.display());
                (File::open(path).and_then(read_text).map_err(|error| missing(&origin, &error.to_string()))?, origin)
            }
            Origin::Command(command) => {
                let origin = format!("take the encryption key from the command '{command}'");
                (run(command).map_err(|error| missing(&origin, &error))?, origin)
            }
            Origin::Environment => {
                let text = std::env::var("XOFS_PASSWORD").unwrap_or_default();
                (Zeroizing::new(text), "take the encryption key from XOFS_PASSWORD".to_owned())
            }
        };
        EncryptionKey::from_text(&text).context(origin)
    }
}

/// Asks a person for the key of a repository; `None` if there is no terminal.
pub fn ask(repository: &str) -> Result<Option<EncryptionKey>> {
    let Some(text) = ask_text(&format!("Encryption key of {repository}: "))? else { return Ok(None) };
    EncryptionKey::from_text(&text).map(Some).context("take the encryption key from the terminal")
}

/// Asks a person for the key of a new repository, twice: nobody could read what a mistyped one encrypted. `None` if there
/// is no terminal.
pub fn ask_twice(repository: &str) -> Result<Option<EncryptionKey>> {
    let Some(text) = ask_text(&format!("Encryption key of the new repository {repository}, 32 characters: "))? else {
        return Ok(None);
    };
    let key = EncryptionKey::from_text(&text).context("take the encryption key from the terminal")?;
    if ask_text("The same once more: ")? != Some(text) {
        return Err(Failure::new(Exit::Key, "the two keys differ; nothing was made").into());
    }
    Ok(Some(key))
}

fn ask_text(prompt: &str) -> Result<Option<Zeroizing<String>>> {
    if !io::stderr().is_terminal() {
        return Ok(None);
    }
    let Ok(terminal) = File::options().read(true).write(true).open("/dev/tty") else { return Ok(None) };
    match ask_on(&terminal, prompt).context("ask for the encryption key")? {
        Some(text) => Ok(Some(text)),
        None => Err(Failure::new(Exit::Interrupted, "interrupted").into()),
    }
}

/// Reads a line without showing it. The terminal's own handling of Ctrl-C is off meanwhile: a signal would leave it mute.
fn ask_on(mut terminal: &File, prompt: &str) -> io::Result<Option<Zeroizing<String>>> {
    let before = termios::tcgetattr(terminal)?;
    let mut mute = before.clone();
    mute.local_modes.remove(LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG);
    terminal.write_all(prompt.as_bytes())?;
    termios::tcsetattr(terminal, OptionalActions::Flush, &mute)?;
    let line = read_line(terminal);
    termios::tcsetattr(terminal, OptionalActions::Flush, &before)?;
    terminal.write_all(b"\n")?;
    line
}

fn read_line(mut terminal: impl Read) -> io::Result<Option<Zeroizing<String>>> {
    // Never grows, so no copy is left behind.
    let mut line = Zeroizing::new(Vec::with_capacity(1024));
    let mut byte = [0];
    loop {
        if terminal.read(&mut byte)? == 0 {
            return Ok(None);
        }
        match byte[0] {
            b'\r' | b'\n' => break,
            // Ctrl-C, Ctrl-D, Ctrl-\
            3 | 4 | 28 => return Ok(None),
            8 | 127 => {
                line.pop();
            }
            // Ctrl-U
            21 => line.clear(),
            byte if line.len() < line.capacity() => line.push(byte),
            _ => {}
        }
    }
    byte.zeroize();
    text_of(line).map(Some)
}

fn read_text(from: impl Read) -> io::Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(LIMIT).unwrap_or(0) + 1));
    from.take(LIMIT + 1).read_to_end(&mut bytes)?;
    text_of(bytes)
}

fn text_of(mut bytes: Zeroizing<Vec<u8>>) -> io::Result<Zeroizing<String>> {
    let not_text = || io::Error::new(io::ErrorKind::InvalidData, "it is not text (UTF-8)");
    String::from_utf8(std::mem::take(&mut *bytes)).map(Zeroizing::new).map_err(|error| {
        error.into_bytes().zeroize();
        not_text()
    })
}

fn run(command: &str) -> Result<Zeroizing<String>, String> {
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let text = child.stdout.take().map(read_text);
    let status = child.wait().map_err(|error| error.to_string())?;
    if !status.success() {
        return Err(format!("it ended with {status}"));
    }
    text.ok_or("it has no output")?.map_err(|error| error.to_string())
}

fn missing(origin: &str, reason: &str) -> Failure {
    Failure::new(Exit::Key, format!("{origin}: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_wins_over_the_environment_and_that_over_the_configuration() {
        let entry =
            Entry { path: "/".into(), password_file: None, password_command: Some("entry".into()), quota: None };
        let named = |origin| Some(Source { origin, is_ambient: false });
        let ambient = |origin| Some(Source { origin, is_ambient: true });
        let file = |path: &str| Origin::File(path.into());
        let command = |text: &str| Origin::Command(text.into());
        let none: &[(&str, &str)] = &[];
        for (cli_file, cli_command, environment, entry, expected) in [
            (None, None, none, None, None),
            (None, None, none, Some(&entry), named(command("entry"))),
            (None, None, &[("XOFS_PASSWORD", "x")], Some(&entry), ambient(Origin::Environment)),
            (None, None, &[("XOFS_PASSWORD", "")], Some(&entry), named(command("entry"))),
            (None, None, &[("XOFS_PASSWORD", "x"), ("XOFS_PASSWORD_COMMAND", "c")], None, ambient(command("c"))),
            (None, None, &[("XOFS_PASSWORD_FILE", "/e"), ("XOFS_PASSWORD_COMMAND", "c")], None, ambient(file("/e"))),
            (None, Some("cli"), &[("XOFS_PASSWORD_FILE", "/e")], Some(&entry), named(command("cli"))),
            (Some(Path::new("/cli")), Some("cli"), none, Some(&entry), named(file("/cli"))),
        ] {
            let lookup = |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
            assert_eq!(Source::choose(cli_file, cli_command, lookup, entry), expected, "{environment:?}");
        }
    }

    #[test]
    fn a_key_comes_from_a_command_and_a_failing_command_is_named() {
        let key = "0123456789abcdef0123456789abcdef";
        let source = |command: &str| Source { origin: Origin::Command(command.into()), is_ambient: false };
        assert!(source(&format!("echo {key}")).read().is_ok());
        for (command, part) in [("exit 3", "exit status: 3"), ("echo short", "32"), ("true", "32")] {
            let error = source(command).read().expect_err(command);
            assert!(format!("{error:#}").contains(part), "{error:#}");
            assert_eq!(super::super::exit::of(&error), Exit::Key, "{command}");
        }
    }

    #[test]
    fn a_line_can_be_corrected_and_given_up() {
        for (typed, line) in [
            (&b"abc\n"[..], Some("abc")),
            (b"abx\x7fc\r", Some("abc")),
            (b"wrong\x15abc\n", Some("abc")),
            (b"abc\x03", None),
            (b"", None),
        ] {
            let read = read_line(typed).expect("UTF-8");
            assert_eq!(read.as_ref().map(|line| line.as_str()), line);
        }
    }
}
