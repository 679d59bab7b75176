//! Attacks on a running agent: hostile models, rules, pictures, manifests and peers.

mod authority;
mod cameras;
mod data_folder;
mod http;
mod manifests;
mod pictures;
mod rules;
mod trust;
mod workers;
