//! The settings of camera sources: allowed folders and hosts, and the memory for decoding.
//!
//! The default of the allowed folders depends on who writes the manifests. With `--manifests`, it is somebody with write access to
//! this node: the folder that contains the manifests folder is allowed, so that models and frames can lie beside it. In a
//! cluster, it is somebody who may have no access to any node: only the data folder is allowed, and what the administrator of
//! the agent mounts and lists. The agent's own state and secrets are excluded in every case.

use std::path::{Path, PathBuf};

use lineside_api::names::ConfigErrors;
use lineside_capture::{CameraHosts, SourcePolicy};
use lineside_common::file_roots::FileRoots;

use super::settings::{ConfigLayers, DATA_FOLDER_ENTRIES, DesiredSource};

/// Default of [`SourcesConfig::decode_bytes`].
const DECODE_MIB_DEFAULT: u64 = 256;
/// Where Kubernetes mounts the service account's token.
const KUBERNETES_SECRETS: &str = "/var/run/secrets";
/// The settings that name files and folders with secrets.
const SECRET_SETTINGS: [&str; 4] = ["secrets-dir", "mqtt-secret", "peer-token-file", "kubeconfig"];
/// What camera sources may read, and the memory for decoding their frames.
#[derive(Debug, Clone)]
pub struct SourcesConfig {
    /// Allowed folders and hosts.
    pub policy: SourcePolicy,
    /// Memory for all frames that are decoded at the same time, in bytes. Default: 256 MiB.
    pub decode_bytes: u64,
}

impl SourcesConfig {
    /// The defaults for this source of the desired state and this data folder.
    pub fn new(desired_state: &DesiredSource, data_dir: &Path) -> Self {
        Self {
            policy: SourcePolicy {
                files: FileRoots::new(default_roots(desired_state, data_dir), own_files(data_dir)),
                cameras: CameraHosts::any(),
            },
            decode_bytes: DECODE_MIB_DEFAULT << 20,
        }
    }
}

/// Reads the settings. Invalid ones are added to the errors and have their default.
pub(super) fn resolve(
    layers: &ConfigLayers,
    desired_state: &DesiredSource,
    data_dir: &Path,
    errors: &mut ConfigErrors,
) -> SourcesConfig {
    let mut sources = SourcesConfig::new(desired_state, data_dir);
    let roots: Vec<PathBuf> = layers.list("file-roots").map(PathBuf::from).collect();
    for root in roots.iter().filter(|root| !root.is_absolute()) {
        errors.add(layers.get("file-roots").1, format!("`{}` is not an absolute path", root.display()));
    }
    let roots = if roots.is_empty() { default_roots(desired_state, data_dir) } else { roots };
    let secrets = SECRET_SETTINGS.into_iter().filter_map(|setting| layers.text(setting)).map(PathBuf::from);
    sources.policy.files = FileRoots::new(roots, own_files(data_dir).into_iter().chain(secrets));
    if layers.text("camera-hosts").is_some() {
        let hosts = CameraHosts::parse(layers.list("camera-hosts"));
        if let Some(hosts) = errors.take(&layers.get("camera-hosts").1, hosts) {
            sources.policy.cameras = hosts;
        }
    }
    sources.decode_bytes = layers.number("decode-mib", DECODE_MIB_DEFAULT, 1..=1 << 20, errors) << 20;
    sources
}

fn default_roots(desired_state: &DesiredSource, data_dir: &Path) -> Vec<PathBuf> {
    let beside_manifests = match desired_state {
        DesiredSource::Folder(folder) => {
            let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.clone());
            // The root folder is the parent of a folder such as /manifests, and would allow every file.
            let parent = folder.parent().filter(|parent| parent.parent().is_some()).map(Path::to_owned);
            Some(parent.unwrap_or(folder))
        }
        DesiredSource::Cluster(_) => None,
    };
    beside_manifests.into_iter().chain([data_dir.to_owned()]).collect()
}

/// The state and the secrets of the agent, which no manifest may name.
fn own_files(data_dir: &Path) -> Vec<PathBuf> {
    let state = DATA_FOLDER_ENTRIES.iter().map(|name| data_dir.join(name));
    state.chain([PathBuf::from(KUBERNETES_SECRETS)]).collect()
}

#[cfg(test)]
mod tests {
    use lineside_kube::ClusterConfig;

    use super::*;

    #[test]
    fn files_beside_the_manifests_are_allowed_but_not_the_whole_node() {
        let of = |folder: &str| default_roots(&DesiredSource::Folder(folder.into()), Path::new("/data"));
        assert_eq!(of("/etc/lineside/manifests"), [PathBuf::from("/etc/lineside"), "/data".into()]);
        assert_eq!(of("/manifests"), [PathBuf::from("/manifests"), "/data".into()]);
        assert_eq!(of("/"), [PathBuf::from("/"), "/data".into()]);
        let cluster = DesiredSource::Cluster(ClusterConfig { kubeconfig: None, contexts: Vec::new(), namespace: None });
        assert_eq!(default_roots(&cluster, Path::new("/data")), [PathBuf::from("/data")]);
    }

    #[test]
    fn the_state_of_the_agent_is_excluded() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        std::fs::create_dir_all(data.join("spool")).unwrap();
        for name in ["spool/1", "last-good.json", "frame.jpg"] {
            std::fs::write(data.join(name), name).unwrap();
        }
        let files = SourcesConfig::new(&DesiredSource::Folder(folder.path().join("manifests")), &data).policy.files;
        assert!(files.open(&data.join("frame.jpg")).is_ok());
        for name in ["spool/1", "last-good.json"] {
            assert!(files.open(&data.join(name)).is_err(), "{name}");
        }
        assert!(files.open(Path::new("/etc/passwd")).is_err());
    }
}
