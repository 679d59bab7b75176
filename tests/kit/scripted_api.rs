//! An API server that answers as it is told, for what a real one does not do on demand: storms of 410, 429 and 503, and
//! JSON that breaks off. It knows lists and watches of EdgeModels and CameraStreams, says that there is no such Node, and
//! takes every other write.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How lists and watches are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Script {
    /// As a server in good order does.
    #[default]
    Well,
    /// Every watch ends at once: the version is too old.
    Expired,
    /// Too many requests, without a word on when to come again.
    LimitExceeded,
    /// Not available.
    Unavailable,
    /// Every answer breaks off in the middle.
    Truncated,
}

#[derive(Default)]
struct State {
    script: Script,
    objects: BTreeMap<&'static str, Vec<Value>>,
    version: u64,
    lists: BTreeMap<&'static str, Vec<Instant>>,
    watches: usize,
}

/// The server. Its threads end with the process.
pub struct ScriptedApi {
    state: Arc<Mutex<State>>,
    address: String,
}

impl ScriptedApi {
    /// One with no objects, in good order.
    ///
    /// # Panics
    /// When there is no free port.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound").to_string();
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

    /// A kubeconfig that leads here.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn kubeconfig(&self, folder: &Path) -> PathBuf {
        let path = folder.join("kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "a",
            "clusters": [{"name": "a", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "a", "user": {"token": "t"}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        });
        std::fs::write(&path, text.to_string()).expect("the folder is ours");
        path
    }

    /// Answers so from now on.
    pub fn follow(&self, script: Script) {
        self.state().script = script;
    }

    /// Puts an object, by the plural of its kind.
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

    /// When lists of a kind were asked for.
    pub fn lists(&self, plural: &str) -> Vec<Instant> {
        self.state().lists.get(plural).cloned().unwrap_or_default()
    }

    /// How many watches were asked for.
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
                    Script::Expired => chunked(&mut stream, &error(410, "Expired").to_string())?,
                    Script::Truncated => chunked(&mut stream, "{\"type\":\"ADDED\",\"object\":{\"apiVersion\":\"li")?,
                    Script::LimitExceeded => whole(&mut stream, 429, &status(429, "TooManyRequests").to_string())?,
                    Script::Unavailable => whole(&mut stream, 503, &status(503, "ServiceUnavailable").to_string())?,
                    // A quiet watch, which ends when the script changes.
                    Script::Well => {
                        write!(
                            stream,
                            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                        )?;
                        let before = lock(state).version;
                        while lock(state).script == Script::Well && lock(state).version == before {
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
                    Script::LimitExceeded => whole(&mut stream, 429, &status(429, "TooManyRequests").to_string())?,
                    Script::Unavailable => whole(&mut stream, 503, &status(503, "ServiceUnavailable").to_string())?,
                    Script::Truncated => whole(&mut stream, 200, &list[..list.len() / 2])?,
                    Script::Well | Script::Expired => whole(&mut stream, 200, &list)?,
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
