//! A scripted Kubernetes API server for faults that a real one does not produce on demand: series of 410, 429 and 503
//! responses, and truncated JSON. It supports lists and watches of EdgeModels and CameraStreams, answers 404 for a
//! Node, and accepts every other write.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The responses to lists and watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ApiScript {
    /// Correct responses.
    #[default]
    Healthy,
    /// Every watch ends immediately with 410: the resource version is too old.
    Expired,
    /// 429 without a `Retry-After` header.
    LimitExceeded,
    /// 503.
    Unavailable,
    /// Every response is truncated.
    Truncated,
}

#[derive(Default)]
struct State {
    script: ApiScript,
    objects: BTreeMap<&'static str, Vec<Value>>,
    version: u64,
    lists: BTreeMap<&'static str, Vec<Instant>>,
    watches: usize,
}

/// The server. Its threads run until the process exits.
pub struct ScriptedApi {
    state: Arc<Mutex<State>>,
    address: String,
}

impl ScriptedApi {
    /// Starts a healthy server without objects.
    ///
    /// # Panics
    /// If no port is free.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let state = Arc::new(Mutex::new(State { version: 1, ..State::default() }));
        std::thread::spawn({
            let state = state.clone();
            move || {
                for stream in listener.incoming().flatten() {
                    let state = state.clone();
                    std::thread::spawn(move || drop(serve(stream, &state)));
                }
            }
        });
        Self { state, address }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Writes a kubeconfig for this server.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn kubeconfig(&self, folder: &Path) -> PathBuf {
        let path = folder.join("kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "a",
            "clusters": [{"name": "a", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "a", "user": {"token": "t"}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        });
        std::fs::write(&path, text.to_string()).expect("the folder is writable");
        path
    }

    /// Sets the responses.
    pub fn set(&self, script: ApiScript) {
        self.state().script = script;
    }

    /// Creates or replaces an object of the kind with this plural name.
    pub fn put(&self, plural: &'static str, name: &str, generation: u64, spec: &Value) {
        let mut state = self.state();
        state.version += 1;
        let version = state.version.to_string();
        let kind = if plural == "edgemodels" { "EdgeModel" } else { "CameraStream" };
        let object = json!({
            "apiVersion": "lineside.dev/v1alpha1", "kind": kind, "spec": spec,
            "metadata": {"name": name, "namespace": "lineside", "uid": name, "generation": generation, "resourceVersion": version},
        });
        let objects = state.objects.entry(plural).or_default();
        objects.retain(|known| known["metadata"]["name"] != name);
        objects.push(object);
    }

    /// The times of the list requests for a kind.
    pub fn lists(&self, plural: &str) -> Vec<Instant> {
        self.state().lists.get(plural).cloned().unwrap_or_default()
    }

    /// The number of watch requests.
    pub fn watches(&self) -> usize {
        self.state().watches
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers the requests of one connection.
fn serve(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
            if header.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let path = request.split(' ').nth(1).unwrap_or_default();
        let plural = ["edgemodels", "camerastreams"].into_iter().find(|plural| path.contains(plural));
        let script = lock(state).script;
        match plural {
            Some(_) if path.contains("watch=true") => {
                lock(state).watches += 1;
                match script {
                    ApiScript::Expired => chunked(&mut stream, &error(410, "Expired").to_string())?,
                    ApiScript::Truncated => {
                        chunked(&mut stream, "{\"type\":\"ADDED\",\"object\":{\"apiVersion\":\"li")?;
                    }
                    ApiScript::LimitExceeded => whole(&mut stream, 429, &status(429, "TooManyRequests").to_string())?,
                    ApiScript::Unavailable => whole(&mut stream, 503, &status(503, "ServiceUnavailable").to_string())?,
                    // A watch without events, which ends when the script or an object changes.
                    ApiScript::Healthy => {
                        write!(
                            stream,
                            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                        )?;
                        let before = lock(state).version;
                        while lock(state).script == ApiScript::Healthy && lock(state).version == before {
                            std::thread::park_timeout(Duration::from_millis(50));
                        }
                        write!(stream, "0\r\n\r\n")?;
                    }
                }
            }
            Some(plural) => {
                lock(state).lists.entry(plural).or_default().push(Instant::now());
                let list = {
                    let state = lock(state);
                    json!({
                        "apiVersion": "lineside.dev/v1alpha1", "kind": "List", "metadata": {"resourceVersion": state.version.to_string()},
                        "items": state.objects.get(plural).cloned().unwrap_or_default(),
                    })
                    .to_string()
                };
                match script {
                    ApiScript::LimitExceeded => whole(&mut stream, 429, &status(429, "TooManyRequests").to_string())?,
                    ApiScript::Unavailable => whole(&mut stream, 503, &status(503, "ServiceUnavailable").to_string())?,
                    ApiScript::Truncated => whole(&mut stream, 200, &list[..list.len() / 2])?,
                    ApiScript::Healthy | ApiScript::Expired => whole(&mut stream, 200, &list)?,
                }
            }
            None if path.contains("/nodes/") => whole(&mut stream, 404, &status(404, "NotFound").to_string())?,
            None => {
                let taken = json!({"apiVersion": "v1", "kind": "Any", "metadata": {"name": "any"}});
                whole(&mut stream, 200, &taken.to_string())?;
            }
        }
    }
}

fn status(code: u16, reason: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason})
}

fn error(code: u16, reason: &str) -> Value {
    json!({"type": "ERROR", "object": status(code, reason)})
}

fn whole(stream: &mut TcpStream, code: u16, body: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {code} Scripted\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn chunked(stream: &mut TcpStream, line: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{line}\n\r\n0\r\n\r\n",
        line.len() + 1
    )
}
