//! Where models and frames come from: `source.uri`, read and checked.

use std::fmt;
use std::path::{Path, PathBuf};

use url::Url;

/// Where a stream's frames come from.
#[derive(Clone, PartialEq)]
pub enum StreamSource {
    /// The pictures of a folder, in the order of their names.
    Dir {
        /// The folder.
        folder: PathBuf,
        /// Whether to start over at the end.
        repeat: bool,
    },
    /// One file: a picture, or recorded MJPEG.
    File(PathBuf),
    /// A camera that answers with one picture, or with an endless MJPEG.
    Http(Url),
}

/// Credentials in an address are kept out of whatever is shown.
impl fmt::Debug for StreamSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self}")
    }
}

impl fmt::Display for StreamSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dir { folder, .. } => write!(formatter, "dir:{}", folder.display()),
            Self::File(file) => write!(formatter, "file:{}", file.display()),
            Self::Http(url) => formatter.write_str(&without_secrets(url)),
        }
    }
}

/// An address without user, password and query, any of which may hold a secret.
fn without_secrets(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{host}{port}{}", url.scheme(), url.path())
}

impl StreamSource {
    /// Reads a stream's address. Relative folders and files are taken from `folder`.
    pub(super) fn parse(uri: &str, folder: &Path) -> Result<Self, String> {
        let scheme = scheme(uri)?;
        match scheme {
            "dir" => {
                let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
                let repeat = match query {
                    "" | "loop=false" => false,
                    "loop=true" => true,
                    other => return Err(format!("`?{other}` is not known; there is ?loop=true")),
                };
                Ok(Self::Dir { folder: local_path(path, folder)?, repeat })
            }
            "file" => Ok(Self::File(local_path(uri, folder)?)),
            "http" | "https" => {
                let url = Url::parse(uri).map_err(|error| format!("this is no address: {error}"))?;
                match url.host_str() {
                    Some(host) if !host.is_empty() => Ok(Self::Http(url)),
                    _ => Err("the address has no host".to_owned()),
                }
            }
            "rtsp" | "rtsps" | "v4l2" | "push" => Err(format!(
                "{scheme}: sources are not built into this version yet; there are dir, file, http and https"
            )),
            other => Err(format!("{other}: is not known; there are dir, file, http and https")),
        }
    }
}

/// Where a model's file comes from.
#[derive(Clone, PartialEq)]
pub enum ModelSource {
    /// A file of this node, also on a mounted volume.
    File(PathBuf),
    /// A file of a web server.
    Http(Url),
    /// An object of an object store.
    Object(ObjectAddress),
    /// An artifact of an OCI registry.
    Oci(OciAddress),
}

/// `s3://bucket/key?endpoint=https://minio:9000&region=plant`, `gs://bucket/key`, `az://account/container/key`.
#[derive(Clone, PartialEq)]
pub struct ObjectAddress {
    /// Whose store it is.
    pub provider: Provider,
    /// The account, for Azure only.
    pub account: Option<String>,
    /// Bucket or container.
    pub bucket: String,
    /// The object's key.
    pub key: String,
    /// A store of one's own, where it is not the provider's.
    pub endpoint: Option<Url>,
    /// The region that requests are signed for.
    pub region: Option<String>,
}

/// Whose protocol an object store speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// Amazon S3 and what is compatible with it.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
}

/// `oci://registry:5000/models/defects:v3` or `...@sha256:...`.
#[derive(Clone, PartialEq)]
pub struct OciAddress {
    /// Host and port.
    pub registry: String,
    /// The repository's name.
    pub repository: String,
    /// A tag or a digest.
    pub reference: String,
}

impl fmt::Debug for ModelSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self}")
    }
}

/// Shown without anything that may be a secret.
impl fmt::Display for ModelSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => write!(formatter, "file:{}", file.display()),
            Self::Http(url) => formatter.write_str(&without_secrets(url)),
            Self::Object(object) => {
                let scheme = match object.provider {
                    Provider::S3 => "s3",
                    Provider::Gcs => "gs",
                    Provider::Azure => "az",
                };
                let account = object.account.iter().map(|account| format!("{account}/")).collect::<String>();
                write!(formatter, "{scheme}://{account}{}/{}", object.bucket, object.key)
            }
            Self::Oci(oci) => {
                let mark = if oci.reference.contains(':') { '@' } else { ':' };
                write!(formatter, "oci://{}/{}{mark}{}", oci.registry, oci.repository, oci.reference)
            }
        }
    }
}

impl ModelSource {
    /// Reads a model's address. Relative files are taken from `folder`.
    pub(super) fn parse(uri: &str, folder: &Path) -> Result<Self, String> {
        const KNOWN: &str = "there are file, https, http, s3, gs, az and oci";
        match scheme(uri)? {
            "file" => Ok(Self::File(local_path(uri, folder)?)),
            "http" | "https" => Ok(Self::Http(plain_url(uri)?)),
            "s3" => ObjectAddress::parse(Provider::S3, uri).map(Self::Object),
            "gs" => ObjectAddress::parse(Provider::Gcs, uri).map(Self::Object),
            "az" => ObjectAddress::parse(Provider::Azure, uri).map(Self::Object),
            "oci" => OciAddress::parse(uri).map(Self::Oci),
            other => Err(format!("{other}: is not known; {KNOWN}")),
        }
    }
}

/// A web address with a host and without credentials: those belong into a Secret.
fn plain_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("this is no address: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("{}: is not known here; use https", url.scheme()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("holds credentials; put them into a Secret and name it in source.secretRef".to_owned());
    }
    match url.host_str() {
        Some(host) if !host.is_empty() => Ok(url),
        _ => Err("the address has no host".to_owned()),
    }
}

impl ObjectAddress {
    fn parse(provider: Provider, uri: &str) -> Result<Self, String> {
        let (_, rest) = uri.split_once("://").ok_or("an object's address is like s3://bucket/key")?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut parts = path.splitn(if provider == Provider::Azure { 3 } else { 2 }, '/');
        let account = (provider == Provider::Azure).then(|| parts.next().unwrap_or_default().to_owned());
        let (bucket, key) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let is_plain = |text: &str| {
            !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        if !is_plain(bucket) || account.as_deref().is_some_and(|account| !is_plain(account)) {
            return Err(
                "names no bucket; expected s3://bucket/key, gs://bucket/key or az://account/container/key".into()
            );
        }
        if key.is_empty() || key.contains(|character: char| character.is_control()) {
            return Err("names no object in the bucket".to_owned());
        }
        let (mut endpoint, mut region) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("endpoint", value)) => {
                    endpoint = Some(plain_url(value).map_err(|why| format!("endpoint {why}"))?);
                }
                Some(("region", value)) if is_plain(value) => region = Some(value.to_owned()),
                _ => return Err(format!("`?{pair}` is not known; there are endpoint and region")),
            }
        }
        Ok(Self { provider, account, bucket: bucket.to_owned(), key: key.to_owned(), endpoint, region })
    }
}

impl OciAddress {
    /// Format: the distribution specification's, `registry/name:tag` or `registry/name@digest`.
    fn parse(uri: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{why}; expected oci://registry/name:tag or oci://registry/name@sha256:...");
        let rest = uri.strip_prefix("oci://").ok_or_else(|| wrong("this is no address of an artifact"))?;
        let (registry, rest) = rest.split_once('/').ok_or_else(|| wrong("it names no repository"))?;
        // The host is read as a web address' is, so that it means the same there.
        let url = plain_url(&format!("https://{registry}/"))?;
        if url.path() != "/" || registry.contains(['?', '#']) {
            return Err(wrong("the registry's name is wrong"));
        }
        let (repository, reference) = match rest.split_once('@') {
            Some((repository, digest)) => {
                lineside_common::digest::Digest::parse(digest).map_err(|error| error.to_string())?;
                (repository, digest)
            }
            None => rest.rsplit_once(':').ok_or_else(|| wrong("it has neither a tag nor a digest"))?,
        };
        let is_part = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte))
        };
        let is_tag = reference.contains(':')
            || (1..=128).contains(&reference.len())
                && reference.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        match repository.split('/').all(is_part) && is_tag {
            true => Ok(Self {
                registry: registry.to_owned(),
                repository: repository.to_owned(),
                reference: reference.to_owned(),
            }),
            false => Err(wrong("the repository's name or the tag is wrong")),
        }
    }
}

fn scheme(uri: &str) -> Result<&str, String> {
    match uri.split_once(':') {
        Some((scheme, _)) if !scheme.is_empty() => Ok(scheme),
        _ => Err("an address begins with its scheme, such as file: or http://".to_owned()),
    }
}

/// The path of `scheme:relative`, `scheme:/absolute` or `scheme:///absolute` (RFC 8089). No part of it is decoded.
fn local_path(uri: &str, folder: &Path) -> Result<PathBuf, String> {
    let (_, rest) = uri.split_once(':').unwrap_or(("", uri));
    let path = match rest.strip_prefix("//") {
        Some(path) if path.starts_with('/') => path,
        Some(_) => return Err("an address with // needs a third one before the path: file:///models/m.onnx".to_owned()),
        None => rest,
    };
    if path.is_empty() || path.contains('\0') {
        return Err("the address names no path".to_owned());
    }
    Ok(folder.join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str) -> Result<StreamSource, String> {
        StreamSource::parse(uri, Path::new("/etc/lineside"))
    }

    #[test]
    fn paths_may_be_absolute_or_beside_the_manifest() {
        assert_eq!(source("file:///a/b.jpg"), Ok(StreamSource::File("/a/b.jpg".into())));
        assert_eq!(source("file:b.jpg"), Ok(StreamSource::File("/etc/lineside/b.jpg".into())));
        let looped = StreamSource::Dir { folder: "/frames".into(), repeat: true };
        assert_eq!(source("dir:///frames?loop=true"), Ok(looped));
        assert!(source("dir:///frames?loop=perhaps").unwrap_err().contains("loop=true"));
        assert!(source("file://host/path").unwrap_err().contains("third"));
        assert!(source("file:").is_err() && source("dir:").is_err() && source("x").is_err() && source("").is_err());
    }

    #[test]
    fn addresses_of_models_are_read_and_shown_without_secrets() {
        let model = |uri: &str| ModelSource::parse(uri, Path::new("/m"));
        assert_eq!(model("file:m.onnx"), Ok(ModelSource::File("/m/m.onnx".into())));
        for (uri, shown) in [
            ("https://h:8443/m.onnx?sig=s3cret", "https://h:8443/m.onnx"),
            ("s3://bucket/a/b.onnx?endpoint=http://minio:9000&region=plant", "s3://bucket/a/b.onnx"),
            ("gs://bucket/m.onnx", "gs://bucket/m.onnx"),
            ("az://account/container/a/m.onnx", "az://account/container/a/m.onnx"),
            ("oci://registry:5000/models/defects:v3", "oci://registry:5000/models/defects:v3"),
        ] {
            assert_eq!(model(uri).unwrap().to_string(), shown);
        }
        let digest = lineside_common::digest::Digest::of(b"").to_string();
        let pinned = format!("oci://r/x@{digest}");
        assert_eq!(model(&pinned).unwrap().to_string(), pinned);
        for wrong in [
            "m.onnx",
            "ftp://h/m",
            "https://user:hunter2@h/m",
            "s3://bucket",
            "s3:///key",
            "s3://bucket/key?speed=1",
            "s3://bucket/key?endpoint=file:///x",
            "az://account/container",
            "oci://registry",
            "oci://registry/x",
            "oci://registry/X:v1",
            "oci://registry/../x:v1",
            "oci://registry/x@sha256:1",
            "oci://user@registry/x:1",
            "oci://registry?/x:1",
            "oci://registry/x:a/b",
        ] {
            let error = model(wrong).unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn what_is_shown_of_an_address_holds_no_secret() {
        let camera = source("http://root:hunter2@10.0.0.7:8080/video.cgi?token=s3cret").unwrap();
        let shown = format!("{camera} {camera:?}");
        assert!(shown.contains("http://10.0.0.7:8080/video.cgi"), "{shown}");
        assert!(!shown.contains("hunter2") && !shown.contains("s3cret") && !shown.contains("root"), "{shown}");
        assert!(source("http://").is_err());
        assert!(source("rtsp://10.0.0.7/1").unwrap_err().contains("not built"));
    }
}
