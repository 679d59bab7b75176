//! Cameras over HTTP: a scripted one for faults, and ffmpeg as a real one.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::broker::free_port;
use crate::wait::until_true;

/// Between two frames of the scripted MJPEG.
const FRAME_EVERY: Duration = Duration::from_millis(40);

/// What the scripted camera answers with.
#[derive(Clone)]
pub enum Script {
    /// These bytes, as one picture.
    Snapshot(Vec<u8>),
    /// An endless MJPEG of this picture.
    Mjpeg(Vec<u8>),
    /// Exactly this answer, then the end of the connection.
    Raw(Vec<u8>),
    /// Nothing at all.
    Silence,
}

/// A camera that does as it is told.
pub struct Camera {
    port: u16,
    script: Arc<Mutex<Script>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
    is_stopped: Arc<AtomicBool>,
    requests: Arc<AtomicUsize>,
}

impl Camera {
    /// Starts one.
    ///
    /// # Panics
    /// When no port can be had.
    pub fn start(script: Script) -> Self {
        let camera = Self {
            port: free_port(),
            script: Arc::new(Mutex::new(script)),
            open: Arc::default(),
            is_stopped: Arc::new(AtomicBool::new(true)),
            requests: Arc::default(),
        };
        camera.resume();
        camera
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/video", self.port)
    }

    /// Requests so far.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// Changes what the next request gets.
    pub fn play(&self, script: Script) {
        *self.script.lock().unwrap_or_else(PoisonError::into_inner) = script;
    }

    /// Pulls the plug: connections break, and no new one is accepted.
    pub fn stop(&self) {
        if !self.is_stopped.swap(true, Ordering::SeqCst) {
            // The accept loop sees the flag when somebody knocks.
            drop(TcpStream::connect(("127.0.0.1", self.port)));
            self.break_connections();
            until_true("the camera to be gone", || TcpStream::connect(("127.0.0.1", self.port)).is_err());
        }
    }

    /// Breaks the open connections.
    pub fn break_connections(&self) {
        for stream in self.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    /// Plugs it in again, on its port.
    ///
    /// # Panics
    /// When somebody else has taken the port.
    pub fn resume(&self) {
        let listener = crate::wait::until("the camera's port", || TcpListener::bind(("127.0.0.1", self.port)).ok());
        self.is_stopped.store(false, Ordering::SeqCst);
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

impl Drop for Camera {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Answers request after request until the other end has enough.
fn answer(stream: TcpStream, script: &Mutex<Script>, requests: &AtomicUsize) {
    let Ok(copy) = stream.try_clone() else { return };
    let mut reader = BufReader::new(copy);
    let mut writer = stream;
    while read_request(&mut reader) {
        requests.fetch_add(1, Ordering::SeqCst);
        let script = script.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let goes_on = match script {
            Script::Snapshot(picture) => writer
                .write_all(
                    &[
                        format!(
                            "HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n",
                            picture.len()
                        )
                        .into_bytes(),
                        picture,
                    ]
                    .concat(),
                )
                .is_ok(),
            Script::Mjpeg(picture) => {
                mjpeg(&mut writer, &picture);
                false
            }
            Script::Raw(bytes) => {
                drop(writer.write_all(&bytes));
                false
            }
            Script::Silence => {
                drop(reader.read(&mut [0; 1]));
                false
            }
        };
        if !goes_on {
            drop(writer.shutdown(Shutdown::Both));
            return;
        }
    }
}

fn read_request(reader: &mut BufReader<TcpStream>) -> bool {
    let mut line = String::new();
    loop {
        line.clear();
        match reader.read_line(&mut line) {
            Ok(0) | Err(_) => return false,
            Ok(_) if line.trim().is_empty() => return true,
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
    let mut goes_on = writer.write_all(head).is_ok();
    while goes_on {
        goes_on = writer.write_all(&part).is_ok();
        std::thread::park_timeout(FRAME_EVERY);
    }
}

/// ffmpeg, serving one picture as an endless MJPEG over HTTP to one client at a time.
pub struct Ffmpeg {
    port: u16,
    child: Child,
}

impl Ffmpeg {
    /// Starts one that plays a JPEG file, unchanged, at 10 frames per second.
    ///
    /// # Panics
    /// When ffmpeg is not installed.
    pub fn start(picture: &std::path::Path) -> Self {
        let port = free_port();
        let child = Command::new("ffmpeg")
            .args(["-hide_banner", "-loglevel", "error", "-re", "-loop", "1", "-framerate", "10", "-i"])
            .arg(picture)
            .args(["-c:v", "copy", "-f", "mpjpeg", "-listen", "1", "-content_type"])
            .arg("multipart/x-mixed-replace;boundary=ffmpeg")
            .arg(format!("http://127.0.0.1:{port}/video"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("ffmpeg is installed; run `make test-tools` once");
        Self { port, child }
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/video", self.port)
    }
}

impl Drop for Ffmpeg {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
