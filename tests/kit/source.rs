//! Real servers as model sources, over TLS: Python's web server, Debian's OCI registry, and moto's S3.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::broker::free_port;
use crate::http::{HttpRequest, HttpResponse};
use crate::process::{Process, command};
use crate::site::digest;
use crate::wait::until;

/// The artifact type of the Cloud Native Computing Foundation's ModelPack.
pub const MODEL_PACK: &str = "application/vnd.cncf.model.manifest.v1+json";
/// The user of a protected registry.
pub const USER: &str = "edge";
/// The password of [`USER`].
pub const PASSWORD: &str = "registry-pass";
/// `USER:PASSWORD` as a header, made with `base64`.
pub const BASIC: &str = "Basic ZWRnZTpyZWdpc3RyeS1wYXNz";
/// `USER` and `PASSWORD` for the registry, made once with `bcrypt.hashpw(password, bcrypt.gensalt(4))` of PyPI's bcrypt.
const HTPASSWD: &str = "edge:$2a$04$Ds1R4VcGTunDkfnPFOiIWeA68XmTCn2eI.heebInj2qNhJDm/xXI2\n";
/// The media type of an artifact's manifest.
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Writes a secret as `<folder>/<name>/` with one file per value.
///
/// # Panics
/// If it cannot be written.
pub fn write_secret(folder: &Path, name: &str, values: &[(&str, &str)]) {
    let folder = folder.join(name);
    fs::create_dir_all(&folder).expect("a folder of secrets");
    for (file, value) in values {
        fs::write(folder.join(file), value).expect("a secret is written");
    }
}

/// A temporary certificate authority, and a certificate for 127.0.0.1 and localhost.
pub struct TlsFiles {
    folder: TempDir,
}

impl TlsFiles {
    /// Creates both.
    ///
    /// # Panics
    /// If openssl is not installed.
    pub fn create() -> Self {
        let tls = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        tls.certify("ca", "Lineside test CA", &["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"]);
        let names = "subjectAltName=IP:127.0.0.1,DNS:localhost";
        tls.certify(
            "server",
            "localhost",
            &[names, "basicConstraints=critical,CA:FALSE", "extendedKeyUsage=serverAuth"],
        );
        tls
    }

    /// The certificate of the authority, which clients must trust.
    pub fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// The server's certificate.
    pub fn cert(&self) -> PathBuf {
        self.folder.path().join("server.pem")
    }

    /// The server's key.
    pub fn key(&self) -> PathBuf {
        self.folder.path().join("server.key")
    }

    /// Creates a key and a certificate, signed by the authority once it exists.
    fn certify(&self, file: &str, name: &str, extensions: &[&str]) {
        let mut openssl = command("openssl");
        openssl
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
            .args(["-subj", &format!("/CN={name}"), "-keyout", &format!("{file}.key"), "-out", &format!("{file}.pem")])
            .current_dir(self.folder.path());
        for extension in extensions {
            openssl.args(["-addext", extension]);
        }
        if self.ca().exists() {
            openssl.args(["-CA", "ca.pem", "-CAkey", "ca.key"]);
        }
        let done = openssl.stderr(Stdio::null()).status().expect("setpriv is installed; it is part of util-linux");
        assert!(done.success(), "openssl creates no certificate");
    }
}

/// Python's web server over TLS, with a folder of files.
pub struct TlsFileServer {
    port: u16,
    folder: TempDir,
    _process: Process,
}

impl TlsFileServer {
    /// Starts a server; with `authorization` it rejects requests with another header value.
    ///
    /// # Panics
    /// If the server does not start.
    pub fn start(tls: &TlsFiles, authorization: Option<&str>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut child = command(crate::python())
            .arg(crate::root().join("tests/kit/files_over_tls.py"))
            .args([folder.path(), &tls.cert(), &tls.key()])
            .args(authorization)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("Python starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        let process = Process::new(child);
        BufReader::new(stdout).read_line(&mut line).expect("the server prints its port");
        Self { port: line.trim().parse().expect("the server prints its port"), folder, _process: process }
    }

    /// The folder that it serves.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Host and port.
    pub fn host(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// The URL of a file.
    pub fn url(&self, file: &str) -> String {
        format!("https://{}/{file}", self.host())
    }
}

/// Debian's `docker-registry` over TLS.
pub struct Registry {
    port: u16,
    folder: TempDir,
    ca: PathBuf,
    settings: String,
    process: Option<Process>,
}

impl Registry {
    /// Starts a registry that is open to everyone, or that requires [`USER`] and [`PASSWORD`].
    ///
    /// # Panics
    /// If docker-registry is not installed or does not start.
    pub fn start(tls: &TlsFiles, is_protected: bool) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let htpasswd = folder.path().join("htpasswd");
        fs::write(&htpasswd, HTPASSWD).expect("the password is written");
        let mut settings = json!({
            "version": "0.1",
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": folder.path().join("storage")}},
            "http": {"secret": "x", "tls": {"certificate": tls.cert(), "key": tls.key()}},
        });
        if is_protected {
            settings["auth"] = json!({"htpasswd": {"realm": "models", "path": htpasswd}});
        }
        let mut registry = Self { port: 0, folder, ca: tls.ca(), settings: String::new(), process: None };
        // Another process may take the port first; then the next port is tried.
        for _ in 0..5 {
            registry.port = free_port();
            settings["http"]["addr"] = registry.host().into();
            registry.settings = settings.to_string();
            if registry.try_restart() {
                return registry;
            }
        }
        panic!("docker-registry does not start; is it installed? run `make test-tools` once");
    }

    /// Host and port.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The URL of an artifact; the reference starts with `:` or `@`.
    pub fn url(&self, repository: &str, reference: &str) -> String {
        format!("oci://{}/{repository}{reference}", self.host())
    }

    /// Kills the registry, as a crash would.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Starts the registry on its previous port, with its previous contents.
    ///
    /// # Panics
    /// If the registry does not start.
    pub fn restart(&mut self) {
        assert!(self.try_restart(), "docker-registry does not start on port {}", self.port);
    }

    fn try_restart(&mut self) -> bool {
        self.stop();
        // The configuration file is YAML, of which JSON is a subset.
        let config = self.folder.path().join("config.yml");
        fs::write(&config, &self.settings).expect("the configuration is written");
        let child = command("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setpriv is installed; it is part of util-linux");
        let mut process = Process::new(child);
        let address = self.host();
        let is_up = until("docker-registry to listen", || {
            let has_exited = process.try_wait().expect("the state of a child is known").is_some();
            if has_exited { Some(false) } else { TcpStream::connect(&address).is_ok().then_some(true) }
        });
        self.process = Some(process);
        is_up
    }

    /// Uploads files as the layers of an artifact and returns the digest of its manifest. With [`MODEL_PACK`] the
    /// artifact is laid out as the ModelPack tools do it, else as ORAS does.
    ///
    /// # Panics
    /// If the registry rejects it.
    pub fn push(&self, repository: &str, tag: &str, layers: &[(&str, &[u8])], artifact_type: Option<&str>) -> String {
        let (artifact_type, config_type, layer_type, title_key) = match artifact_type {
            Some(MODEL_PACK) => (
                MODEL_PACK,
                "application/vnd.cncf.model.config.v1+json",
                "application/vnd.cncf.model.weight.v1.raw",
                "org.cncf.model.filepath",
            ),
            other => (
                other.unwrap_or("application/vnd.unknown.artifact.v1"),
                "application/vnd.oci.empty.v1+json",
                "application/vnd.oci.image.layer.v1.tar",
                "org.opencontainers.image.title",
            ),
        };
        let descriptor = |media_type: &str, bytes: &[u8]| json!({"mediaType": media_type, "digest": self.upload(repository, bytes), "size": bytes.len()});
        let layers: Vec<Value> = layers
            .iter()
            .map(|(title, bytes)| {
                let mut layer = descriptor(layer_type, bytes);
                layer["annotations"] = json!({title_key: title});
                layer
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": artifact_type,
            "config": descriptor(config_type, b"{}"),
            "layers": layers,
        })
        .to_string();
        let path = format!("/v2/{repository}/manifests/{tag}");
        let response = self.request("PUT", &path, &[("Content-Type", OCI_MANIFEST)], manifest.as_bytes());
        assert_eq!(response.status, 201, "{}", String::from_utf8_lossy(&response.body));
        digest(manifest.as_bytes())
    }

    /// Format: OCI distribution specification, a POST followed by one PUT.
    fn upload(&self, repository: &str, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let started = self.request("POST", &format!("/v2/{repository}/blobs/uploads/"), &[], b"");
        let location = started.header("location").expect("the registry returns an upload location");
        let path = location.trim_start_matches(&format!("https://{}", self.host()));
        let done = self.request("PUT", &format!("{path}&digest={digest}"), &[], bytes);
        assert_eq!(done.status, 201, "{}", String::from_utf8_lossy(&done.body));
        digest
    }

    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> HttpResponse {
        let headers = [headers, &[("Authorization", BASIC)]].concat();
        HttpRequest { address: &self.host(), ca: Some(&self.ca), method, path, headers: &headers, body }.send()
    }
}

/// The S3 server of moto. Writes need no signature; reads need one, of any key.
pub struct S3 {
    address: String,
    ca: Option<PathBuf>,
    _process: Process,
}

impl S3 {
    /// Starts a server, with TLS if certificates are given.
    ///
    /// # Panics
    /// If moto is not installed or does not start.
    pub fn start(tls: Option<&TlsFiles>) -> Self {
        let mut moto = command(crate::python());
        moto.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]);
        if let Some(tls) = tls {
            moto.arg("--ssl-cert").arg(tls.cert()).arg("--ssl-key").arg(tls.key());
        }
        let mut child = moto.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("Python starts");
        let mut lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines().map_while(Result::ok);
        let process = Process::new(child);
        let address = lines
            .find_map(|line| line.split_once("Running on ")?.1.split_once("://").map(|(_, address)| address.to_owned()))
            .expect("moto prints its address; is it installed? run `make test-tools` once");
        // Later output is discarded, but must be read so that moto does not block.
        std::thread::spawn(move || lines.for_each(drop));
        Self { address: address.trim().to_owned(), ca: tls.map(TlsFiles::ca), _process: process }
    }

    /// Host and port.
    pub fn host(&self) -> &str {
        &self.address
    }

    /// Creates an object and its bucket.
    ///
    /// # Panics
    /// If moto rejects it.
    pub fn put(&self, bucket: &str, key: &str, bytes: &[u8]) {
        for (path, body) in [(format!("/{bucket}"), &b""[..]), (format!("/{bucket}/{key}"), bytes)] {
            let request = HttpRequest {
                address: &self.address,
                ca: self.ca.as_deref(),
                method: "PUT",
                path: &path,
                body,
                ..HttpRequest::default()
            };
            let response = request.send();
            assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
        }
    }

    /// The URL of an object.
    pub fn url(&self, bucket: &str, key: &str) -> String {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        format!("s3://{bucket}/{key}?endpoint={scheme}://{}&region=us-east-1", self.address)
    }
}
