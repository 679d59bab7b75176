//! A real mosquitto, and its own client as a subscriber.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tempfile::TempDir;

use crate::wait::until_true;

/// A port nobody listens on. It is given back before it is used, so somebody may be faster; callers try again.
///
/// # Panics
/// When the machine has no free port.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// A mosquitto that can be stopped and started on one port.
pub struct Broker {
    port: u16,
    folder: TempDir,
    child: Option<Child>,
}

impl Broker {
    /// Starts one that keeps nothing when it ends.
    ///
    /// # Panics
    /// When mosquitto is not installed or does not come up.
    pub fn start() -> Self {
        let mut broker = Self { port: 0, folder: tempfile::tempdir().expect("a temporary folder"), child: None };
        // Somebody else may have taken the port in between; then mosquitto ends, and another port is tried.
        for _ in 0..5 {
            broker.port = free_port();
            if broker.try_restart() {
                return broker;
            }
        }
        panic!("mosquitto does not start; is it installed? run `make test-tools` once");
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// Ends it at once, as a crash would.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// Starts it again on its port.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn restart(&mut self) {
        assert!(self.try_restart(), "mosquitto does not start on port {}", self.port);
    }

    fn try_restart(&mut self) -> bool {
        self.stop();
        let config = self.folder.path().join("mosquitto.conf");
        let text = format!("listener {} 127.0.0.1\nallow_anonymous true\npersistence false\n", self.port);
        fs::write(&config, text).expect("the configuration is written");
        let child = Command::new(mosquitto())
            .arg("-c")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("mosquitto is installed; run `make test-tools` once");
        self.child = Some(child);
        let address = format!("127.0.0.1:{}", self.port);
        crate::wait::until("mosquitto to listen", || {
            let has_ended =
                self.child.as_mut().is_some_and(|child| child.try_wait().expect("the process can be asked").is_some());
            if has_ended {
                return Some(false);
            }
            std::net::TcpStream::connect(&address).is_ok().then_some(true)
        })
    }

    /// Subscribes to a topic filter.
    pub fn subscribe(&self, filter: &str) -> Subscriber {
        Subscriber::start(self.port, filter)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Debian puts daemons where an ordinary user's PATH does not lead.
fn mosquitto() -> &'static str {
    if std::path::Path::new("/usr/sbin/mosquitto").exists() { "/usr/sbin/mosquitto" } else { "mosquitto" }
}

/// One message as a subscriber got it.
#[derive(Debug, Clone)]
pub struct Message {
    /// Where it was published.
    pub topic: String,
    /// Whether the broker had kept it.
    pub retained: bool,
    /// The quality it came with.
    pub qos: u8,
    /// What it says.
    pub payload: Value,
}

/// A `mosquitto_sub` and what it has printed so far.
pub struct Subscriber {
    child: Child,
    messages: Arc<Mutex<Vec<Message>>>,
}

impl Subscriber {
    /// Starts one, which has subscribed when this returns.
    ///
    /// # Panics
    /// When `mosquitto_sub` is not installed.
    pub fn start(port: u16, filter: &str) -> Self {
        // `-d` makes it say on stdout when the subscription was granted, which it would keep in its buffer without
        // `stdbuf`; messages begin with a tab.
        let mut child = Command::new("stdbuf")
            .args([
                "-oL",
                "mosquitto_sub",
                "-h",
                "127.0.0.1",
                "-p",
                &port.to_string(),
                "-q",
                "1",
                "-d",
                "-F",
                "\t%t\t%r\t%q\t%p",
                "-t",
                filter,
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("mosquitto_sub is installed; run `make test-tools` once");
        let messages = Arc::new(Mutex::new(Vec::new()));
        let granted = Arc::new(Mutex::new(false));
        let lines = BufReader::new(child.stdout.take().expect("stdout is piped"));
        std::thread::spawn({
            let (messages, granted) = (messages.clone(), granted.clone());
            move || {
                for line in lines.lines().map_while(Result::ok) {
                    if line.contains("Subscribed (mid") {
                        *granted.lock().unwrap_or_else(PoisonError::into_inner) = true;
                    }
                    let mut parts = line.splitn(5, '\t').skip(1);
                    let (Some(topic), Some(retained), Some(qos), Some(payload)) =
                        (parts.next(), parts.next(), parts.next(), parts.next())
                    else {
                        continue;
                    };
                    messages.lock().unwrap_or_else(PoisonError::into_inner).push(Message {
                        topic: topic.to_owned(),
                        retained: retained == "1",
                        qos: qos.parse().unwrap_or(9),
                        payload: serde_json::from_str(payload).unwrap_or_else(|_| Value::from(payload)),
                    });
                }
            }
        });
        until_true("the subscription", || *granted.lock().unwrap_or_else(PoisonError::into_inner));
        Self { child, messages }
    }

    /// Everything that has come so far.
    pub fn messages(&self) -> Vec<Message> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Payloads whose topic ends like this.
    pub fn payloads(&self, topic_end: &str) -> Vec<Value> {
        self.messages()
            .into_iter()
            .filter(|message| message.topic.ends_with(topic_end))
            .map(|message| message.payload)
            .collect()
    }

    /// Waits until so many messages with this end of a topic have come, and returns their payloads.
    ///
    /// # Panics
    /// When they do not come.
    pub fn wait_for(&self, topic_end: &str, count: usize) -> Vec<Value> {
        until_true(&format!("{count} messages on {topic_end}"), || self.payloads(topic_end).len() >= count);
        self.payloads(topic_end)
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
