//! The loops, one owner each: `follow` looks at the manifests, `sync` talks to the cluster, `deploy` decides what runs, `capture` feeds frames, `infer`
//! looks at them, `publish` talks to the broker, `measure` says how things stand.

pub mod capture;
pub mod controller;
pub mod deploy;
pub mod follow;
pub mod infer;
pub mod measure;
mod order;
pub mod publish;
pub mod sync;

pub use order::{Order, Task};
