//! Where models and frames come from: `source.uri`, read and checked.

use std::fmt;
use std::path::{Path, PathBuf};

use reqwest::Url;

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

/// The file a model's address names.
pub(super) fn model_file(uri: &str, folder: &Path) -> Result<PathBuf, String> {
    match scheme(uri)? {
        "file" => local_path(uri, folder),
        scheme @ ("http" | "https" | "s3" | "gs" | "az" | "oci") => {
            Err(format!("{scheme}: sources of models are not built into this version yet; use file:"))
        }
        other => Err(format!("{other}: is not known; use file:")),
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
        assert_eq!(model_file("file:m.onnx", Path::new("/m")), Ok("/m/m.onnx".into()));
        assert!(model_file("oci://registry/x", Path::new("/")).unwrap_err().contains("not built"));
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
