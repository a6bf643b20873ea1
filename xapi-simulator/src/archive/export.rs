//! What `GET /export/` sends.

use std::io::{self, BufWriter, Write};

use flate2::write::GzEncoder;

use super::ova::Ova;
use super::zstd::ZstdWriter;
use super::{OVA, PIECE_BYTES, tar, xxhash};
use crate::content::Content;
use crate::layer::{BLOCK_BYTES, is_zero};
use crate::transfer::{Hook, Piece};

/// How an archive is compressed, as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// Gzip, quickly.
    Gzip,
    /// Zstandard, quickly.
    Zstd,
}

/// A disk in an archive.
#[derive(Debug, Clone, Copy)]
pub struct Disk<'a> {
    /// Its reference within the archive, which is its folder: `Ref:4`.
    pub reference: &'a str,
    /// What it holds.
    pub content: &'a Content,
}

/// How an archive is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// The compression.
    pub compression: Compression,
    /// After how many pieces of zeroes in a row an empty piece is written, as a server does after five silent seconds.
    pub empty_piece_after: Option<u64>,
}

/// An archive about to be sent.
#[derive(Debug)]
pub struct Export<'a> {
    ova: String,
    disks: Vec<Disk<'a>>,
    options: Options,
}

impl<'a> Export<'a> {
    /// Gathers what is sent; the disks need no order.
    pub fn new(ova: &Ova, mut disks: Vec<Disk<'a>>, options: Options) -> Self {
        disks.sort_by_key(|disk| disk.reference);
        Self { ova: ova.to_xml(), disks, options }
    }

    /// Sends all; `hook` is called before each piece that is written.
    ///
    /// # Errors
    /// Of `to` and of `hook`.
    pub fn send(&self, to: &mut dyn Write, hook: Hook<'_>) -> io::Result<()> {
        match self.options.compression {
            Compression::None => {
                let mut to = BufWriter::new(to);
                self.write(&mut to, hook)?;
                to.flush()
            }
            Compression::Gzip => {
                let mut encoder = GzEncoder::new(to, flate2::Compression::fast());
                self.write(&mut encoder, hook)?;
                encoder.finish()?.flush()
            }
            Compression::Zstd => {
                let mut encoder = ZstdWriter::new(to)?;
                self.write(&mut encoder, hook)?;
                encoder.finish()?.flush()
            }
        }
    }

    fn write(&self, to: &mut dyn Write, hook: Hook<'_>) -> io::Result<()> {
        tar::append(to, OVA, self.ova.as_bytes())?;
        let mut state = Progress { number: 0, done: self.ova.len() as u64 };
        for disk in &self.disks {
            self.write_disk(*disk, to, hook, &mut state)?;
        }
        tar::finish(to)
    }

    fn write_disk(
        &self,
        disk: Disk<'_>,
        to: &mut dyn Write,
        hook: Hook<'_>,
        progress: &mut Progress,
    ) -> io::Result<()> {
        let size = disk.content.size();
        let present = disk.content.present();
        let mut buffer = vec![0; PIECE_BYTES];
        let (mut number, mut silent) = (0_u64, 0);
        for offset in (0..size).step_by(PIECE_BYTES) {
            let length = usize::try_from(size - offset).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            let bytes = &mut buffer[..length];
            let block = u32::try_from(offset / BLOCK_BYTES).map_err(io::Error::other)?;
            let is_edge = offset == 0 || offset + length as u64 == size;
            let is_absent = present.binary_search(&block).is_err();
            if !is_absent || is_edge {
                disk.content.read(offset, bytes).map_err(io::Error::other)?;
            }
            if !is_edge && (is_absent || is_zero(bytes)) {
                number += 1;
                silent += 1;
                if Some(silent) == self.options.empty_piece_after {
                    append_piece(to, disk.reference, number, &[])?;
                    number += 1;
                    silent = 0;
                }
                continue;
            }
            let length = length as u64;
            hook(&Piece { number: progress.number, offset, length, done: progress.done, total: None })?;
            append_piece(to, disk.reference, number, bytes)?;
            progress.number += 1;
            progress.done += length;
            number += 1;
            silent = 0;
        }
        Ok(())
    }
}

/// What was sent of all disks, without what the container adds.
struct Progress {
    number: u64,
    done: u64,
}

fn append_piece(to: &mut dyn Write, folder: &str, number: u64, bytes: &[u8]) -> io::Result<()> {
    let name = format!("{folder}/{number:08}");
    tar::append(to, &name, bytes)?;
    tar::append(to, &format!("{name}.xxhash"), xxhash(bytes).as_bytes())
}
