//! Attacks on a running agent: hostile models, rules, pictures, manifests and peers.

mod authority;
mod data_folder;
mod manifests;
mod rules;
mod trust;
mod workers;
