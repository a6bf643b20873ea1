//! A guest at work: files made, changed, renamed and removed, so that a journal always holds some of it.
