//! OCI registries: from a tag or a digest to the one blob that is the model.
//!
//! Protocol: the OCI distribution specification 1.1 (`GET /v2/<name>/manifests/<reference>`, `.../blobs/<digest>`) with
//! Docker's token authentication. Both ModelPack manifests and plain ORAS artifacts name their files in annotations; the
//! blob is fetched as it is, and nothing is unpacked.
//!
//! This speaks HTTP through the client of [`policy`](super::policy). The `oci-client` crate (0.18) makes a client of its
//! own, which follows any redirect and resolves names unchecked, and takes no other.

use std::collections::BTreeMap;

use futures_util::StreamExt as _;
use reqwest::header::{ACCEPT, HeaderMap, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;

use super::policy::{Policy, describe};
use super::transfer::{Failure, Origin, authorization, basic};
use lineside_api::kinds::OciAddress;
use lineside_common::digest::Digest;
use lineside_common::secrets::Secret;

/// Bytes of a manifest at most, as registries limit it.
const MANIFEST_BYTES_MAX: usize = 4 << 20;
const MANIFEST_TYPES: &str =
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";
/// ModelPack's type of weights that are packed, plain or compressed.
const ARCHIVE_TYPE: &str = "application/vnd.cncf.model.weight.v1.tar";
const FILE_NAMES: [&str; 2] = ["org.cncf.model.filepath", "org.opencontainers.image.title"];

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

/// Finds the blob of an artifact; returns where it can be had and its size.
pub(super) async fn origin(
    client: &Client,
    policy: &Policy,
    address: &OciAddress,
    secret: &Secret,
    wanted: &Digest,
) -> Result<(Origin, u64), Failure> {
    let login = secret
        .login(Some(&address.registry))
        .map_err(|error| Failure::lasting(lineside_common::error_chain(&error)))?;
    let path = format!("v2/{}/manifests/{}", address.repository, address.reference);
    let (answer, base, headers) = ask(client, policy, address, &path, login.as_ref()).await?;
    let text = body(answer).await?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|error| Failure::lasting(format!("the artifact's manifest cannot be read: {error}")))?;
    let layer = model_layer(&manifest.layers).map_err(Failure::lasting)?;
    if Digest::parse(&layer.digest).as_ref() != Ok(wanted) {
        return Err(Failure::lasting(format!(
            "the artifact's file has the digest {}, but source.digest asks for {wanted}",
            layer.digest
        )));
    }
    // Plain files that ORAS pushes bear the type of an image's layer, so that one says nothing.
    if layer.media_type.starts_with(ARCHIVE_TYPE) {
        return Err(Failure::lasting(format!(
            "the artifact's file is an archive ({}); push the .onnx file as it is",
            layer.media_type
        )));
    }
    let url = join(&base, &format!("v2/{}/blobs/{wanted}", address.repository))?;
    Ok((Origin::Http { client: client.clone(), url, headers }, layer.size))
}

/// The only layer, or the only one whose name ends in `.onnx`.
fn model_layer(layers: &[Layer]) -> Result<&Layer, String> {
    let name = |layer: &Layer| FILE_NAMES.iter().find_map(|key| layer.annotations.get(*key).cloned());
    let named: Vec<&Layer> =
        layers.iter().filter(|layer| name(layer).is_some_and(|name| name.ends_with(".onnx"))).collect();
    match (layers, named.as_slice()) {
        ([only], _) => Ok(only),
        (_, [only]) => Ok(only),
        (_, []) => Err(format!("the artifact has {} files, and none is called *.onnx", layers.len())),
        (_, several) => Err(format!("the artifact has {} files called *.onnx; one is expected", several.len())),
    }
}

/// Asks for a path, and once more with the credentials the registry wants to see. Returns what worked.
async fn ask(
    client: &Client,
    policy: &Policy,
    address: &OciAddress,
    path: &str,
    login: Option<&(String, String)>,
) -> Result<(Response, Url, HeaderMap), Failure> {
    let parse = |scheme: &str| {
        Url::parse(&format!("{scheme}://{}/", address.registry)).map_err(|error| Failure::lasting(error.to_string()))
    };
    let mut base = parse("https")?;
    policy.check(&base).map_err(Failure::lasting)?;
    let get = async |base: &Url, headers: &HeaderMap| -> Result<reqwest::Result<Response>, Failure> {
        let url = join(base, path)?;
        Ok(client.get(url).header(ACCEPT, MANIFEST_TYPES).headers(headers.clone()).send().await)
    };
    let mut headers = HeaderMap::new();
    let first = match get(&base, &headers).await? {
        // A login is never tried without encryption where encryption was meant.
        Err(error) if error.is_connect() && policy.allow_http && login.is_none() => {
            base = parse("http")?;
            policy.check(&base).map_err(Failure::lasting)?;
            get(&base, &headers).await?
        }
        answer => answer,
    };
    let mut answer = first.map_err(|error| sent(&error))?;
    if answer.status() == StatusCode::UNAUTHORIZED {
        headers = authenticate(client, policy, &base, &answer, login).await?;
        answer = get(&base, &headers).await?.map_err(|error| sent(&error))?;
    }
    match answer.status() {
        StatusCode::OK => Ok((answer, base, headers)),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Failure::lasting(match login {
            Some(_) => format!("the registry refuses the login ({}); check source.secretRef", answer.status()),
            None => format!("the registry wants a login ({}); name one in source.secretRef", answer.status()),
        })),
        StatusCode::NOT_FOUND => Err(Failure::lasting("the registry has no such repository or tag (404)")),
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            Err(Failure { reason: format!("the registry says {status}"), is_passing: true, begin_anew: false })
        }
        status => Err(Failure::lasting(format!("the registry says {status}"))),
    }
}

/// Answers a registry's challenge: a login as it is, or a token that is fetched with it.
async fn authenticate(
    client: &Client,
    policy: &Policy,
    base: &Url,
    answer: &Response,
    login: Option<&(String, String)>,
) -> Result<HeaderMap, Failure> {
    let login = login.map(basic);
    let wanted: Vec<String> = answer
        .headers()
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok().map(str::to_owned))
        .collect();
    for text in &wanted {
        for challenge in http_auth::parse_challenges(text).unwrap_or_default() {
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                let login = login
                    .as_ref()
                    .ok_or_else(|| Failure::lasting("the registry wants a login; name one in source.secretRef"))?;
                return authorization(login).map_err(Failure::lasting);
            }
            if challenge.scheme.eq_ignore_ascii_case("bearer") {
                let value = |name: &str| {
                    challenge
                        .params
                        .iter()
                        .find(|(key, _)| key.eq_ignore_ascii_case(name))
                        .map(|(_, value)| value.to_unescaped())
                };
                let realm = value("realm").unwrap_or_default();
                let query: Vec<(&str, String)> =
                    ["service", "scope"].iter().filter_map(|name| Some((*name, value(name)?))).collect();
                return token(client, policy, base, &realm, &query, login.as_deref()).await;
            }
        }
    }
    Err(Failure::lasting("the registry wants credentials of a kind that is not known here"))
}

async fn token(
    client: &Client,
    policy: &Policy,
    base: &Url,
    realm: &str,
    query: &[(&str, String)],
    basic: Option<&str>,
) -> Result<HeaderMap, Failure> {
    let mut url = Url::parse(realm).map_err(|_| Failure::lasting("the registry names no place for its tokens"))?;
    policy.check(&url).map_err(|why| Failure::lasting(format!("the registry's tokens: {why}")))?;
    // A registry decides where its tokens are made; the login goes there encrypted or not at all.
    if url.scheme() != "https" && (base.scheme() == "https" || url.host() != base.host()) {
        return Err(Failure::lasting("the registry's tokens are to be had without encryption, which is refused"));
    }
    url.query_pairs_mut().extend_pairs(query);
    let mut request = client.get(url);
    if let Some(basic) = basic {
        request = request.headers(authorization(basic).map_err(Failure::lasting)?);
    }
    let answer = request.send().await.map_err(|error| sent(&error))?;
    if !answer.status().is_success() {
        return Err(Failure::lasting(format!(
            "the registry gives no token ({}); check source.secretRef",
            answer.status()
        )));
    }
    let token: Token = serde_json::from_slice(&body(answer).await?)
        .map_err(|_| Failure::lasting("the registry's answer for a token cannot be read"))?;
    let token = token.token.or(token.access_token).ok_or_else(|| Failure::lasting("the registry gives no token"))?;
    authorization(&format!("Bearer {token}")).map_err(Failure::lasting)
}

async fn body(answer: Response) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let mut pieces = answer.bytes_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| sent(&error))?;
        if bytes.len() + piece.len() > MANIFEST_BYTES_MAX {
            return Err(Failure::lasting(format!("the registry's answer has more than {MANIFEST_BYTES_MAX} bytes")));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

fn sent(error: &reqwest::Error) -> Failure {
    Failure { reason: describe(error), is_passing: !error.is_redirect(), begin_anew: false }
}

fn join(base: &Url, path: &str) -> Result<Url, Failure> {
    base.join(path).map_err(|error| Failure::lasting(error.to_string()))
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
        let model = layer(Some((FILE_NAMES[0], "models/m.onnx")));
        let titled = layer(Some((FILE_NAMES[1], "m.onnx")));
        let readme = layer(Some((FILE_NAMES[1], "README.md")));
        assert!(model_layer(&[layer(None)]).is_ok());
        let found = [readme.clone(), model.clone()];
        assert_eq!(model_layer(&found).unwrap().annotations, model.annotations);
        assert!(model_layer(&[readme, layer(None)]).err().unwrap().contains("none"));
        assert!(model_layer(&[model, titled]).err().unwrap().contains("2 files"));
        assert!(model_layer(&[]).is_err());
    }
}
