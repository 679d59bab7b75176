//! The Kubernetes API as the agent and the controller use it. This crate is the only one that depends on `kube`.
//!
//! - [`ClusterClient`] calls the API server. Every call has a timeout. It does not retry; the caller decides when to,
//!   and can replace the connection first with [`ClusterClient::reconnect`], since a TCP connection through a network
//!   that was down can stay silent for a long time after the network is back.
//! - [`reflector`] lists and watches the objects of one kind.
//! - [`status_writer`] writes the node's status and publishes the Events that [`status_events`] computes.
//! - [`ClusterClient::rebind_volume`] makes the volume of the data folders available to a claim that was created again.
//! - [`Lease`] elects one of several controllers as leader.
//! - [`definitions`] are the custom resource definitions.
//!
//! Objects are read as dynamic objects and passed on as JSON, so that an object that this version cannot interpret is
//! one rejected object and not the failure of a list.
//!
//! Credentials come from the pod's service account or from a kubeconfig ([`ClusterConfig`]). A kubeconfig may name
//! several contexts that lead to the same objects: they are tried in order, and the first one is preferred as soon as
//! it answers again.

mod client;
mod cluster_state;
mod config;
mod connection;
mod crds;
mod error;
mod event;
mod lease;
mod metrics;
pub mod reflector;
mod resource;
pub mod status_events;
pub mod status_writer;
mod volume;

pub use client::{ClusterClient, parse_watch_message};
pub use cluster_state::{ClusterState, ClusterStatePublisher, ClusterStateReader};
pub use config::ClusterConfig;
pub use crds::definitions;
pub use error::{ClusterError, ClusterErrorKind};
pub use event::ClusterEvent;
pub use lease::{Leadership, Lease};
pub use metrics::KubeMetrics;
pub use resource::{NodeMetadata, Resource, ResourceKind, WatchChange, WatchChanges};
