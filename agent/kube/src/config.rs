//! How the agent and the controller reach the API server and authenticate.

use std::fmt;
use std::path::PathBuf;

/// Where the credentials of a cluster are, and which namespace holds the objects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterConfig {
    /// The path of a kubeconfig. `None`: the service account of the pod that the process runs in.
    pub kubeconfig: Option<PathBuf>,
    /// The contexts of the kubeconfig, in order of preference. Empty: its current context.
    pub contexts: Vec<String>,
    /// The namespace of the objects. `None`: the namespace of the pod or of the context, else `lineside`.
    pub namespace: Option<String>,
}

impl fmt::Display for ClusterConfig {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kubeconfig {
            None => write!(formatter, "the cluster of this pod"),
            Some(path) => write!(formatter, "the cluster of {}", path.display()),
        }
    }
}
