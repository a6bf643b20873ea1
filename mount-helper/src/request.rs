//! The command line of a mount helper.

use std::ffi::{OsStr, OsString};
use std::fmt;

use crate::Options;

/// Why a command line was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The form of the command line is wrong.
    Usage(String),
    /// An option after `-o` that nobody knows, by name.
    UnknownOption(String),
    /// An option that is known, with a value that cannot be.
    Value(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(message) | Self::Value(message) => f.write_str(message),
            Self::UnknownOption(name) => write!(f, "unknown mount option '{}'", name.escape_debug()),
        }
    }
}

impl std::error::Error for Error {}

/// What mount(8) asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The repository: a path, an address, or a name of the configuration file.
    pub source: OsString,
    /// Where to mount.
    pub directory: OsString,
    /// What stood after `-o`.
    pub options: Options,
    /// Everything but the mount itself (`-f`).
    pub is_fake: bool,
    /// Says what is done (`-v`).
    pub is_verbose: bool,
}

impl Request {
    /// Parses the arguments of a mount helper, without the program's name.
    ///
    /// Options may stand before, between and after the two names, as single letters together (`-fv`) or with their value
    /// attached (`-oro`). `-n` and `-t` are accepted and mean nothing here.
    /// Source: mount(8), "EXTERNAL HELPERS".
    ///
    /// # Errors
    /// [`Error`], as a sentence for people.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, Error> {
        let mut names = Vec::new();
        let mut texts = Vec::new();
        let (mut is_sloppy, mut is_fake, mut is_verbose, mut only_names) = (false, false, false, false);
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let letters = match argument.to_str() {
                _ if only_names => None,
                Some("--") => {
                    only_names = true;
                    continue;
                }
                Some(text) => text.strip_prefix('-').filter(|letters| !letters.is_empty()),
                None => None,
            };
            let Some(letters) = letters else {
                names.push(argument);
                continue;
            };
            for (at, letter) in letters.char_indices() {
                match letter {
                    's' => is_sloppy = true,
                    'f' => is_fake = true,
                    'v' => is_verbose = true,
                    // No mtab is written anyway; read-only is what always happens.
                    'n' | 'r' | 'w' | 'i' => {}
                    'o' | 't' | 'N' => {
                        let value = match &letters[at + 1..] {
                            "" => arguments
                                .next()
                                .ok_or_else(|| Error::Usage(format!("'-{letter}' needs a value")))?
                                .into_string()
                                .map_err(|_| Error::Usage(format!("the value of '-{letter}' is not UTF-8")))?,
                            attached => attached.to_owned(),
                        };
                        match letter {
                            'o' => texts.push(value),
                            'N' => {
                                return Err(Error::Usage(
                                    "mounting into another namespace (-N) is not supported: use nsenter(1)".to_owned(),
                                ));
                            }
                            _ => {}
                        }
                        break;
                    }
                    _ => {
                        return Err(Error::Usage(format!(
                            "unknown option '-{}'; usage: mount.xofs REPOSITORY DIRECTORY [-sfnv] [-o OPTIONS]",
                            letter.escape_debug()
                        )));
                    }
                }
            }
        }
        let mut options = Options::default();
        for text in &texts {
            options.add(text, is_sloppy)?;
        }
        match <[OsString; 2]>::try_from(names) {
            Ok([source, directory]) => Ok(Self { source, directory, options, is_fake, is_verbose }),
            Err(names) => Err(Error::Usage(format!(
                "expected a repository and a directory, got {} names; usage: mount.xofs REPOSITORY DIRECTORY [-sfnv] \
                 [-o OPTIONS]",
                names.len()
            ))),
        }
    }

    /// Returns the arguments that make `xofs` do it, and return when the mount can be read.
    #[must_use]
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["mount".into(), "--daemon".into()];
        arguments.extend(self.options.arguments().into_iter().map(OsString::from));
        arguments.push("--".into());
        arguments.extend([self.source.clone(), self.directory.clone()]);
        arguments
    }

    /// Whether a command line of `xofs` is meant for a mount helper, as `mount -t fuse.xofs` makes it
    /// (`xofs REPOSITORY DIRECTORY -o ro,dev,suid`). `is_subcommand` knows the commands.
    pub fn is_meant_by(arguments: &[OsString], is_subcommand: impl Fn(&str) -> bool) -> bool {
        let Some(first) = arguments.first() else { return false };
        let is_command = first.to_str().is_some_and(|first| first.starts_with('-') || is_subcommand(first));
        let has_options = arguments.iter().any(|argument| argument == OsStr::new("-o"));
        let is_path = first.as_encoded_bytes().contains(&b'/');
        !is_command && arguments.len() >= 2 && (has_options || is_path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn every_order_of_the_arguments_is_understood() {
        for (line, expected) in [
            ("/srv/br /mnt", "mount --daemon -- /srv/br /mnt"),
            ("/srv/br /mnt -o ro,_netdev", "mount --daemon -- /srv/br /mnt"),
            ("/srv/br /mnt -v -n -o allow_other,uid=5", "mount --daemon --allow-other --uid=5 -- /srv/br /mnt"),
            ("-o uid=5 /srv/br -o gid=6 /mnt", "mount --daemon --uid=5 --gid=6 -- /srv/br /mnt"),
            ("/srv/br /mnt -sfnvoumask=077", "mount --daemon --umask=077 -- /srv/br /mnt"),
            ("/srv/br /mnt -t xofs -o rw", "mount --daemon -- /srv/br /mnt"),
            ("main /mnt -o ro,dev,suid", "mount --daemon -- main /mnt"),
            ("-o ro -- -odd /mnt", "mount --daemon -- -odd /mnt"),
        ] {
            let request = Request::parse(words(line)).expect(line);
            assert_eq!(request.arguments(), words(expected), "{line}");
        }
        let request = Request::parse(words("a /b -fv")).expect("parses");
        assert!(request.is_fake && request.is_verbose);
    }

    #[test]
    fn a_wrong_command_line_is_refused() {
        for (line, part) in [
            ("", "got 0 names"),
            ("/srv/br", "got 1 names"),
            ("a b c", "got 3 names"),
            ("a b -o", "'-o' needs a value"),
            ("a b -x", "unknown option '-x'"),
            ("a b -N /proc/1/ns/mnt", "another namespace"),
            ("a b -o colour", "unknown mount option 'colour'"),
        ] {
            let error = Request::parse(words(line)).expect_err(line).to_string();
            assert!(error.contains(part), "{line}: {error}");
        }
    }

    #[test]
    fn xofs_called_by_mount_is_told_from_xofs_called_by_a_person() {
        for (line, expected) in [
            ("/srv/br /mnt -o ro,dev,suid", true),
            ("main /mnt -o ro,dev,suid", true),
            ("/srv/br /mnt", true),
            ("mount /srv/br /mnt -o ro", false),
            ("lisst main", false),
            ("--help", false),
            ("-r /srv/br list", false),
            ("/srv/br", false),
            ("", false),
        ] {
            assert_eq!(Request::is_meant_by(&words(line), |word| word == "mount"), expected, "{line}");
        }
    }
}
