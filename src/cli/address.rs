//! Addresses of repositories: a path, `file:///path`, or a name of the configuration.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::config::{Config, Entry};
use super::exit::Failure;

/// Where a repository lies, and what the configuration says about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The path.
    pub path: PathBuf,
    /// As it was named on the command line; holds no secret.
    pub name: String,
    /// Its entry in the configuration.
    pub entry: Option<Entry>,
}

impl Place {
    /// Finds what `address` names. A word without `/` that the configuration knows is a name; write `./word` for a path.
    ///
    /// # Errors
    /// `Usage` for addresses of kinds that cannot be opened, with what to do instead.
    pub fn find(address: &OsStr, config: &Config) -> Result<Self> {
        let name = address.to_string_lossy().into_owned();
        if let Some(entry) = address.to_str().and_then(|name| config.repositories.get(name)) {
            return Ok(Self { path: path_of(OsStr::new(&entry.path))?, name, entry: Some(entry.clone()) });
        }
        let path = path_of(address)?;
        let is_word = !name.contains('/') && !path.exists();
        if is_word && !config.repositories.is_empty() {
            let known = config.repositories.keys().cloned().collect::<Vec<_>>().join(", ");
            return Err(Failure::new(
                super::exit::Exit::NoRepository,
                format!("'{name}' is neither a path nor a repository of the configuration, which knows: {known}"),
            )
            .into());
        }
        Ok(Self { path, name, entry: None })
    }
}

fn path_of(address: &OsStr) -> Result<PathBuf> {
    let Some(text) = address.to_str() else { return Ok(PathBuf::from(address)) };
    let Some((scheme, rest)) = scheme_of(text) else {
        if text.is_empty() {
            return Err(Failure::usage("the address of the repository is empty").into());
        }
        return Ok(PathBuf::from(address));
    };
    let failure = match scheme {
        "file" => {
            let path = rest.strip_prefix("//").unwrap_or(rest);
            if path.starts_with('/') {
                return Ok(Path::new(path).to_path_buf());
            }
            "an address of a folder is written file:///path, with three slashes".to_owned()
        }
        "nfs" => {
            let (host, path) = nfs_of(rest);
            format!(
                "NFS is mounted by the system: run 'mount -t nfs -o ro {host}:{path} /mnt/br', then give /mnt/br as the \
                 repository"
            )
        }
        "smb" | "cifs" => {
            let (host, share) = smb_of(rest);
            format!(
                "SMB is mounted by the system: run 'mount -t cifs -o ro,credentials=FILE //{host}/{share} /mnt/br', then \
                 give /mnt/br as the repository"
            )
        }
        "s3" | "s3+http" | "azure" | "azurite" | "azurite+http" => {
            format!("repositories on {scheme}:// are not supported yet; give a path, or copy what you need to one")
        }
        _ => format!("'{scheme}:' is not an address xofs knows; give a path, file:///path or a configured name"),
    };
    Err(Failure::usage(failure).into())
}

/// Splits `scheme:rest`; a path is never taken for one.
fn scheme_of(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let is_known = matches!(scheme, "file" | "nfs" | "smb" | "cifs");
    let is_word = !scheme.is_empty() && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-'));
    (is_known || is_word && rest.starts_with("//")).then_some((scheme, rest))
}

/// Host and path of `nfs://host:/path:subfolder?options`, the form XO prints, and of `nfs://host/path`.
fn nfs_of(rest: &str) -> (&str, String) {
    let rest = rest.trim_start_matches('/').split('?').next().unwrap_or_default();
    let (host, path) = rest.split_at(rest.find([':', '/']).unwrap_or(rest.len()));
    let path = path.trim_start_matches(':').split(':').next().unwrap_or_default();
    (if host.is_empty() { "HOST" } else { host }, if path.is_empty() { "/PATH".to_owned() } else { path.to_owned() })
}

/// Host and share of `smb://user:password@host\\share\0folder`, without who and the password.
fn smb_of(rest: &str) -> (String, String) {
    // The password may hold an '@' itself.
    let rest = rest.rsplit('@').next().unwrap_or_default().trim_start_matches(['/', '\\']);
    let mut parts = rest.split(['/', '\\', '\0', '?']).filter(|part| !part.is_empty());
    (parts.next().unwrap_or("HOST").to_owned(), parts.next().unwrap_or("SHARE").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(address: &str) -> Result<PathBuf, String> {
        let entry = Entry { path: "file:///srv/main".into(), password_file: None, password_command: None, quota: None };
        let config = Config { repositories: [("main".to_owned(), entry)].into(), ..Config::default() };
        Place::find(OsStr::new(address), &config).map(|place| place.path).map_err(|error| error.to_string())
    }

    #[test]
    fn paths_file_addresses_and_configured_names_are_found() {
        for (address, path) in [
            ("/srv/br", "/srv/br"),
            ("./main", "./main"),
            ("/srv/a:b", "/srv/a:b"),
            ("/srv/http://x", "/srv/http://x"),
            ("file:///srv/br", "/srv/br"),
            ("file:/srv/br", "/srv/br"),
            ("main", "/srv/main"),
        ] {
            assert_eq!(find(address), Ok(PathBuf::from(path)), "{address}");
        }
    }

    #[test]
    fn other_addresses_are_refused_with_what_to_do() {
        for (address, part) in [
            ("nfs://nas:/export/br:sub?useVhdDirectory=true", "mount -t nfs -o ro nas:/export/br /mnt/br"),
            ("nfs:nas:/export", "mount -t nfs -o ro nas:/export /mnt/br"),
            ("smb://bob:s3cr3t@nas\\share\\0sub", "//nas/share /mnt/br"),
            ("s3://key:s3cr3t@host/bucket/dir", "not supported yet"),
            ("s3+http://host/bucket", "not supported yet"),
            ("azure://account:s3cr3t@host/container", "not supported yet"),
            ("http://host/", "'http:' is not an address"),
            ("file://srv", "three slashes"),
            ("", "is empty"),
            ("other", "which knows: main"),
        ] {
            let error = find(address).expect_err(address);
            assert!(error.contains(part), "{address}: {error}");
            assert!(!error.contains("s3cr3t"), "{address}: {error}");
        }
    }
}
