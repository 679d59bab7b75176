//! Model sources: a scripted web server that produces faults, and real servers over TLS: Python's web server, Debian's
//! OCI registry, and moto's S3.

use std::collections::VecDeque;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufRead as _, BufReader, Read as _, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::broker::free_port;
use crate::process::{Process, command};
use crate::site::digest;
use crate::wait::{TIMEOUT, until};

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
/// The chunk size of a body; progress is counted per chunk.
const CHUNK_BYTES: usize = 16 << 10;

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

/// The response of a server.
pub struct HttpResponse {
    /// The status code.
    pub status: u16,
    /// The status line and the headers.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

impl HttpResponse {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let headers = self.head.lines().filter_map(|line| line.split_once(": "));
        headers.into_iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// Sends one request on a new connection, over TLS if an authority is given.
///
/// # Panics
/// If the server cannot be reached or does not respond.
pub fn http_request(
    address: &str,
    ca: Option<&Path>,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> HttpResponse {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    let request = [head.as_bytes(), body].concat();
    let text = match ca {
        Some(ca) => {
            let mut client = command("openssl");
            client.args(["s_client", "-quiet", "-verify_return_error", "-connect", address, "-CAfile"]).arg(ca);
            run_command_with_input(&mut client, &request)
        }
        None => {
            let mut stream = TcpStream::connect(address).expect("the server listens");
            stream.set_read_timeout(Some(TIMEOUT)).expect("a socket accepts a timeout");
            stream.write_all(&request).expect("the server reads");
            let mut text = Vec::new();
            stream.read_to_end(&mut text).expect("the server answers");
            text
        }
    };
    let end = text.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("the server answers with HTTP");
    let head = String::from_utf8_lossy(&text[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    HttpResponse { status, head, body: text[end + 4..].to_vec() }
}

/// Runs a command with this standard input and returns its standard output.
fn run_command_with_input(command: &mut Command, input: &[u8]) -> Vec<u8> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("setpriv is installed; it is part of util-linux");
    child.stdin.take().expect("stdin is piped").write_all(input).expect("the command reads");
    child.wait_with_output().expect("the command ends").stdout
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
        assert!(done.success(), "openssl creates no certificate; is it installed? run `make test-tools` once");
    }
}

/// A fault in the response to one request.
#[derive(Clone)]
pub enum Fault {
    /// No fault.
    None,
    /// The connection is closed after this many bytes of the body.
    CutAfter(usize),
    /// Nothing is sent after this many bytes of the body, and the connection stays open.
    StallAfter(usize),
    /// The connection is closed after this many bytes, and the server has another body and `ETag` from then on.
    ChangesAfter(usize, Vec<u8>),
    /// `Content-Length` is larger than the body.
    WrongContentLength,
    /// The body is infinite.
    EndlessBody,
    /// The response is a part that starts at another offset than requested.
    Misaligned206,
    /// The response is 416.
    Unsatisfiable416,
    /// The response is marked as compressed without having been requested, and is not the body.
    Gzip,
    /// The response redirects to this URL.
    Redirect(String),
    /// The response has this status and no body.
    Status(u16),
    /// The response is 401 unless the `Authorization` header has this value.
    RequiresAuthorization(String),
}

/// A request as the scripted server received it.
#[derive(Debug, Clone)]
pub struct Request {
    /// The method.
    pub method: String,
    /// The path with the query.
    pub path: String,
    /// The headers, with names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Request {
    /// The value of a header; the name must be in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The start of the requested range.
    pub fn range_start(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
    }
}

#[derive(Default)]
struct ServerState {
    body: Vec<u8>,
    script: VecDeque<Fault>,
    requests: Vec<Request>,
    connections: usize,
    bytes_sent: usize,
    is_stopped: bool,
}

impl ServerState {
    /// The fault for a request. Only a GET advances the script, whose last entry is repeated.
    fn next_fault(&mut self, method: &str) -> Fault {
        let is_last = self.script.len() <= 1 || method != "GET";
        let fault = if is_last { self.script.front().cloned() } else { self.script.pop_front() };
        fault.unwrap_or(Fault::None)
    }
}

/// A web server that serves one body under every path, with `ETag`, `Range` and `If-Range`, and with the configured
/// faults.
pub struct FileServer {
    port: u16,
    state: Arc<Mutex<ServerState>>,
}

impl FileServer {
    /// Starts a server with the same fault for every request.
    ///
    /// # Panics
    /// If no port is free.
    pub fn start(body: &[u8], fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let state = ServerState { body: body.to_vec(), script: VecDeque::from([fault]), ..ServerState::default() };
        let server = Self { port, state: Arc::new(Mutex::new(state)) };
        let state = server.state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let mut current = lock(&state);
                if current.is_stopped {
                    return;
                }
                current.connections += 1;
                drop(current);
                let state = state.clone();
                // A client that disconnects early is not an error of the server.
                std::thread::spawn(move || drop(serve_connection(stream, &state)));
            }
        });
        server
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.host())
    }

    /// Host and port.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Sets the faults of subsequent requests, in order; the last one is repeated.
    pub fn set_faults(&self, script: &[Fault]) {
        lock(&self.state).script = script.iter().cloned().collect();
    }

    /// Sets one fault for all subsequent requests.
    pub fn set_fault(&self, fault: Fault) {
        self.set_faults(&[fault]);
    }

    /// Replaces the body.
    pub fn set_body(&self, body: &[u8]) {
        lock(&self.state).body = body.to_vec();
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.state).requests.clone()
    }

    /// The number of connections so far.
    pub fn connections(&self) -> usize {
        lock(&self.state).connections
    }

    /// The number of body bytes sent so far.
    pub fn bytes_sent(&self) -> usize {
        lock(&self.state).bytes_sent
    }

    /// The `ETag` of the current body.
    pub fn etag(&self) -> String {
        etag(&lock(&self.state).body)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        lock(&self.state).is_stopped = true;
        // The accept loop checks the flag after the next connection.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn lock(state: &Mutex<ServerState>) -> MutexGuard<'_, ServerState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn etag(body: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    format!("\"{:x}\"", hasher.finish())
}

/// Answers requests until the client or a fault closes the connection.
fn serve_connection(mut stream: TcpStream, state: &Mutex<ServerState>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(request) = read_request(&mut reader)? {
        let (body, fault) = {
            let mut state = lock(state);
            state.requests.push(request.clone());
            (state.body.clone(), state.next_fault(&request.method))
        };
        let keep_alive = answer(&mut stream, state, &request, &body, &fault)?;
        if matches!(fault, Fault::StallAfter(_)) {
            // The client sends nothing more, so this returns when the client disconnects.
            drop(reader.read(&mut [0]));
        }
        if let Fault::ChangesAfter(_, second) = fault {
            lock(state).body = second;
        }
        if !keep_alive || request.header("connection") == Some("close") {
            break;
        }
    }
    stream.shutdown(Shutdown::Both)
}

fn read_request(reader: &mut impl std::io::BufRead) -> std::io::Result<Option<Request>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        match line.trim() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let mut words = lines.first().map(String::as_str).unwrap_or_default().split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let headers = lines.iter().skip(1).filter_map(|line| line.split_once(':'));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.trim().to_owned())).collect();
    Ok(Some(Request { method, path, headers }))
}

/// Answers one request. Returns whether the connection can be reused.
fn answer(
    stream: &mut TcpStream,
    state: &Mutex<ServerState>,
    request: &Request,
    body: &[u8],
    fault: &Fault,
) -> std::io::Result<bool> {
    let etag = etag(body);
    let range_start = request.range_start().filter(|_| request.header("if-range").is_none_or(|tag| tag == etag));
    let last = body.len().saturating_sub(1);
    let first = range_start.unwrap_or(0) + if matches!(fault, Fault::Misaligned206) { 7 } else { 0 };
    let is_refused = |wanted: &String| request.header("authorization") != Some(wanted);
    let (status, headers, mut body) = match fault {
        Fault::Redirect(to) => ("302 Found".to_owned(), format!("Location: {to}\r\n"), &[][..]),
        Fault::Status(code) => (format!("{code} Scripted"), String::new(), &[][..]),
        Fault::RequiresAuthorization(wanted) if is_refused(wanted) => {
            ("401 Unauthorized".to_owned(), "WWW-Authenticate: Basic realm=\"models\"\r\n".to_owned(), &[][..])
        }
        Fault::Gzip => {
            ("200 OK".to_owned(), "Content-Encoding: gzip\r\n".to_owned(), &b"\x1f\x8b\x08\0 not the model"[..])
        }
        Fault::Unsatisfiable416 => unsatisfiable(body),
        _ if first > last => unsatisfiable(body),
        Fault::Misaligned206 => part(first, body),
        _ if range_start.is_some() => part(first, body),
        _ => ("200 OK".to_owned(), String::new(), body),
    };
    let length = match fault {
        Fault::EndlessBody => "Transfer-Encoding: chunked".to_owned(),
        Fault::WrongContentLength => format!("Content-Length: {}", body.len() + 1000),
        _ => format!("Content-Length: {}", body.len()),
    };
    write!(stream, "HTTP/1.1 {status}\r\n{headers}ETag: {etag}\r\nAccept-Ranges: bytes\r\n{length}\r\n\r\n")?;
    if request.method == "HEAD" {
        return Ok(true);
    }
    let mut keep_alive = !matches!(fault, Fault::WrongContentLength);
    if let Fault::CutAfter(bytes) | Fault::StallAfter(bytes) | Fault::ChangesAfter(bytes, _) = fault {
        body = &body[..(*bytes).min(body.len())];
        keep_alive = false;
    }
    let mut send = |head: &str, chunk: &[u8], tail: &str| {
        stream.write_all(&[head.as_bytes(), chunk, tail.as_bytes()].concat())?;
        lock(state).bytes_sent += chunk.len();
        std::io::Result::Ok(())
    };
    if matches!(fault, Fault::EndlessBody) {
        loop {
            send(&format!("{CHUNK_BYTES:x}\r\n"), &[b'x'; CHUNK_BYTES], "\r\n")?;
        }
    }
    body.chunks(CHUNK_BYTES).try_for_each(|chunk| send("", chunk, ""))?;
    Ok(keep_alive)
}

fn part(first: usize, body: &[u8]) -> (String, String, &[u8]) {
    let headers = format!("Content-Range: bytes {first}-{}/{}\r\n", body.len() - 1, body.len());
    ("206 Partial Content".to_owned(), headers, &body[first..])
}

fn unsatisfiable(body: &[u8]) -> (String, String, &[u8]) {
    let headers = format!("Content-Range: bytes */{}\r\n", body.len());
    ("416 Range Not Satisfiable".to_owned(), headers, &[])
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
        let answer = self.request("PUT", &path, &[("Content-Type", OCI_MANIFEST)], manifest.as_bytes());
        assert_eq!(answer.status, 201, "{}", String::from_utf8_lossy(&answer.body));
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
        http_request(&self.host(), Some(&self.ca), method, path, &headers, body)
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
            let answer = http_request(&self.address, self.ca.as_deref(), "PUT", &path, &[], body);
            assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
        }
    }

    /// The URL of an object.
    pub fn url(&self, bucket: &str, key: &str) -> String {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        format!("s3://{bucket}/{key}?endpoint={scheme}://{}&region=us-east-1", self.address)
    }
}
