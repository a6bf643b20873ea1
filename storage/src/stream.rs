//! Objects that are read or written once, from the beginning to the end, in bounded memory.
//!
//! That is all that can be done with a long object that is encrypted as a whole; others are streams of positioned reads and
//! writes.

use std::sync::Arc;

use crate::{Object, Result, WritableObject};

/// An object that is read in order.
pub trait Stream: Send {
    /// Returns how many bytes it had when it was opened, as they are read.
    fn size(&self) -> u64;

    /// Fills `buffer` with the bytes that come next; returns how many there were, less than asked only at the end.
    ///
    /// Of an encrypted object the bytes are right once its end was read, and may be anything until then: what is made of them
    /// must not be believed before.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Authentication`] at the end of an object that is damaged; else what the storage says. Nothing can be
    /// read after an error.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize>;
}

/// A new object that is written in order.
pub trait WritableStream: Send {
    /// Writes the bytes that follow those that it has.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NoSpace`], or what the storage says; some of the bytes may then be written, and nothing can follow.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;

    /// Ends it; returns once its bytes would outlive a power cut. One that is dropped instead is a part of an object.
    ///
    /// # Errors
    /// As for [`WritableStream::append`] and [`WritableObject::sync`].
    fn finish(self: Box<Self>) -> Result<()>;
}

/// Reads an open object in order.
pub(crate) fn of_object(object: Arc<dyn Object>) -> Result<Box<dyn Stream>> {
    let size = object.stat()?.size;
    Ok(Box::new(Positioned { object, size, at: 0 }))
}

/// Writes a new, empty object in order.
pub(crate) fn into_object(object: Arc<dyn WritableObject>) -> Box<dyn WritableStream> {
    Box::new(WritePositioned { object, at: 0 })
}

struct Positioned {
    object: Arc<dyn Object>,
    size: u64,
    at: u64,
}

impl Stream for Positioned {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let read = self.object.read_at(self.at, buffer)?;
        self.at += read as u64;
        Ok(read)
    }
}

struct WritePositioned {
    object: Arc<dyn WritableObject>,
    at: u64,
}

impl WritableStream for WritePositioned {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.object.write_at(self.at, bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.object.sync()
    }
}
