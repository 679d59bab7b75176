//! Sources of models: a scripted web server for faults, and real ones over TLS: Python's web server, Debian's OCI
//! registry, and moto's S3.

use std::collections::VecDeque;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufRead as _, BufReader, Read as _, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::broker::free_port;
use crate::plant::digest;
use crate::wait::{BOUND, until};

/// The artifact type of the Cloud Native Computing Foundation's ModelPack.
pub const MODEL_PACK: &str = "application/vnd.cncf.model.manifest.v1+json";
/// Who may use a protected registry.
pub const USER: &str = "edge";
/// The password of [`USER`].
pub const PASSWORD: &str = "registry-pass";
/// `USER:PASSWORD` as a header, made with `base64`.
pub const BASIC: &str = "Basic ZWRnZTpyZWdpc3RyeS1wYXNz";
/// `USER` and `PASSWORD` for the registry, made once with `bcrypt.hashpw(password, bcrypt.gensalt(4))` of PyPI's bcrypt.
const HTPASSWD: &str = "edge:$2a$04$Ds1R4VcGTunDkfnPFOiIWeA68XmTCn2eI.heebInj2qNhJDm/xXI2\n";
/// The format of an artifact's manifest.
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// How much an endless body sends at once, and how often progress is counted.
const PIECE: usize = 16 << 10;

/// Lays out a folder of secrets: `<folder>/<name>/` with one file per value.
///
/// # Panics
/// When it cannot be written.
pub fn secret(folder: &Path, name: &str, values: &[(&str, &str)]) {
    let folder = folder.join(name);
    fs::create_dir_all(&folder).expect("a folder of secrets");
    for (file, value) in values {
        fs::write(folder.join(file), value).expect("a secret is written");
    }
}

/// What a server said.
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Everything before the body.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let headers = self.head.lines().filter_map(|line| line.split_once(": "));
        headers.into_iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// Sends one request over a connection of its own, and over TLS when there is an authority to trust.
///
/// # Panics
/// When the server cannot be reached or says nothing.
pub fn exchange(
    address: &str,
    ca: Option<&Path>,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Answer {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    let request = [head.as_bytes(), body].concat();
    let text = match ca {
        Some(ca) => {
            let mut client = Command::new("openssl");
            client.args(["s_client", "-quiet", "-verify_return_error", "-connect", address, "-CAfile"]).arg(ca);
            piped(&mut client, &request)
        }
        None => {
            let mut stream = TcpStream::connect(address).expect("the server listens");
            stream.set_read_timeout(Some(BOUND)).expect("a connection takes a bound");
            stream.write_all(&request).expect("the server reads");
            let mut text = Vec::new();
            stream.read_to_end(&mut text).expect("the server answers");
            text
        }
    };
    let end = text.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("the server answers with HTTP");
    let head = String::from_utf8_lossy(&text[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    Answer { status, head, body: text[end + 4..].to_vec() }
}

/// What a command prints when it is told this.
fn piped(command: &mut Command, input: &[u8]) -> Vec<u8> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("openssl is installed; run `make test-tools` once");
    child.stdin.take().expect("stdin is piped").write_all(input).expect("the command reads");
    child.wait_with_output().expect("the command ends").stdout
}

/// A throw-away authority, and a certificate of its for 127.0.0.1 and localhost.
pub struct Tls {
    folder: TempDir,
}

impl Tls {
    /// Makes both.
    ///
    /// # Panics
    /// When openssl is not installed.
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

    /// The authority, which clients are to trust.
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

    /// Makes a key and a certificate, signed by the authority as soon as there is one.
    fn certify(&self, file: &str, name: &str, extensions: &[&str]) {
        let mut openssl = Command::new("openssl");
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
        let done = openssl.stderr(Stdio::null()).status().expect("openssl is installed; run `make test-tools` once");
        assert!(done.success(), "openssl makes no certificate");
    }
}

/// What a scripted server does wrong with one request.
#[derive(Clone)]
pub enum Fault {
    /// Nothing.
    None,
    /// It closes the connection after so many bytes of the body.
    CutAfter(usize),
    /// It falls silent after so many bytes of the body, and keeps the connection.
    StallAfter(usize),
    /// It closes the connection after so many bytes, and has another body and `ETag` from then on.
    ChangesAfter(usize, Vec<u8>),
    /// It announces more bytes than there are.
    LyingLength,
    /// Its body never ends.
    EndlessBody,
    /// It answers with a part that begins elsewhere than asked for.
    Misaligned206,
    /// It says that there is no such part.
    Unsatisfiable416,
    /// It compresses without being asked, and what it sends is not the body.
    Gzip,
    /// It sends the client elsewhere.
    Redirect(String),
    /// It answers with this status and no body.
    Status(u16),
    /// It answers 401 unless `Authorization` has this value.
    WantsAuthorization(String),
}

/// A request as a scripted server got it.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its method.
    pub method: String,
    /// Its path with the query.
    pub path: String,
    /// Its headers, names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Request {
    /// The value of a header, given in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// Where the part begins that is asked for.
    pub fn range_start(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
    }
}

#[derive(Default)]
struct Served {
    body: Vec<u8>,
    script: VecDeque<Fault>,
    requests: Vec<Request>,
    connections: usize,
    bytes_sent: usize,
    is_stopped: bool,
}

impl Served {
    /// The fault for a request. Only a GET moves the script on, and its last entry stays.
    fn next_fault(&mut self, method: &str) -> Fault {
        let is_last = self.script.len() <= 1 || method != "GET";
        let fault = if is_last { self.script.front().cloned() } else { self.script.pop_front() };
        fault.unwrap_or(Fault::None)
    }
}

/// A web server that has one body under every path, with `ETag`, `Range` and `If-Range`, and does wrong what it is told.
pub struct FileServer {
    port: u16,
    served: Arc<Mutex<Served>>,
}

impl FileServer {
    /// Starts one with the same fault for every request.
    ///
    /// # Panics
    /// When no port can be had.
    pub fn start(body: &[u8], fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let served = Served { body: body.to_vec(), script: VecDeque::from([fault]), ..Served::default() };
        let server = Self { port, served: Arc::new(Mutex::new(served)) };
        let served = server.served.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let mut now = lock(&served);
                if now.is_stopped {
                    return;
                }
                now.connections += 1;
                drop(now);
                let served = served.clone();
                // Whoever leaves early is no concern of the server's.
                std::thread::spawn(move || drop(talk(stream, &served)));
            }
        });
        server
    }

    /// The address of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.host())
    }

    /// Host and port.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Faults for the requests to come, one after the other; the last one stays.
    pub fn play(&self, script: &[Fault]) {
        lock(&self.served).script = script.iter().cloned().collect();
    }

    /// One fault for all requests to come.
    pub fn set_fault(&self, fault: Fault) {
        self.play(&[fault]);
    }

    /// Serves another body from now on.
    pub fn set_body(&self, body: &[u8]) {
        lock(&self.served).body = body.to_vec();
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.served).requests.clone()
    }

    /// The connections so far.
    pub fn connections(&self) -> usize {
        lock(&self.served).connections
    }

    /// The bytes of bodies sent so far.
    pub fn bytes_sent(&self) -> usize {
        lock(&self.served).bytes_sent
    }

    /// The validator of the body it has now.
    pub fn etag(&self) -> String {
        etag(&lock(&self.served).body)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        lock(&self.served).is_stopped = true;
        // The accept loop sees the flag when somebody knocks.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn lock(served: &Mutex<Served>) -> MutexGuard<'_, Served> {
    served.lock().unwrap_or_else(PoisonError::into_inner)
}

fn etag(body: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    format!("\"{:x}\"", hasher.finish())
}

/// Answers request after request until one end has enough.
fn talk(mut stream: TcpStream, served: &Mutex<Served>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(request) = read_request(&mut reader)? {
        let (body, fault) = {
            let mut served = lock(served);
            served.requests.push(request.clone());
            (served.body.clone(), served.next_fault(&request.method))
        };
        let goes_on = answer(&mut stream, served, &request, &body, &fault)?;
        if matches!(fault, Fault::StallAfter(_)) {
            // Nothing comes any more, so this waits until the client leaves.
            drop(reader.read(&mut [0]));
        }
        if let Fault::ChangesAfter(_, second) = fault {
            lock(served).body = second;
        }
        if !goes_on || request.header("connection") == Some("close") {
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

/// Answers one request, and says whether the connection is still good for another.
fn answer(
    stream: &mut TcpStream,
    served: &Mutex<Served>,
    request: &Request,
    body: &[u8],
    fault: &Fault,
) -> std::io::Result<bool> {
    let etag = etag(body);
    let asked = request.range_start().filter(|_| request.header("if-range").is_none_or(|tag| tag == etag));
    let last = body.len().saturating_sub(1);
    let first = asked.unwrap_or(0) + if matches!(fault, Fault::Misaligned206) { 7 } else { 0 };
    let is_refused = |wanted: &String| request.header("authorization") != Some(wanted);
    let (status, headers, mut body) = match fault {
        Fault::Redirect(to) => ("302 Found".to_owned(), format!("Location: {to}\r\n"), &[][..]),
        Fault::Status(code) => (format!("{code} As told"), String::new(), &[][..]),
        Fault::WantsAuthorization(wanted) if is_refused(wanted) => {
            ("401 Unauthorized".to_owned(), "WWW-Authenticate: Basic realm=\"models\"\r\n".to_owned(), &[][..])
        }
        Fault::Gzip => {
            ("200 OK".to_owned(), "Content-Encoding: gzip\r\n".to_owned(), &b"\x1f\x8b\x08\0 not the model"[..])
        }
        Fault::Unsatisfiable416 => unsatisfiable(body),
        _ if first > last => unsatisfiable(body),
        Fault::Misaligned206 => part(first, body),
        _ if asked.is_some() => part(first, body),
        _ => ("200 OK".to_owned(), String::new(), body),
    };
    let length = match fault {
        Fault::EndlessBody => "Transfer-Encoding: chunked".to_owned(),
        Fault::LyingLength => format!("Content-Length: {}", body.len() + 1000),
        _ => format!("Content-Length: {}", body.len()),
    };
    write!(stream, "HTTP/1.1 {status}\r\n{headers}ETag: {etag}\r\nAccept-Ranges: bytes\r\n{length}\r\n\r\n")?;
    if request.method == "HEAD" {
        return Ok(true);
    }
    let mut goes_on = !matches!(fault, Fault::LyingLength);
    if let Fault::CutAfter(bytes) | Fault::StallAfter(bytes) | Fault::ChangesAfter(bytes, _) = fault {
        body = &body[..(*bytes).min(body.len())];
        goes_on = false;
    }
    let mut send = |head: &str, piece: &[u8], tail: &str| {
        stream.write_all(&[head.as_bytes(), piece, tail.as_bytes()].concat())?;
        lock(served).bytes_sent += piece.len();
        std::io::Result::Ok(())
    };
    if matches!(fault, Fault::EndlessBody) {
        loop {
            send(&format!("{PIECE:x}\r\n"), &[b'x'; PIECE], "\r\n")?;
        }
    }
    body.chunks(PIECE).try_for_each(|piece| send("", piece, ""))?;
    Ok(goes_on)
}

fn part(first: usize, body: &[u8]) -> (String, String, &[u8]) {
    let headers = format!("Content-Range: bytes {first}-{}/{}\r\n", body.len() - 1, body.len());
    ("206 Partial Content".to_owned(), headers, &body[first..])
}

fn unsatisfiable(body: &[u8]) -> (String, String, &[u8]) {
    let headers = format!("Content-Range: bytes */{}\r\n", body.len());
    ("416 Range Not Satisfiable".to_owned(), headers, &[])
}

/// A child that ends with its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Python's web server over TLS, with a folder of files.
pub struct TlsFileServer {
    port: u16,
    folder: TempDir,
    _process: Process,
}

impl TlsFileServer {
    /// Starts one; with `authorization` it refuses requests whose header differs.
    ///
    /// # Panics
    /// When Python does not come up.
    pub fn start(tls: &Tls, authorization: Option<&str>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut child = Command::new(crate::python())
            .arg(crate::root().join("tests/kit/files_over_tls.py"))
            .args([folder.path(), &tls.cert(), &tls.key()])
            .args(authorization)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("Python starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        let process = Process(child);
        BufReader::new(stdout).read_line(&mut line).expect("Python says something");
        Self { port: line.trim().parse().expect("Python says its port"), folder, _process: process }
    }

    /// The folder it serves.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Host and port.
    pub fn host(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// The address of a file.
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
    /// Starts one that is open to everybody, or that only [`USER`] with [`PASSWORD`] may use.
    ///
    /// # Panics
    /// When docker-registry is not installed or does not come up.
    pub fn start(tls: &Tls, is_protected: bool) -> Self {
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
        // Somebody else may have taken the port in between; then another one is tried.
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

    /// The address of an artifact; the reference begins with `:` or `@`.
    pub fn url(&self, repository: &str, reference: &str) -> String {
        format!("oci://{}/{repository}{reference}", self.host())
    }

    /// Ends it at once, as a crash would.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Starts it again on its port, with what it had.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn restart(&mut self) {
        assert!(self.try_restart(), "docker-registry does not start on port {}", self.port);
    }

    fn try_restart(&mut self) -> bool {
        self.stop();
        // JSON is YAML.
        let config = self.folder.path().join("config.yml");
        fs::write(&config, &self.settings).expect("the configuration is written");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed; run `make test-tools` once");
        let mut process = Process(child);
        let address = self.host();
        let is_up = until("docker-registry to listen", || {
            let has_ended = process.0.try_wait().expect("the process can be asked").is_some();
            if has_ended { Some(false) } else { TcpStream::connect(&address).is_ok().then_some(true) }
        });
        self.process = Some(process);
        is_up
    }

    /// Uploads files as the layers of an artifact, as ModelPack's tools do with [`MODEL_PACK`], else as ORAS does, and
    /// returns the digest of its manifest.
    ///
    /// # Panics
    /// When the registry does not take it.
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

    /// Format: the distribution specification, a POST that is followed by one PUT.
    fn upload(&self, repository: &str, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let begun = self.request("POST", &format!("/v2/{repository}/blobs/uploads/"), &[], b"");
        let location = begun.header("location").expect("the registry says where to upload");
        let path = location.trim_start_matches(&format!("https://{}", self.host()));
        let done = self.request("PUT", &format!("{path}&digest={digest}"), &[], bytes);
        assert_eq!(done.status, 201, "{}", String::from_utf8_lossy(&done.body));
        digest
    }

    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let headers = [headers, &[("Authorization", BASIC)]].concat();
        exchange(&self.host(), Some(&self.ca), method, path, &headers, body)
    }
}

/// The S3 of moto: objects are put without a signature, but read only with one, of whatever key.
pub struct S3 {
    address: String,
    ca: Option<PathBuf>,
    _process: Process,
}

impl S3 {
    /// Starts one, over TLS when there is a certificate.
    ///
    /// # Panics
    /// When moto is not installed or does not come up.
    pub fn start(tls: Option<&Tls>) -> Self {
        let mut command = Command::new(crate::python());
        command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]);
        if let Some(tls) = tls {
            command.arg("--ssl-cert").arg(tls.cert()).arg("--ssl-key").arg(tls.key());
        }
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("Python starts");
        let mut lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines().map_while(Result::ok);
        let process = Process(child);
        let address = lines
            .find_map(|line| line.split_once("Running on ")?.1.split_once("://").map(|(_, address)| address.to_owned()))
            .expect("moto says where it serves; is it installed? run `make test-tools` once");
        // What it says later is of no interest, but has to be read.
        std::thread::spawn(move || lines.for_each(drop));
        Self { address: address.trim().to_owned(), ca: tls.map(Tls::ca), _process: process }
    }

    /// Host and port.
    pub fn host(&self) -> &str {
        &self.address
    }

    /// Puts an object, and makes its bucket.
    ///
    /// # Panics
    /// When moto does not take it.
    pub fn put(&self, bucket: &str, key: &str, bytes: &[u8]) {
        for (path, body) in [(format!("/{bucket}"), &b""[..]), (format!("/{bucket}/{key}"), bytes)] {
            let answer = exchange(&self.address, self.ca.as_deref(), "PUT", &path, &[], body);
            assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
        }
    }

    /// The address of an object.
    pub fn url(&self, bucket: &str, key: &str) -> String {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        format!("s3://{bucket}/{key}?endpoint={scheme}://{}&region=us-east-1", self.address)
    }
}
