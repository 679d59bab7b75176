//! Attacks on a running agent: hostile models, rules, pictures, manifests and peers.

mod rules;
mod workers;
