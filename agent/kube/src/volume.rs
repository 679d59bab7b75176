//! The persistent volume of the data folders.
//!
//! A volume is bound to one claim by the claim's uid. When the namespace is deleted and created again, the new claim has another
//! uid, and Kubernetes keeps the volume in the phase `Released` so that nobody else reads the data. This volume is reserved for
//! one claim by namespace and name, so its data belongs to the new claim too: the uid is removed, and Kubernetes binds the two.

use k8s_openapi::api::core::v1::PersistentVolume;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::client::ClusterClient;
use crate::connection::CALL_TIMEOUT;
use crate::error::ClusterError;

impl ClusterClient {
    /// Makes the persistent volume of this name available again if its claim, which bears the same name in the namespace of
    /// this client, was deleted. Returns whether the volume was changed; it is not if it does not exist.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`](crate::ClusterErrorKind).
    pub async fn rebind_volume(&self, name: &str) -> Result<bool, ClusterError> {
        let api: Api<PersistentVolume> = Api::all(self.client().await?);
        let Some(volume) = self.call(CALL_TIMEOUT, api.get_opt(name)).await? else { return Ok(false) };
        let Some(patch) = patch_of_released(&volume, self.namespace(), name) else { return Ok(false) };
        self.call(CALL_TIMEOUT, api.patch(name, &PatchParams::default(), &Patch::Merge(&patch))).await?;
        Ok(true)
    }
}

/// The patch that removes the deleted claim from a volume that is reserved for the claim `name` of `namespace`. `None` unless
/// Kubernetes has found that the claim no longer exists. The patch fails if the volume has changed since it was read.
fn patch_of_released(volume: &PersistentVolume, namespace: &str, name: &str) -> Option<Value> {
    let phase = volume.status.as_ref()?.phase.as_deref()?;
    let claim = volume.spec.as_ref()?.claim_ref.as_ref()?;
    let is_ours = claim.namespace.as_deref() == Some(namespace) && claim.name.as_deref() == Some(name);
    (phase == "Released" && is_ours).then(|| {
        json!({
            "metadata": {"resourceVersion": volume.metadata.resource_version},
            "spec": {"claimRef": {"uid": null, "resourceVersion": null}},
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(phase: &str, namespace: &str, name: &str) -> PersistentVolume {
        serde_json::from_value(json!({
            "metadata": {"name": "frames", "resourceVersion": "41"},
            "spec": {"claimRef": {"namespace": namespace, "name": name, "uid": "a-b"}},
            "status": {"phase": phase},
        }))
        .unwrap()
    }

    #[test]
    fn only_a_released_volume_of_the_own_claim_is_patched() {
        let patch = |phase, namespace, name| patch_of_released(&volume(phase, namespace, name), "plant", "frames");
        let released = patch("Released", "plant", "frames").unwrap();
        assert_eq!(released["metadata"]["resourceVersion"], "41");
        assert_eq!(released["spec"]["claimRef"], json!({"uid": null, "resourceVersion": null}));
        for phase in ["Bound", "Available", "Pending", "Failed"] {
            assert_eq!(patch(phase, "plant", "frames"), None, "{phase}");
        }
        assert_eq!(patch("Released", "other", "frames"), None);
        assert_eq!(patch("Released", "plant", "other"), None);
        assert_eq!(patch_of_released(&PersistentVolume::default(), "plant", "frames"), None);
    }
}
