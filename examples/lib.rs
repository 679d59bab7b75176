//! The examples live beside this file; see `README.md`. This crate only makes cargo build them with everything else.
