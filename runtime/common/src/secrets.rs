//! Credentials, read from mounted files when they are needed, so that a rotated Secret counts without a restart. Nothing
//! in here is ever shown.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::files::read_bounded;

/// Bytes of one value at most; Kubernetes' own limit of a whole Secret.
const VALUE_BYTES_MAX: u64 = 1 << 20;

/// A folder with one file for each value: a mounted Secret, or none.
pub struct Secret {
    name: String,
    folder: Option<PathBuf>,
}

impl Secret {
    /// The secret that a manifest names.
    ///
    /// # Errors
    /// When it is not mounted.
    pub fn open(secrets: &Path, name: Option<&str>) -> Result<Self, String> {
        let Some(name) = name else { return Ok(Self { name: String::new(), folder: None }) };
        let folder = secrets.join(name);
        match folder.is_dir() {
            true => Ok(Self { name: name.to_owned(), folder: Some(folder) }),
            false => Err(format!(
                "the secret {name} that source.secretRef names is not there; mount it at {}",
                folder.display()
            )),
        }
    }

    /// The secret in a folder of its own.
    ///
    /// # Errors
    /// When the folder is not there.
    pub fn at(folder: &Path) -> Result<Self, String> {
        match folder.is_dir() {
            true => Ok(Self { name: folder.display().to_string(), folder: Some(folder.to_owned()) }),
            false => Err(format!("{} is no folder; mount the secret there", folder.display())),
        }
    }

    /// One value, without the line's end that editors add.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn get(&self, key: &str) -> Result<Option<String>, String> {
        let Some(folder) = &self.folder else { return Ok(None) };
        let path = folder.join(key);
        match read_bounded(&path, VALUE_BYTES_MAX) {
            Ok(bytes) => match String::from_utf8(bytes) {
                Ok(text) => Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned())),
                Err(_) => Err(format!("{} is no text", path.display())),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// A value that has to be there.
    ///
    /// # Errors
    /// When it is not.
    pub fn require(&self, key: &str) -> Result<String, String> {
        self.get(key)?.ok_or_else(|| format!("the secret {} has no {key}", self.name))
    }

    /// Whether the manifest names one.
    pub fn is_named(&self) -> bool {
        self.folder.is_some()
    }

    /// User and password, for a web server or for a registry. For a registry they may stand in a Docker configuration
    /// (`.dockerconfigjson`, as `kubectl create secret docker-registry` writes it).
    ///
    /// # Errors
    /// When it is half there, or is no login.
    pub fn login(&self, registry: Option<&str>) -> Result<Option<(String, String)>, String> {
        if let Some(user) = self.get("username")? {
            return Ok(Some((user, self.require("password")?)));
        }
        let Some(registry) = registry else { return Ok(None) };
        let Some(text) = self.get(".dockerconfigjson")? else { return Ok(None) };
        let wrong = || format!("the secret {} holds no Docker configuration with a login for {registry}", self.name);
        let config: serde_json::Value = serde_json::from_str(&text).map_err(|_| wrong())?;
        let entry = ["", "https://", "http://"]
            .iter()
            .find_map(|scheme| config["auths"].get(format!("{scheme}{registry}")))
            .ok_or_else(wrong)?;
        if let (Some(user), Some(password)) = (entry["username"].as_str(), entry["password"].as_str()) {
            return Ok(Some((user.to_owned(), password.to_owned())));
        }
        let decoded = entry["auth"].as_str().and_then(|auth| BASE64.decode(auth).ok()).ok_or_else(wrong)?;
        let decoded = String::from_utf8(decoded).map_err(|_| wrong())?;
        let (user, password) = decoded.split_once(':').ok_or_else(wrong)?;
        Ok(Some((user.to_owned(), password.to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_are_read_from_files_or_from_a_docker_configuration() {
        let root = tempfile::tempdir().unwrap();
        let put = |name: &str, file: &str, text: &str| {
            std::fs::create_dir_all(root.path().join(name)).unwrap();
            std::fs::write(root.path().join(name).join(file), text).unwrap();
        };
        put("plain", "username", "line\n");
        assert!(Secret::open(root.path(), Some("plain")).unwrap().login(None).unwrap_err().contains("no password"));
        put("plain", "password", "s3cret\n");
        let plain = Secret::open(root.path(), Some("plain")).unwrap();
        assert_eq!(plain.login(None), Ok(Some(("line".into(), "s3cret".into()))));
        let auth = BASE64.encode("line:s3:cret");
        put("docker", ".dockerconfigjson", &format!(r#"{{"auths": {{"registry:5000": {{"auth": "{auth}"}}}}}}"#));
        let docker = Secret::open(root.path(), Some("docker")).unwrap();
        assert_eq!(docker.login(Some("registry:5000")), Ok(Some(("line".into(), "s3:cret".into()))));
        let error = docker.login(Some("other")).unwrap_err();
        assert!(error.contains("other") && !error.contains("s3:cret"), "{error}");
        assert!(Secret::open(root.path(), Some("gone")).err().unwrap().contains("mount it at"));
        assert_eq!(Secret::open(root.path(), None).unwrap().login(None), Ok(None));
    }
}
