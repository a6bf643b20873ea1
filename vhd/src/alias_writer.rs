//! Writes aliases: the act by which an exploded VHD becomes a disk.

use storage::{ObjectPath, WritableStorage, publish};

use crate::alias;
use crate::error::{Error, ErrorKind, Result};

/// Makes `alias` lead to the VHD `data`, at once and durably; an alias of that name leads there instead.
///
/// At no moment is it empty: an empty alias leads to its own folder, which Xen Orchestra's cleaner then removes.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if `alias` does not have the name of one, or readers would refuse what it would hold;
/// [`ErrorKind::Escape`] if `data` is not below the folder of `alias`; else what the storage says.
pub fn write_alias(storage: &dyn WritableStorage, alias: &ObjectPath, data: &ObjectPath) -> Result<()> {
    if !alias::is_alias(alias.file_name()) {
        let reason = "a name that ends in '.alias.vhd' was expected of an alias";
        return Err(Error::new(ErrorKind::Unsupported, alias, reason));
    }
    let folder = alias.parent();
    let mut target = data.components();
    if !folder.components().all(|name| target.next() == Some(name)) {
        let reason = format!("an alias leads to a VHD below its own folder, not to '{data}'");
        return Err(Error::new(ErrorKind::Escape, alias, reason));
    }
    let text = target.collect::<Vec<_>>().join("/");
    match alias::parse(text.as_bytes()) {
        Ok(read) if read == text => Ok(publish(storage, alias, text.as_bytes())?),
        Ok(_) => Err(Error::new(ErrorKind::Unsupported, alias, format!("white space around '{data}' would be lost"))),
        Err(error) => Err(Error::new(ErrorKind::Unsupported, alias, error.reason)),
    }
}
