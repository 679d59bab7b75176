//! The examples are in the folders next to this file; see `README.md`. This crate makes cargo build them with the workspace.
