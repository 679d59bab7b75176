//! Credentials in mounted files. They are read each time they are used, so that a rotated Secret takes effect without a
//! restart. No value of a secret appears in a log or in an error.

use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::files::read_bounded;

/// Largest value in bytes: Kubernetes' limit of a whole Secret.
const VALUE_BYTES_MAX: u64 = 1 << 20;
/// The key of a Docker configuration, as `kubectl create secret docker-registry` writes it.
const DOCKER_CONFIG: &str = ".dockerconfigjson";

/// Why a secret cannot be used. The messages name the secret, the file and the key, and never a value.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The folder of a secret that a manifest names does not exist.
    #[error("the secret {name} of source.secretRef is not mounted; mount it at {}", .folder.display())]
    NotMounted {
        /// Name of the secret.
        name: String,
        /// Where the secret has to be mounted.
        folder: PathBuf,
    },
    /// A configured folder does not exist.
    #[error("{} is not a folder; mount the secret there", .0.display())]
    NotAFolder(PathBuf),
    /// The file of a value cannot be read.
    #[error("{} cannot be read", .path.display())]
    Unreadable {
        /// File of the value.
        path: PathBuf,
        /// The error of the file system.
        #[source]
        source: io::Error,
    },
    /// The file of a value does not contain UTF-8 text.
    #[error("{} is not UTF-8 text", .0.display())]
    NotText(PathBuf),
    /// A required value does not exist.
    #[error("the secret {name} has no {key}")]
    MissingKey {
        /// Name or folder of the secret.
        name: String,
        /// The missing key, which is also its file name.
        key: String,
    },
    /// The Docker configuration has no usable login for a registry.
    #[error("the secret {name} has no Docker configuration with a login for {registry}")]
    NoRegistryLogin {
        /// Name or folder of the secret.
        name: String,
        /// Host and port of the registry.
        registry: String,
    },
}

/// The kind of a [`SecretError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretErrorKind {
    /// The folder of the secret does not exist.
    NotMounted,
    /// A file exists and cannot be read, or has the wrong content.
    Unusable,
    /// A required value does not exist.
    Incomplete,
}

impl SecretError {
    /// The kind, to branch on.
    pub fn kind(&self) -> SecretErrorKind {
        match self {
            Self::NotMounted { .. } | Self::NotAFolder(_) => SecretErrorKind::NotMounted,
            Self::Unreadable { .. } | Self::NotText(_) => SecretErrorKind::Unusable,
            Self::MissingKey { .. } | Self::NoRegistryLogin { .. } => SecretErrorKind::Incomplete,
        }
    }
}

/// A folder with one file for each value, as Kubernetes mounts a Secret; or no secret, which has no values.
pub struct Secret {
    name: String,
    folder: Option<PathBuf>,
}

impl Secret {
    /// The secret that a manifest names, mounted below the folder `secrets`; without a name, an empty secret.
    ///
    /// # Errors
    /// [`SecretError::NotMounted`].
    pub fn open(secrets: &Path, name: Option<&str>) -> Result<Self, SecretError> {
        let Some(name) = name else { return Ok(Self { name: String::new(), folder: None }) };
        let (name, folder) = (name.to_owned(), secrets.join(name));
        if folder.is_dir() {
            Ok(Self { name, folder: Some(folder) })
        } else {
            Err(SecretError::NotMounted { name, folder })
        }
    }

    /// The secret in a configured folder.
    ///
    /// # Errors
    /// [`SecretError::NotAFolder`].
    pub fn at(folder: &Path) -> Result<Self, SecretError> {
        if folder.is_dir() {
            Ok(Self { name: folder.display().to_string(), folder: Some(folder.to_owned()) })
        } else {
            Err(SecretError::NotAFolder(folder.to_owned()))
        }
    }

    /// One value, without trailing line ends, which editors add. `None` when the secret has no such key.
    ///
    /// # Errors
    /// [`SecretError::Unreadable`] and [`SecretError::NotText`].
    pub fn get(&self, key: &str) -> Result<Option<String>, SecretError> {
        let Some(folder) = &self.folder else { return Ok(None) };
        let path = folder.join(key);
        match read_bounded(&path, VALUE_BYTES_MAX) {
            Ok(bytes) => match String::from_utf8(bytes) {
                Ok(text) => Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned())),
                Err(_) => Err(SecretError::NotText(path)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(SecretError::Unreadable { path, source }),
        }
    }

    /// One value that is required.
    ///
    /// # Errors
    /// [`SecretError::MissingKey`], and those of [`Secret::get`].
    pub fn require(&self, key: &str) -> Result<String, SecretError> {
        self.get(key)?.ok_or_else(|| self.missing(key))
    }

    /// The error for a value that does not exist.
    pub fn missing(&self, key: &str) -> SecretError {
        SecretError::MissingKey { name: self.name.clone(), key: key.to_owned() }
    }

    /// Whether this is a named secret, and not the empty one.
    pub fn is_named(&self) -> bool {
        self.folder.is_some()
    }

    /// User and password: the keys `username` and `password`, or for a `registry` its entry in a Docker configuration
    /// (`.dockerconfigjson`). `None` when the secret has neither.
    ///
    /// # Errors
    /// [`SecretError::MissingKey`] for a user without a password, [`SecretError::NoRegistryLogin`], and those of
    /// [`Secret::get`].
    pub fn login(&self, registry: Option<&str>) -> Result<Option<(String, String)>, SecretError> {
        if let Some(user) = self.get("username")? {
            return Ok(Some((user, self.require("password")?)));
        }
        let Some(registry) = registry else { return Ok(None) };
        let Some(text) = self.get(DOCKER_CONFIG)? else { return Ok(None) };
        let error = || SecretError::NoRegistryLogin { name: self.name.clone(), registry: registry.to_owned() };
        docker_login(&text, registry).map(Some).ok_or_else(error)
    }
}

/// The login for a registry in the text of a Docker configuration.
fn docker_login(text: &str, registry: &str) -> Option<(String, String)> {
    let config: serde_json::Value = serde_json::from_str(text).ok()?;
    let entry =
        ["", "https://", "http://"].iter().find_map(|scheme| config["auths"].get(format!("{scheme}{registry}")))?;
    if let (Some(user), Some(password)) = (entry["username"].as_str(), entry["password"].as_str()) {
        return Some((user.to_owned(), password.to_owned()));
    }
    let decoded = String::from_utf8(BASE64.decode(entry["auth"].as_str()?).ok()?).ok()?;
    let (user, password) = decoded.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
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
        let error = Secret::open(root.path(), Some("plain")).unwrap().login(None).unwrap_err();
        assert_eq!(error.kind(), SecretErrorKind::Incomplete);
        assert!(error.to_string().contains("no password"), "{error}");
        put("plain", "password", "s3cret\n");
        let plain = Secret::open(root.path(), Some("plain")).unwrap();
        assert_eq!(plain.login(None).unwrap(), Some(("line".into(), "s3cret".into())));
        let auth = BASE64.encode("line:s3:cret");
        put("docker", ".dockerconfigjson", &format!(r#"{{"auths": {{"registry:5000": {{"auth": "{auth}"}}}}}}"#));
        let docker = Secret::open(root.path(), Some("docker")).unwrap();
        assert_eq!(docker.login(Some("registry:5000")).unwrap(), Some(("line".into(), "s3:cret".into())));
        let error = docker.login(Some("other")).unwrap_err().to_string();
        assert!(error.contains("other") && !error.contains("s3:cret"), "{error}");
    }

    #[test]
    fn missing_and_unusable_secrets_have_different_kinds() {
        let root = tempfile::tempdir().unwrap();
        let error = Secret::open(root.path(), Some("absent")).err().unwrap();
        assert_eq!(error.kind(), SecretErrorKind::NotMounted);
        assert!(error.to_string().contains("mount it at"), "{error}");
        assert!(!Secret::open(root.path(), None).unwrap().is_named());
        assert_eq!(Secret::open(root.path(), None).unwrap().login(None).unwrap(), None);
        std::fs::write(root.path().join("token"), [0xFF, 0xFE]).unwrap();
        std::fs::create_dir(root.path().join("folder")).unwrap();
        let secret = Secret::at(root.path()).unwrap();
        assert_eq!(secret.get("token").unwrap_err().kind(), SecretErrorKind::Unusable);
        assert_eq!(secret.get("folder").unwrap_err().kind(), SecretErrorKind::Unusable);
        assert_eq!(secret.get("absent").unwrap(), None);
    }
}
