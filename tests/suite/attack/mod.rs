//! Attacks on a running agent: hostile models, rules, pictures, manifests and peers.

mod manifests;
mod rules;
mod workers;
