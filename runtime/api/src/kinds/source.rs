//! Addresses of models and of camera sources: the field `source.uri`, parsed and validated.

use std::fmt;
use std::path::{Path, PathBuf};

use url::Url;

/// Source of the frames of a stream.
#[derive(Clone, PartialEq)]
pub enum StreamSource {
    /// The pictures of a folder, in the order of their names.
    Dir {
        /// Absolute path of the folder.
        folder: PathBuf,
        /// Whether the source starts again after the last picture.
        repeat: bool,
    },
    /// A file: one picture, or an MJPEG recording.
    File(PathBuf),
    /// A camera that responds with a single picture or with an MJPEG stream.
    Http(Url),
}

/// As [`fmt::Display`], without credentials.
impl fmt::Debug for StreamSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self}")
    }
}

/// The address without credentials and query.
impl fmt::Display for StreamSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dir { folder, .. } => write!(formatter, "dir:{}", folder.display()),
            Self::File(file) => write!(formatter, "file:{}", file.display()),
            Self::Http(url) => formatter.write_str(&without_secrets(url)),
        }
    }
}

/// An address without user, password and query, which may contain secrets.
fn without_secrets(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{host}{port}{}", url.scheme(), url.path())
}

/// Whether a `/`, `#` or `?` that stands for itself in a user or password ends the host before it. Such an address would name another
/// host, and parts of the password would be shown as its port or path.
fn has_raw_delimiter(uri: &str) -> bool {
    let rest = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    let after_host = rest.find(['/', '?', '#']).map_or("", |end| &rest[end..]);
    match after_host.chars().next() {
        Some('/') => {
            let path = after_host.split('?').next().unwrap_or_default();
            path.contains('@')
        }
        _ => after_host.contains('@'),
    }
}

impl StreamSource {
    /// Parses the address of a stream's source. Relative paths refer to `folder`.
    pub(super) fn parse(uri: &str, folder: &Path) -> Result<Self, String> {
        let scheme = scheme(uri)?;
        match scheme {
            "dir" => {
                let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
                let repeat = match query {
                    "" | "loop=false" => false,
                    "loop=true" => true,
                    other => return Err(format!("unknown option `?{other}`; only ?loop=true is supported")),
                };
                Ok(Self::Dir { folder: local_path(path, folder)?, repeat })
            }
            "file" => Ok(Self::File(local_path(uri, folder)?)),
            "http" | "https" => {
                if has_raw_delimiter(uri) {
                    return Err("an @ follows the host, so user or password seem to contain a character that ends the host; write / as %2F, \
                                # as %23, ? as %3F and @ as %40 in them"
                        .to_owned());
                }
                let url = Url::parse(uri).map_err(|error| format!("not a valid address: {error}"))?;
                match url.host_str() {
                    Some(host) if !host.is_empty() => Ok(Self::Http(url)),
                    _ => Err("the address has no host".to_owned()),
                }
            }
            "rtsp" | "rtsps" | "v4l2" | "push" => {
                Err(format!("the scheme {scheme}: is not supported by this version; use dir, file, http or https"))
            }
            other => Err(format!("the scheme {other}: is not supported; use dir, file, http or https")),
        }
    }
}

/// Location of a model file.
#[derive(Clone, PartialEq)]
pub enum ModelSource {
    /// A file on the node or on a mounted volume.
    File(PathBuf),
    /// A file on a web server.
    Http(Url),
    /// An object in an object store.
    Object(ObjectAddress),
    /// An artifact in an OCI registry.
    Oci(OciAddress),
}

/// `s3://bucket/key?endpoint=https://minio:9000&region=plant`, `gs://bucket/key`, `az://account/container/key`.
#[derive(Clone, PartialEq)]
pub struct ObjectAddress {
    /// Protocol of the store.
    pub provider: Provider,
    /// Storage account, for Azure only.
    pub account: Option<String>,
    /// Name of the bucket or container.
    pub bucket: String,
    /// Key of the object.
    pub key: String,
    /// Address of the store. Default: the provider's public service.
    pub endpoint: Option<Url>,
    /// Region that requests are signed for.
    pub region: Option<String>,
}

/// Protocol of an object store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// Amazon S3 and compatible stores.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
}

/// `oci://registry:5000/models/defects:v3` or `...@sha256:...`.
#[derive(Clone, PartialEq)]
pub struct OciAddress {
    /// Host and port of the registry.
    pub registry: String,
    /// Name of the repository.
    pub repository: String,
    /// A tag or a digest.
    pub reference: String,
}

impl fmt::Debug for ModelSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self}")
    }
}

/// The address without credentials and query.
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
    /// Parses the address of a model file. Relative paths refer to `folder`.
    pub(super) fn parse(uri: &str, folder: &Path) -> Result<Self, String> {
        const SUPPORTED: &str = "use file, https, http, s3, gs, az or oci";
        match scheme(uri)? {
            "file" => Ok(Self::File(local_path(uri, folder)?)),
            "http" | "https" => Ok(Self::Http(plain_url(uri)?)),
            "s3" => ObjectAddress::parse(Provider::S3, uri).map(Self::Object),
            "gs" => ObjectAddress::parse(Provider::Gcs, uri).map(Self::Object),
            "az" => ObjectAddress::parse(Provider::Azure, uri).map(Self::Object),
            "oci" => OciAddress::parse(uri).map(Self::Oci),
            other => Err(format!("the scheme {other}: is not supported; {SUPPORTED}")),
        }
    }
}

/// Parses a web address with a host and without credentials, which belong in a Secret.
fn plain_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("not a valid address: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("the scheme {}: is not supported here; use https", url.scheme()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("contains credentials; put them into a Secret and name it in source.secretRef".to_owned());
    }
    match url.host_str() {
        Some(host) if !host.is_empty() => Ok(url),
        _ => Err("the address has no host".to_owned()),
    }
}

impl ObjectAddress {
    fn parse(provider: Provider, uri: &str) -> Result<Self, String> {
        let (_, rest) = uri.split_once("://").ok_or("the address of an object has the form s3://bucket/key")?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut parts = path.splitn(if provider == Provider::Azure { 3 } else { 2 }, '/');
        let account = (provider == Provider::Azure).then(|| parts.next().unwrap_or_default().to_owned());
        let (bucket, key) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let is_plain = |text: &str| {
            !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        if !is_plain(bucket) || account.as_deref().is_some_and(|account| !is_plain(account)) {
            return Err(
                "has no valid bucket; expected s3://bucket/key, gs://bucket/key or az://account/container/key".into()
            );
        }
        if key.is_empty() || key.contains(|character: char| character.is_control()) {
            return Err("has no key of an object in the bucket".to_owned());
        }
        let (mut endpoint, mut region) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("endpoint", value)) => {
                    endpoint = Some(plain_url(value).map_err(|reason| format!("endpoint: {reason}"))?);
                }
                Some(("region", value)) if is_plain(value) => region = Some(value.to_owned()),
                _ => return Err(format!("unknown option `?{pair}`; supported are endpoint and region")),
            }
        }
        Ok(Self { provider, account, bucket: bucket.to_owned(), key: key.to_owned(), endpoint, region })
    }
}

impl OciAddress {
    /// Parses the format of the distribution specification: `registry/name:tag` or `registry/name@digest`.
    fn parse(uri: &str) -> Result<Self, String> {
        let invalid =
            |reason: &str| format!("{reason}; expected oci://registry/name:tag or oci://registry/name@sha256:...");
        let rest = uri.strip_prefix("oci://").ok_or_else(|| invalid("not the address of an artifact"))?;
        let (registry, rest) = rest.split_once('/').ok_or_else(|| invalid("the address has no repository"))?;
        // The host is parsed as in a web address, so that it refers to the same server in requests.
        let url = plain_url(&format!("https://{registry}/"))?;
        if url.path() != "/" || registry.contains(['?', '#']) {
            return Err(invalid("the name of the registry is invalid"));
        }
        let (repository, reference) = match rest.split_once('@') {
            Some((repository, digest)) => {
                lineside_common::digest::Digest::parse(digest).map_err(|error| error.to_string())?;
                (repository, digest)
            }
            None => rest.rsplit_once(':').ok_or_else(|| invalid("the address has neither a tag nor a digest"))?,
        };
        let is_part = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte))
        };
        let is_tag = reference.contains(':')
            || (1..=128).contains(&reference.len())
                && reference.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !(repository.split('/').all(is_part) && is_tag) {
            return Err(invalid("the name of the repository or the tag is invalid"));
        }
        Ok(Self { registry: registry.to_owned(), repository: repository.to_owned(), reference: reference.to_owned() })
    }
}

fn scheme(uri: &str) -> Result<&str, String> {
    match uri.split_once(':') {
        Some((scheme, _)) if !scheme.is_empty() => Ok(scheme),
        _ => Err("an address must begin with a scheme, such as file: or http://".to_owned()),
    }
}

/// The path of `scheme:relative`, `scheme:/absolute` or `scheme:///absolute` (RFC 8089). Percent-encoding is not decoded.
fn local_path(uri: &str, folder: &Path) -> Result<PathBuf, String> {
    let (_, rest) = uri.split_once(':').unwrap_or(("", uri));
    let path = match rest.strip_prefix("//") {
        Some(path) if path.starts_with('/') => path,
        Some(_) => return Err("a path behind // must be absolute, such as file:///models/m.onnx".to_owned()),
        None => rest,
    };
    if path.is_empty() || path.contains('\0') {
        return Err("the address has no path".to_owned());
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
    fn paths_are_absolute_or_relative_to_the_manifest() {
        assert_eq!(source("file:///a/b.jpg"), Ok(StreamSource::File("/a/b.jpg".into())));
        assert_eq!(source("file:b.jpg"), Ok(StreamSource::File("/etc/lineside/b.jpg".into())));
        let looped = StreamSource::Dir { folder: "/frames".into(), repeat: true };
        assert_eq!(source("dir:///frames?loop=true"), Ok(looped));
        assert!(source("dir:///frames?loop=perhaps").unwrap_err().contains("loop=true"));
        assert!(source("file://host/path").unwrap_err().contains("absolute"));
        assert!(source("file:").is_err() && source("dir:").is_err() && source("x").is_err() && source("").is_err());
    }

    #[test]
    fn addresses_of_models_are_parsed_and_displayed_without_secrets() {
        let model = |uri: &str| ModelSource::parse(uri, Path::new("/m"));
        assert_eq!(model("file:m.onnx"), Ok(ModelSource::File("/m/m.onnx".into())));
        for (uri, displayed) in [
            ("https://h:8443/m.onnx?sig=s3cret", "https://h:8443/m.onnx"),
            ("s3://bucket/a/b.onnx?endpoint=http://minio:9000&region=plant", "s3://bucket/a/b.onnx"),
            ("gs://bucket/m.onnx", "gs://bucket/m.onnx"),
            ("az://account/container/a/m.onnx", "az://account/container/a/m.onnx"),
            ("oci://registry:5000/models/defects:v3", "oci://registry:5000/models/defects:v3"),
        ] {
            assert_eq!(model(uri).unwrap().to_string(), displayed);
        }
        let digest = lineside_common::digest::Digest::of(b"").to_string();
        let pinned = format!("oci://r/x@{digest}");
        assert_eq!(model(&pinned).unwrap().to_string(), pinned);
        for invalid in [
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
            let error = model(invalid).unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_displayed_address_contains_no_secret() {
        let camera = source("http://root:hunter2@10.0.0.7:8080/video.cgi?token=s3cret").unwrap();
        let displayed = format!("{camera} {camera:?}");
        assert!(displayed.contains("http://10.0.0.7:8080/video.cgi"), "{displayed}");
        for secret in ["hunter2", "s3cret", "root"] {
            assert!(!displayed.contains(secret), "{displayed}");
        }
        assert!(source("http://").is_err());
        assert!(source("rtsp://10.0.0.7/1").unwrap_err().contains("not supported"));
    }
}
