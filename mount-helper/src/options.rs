//! The options after `-o`.

use crate::Error;

/// Options that mount(8), systemd and habit add, and that change nothing here: the mount is always read-only, nodev and
/// nosuid, keeps no access times, and when it is mounted is not its own affair. `rw` is among them: mount(8) tells its
/// helpers so whenever nobody said `ro`.
pub const IGNORED: &[&str] = &[
    "_netdev",
    "async",
    "atime",
    "auto",
    "default_permissions",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "group",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "noexec",
    "nofail",
    "nogroup",
    "noiversion",
    "nolazytime",
    "nomand",
    "noowner",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nouser",
    "nousers",
    "owner",
    "relatime",
    "ro",
    "rw",
    "silent",
    "strictatime",
    "suid",
    "sync",
    "user",
    "users",
];

/// Options of which any value is ignored: notes of systemd and mount(8) to themselves.
const IGNORED_PREFIXES: &[&str] = &["x-", "X-", "comment=", "user=", "uhelper=", "helper="];

/// What the options ask of `xofs mount`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Other users may enter (`allow_other`).
    pub allow_other: bool,
    /// Guest symlinks are shown as text files (`inert_symlinks`).
    pub inert_symlinks: bool,
    /// Whose numbers guests' files have, as `xofs mount --owner` takes it (`owner=`).
    pub owner: Option<String>,
    /// Processes that read the disks of guests, at most (`guest_workers=`).
    pub guest_workers: Option<u16>,
    /// Owner of everything (`uid=`).
    pub uid: Option<u32>,
    /// Group of everything (`gid=`).
    pub gid: Option<u32>,
    /// Permission bits taken away (`umask=`, octal).
    pub umask: Option<u32>,
    /// File that holds the encryption key (`password_file=`).
    pub password_file: Option<String>,
    /// Command that prints the encryption key (`password_command=`).
    pub password_command: Option<String>,
    /// Memory for decoded blocks, as `xofs mount --cache` takes it (`cache=`).
    pub cache: Option<String>,
    /// Seconds a request may wait for the repository, 0 for ever (`timeout=`).
    pub timeout: Option<u32>,
    /// What was accepted but is not as asked, one sentence each.
    pub warnings: Vec<String>,
}

impl Options {
    /// Takes the options of one `-o`; a later one wins. With `sloppy` (`mount -s`), unknown ones are only warned of.
    ///
    /// A comma inside double quotes does not separate, and quotes around a value are dropped, as in mount(8).
    ///
    /// # Errors
    /// Names the first option that is unknown or whose value cannot be understood.
    pub fn add(&mut self, text: &str, sloppy: bool) -> Result<(), Error> {
        for option in split(text)? {
            if let Err(error) = self.add_one(&option) {
                match error {
                    Error::UnknownOption(_) if sloppy => self.warnings.push(format!("{error}; ignored")),
                    _ => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn add_one(&mut self, option: &str) -> Result<(), Error> {
        if IGNORED.contains(&option) || IGNORED_PREFIXES.iter().any(|prefix| option.starts_with(prefix)) {
            return Ok(());
        }
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(unquote(value))),
            None => (option, None),
        };
        match (name, value) {
            ("allow_other", None) => self.allow_other = true,
            ("inert_symlinks", None) => self.inert_symlinks = true,
            ("uid", Some(value)) => self.uid = Some(number(name, value, 10)?),
            ("gid", Some(value)) => self.gid = Some(number(name, value, 10)?),
            ("umask", Some(value)) => {
                let umask = number(name, value, 8)?;
                if umask > 0o777 {
                    return Err(bad_value(name, value, "three octal digits, as in umask=077"));
                }
                self.umask = Some(umask);
            }
            ("password_file", Some(value)) => self.password_file = Some(text(name, value)?),
            ("password_command", Some(value)) => self.password_command = Some(text(name, value)?),
            ("cache", Some(value)) => self.cache = Some(text(name, value)?),
            ("timeout", Some(value)) => self.timeout = Some(number(name, value, 10)?),
            ("owner", Some(value @ ("guest" | "mounter"))) => self.owner = Some(value.to_owned()),
            ("owner", Some(value)) => return Err(bad_value(name, value, "'guest' or 'mounter'")),
            ("guest_workers", Some(value)) => match number(name, value, 10)? {
                workers @ 1..=256 => self.guest_workers = u16::try_from(workers).ok(),
                _ => return Err(bad_value(name, value, "a number from 1 to 256")),
            },
            (
                "guest_workers" | "uid" | "gid" | "umask" | "password_file" | "password_command" | "cache" | "timeout",
                None,
            ) => {
                return Err(Error::Value(format!("option '{name}' needs a value, as in '{name}=...'")));
            }
            ("allow_other" | "inert_symlinks", Some(_)) => {
                return Err(Error::Value(format!("option '{name}' takes no value")));
            }
            ("password" | "pass" | "key", _) => {
                return Err(Error::Value(format!(
                    "option '{name}' would show the key to everybody: put it into a file and give password_file=PATH"
                )));
            }
            ("remount", None) => {
                return Err(Error::Value("'remount' is not supported: unmount, then mount again".to_owned()));
            }
            // The value is left out: it may be a secret under a misspelt name.
            _ => return Err(Error::UnknownOption(name.to_owned())),
        }
        Ok(())
    }

    /// Returns the same options as arguments of `xofs mount`.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        if self.allow_other {
            arguments.push("--allow-other".to_owned());
        }
        if self.inert_symlinks {
            arguments.push("--inert-symlinks".to_owned());
        }
        let values = [
            ("uid", self.uid.map(|uid| uid.to_string())),
            ("gid", self.gid.map(|gid| gid.to_string())),
            ("timeout", self.timeout.map(|seconds| seconds.to_string())),
            ("owner", self.owner.clone()),
            ("guest-workers", self.guest_workers.map(|workers| workers.to_string())),
            ("umask", self.umask.map(|umask| format!("{umask:03o}"))),
            ("password-file", self.password_file.clone()),
            ("password-command", self.password_command.clone()),
            // Left as an option, so that a wrong size is said in the words of options.
            ("options", self.cache.as_ref().map(|cache| format!("cache={cache}"))),
        ];
        arguments.extend(values.into_iter().filter_map(|(name, value)| Some(format!("--{name}={}", value?))));
        arguments
    }
}

fn split(text: &str) -> Result<Vec<String>, Error> {
    let mut parts = vec![String::new()];
    let mut is_quoted = false;
    for character in text.chars() {
        match character {
            ',' if !is_quoted => parts.push(String::new()),
            _ => {
                is_quoted ^= character == '"';
                parts.last_mut().expect("starts with one part").push(character);
            }
        }
    }
    if is_quoted {
        return Err(Error::Value("the options after -o hold an opening quote without its closing one".to_owned()));
    }
    Ok(parts.into_iter().map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect())
}

fn unquote(value: &str) -> &str {
    value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
}

fn number(name: &str, value: &str, radix: u32) -> Result<u32, Error> {
    let is_digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    let kind = if radix == 8 { "an octal number" } else { "a number (names are not looked up)" };
    match u32::from_str_radix(value, radix) {
        Ok(number) if is_digits => Ok(number),
        _ => Err(bad_value(name, value, kind)),
    }
}

fn text(name: &str, value: &str) -> Result<String, Error> {
    if value.is_empty() {
        return Err(Error::Value(format!("option '{name}' has an empty value")));
    }
    Ok(value.to_owned())
}

fn bad_value(name: &str, value: &str, expected: &str) -> Error {
    Error::Value(format!("option '{name}={value}': expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Options, String> {
        let mut options = Options::default();
        options.add(text, false).map_err(|error| error.to_string())?;
        Ok(options)
    }

    #[test]
    fn what_mount_and_systemd_add_changes_nothing() {
        for text in [
            "",
            "ro",
            "ro,dev,suid",
            // What mount(8) passes if it is given no option at all.
            "rw",
            "ro,_netdev,nofail,noauto,x-systemd.automount,x-systemd.idle-timeout=10min",
            "defaults,noatime,nodev,nosuid,noexec,users,user=alice,comment=x-gvfs-show,X-mount.mkdir=0700",
            ",,ro,,",
        ] {
            assert_eq!(parsed(text), Ok(Options::default()), "{text}");
        }
        for option in IGNORED {
            assert_eq!(parsed(option), Ok(Options::default()), "{option}");
        }
        assert!(IGNORED.is_sorted(), "the table is kept sorted");
    }

    #[test]
    fn each_option_of_ours_becomes_an_argument() {
        for (text, arguments) in [
            ("allow_other", vec!["--allow-other"]),
            ("inert_symlinks", vec!["--inert-symlinks"]),
            ("uid=1000,gid=0100", vec!["--uid=1000", "--gid=100"]),
            ("umask=022", vec!["--umask=022"]),
            ("umask=7", vec!["--umask=007"]),
            ("password_file=/etc/xofs/key", vec!["--password-file=/etc/xofs/key"]),
            ("password_command=\"pass show a,b\",ro", vec!["--password-command=pass show a,b"]),
            ("password_command=cut -d= -f2 /k", vec!["--password-command=cut -d= -f2 /k"]),
            ("cache=1GiB", vec!["--options=cache=1GiB"]),
            ("timeout=5", vec!["--timeout=5"]),
            ("owner,owner=guest,guest_workers=4", vec!["--owner=guest", "--guest-workers=4"]),
            ("uid=1,uid=2", vec!["--uid=2"]),
        ] {
            assert_eq!(parsed(text).expect(text).arguments(), arguments, "{text}");
        }
    }

    #[test]
    fn a_wrong_option_is_named() {
        for (text, message) in [
            ("ro,colour=blue", "unknown mount option 'colour'"),
            ("allow_others", "unknown mount option 'allow_others'"),
            ("ro=1", "unknown mount option 'ro'"),
            ("uid", "option 'uid' needs a value, as in 'uid=...'"),
            ("uid=alice", "option 'uid=alice': expected a number (names are not looked up)"),
            ("gid=+5", "option 'gid=+5': expected a number (names are not looked up)"),
            ("umask=999", "option 'umask=999': expected an octal number"),
            ("umask=1777", "option 'umask=1777': expected three octal digits, as in umask=077"),
            ("allow_other=1", "option 'allow_other' takes no value"),
            ("cache=", "option 'cache' has an empty value"),
            ("remount,ro", "'remount' is not supported: unmount, then mount again"),
            ("password_command=\"a", "the options after -o hold an opening quote without its closing one"),
        ] {
            assert_eq!(parsed(text), Err(message.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_key_given_as_an_option_is_refused_without_being_repeated() {
        for text in ["password=hunter2", "passwrd=hunter2"] {
            assert!(!parsed(text).expect_err("refused").contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn a_sloppy_mount_is_warned_of_unknown_options() {
        let mut options = Options::default();
        options.add("colour=blue,allow_other", true).expect("sloppy");
        assert_eq!(options.warnings, ["unknown mount option 'colour'; ignored"]);
        assert!(options.allow_other);
        assert!(options.add("uid=blue", true).is_err(), "a wrong value is not sloppiness");
    }
}
