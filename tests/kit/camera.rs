//! HTTP cameras: a scripted one that produces faults, and ffmpeg as a real one.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::broker::free_port;
use crate::process::{Process, command};
use crate::wait::{until, until_true};

/// The interval between two frames of the scripted MJPEG stream.
const FRAME_INTERVAL: Duration = Duration::from_millis(40);

/// The response of the scripted camera.
#[derive(Clone)]
pub enum CameraScript {
    /// These bytes as one JPEG image per request.
    Snapshot(Vec<u8>),
    /// An endless MJPEG stream of this image.
    Mjpeg(Vec<u8>),
    /// Exactly these bytes; then the connection is closed.
    Raw(Vec<u8>),
    /// The first bytes, and then the others again and again.
    Stream(Vec<u8>, Vec<u8>),
    /// These bytes; then silence, with the connection open.
    Stall(Vec<u8>),
    /// One image per connection: the second request on it is received, and the connection is closed without an answer.
    Forgetful(Vec<u8>),
    /// The first bytes for requests that do not contain the text, the others for those that do. The connection is closed.
    Unless(&'static str, Vec<u8>, Vec<u8>),
    /// No response; the connection stays open.
    Silence,
}

/// A camera that follows a script.
pub struct ScriptedCamera {
    port: u16,
    script: Arc<Mutex<CameraScript>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
    is_stopped: Arc<AtomicBool>,
    requests: Arc<AtomicUsize>,
}

impl ScriptedCamera {
    /// Starts a camera on a free port.
    ///
    /// # Panics
    /// If no port is free.
    pub fn start(script: CameraScript) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let camera = Self {
            port: listener.local_addr().expect("a bound socket has an address").port(),
            script: Arc::new(Mutex::new(script)),
            open: Arc::default(),
            is_stopped: Arc::default(),
            requests: Arc::default(),
        };
        camera.serve(listener);
        camera
    }

    /// The camera's URL.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/video", self.port)
    }

    /// The number of requests so far.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// Sets the response to subsequent requests.
    pub fn set(&self, script: CameraScript) {
        *self.script.lock().unwrap_or_else(PoisonError::into_inner) = script;
    }

    /// Stops the camera: open connections are closed, and no new one is accepted.
    pub fn stop(&self) {
        if !self.is_stopped.swap(true, Ordering::SeqCst) {
            // The accept loop checks the flag after the next connection.
            drop(TcpStream::connect(("127.0.0.1", self.port)));
            self.break_connections();
            until_true("the camera to refuse connections", || TcpStream::connect(("127.0.0.1", self.port)).is_err());
        }
    }

    /// Closes the open connections.
    pub fn break_connections(&self) {
        for stream in self.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    /// Starts the camera again on its previous port.
    ///
    /// # Panics
    /// If another process has taken the port.
    pub fn resume(&self) {
        let listener = until("the camera's port", || TcpListener::bind(("127.0.0.1", self.port)).ok());
        self.is_stopped.store(false, Ordering::SeqCst);
        self.serve(listener);
    }

    fn serve(&self, listener: TcpListener) {
        let (script, open, is_stopped) = (self.script.clone(), self.open.clone(), self.is_stopped.clone());
        let requests = self.requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if is_stopped.load(Ordering::SeqCst) {
                    return;
                }
                if let Ok(copy) = stream.try_clone() {
                    open.lock().unwrap_or_else(PoisonError::into_inner).push(copy);
                }
                let (script, requests) = (script.clone(), requests.clone());
                std::thread::spawn(move || answer(stream, &script, &requests));
            }
        });
    }
}

impl Drop for ScriptedCamera {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Answers requests until the script or the client closes the connection.
fn answer(stream: TcpStream, script: &Mutex<CameraScript>, requests: &AtomicUsize) {
    let Ok(copy) = stream.try_clone() else { return };
    let mut reader = BufReader::new(copy);
    let mut writer = stream;
    let mut count = 0;
    while let Some(request) = read_request(&mut reader) {
        requests.fetch_add(1, Ordering::SeqCst);
        count += 1;
        let script = script.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let keep_alive = match script {
            CameraScript::Snapshot(picture) => writer.write_all(&snapshot(&picture)).is_ok(),
            CameraScript::Mjpeg(picture) => {
                mjpeg(&mut writer, &picture);
                false
            }
            CameraScript::Raw(bytes) => {
                drop(writer.write_all(&bytes));
                false
            }
            CameraScript::Stream(head, part) => {
                repeat(&mut writer, &head, &part);
                false
            }
            CameraScript::Stall(bytes) => {
                drop(writer.write_all(&bytes));
                drop(reader.read(&mut [0; 1]));
                false
            }
            CameraScript::Forgetful(picture) if count == 1 => writer.write_all(&snapshot(&picture)).is_ok(),
            CameraScript::Forgetful(_) => false,
            CameraScript::Unless(text, first, other) => {
                drop(writer.write_all(if request.contains(text) { &other } else { &first }));
                false
            }
            CameraScript::Silence => {
                drop(reader.read(&mut [0; 1]));
                false
            }
        };
        if !keep_alive {
            drop(writer.shutdown(Shutdown::Both));
            return;
        }
    }
}

/// The response with one image.
fn snapshot(picture: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n", picture.len());
    [head.as_bytes(), picture].concat()
}

/// The head of a request; `None` at the end of the connection.
fn read_request(reader: &mut BufReader<TcpStream>) -> Option<String> {
    let mut request = String::new();
    loop {
        let before = request.len();
        match reader.read_line(&mut request) {
            Ok(0) | Err(_) => return None,
            Ok(_) if request[before..].trim().is_empty() => return Some(request),
            Ok(_) => {}
        }
    }
}

fn mjpeg(writer: &mut TcpStream, picture: &[u8]) {
    let head = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n";
    let part = [
        format!("--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n", picture.len()).into_bytes(),
        picture.to_vec(),
        b"\r\n".to_vec(),
    ]
    .concat();
    repeat(writer, head, &part);
}

fn repeat(writer: &mut TcpStream, head: &[u8], part: &[u8]) {
    let mut is_open = writer.write_all(head).is_ok();
    while is_open {
        is_open = writer.write_all(part).is_ok();
        std::thread::park_timeout(FRAME_INTERVAL);
    }
}

/// An ffmpeg process that serves one JPEG file as an endless MJPEG stream over HTTP, to one client at a time.
pub struct FfmpegCamera {
    port: u16,
    _process: Process,
}

impl FfmpegCamera {
    /// Starts a camera that repeats a JPEG file, without re-encoding it, at 10 frames per second. ffmpeg cannot bind
    /// port 0 and report the port, so a free one is chosen before.
    ///
    /// # Panics
    /// If ffmpeg is not installed.
    pub fn start(picture: &std::path::Path) -> Self {
        let port = free_port();
        let child = command("ffmpeg")
            .args(["-hide_banner", "-loglevel", "error", "-re", "-loop", "1", "-framerate", "10", "-i"])
            .arg(picture)
            .args(["-c:v", "copy", "-f", "mpjpeg", "-listen", "1", "-content_type"])
            .arg("multipart/x-mixed-replace;boundary=ffmpeg")
            .arg(format!("http://127.0.0.1:{port}/video"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setpriv is installed; it is part of util-linux");
        Self { port, _process: Process::new(child) }
    }

    /// The camera's URL.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/video", self.port)
    }
}
