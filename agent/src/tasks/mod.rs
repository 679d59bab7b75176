//! The loops, one owner each: `deploy` decides what runs, `capture` feeds frames, `infer` looks at them, `publish` talks to
//! the broker, `measure` says how things stand.

pub mod capture;
pub mod deploy;
pub mod infer;
pub mod measure;
mod order;
pub mod publish;

pub use order::{Order, Task};
