//! A scripted web server for model downloads, for faults that real servers do not produce on demand.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufReader, Read as _, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The chunk size of a body; progress is counted per chunk.
const CHUNK_BYTES: usize = 16 << 10;

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
