//! A simulated pool: as restrictive as a real one, with faults on demand.
