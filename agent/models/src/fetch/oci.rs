//! OCI registries: finds the one blob of an artifact that is the model.
//!
//! Protocol: the OCI distribution specification 1.1 (`GET /v2/<name>/manifests/<reference>`, `.../blobs/<digest>`) with
//! the token authentication of Docker. ModelPack manifests and plain ORAS artifacts both name their files in
//! annotations; the blob is fetched as it is, and nothing is unpacked.
//!
//! This module uses the HTTP client of the [address policy](super::policy). The `oci-client` crate (0.18) creates a
//! client of its own, which follows any redirect and resolves names unchecked, and does not accept another one.

use std::collections::BTreeMap;

use futures_util::StreamExt as _;
use reqwest::header::{ACCEPT, HeaderMap, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;

use lineside_api::kinds::OciAddress;
use lineside_common::digest::Digest;
use lineside_common::secrets::Secret;

use super::credentials::{authorization, basic};
use super::error::{FetchErrorKind, TransferError};
use super::policy::AddressPolicy;
use super::transfer::Origin;

/// Upper bound of a manifest, which is also the limit of registries.
const MANIFEST_BYTES_MAX: usize = 4 << 20;
const MANIFEST_TYPES: &str =
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";
/// The ModelPack type of packed weights, plain or compressed.
const ARCHIVE_TYPE: &str = "application/vnd.cncf.model.weight.v1.tar";
const FILE_NAME_ANNOTATIONS: [&str; 2] = ["org.cncf.model.filepath", "org.opencontainers.image.title"];

#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    layers: Vec<Layer>,
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase")]
struct Layer {
    digest: String,
    size: u64,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// A registry, and how requests to it are made.
struct Registry<'a> {
    client: &'a Client,
    policy: &'a AddressPolicy,
    address: &'a OciAddress,
    /// User and password of the secret.
    login: Option<(String, String)>,
}

/// Finds the blob of an artifact. Returns its origin and its size in bytes.
pub(super) async fn origin(
    client: &Client,
    policy: &AddressPolicy,
    address: &OciAddress,
    secret: &Secret,
    expected: &Digest,
) -> Result<(Origin, u64), TransferError> {
    let login = secret.login(Some(&address.registry)).map_err(TransferError::secret)?;
    let registry = Registry { client, policy, address, login };
    let (response, base, headers) = registry.get_manifest().await?;
    let text = read_body(response).await?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|error| refused("the manifest of the artifact is not valid").caused_by(error))?;
    let layer = model_layer(&manifest.layers)?;
    if Digest::parse(&layer.digest).ok().as_ref() != Some(expected) {
        return Err(TransferError::permanent(
            FetchErrorKind::DigestMismatch,
            format!("the file of the artifact has the digest {}, but source.digest is {expected}", layer.digest),
        ));
    }
    // Plain files that ORAS pushes have the media type of an image layer, which does not identify an archive.
    if layer.media_type.starts_with(ARCHIVE_TYPE) {
        let message = format!("the file of the artifact is an archive ({}); push the .onnx file", layer.media_type);
        return Err(refused(message));
    }
    let url = join(&base, &format!("v2/{}/blobs/{expected}", address.repository))?;
    Ok((Origin::Http { client: client.clone(), url, headers }, layer.size))
}

/// The only layer, or the only one whose name ends in `.onnx`.
fn model_layer(layers: &[Layer]) -> Result<&Layer, TransferError> {
    let name = |layer: &Layer| FILE_NAME_ANNOTATIONS.iter().find_map(|key| layer.annotations.get(*key).cloned());
    let named: Vec<&Layer> =
        layers.iter().filter(|layer| name(layer).is_some_and(|name| name.ends_with(".onnx"))).collect();
    match (layers, named.as_slice()) {
        ([only], _) => Ok(only),
        (_, [only]) => Ok(only),
        (_, []) => Err(refused(format!("the artifact has {} files, none of them named *.onnx", layers.len()))),
        (_, several) => Err(refused(format!("the artifact has {} files named *.onnx, expected one", several.len()))),
    }
}

impl Registry<'_> {
    /// Requests the manifest, and once more with the credentials that the registry requires. Returns the response, the
    /// base address and the headers that succeeded.
    async fn get_manifest(&self) -> Result<(Response, Url, HeaderMap), TransferError> {
        let path = format!("v2/{}/manifests/{}", self.address.repository, self.address.reference);
        let get = async |base: &Url, headers: &HeaderMap| -> Result<reqwest::Result<Response>, TransferError> {
            let url = join(base, &path)?;
            Ok(self.client.get(url).header(ACCEPT, MANIFEST_TYPES).headers(headers.clone()).send().await)
        };
        let mut base = self.base("https")?;
        let mut headers = HeaderMap::new();
        let first = match get(&base, &headers).await? {
            // A login is never sent unencrypted after an encrypted attempt failed.
            Err(error) if error.is_connect() && self.policy.allow_http && self.login.is_none() => {
                base = self.base("http")?;
                get(&base, &headers).await?
            }
            response => response,
        };
        let mut response = first.map_err(TransferError::http)?;
        if response.status() == StatusCode::UNAUTHORIZED {
            headers = self.authenticate(&base, &response).await?;
            response = get(&base, &headers).await?.map_err(TransferError::http)?;
        }
        self.check_status(response.status())?;
        Ok((response, base, headers))
    }

    /// The base address of the registry, when the policy allows it.
    fn base(&self, scheme: &str) -> Result<Url, TransferError> {
        let base = Url::parse(&format!("{scheme}://{}/", self.address.registry))
            .map_err(|error| refused("the address of the registry is not valid").caused_by(error))?;
        self.policy.check(&base)?;
        Ok(base)
    }

    fn check_status(&self, status: StatusCode) -> Result<(), TransferError> {
        match status {
            StatusCode::OK => Ok(()),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.login.is_some() => {
                Err(credentials(format!("the registry refuses the credentials ({status}); check source.secretRef")))
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(credentials(format!("the registry requires credentials ({status}); set source.secretRef")))
            }
            StatusCode::NOT_FOUND => Err(TransferError::permanent(
                FetchErrorKind::NotFound,
                "the registry does not have the repository or the tag (404)",
            )),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                Err(TransferError::interrupted(format!("the registry responds with {status}")))
            }
            status => Err(refused(format!("the registry responds with {status}"))),
        }
    }

    /// Answers the challenge of a registry: with the login, or with a token that is requested with the login.
    async fn authenticate(&self, base: &Url, response: &Response) -> Result<HeaderMap, TransferError> {
        let login = self.login.as_ref().map(basic);
        let challenges: Vec<&str> =
            response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()).collect();
        for text in challenges {
            for challenge in http_auth::parse_challenges(text).unwrap_or_default() {
                if challenge.scheme.eq_ignore_ascii_case("basic") {
                    let login = login
                        .as_ref()
                        .ok_or_else(|| credentials("the registry requires credentials; set source.secretRef"))?;
                    return authorization(login);
                }
                if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    let parameter = |name: &str| {
                        let mut parameters = challenge.params.iter();
                        let found = parameters.find(|(key, _)| key.eq_ignore_ascii_case(name));
                        found.map(|(_, value)| value.to_unescaped())
                    };
                    let realm = parameter("realm").unwrap_or_default();
                    let query: Vec<(&str, String)> =
                        ["service", "scope"].iter().filter_map(|name| Some((*name, parameter(name)?))).collect();
                    return self.request_token(base, &realm, &query, login.as_deref()).await;
                }
            }
        }
        Err(credentials("the registry requires credentials of a kind that is not supported"))
    }

    /// Requests a token from the token service that the registry names.
    async fn request_token(
        &self,
        base: &Url,
        realm: &str,
        query: &[(&str, String)],
        login: Option<&str>,
    ) -> Result<HeaderMap, TransferError> {
        let mut url = Url::parse(realm)
            .map_err(|_| refused("the registry does not name a valid address of its token service"))?;
        self.policy.check(&url)?;
        // The registry chooses the token service; the login is sent there encrypted or not at all.
        if url.scheme() != "https" && (base.scheme() == "https" || url.host() != base.host()) {
            return Err(TransferError::permanent(
                FetchErrorKind::PolicyViolation,
                "the token service of the registry does not use encryption, which is not allowed",
            ));
        }
        url.query_pairs_mut().extend_pairs(query);
        let mut request = self.client.get(url);
        if let Some(login) = login {
            request = request.headers(authorization(login)?);
        }
        let response = request.send().await.map_err(TransferError::http)?;
        let status = response.status();
        if !status.is_success() {
            return Err(credentials(format!("the registry does not issue a token ({status}); check source.secretRef")));
        }
        let token: Token = serde_json::from_slice(&read_body(response).await?)
            .map_err(|error| refused("the response of the token service is not valid").caused_by(error))?;
        let token = token.token.or(token.access_token);
        let token = token.ok_or_else(|| refused("the response of the token service does not contain a token"))?;
        authorization(&format!("Bearer {token}"))
    }
}

async fn read_body(response: Response) -> Result<Vec<u8>, TransferError> {
    let mut bytes = Vec::new();
    let mut pieces = response.bytes_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(TransferError::http)?;
        if bytes.len() + piece.len() > MANIFEST_BYTES_MAX {
            return Err(refused(format!("the response of the registry has more than {MANIFEST_BYTES_MAX} bytes")));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

fn refused(message: impl Into<String>) -> TransferError {
    TransferError::permanent(FetchErrorKind::Refused, message)
}

fn credentials(message: impl Into<String>) -> TransferError {
    TransferError::permanent(FetchErrorKind::Credentials, message)
}

fn join(base: &Url, path: &str) -> Result<Url, TransferError> {
    base.join(path).map_err(|error| refused("the address of the artifact is not valid").caused_by(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: Option<(&str, &str)>) -> Layer {
        let annotations = name.map(|(key, name)| (key.to_owned(), name.to_owned())).into_iter().collect();
        Layer { digest: String::new(), size: 1, media_type: String::new(), annotations }
    }

    #[test]
    fn the_model_is_the_only_file_or_the_only_onnx_file() {
        let model = layer(Some((FILE_NAME_ANNOTATIONS[0], "models/m.onnx")));
        let titled = layer(Some((FILE_NAME_ANNOTATIONS[1], "m.onnx")));
        let readme = layer(Some((FILE_NAME_ANNOTATIONS[1], "README.md")));
        assert!(model_layer(&[layer(None)]).is_ok());
        let layers = [readme.clone(), model.clone()];
        assert_eq!(model_layer(&layers).unwrap().annotations, model.annotations);
        assert!(model_layer(&[readme, layer(None)]).err().unwrap().to_string().contains("none"));
        assert!(model_layer(&[model, titled]).err().unwrap().to_string().contains("2 files"));
        assert!(model_layer(&[]).is_err());
    }
}
