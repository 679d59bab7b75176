//! Attacks on a running agent: hostile models, rules, pictures, manifests and peers.

mod authority;
mod manifests;
mod rules;
mod trust;
mod workers;
