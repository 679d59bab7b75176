//! The loops, one owner each: `deploy` decides what runs, `capture` feeds frames, `infer` looks at them, `publish` talks to
//! the broker.

pub mod capture;
pub mod deploy;
pub mod infer;
pub mod publish;
