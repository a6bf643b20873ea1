//! Zeroes to be written where a hole cannot be.

/// Returns `len` zeroes, in pieces.
pub fn zeroes(mut len: u64) -> impl Iterator<Item = &'static [u8]> {
    static ZEROES: [u8; 1 << 20] = [0; 1 << 20];
    std::iter::from_fn(move || {
        let now = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROES.len());
        len -= now as u64;
        (now > 0).then(|| &ZEROES[..now])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_as_long_as_was_asked() {
        for len in [0, 1, 1 << 20, (1 << 20) + 1, 3 << 20] {
            assert_eq!(zeroes(len).map(|piece| piece.len() as u64).sum::<u64>(), len);
            assert!(zeroes(len).all(|piece| !piece.is_empty()));
        }
    }
}
