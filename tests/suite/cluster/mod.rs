//! The agent as a DaemonSet and the controller as a Deployment, on a real Kubernetes with a real kubelet (`kit/lab.rs`).

mod abroad;
mod faults;
mod manifests;
mod nodes;
mod pods;
mod rights;
mod story;
