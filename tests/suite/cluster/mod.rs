//! The agent as a DaemonSet and the controller as a Deployment on a real Kubernetes with a real kubelet (`kit/lab/`), and
//! the agent against a scripted API server.

mod api_faults;
mod external_agent;
mod manifests;
mod pods;
mod rbac;
mod unreachable_nodes;
mod workflow;
