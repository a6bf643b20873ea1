//! What the allocator does with large pieces of memory.

#![expect(unsafe_code, reason = "setting the allocator up is a system call without a safe wrapper")]

/// Pieces of so many bytes come from the system and go back to it: a decoded block is one, the file it is decoded from is not.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 2 << 20;

/// Free bytes that a heap may keep at its end: what decoding a block takes for a moment, so that it is not cleared each time.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 8 << 20;

/// Has large pieces of memory given back to the system as soon as they are free.
///
/// Left to itself, glibc learns from the first that is freed to keep them, in a heap for each of some sixteen threads, where
/// they lie among others and hold several times what is in use. Source: mallopt(3).
pub fn set_up() {
    // Where it is refused, more memory is used. Call it before there are threads.
    #[cfg(target_env = "gnu")]
    // SAFETY: the calls take two numbers and touch nothing of ours.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;

    /// Returns whether a piece of memory stays with the process after it was freed.
    fn is_kept(bytes: usize) -> bool {
        let piece = vec![1_u8; bytes];
        let address = piece.as_ptr().addr();
        let is_there = || is_mapped(&std::fs::read_to_string("/proc/self/maps").unwrap(), address);
        assert!(is_there());
        drop(piece);
        is_there()
    }

    fn is_mapped(maps: &str, address: usize) -> bool {
        maps.lines().any(|line| {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            (number(start)..number(end)).contains(&address)
        })
    }

    #[test]
    fn a_block_that_is_freed_goes_back_to_the_system_also_the_second_time() {
        set_up();
        const BLOCK: usize = (2 << 20) + 512;
        // From the first, the allocator would learn to keep the next ones.
        is_kept(BLOCK);
        let other = vec![1_u8; BLOCK];
        // Another test may get the same address meanwhile.
        assert!((0..20).any(|_| !is_kept(BLOCK)), "beside {}", other.len());
    }
}
