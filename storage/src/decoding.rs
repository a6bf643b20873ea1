//! How long a thread decodes what it reads, decrypts and decompresses: told to who asked for it, who knows of no filter and no key, without
//! a word to those in between.
//!
//! Invariant: what is decoded is told once, to the innermost that asked.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// What a thread decoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Decoded {
    /// How long that took.
    pub time: Duration,
    /// Bytes that came of it.
    pub bytes: usize,
}

thread_local! {
    static DECODED: Cell<Decoded> = const { Cell::new(Decoded { time: Duration::ZERO, bytes: 0 }) };
}

/// Does something; returns also what this thread decoded for it, of which those around it are told nothing.
pub fn with_decoded<T>(act: impl FnOnce() -> T) -> (T, Decoded) {
    let before = DECODED.take();
    let result = act();
    (result, DECODED.replace(before))
}

/// Decodes something that has so many bytes then.
pub fn decoding<T>(bytes: usize, act: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let result = act();
    let before = DECODED.get();
    let time = before.time.saturating_add(begun.elapsed());
    DECODED.set(Decoded { time, bytes: before.bytes.saturating_add(bytes) });
    result
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    const PAUSE: Duration = Duration::from_millis(5);

    #[test]
    fn what_is_decoded_is_told_once_to_the_innermost_that_asked() {
        decoding(1, || sleep(PAUSE));
        let ((inner, between), outer) = with_decoded(|| {
            decoding(2, || sleep(PAUSE));
            let ((), inner) = with_decoded(|| decoding(4, || sleep(PAUSE)));
            let between = std::thread::spawn(|| with_decoded(|| ()).1).join().expect("it does nothing");
            decoding(8, || ());
            (inner, between)
        });
        assert_eq!((inner.bytes, outer.bytes, between), (4, 10, Decoded::default()));
        assert!(inner.time >= PAUSE && outer.time >= PAUSE, "{inner:?} {outer:?}");
    }
}
