//! Where secrets come from, the encryption key of a repository and the password of a pool: the command line, then the
//! environment, then the configuration, then a person.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::termios::{self, LocalModes, OptionalActions};
use storage::EncryptionKey;
use zeroize::{Zeroize, Zeroizing};

use super::exit::{Exit, Failure};

/// No key is longer; what is longer is another file by mistake.
const LIMIT: u64 = 4096;

/// A kind of secret.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// What it is called.
    name: &'static str,
    /// The variables that name a file, name a command, and hold it.
    variables: [&'static str; 3],
}

/// The encryption key of a repository.
pub static KEY: Kind =
    Kind { name: "encryption key", variables: ["XOFS_PASSWORD_FILE", "XOFS_PASSWORD_COMMAND", "XOFS_PASSWORD"] };
/// The password of a pool's user.
pub static OF_POOL: Kind = Kind {
    name: "password of the pool",
    variables: ["XOFS_POOL_PASSWORD_FILE", "XOFS_POOL_PASSWORD_COMMAND", "XOFS_POOL_PASSWORD"],
};

/// A file and a command of which either may hold a secret.
pub type Places<'a> = (Option<&'a Path>, Option<&'a str>);

/// Where to take a secret from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    kind: &'static Kind,
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
    /// A variable.
    Environment,
}

impl Source {
    /// Chooses among what the command line, the environment and the configuration say; a file comes before a command.
    pub fn choose(
        kind: &'static Kind,
        command_line: Places,
        environment: impl Fn(&str) -> Option<String>,
        configuration: Places,
    ) -> Option<Self> {
        let of =
            |file: Option<PathBuf>, command: Option<String>| file.map(Origin::File).or(command.map(Origin::Command));
        let named = |(file, command): Places| {
            let origin = of(file.map(Path::to_path_buf), command.map(str::to_owned))?;
            Some(Self { kind, origin, is_ambient: false })
        };
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        let ambient = |origin| Self { kind, origin, is_ambient: true };
        let [file, command, variable] = kind.variables;
        named(command_line)
            .or_else(|| of(set(file).map(PathBuf::from), set(command)).map(ambient))
            .or_else(|| set(variable).map(|_| ambient(Origin::Environment)))
            .or_else(|| named(configuration))
    }

    /// Reads the encryption key.
    ///
    /// # Errors
    /// `Key` if it cannot be had or is no key; the error says where it was to come from, never what was found.
    pub fn read(&self) -> Result<EncryptionKey> {
        EncryptionKey::from_text(&self.text()?).with_context(|| self.act())
    }

    /// Reads a secret as it is, without the end of its line.
    ///
    /// # Errors
    /// `Key` if it cannot be had.
    pub fn line(&self) -> Result<Zeroizing<String>> {
        let mut text = self.text()?;
        let len = text.trim_end_matches(['\r', '\n']).len();
        text.truncate(len);
        Ok(text)
    }

    fn text(&self) -> Result<Zeroizing<String>> {
        let missing = |reason: &str| Failure::new(Exit::Key, format!("{}: {reason}", self.act()));
        Ok(match &self.origin {
            Origin::File(path) => File::open(path).and_then(read_text).map_err(|error| missing(&error.to_string()))?,
            Origin::Command(command) => run(command).map_err(|error| missing(&error))?,
            Origin::Environment => Zeroizing::new(std::env::var(self.kind.variables[2]).unwrap_or_default()),
        })
    }

    /// Says what reading it is.
    fn act(&self) -> String {
        let name = self.kind.name;
        match &self.origin {
            Origin::File(path) => format!("read the {name} from '{}'", path.display()),
            Origin::Command(command) => format!("take the {name} from the command '{command}'"),
            Origin::Environment => format!("take the {name} from {}", self.kind.variables[2]),
        }
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

/// Asks a person for a secret; `None` if there is no terminal.
pub fn ask_text(prompt: &str) -> Result<Option<Zeroizing<String>>> {
    if !io::stderr().is_terminal() {
        return Ok(None);
    }
    let Ok(terminal) = File::options().read(true).write(true).open("/dev/tty") else { return Ok(None) };
    match ask_on(&terminal, prompt).context("ask on the terminal")? {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_wins_over_the_environment_and_that_over_the_configuration() {
        let entry: Places = (None, Some("entry"));
        let nowhere: Places = (None, None);
        let named = |origin| Some(Source { kind: &KEY, origin, is_ambient: false });
        let ambient = |origin| Some(Source { kind: &KEY, origin, is_ambient: true });
        let file = |path: &str| Origin::File(path.into());
        let command = |text: &str| Origin::Command(text.into());
        let none: &[(&str, &str)] = &[];
        for (command_line, environment, entry, expected) in [
            (nowhere, none, nowhere, None),
            (nowhere, none, entry, named(command("entry"))),
            (nowhere, &[("XOFS_PASSWORD", "x")], entry, ambient(Origin::Environment)),
            (nowhere, &[("XOFS_PASSWORD", "")], entry, named(command("entry"))),
            (nowhere, &[("XOFS_POOL_PASSWORD", "x")], nowhere, None),
            (nowhere, &[("XOFS_PASSWORD", "x"), ("XOFS_PASSWORD_COMMAND", "c")], nowhere, ambient(command("c"))),
            (nowhere, &[("XOFS_PASSWORD_FILE", "/e"), ("XOFS_PASSWORD_COMMAND", "c")], nowhere, ambient(file("/e"))),
            ((None, Some("cli")), &[("XOFS_PASSWORD_FILE", "/e")], entry, named(command("cli"))),
            ((Some(Path::new("/cli")), Some("cli")), none, entry, named(file("/cli"))),
        ] {
            let lookup = |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
            assert_eq!(Source::choose(&KEY, command_line, lookup, entry), expected, "{environment:?}");
        }
    }

    #[test]
    fn a_key_comes_from_a_command_and_a_failing_command_is_named() {
        let key = "0123456789abcdef0123456789abcdef";
        let source = |command: &str| Source { kind: &KEY, origin: Origin::Command(command.into()), is_ambient: false };
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
