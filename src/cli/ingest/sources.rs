//! What `xofs ingest` reads: images, or a backup of another repository.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;

use super::IngestArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::text::Shown;
use crate::cli::{Global, open};
use crate::ingest::{Changes, ImageOptions, PieceSet, Source, Wanted};
use crate::probe::Subject;
use crate::repository::Selection;

/// Returns what is read, and of which VM it is.
///
/// # Errors
/// `Usage` if it is named wrongly; what keeps an image or a backup from being opened.
pub fn wanted(global: &Global, arguments: &IngestArgs) -> Result<Wanted> {
    if let (Some(from), Some(what)) = (&arguments.from, &arguments.backup) {
        let place = open::place(global, Some(from))?;
        let repository = open::repository(global, &place, open::SMALL_CACHE)?;
        let (vm, backup) = match repository.select(what)? {
            Selection::Backup(vm, backup) => (vm, backup),
            Selection::Vm(vm) => {
                let newest = repository.backups(&vm.id)?.last().cloned();
                let none = || Failure::new(Exit::Failed, format!("'{}' has no backup", Shown(what)));
                (vm, newest.ok_or_else(none)?)
            }
            Selection::Disk(..) | Selection::Loose(_) => {
                let message = format!("'{}' is a disk: a backup is mirrored as a whole, VM/BACKUP", Shown(what));
                return Err(Failure::usage(message).into());
            }
        };
        let from = Some(Subject::repository(place.name));
        return Ok(Wanted { from, ..Wanted::mirror(&repository, &vm, &backup)? });
    }
    let options = ImageOptions { allow_backing: arguments.allow_backing, bitmap: arguments.bitmap.clone() };
    let (mut disks, mut changed) = (Vec::with_capacity(arguments.disks.len()), BTreeMap::new());
    for disk in &arguments.disks {
        let (name, source, blocks) = source(disk, &options)?;
        changed.extend(blocks.map(|blocks| (name.clone(), Arc::new(blocks))));
        disks.push((name, source));
    }
    Ok(Wanted {
        vm: arguments.vm.clone().unwrap_or_default(),
        name: arguments.name.clone(),
        disks,
        time: arguments.time,
        changes: arguments.bitmap_since.map(|since| Changes { since, disks: changed }),
        ..Wanted::default()
    })
}

/// Opens the image of `NAME=IMAGE`; returns the blocks that its bitmap says have changed, too.
fn source(disk: &OsString, options: &ImageOptions) -> Result<(String, Source, Option<PieceSet>)> {
    let shown = disk.to_string_lossy();
    let Some((name, image)) = disk.to_str().and_then(|disk| disk.split_once('=')) else {
        return Err(Failure::usage(format!("--disk takes NAME=IMAGE, like xvda=disk.raw, not '{shown}'")).into());
    };
    let (source, changed) = match (image, nbd::Uri::parse(image)) {
        (_, Some(uri)) => Source::open_nbd(&uri.map_err(Failure::usage)?, options)?,
        ("-", None) if options.bitmap.is_some() => {
            return Err(Failure::usage("standard input has no dirty bitmaps: leave --bitmap out").into());
        }
        ("-", None) => (Source::stdin()?, None),
        (path, None) => Source::open(Path::new(path), options)?,
    };
    Ok((name.to_owned(), source, changed))
}
