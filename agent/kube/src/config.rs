//! How the agent and the controller find their cluster.

use std::path::PathBuf;

/// A way into a cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterConfig {
    /// A kubeconfig; `None` is the service account of the pod this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// Contexts of the kubeconfig, in the order in which they are tried. None is its current one.
    pub contexts: Vec<String>,
    /// Where our objects are. `None` is the pod's or context's own namespace, else `lineside`.
    pub namespace: Option<String>,
}

impl std::fmt::Display for ClusterConfig {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.kubeconfig {
            None => write!(formatter, "the cluster this pod is in"),
            Some(path) => write!(formatter, "the cluster of {}", path.display()),
        }
    }
}
