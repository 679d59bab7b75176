//! A real mosquitto broker with a configuration per test, and mosquitto's own clients.
//!
//! Queues and in-flight windows of the broker are unbounded, so a message that a connected subscriber misses was never
//! published. The kit's own clients connect as the first user of the options, with a certificate of the same authority.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tempfile::TempDir;

use crate::certificates::Certificates;
use crate::process::{Process, command, run_with_input};
use crate::utf8;
use crate::wait::{until, until_true};

/// The URL of a broker that is never reachable: nothing listens on port 1 of the loopback address.
pub const UNREACHABLE_BROKER: &str = "mqtt://127.0.0.1:1";

/// A free port. It is released before the caller binds it, so another process can take it in between; callers retry.
///
/// # Panics
/// If no port is free.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// The configuration of a broker. By default every client may connect, and nothing is persisted.
#[derive(Debug, Clone, Default)]
pub struct BrokerOptions {
    /// Whether the broker persists sessions and messages. It saves them after every change, so that a crash loses
    /// almost nothing.
    pub persistence: bool,
    /// The certificates for TLS; `None` is plain TCP.
    pub tls: Option<Certificates>,
    /// Whether clients must present a certificate of the same authority; only with TLS.
    pub client_certificates: bool,
    /// Users and passwords; anonymous clients are allowed only if the list is empty.
    pub users: Vec<(String, String)>,
    /// The contents of mosquitto's `acl_file`.
    pub acl: Option<String>,
    /// Additional lines of the configuration.
    pub extra: String,
}

/// The options with which a client connects to a broker.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// The host.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The certificate authority to trust; with one, the client uses TLS.
    pub ca: Option<PathBuf>,
    /// The client's certificate and key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The user and the password.
    pub user: Option<(String, String)>,
}

impl ConnectOptions {
    /// A broker without authentication on this loopback port.
    pub fn at(port: u16) -> Self {
        Self { host: "127.0.0.1".to_owned(), port, ca: None, certificate: None, user: None }
    }

    /// The options as flags of mosquitto's clients, which `subscriber.py` accepts as well.
    pub(crate) fn flags(&self) -> Vec<String> {
        let mut flags = vec!["-h".to_owned(), self.host.clone(), "-p".to_owned(), self.port.to_string()];
        let mut add = |flag: &str, value: &str| flags.extend([flag.to_owned(), value.to_owned()]);
        if let Some(ca) = &self.ca {
            add("--cafile", utf8(ca));
        }
        if let Some((certificate, key)) = &self.certificate {
            add("--cert", utf8(certificate));
            add("--key", utf8(key));
        }
        if let Some((name, password)) = &self.user {
            add("-u", name);
            add("-P", password);
        }
        flags
    }
}

/// A mosquitto process that can be stopped and restarted on the same port.
pub struct Broker {
    port: u16,
    options: BrokerOptions,
    folder: TempDir,
    process: Option<Process>,
}

impl Broker {
    /// Starts a broker with the default configuration.
    ///
    /// # Panics
    /// If mosquitto is not installed or does not start.
    pub fn start() -> Self {
        Self::with(BrokerOptions::default())
    }

    /// Starts a broker with this configuration.
    ///
    /// # Panics
    /// If mosquitto is not installed or does not start.
    pub fn with(options: BrokerOptions) -> Self {
        // In memory, saving after every change is cheap, and a crash of the process loses nothing.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a temporary folder");
        let mut broker = Self { port: 0, options, folder, process: None };
        // Another process may take the port first; then mosquitto exits, and the next port is tried.
        for _ in 0..5 {
            broker.port = free_port();
            if broker.try_restart() {
                return broker;
            }
        }
        panic!("mosquitto does not start; is it installed? run `make test-tools` once\n{}", broker.configuration());
    }

    /// The broker's URL. With TLS it contains the host name of the certificate.
    pub fn url(&self) -> String {
        let scheme = if self.options.tls.is_some() { "mqtts" } else { "mqtt" };
        format!("{scheme}://{}:{}", self.connect_options().host, self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The options with which the kit's own clients connect.
    pub fn connect_options(&self) -> ConnectOptions {
        let user = self.options.users.first().cloned();
        match &self.options.tls {
            None => ConnectOptions { user, ..ConnectOptions::at(self.port) },
            Some(tls) => ConnectOptions {
                host: "localhost".to_owned(),
                port: self.port,
                ca: Some(tls.ca()),
                certificate: self.options.client_certificates.then(|| tls.client()),
                user,
            },
        }
    }

    /// Kills the broker, as a crash would.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Starts the broker on its previous port.
    ///
    /// # Panics
    /// If the broker does not start.
    pub fn restart(&mut self) {
        assert!(self.try_restart(), "mosquitto does not start on port {}", self.port);
    }

    /// Kills the broker, and starts it on the same port with another configuration.
    ///
    /// # Panics
    /// If the broker does not start.
    pub fn reconfigure(&mut self, options: BrokerOptions) {
        self.options = options;
        self.restart();
    }

    /// The contents of the configuration file. [`Broker::write_files`] writes the files that it refers to.
    fn configuration(&self) -> String {
        let BrokerOptions { persistence, tls, client_certificates, users, acl, extra } = &self.options;
        let folder = utf8(self.folder.path());
        let mut lines = vec![
            format!("listener {} 127.0.0.1", self.port),
            // If mosquitto starts as root, it changes to an unprivileged user who cannot read this folder. For other
            // users this line has no effect.
            "user root".to_owned(),
            "max_queued_messages 0".to_owned(),
            "max_inflight_messages 0".to_owned(),
            format!("allow_anonymous {}", users.is_empty()),
            format!("persistence {persistence}"),
        ];
        if *persistence {
            lines.extend([
                format!("persistence_location {folder}/"),
                "autosave_interval 1".to_owned(),
                "autosave_on_changes true".to_owned(),
            ]);
        }
        if let Some(tls) = tls {
            lines.extend([
                format!("cafile {}", utf8(&tls.ca())),
                format!("certfile {}", utf8(&tls.server_certificate())),
                format!("keyfile {}", utf8(&tls.server_key())),
                format!("require_certificate {client_certificates}"),
            ]);
        }
        if !users.is_empty() {
            lines.push(format!("password_file {folder}/passwords"));
        }
        if acl.is_some() {
            lines.push(format!("acl_file {folder}/acl"));
        }
        lines.push(extra.clone());
        lines.join("\n") + "\n"
    }

    fn write_files(&self) {
        let path = |name: &str| self.folder.path().join(name);
        fs::write(path("mosquitto.conf"), self.configuration()).expect("the configuration is written");
        fs::write(path("acl"), self.options.acl.as_deref().unwrap_or_default()).expect("the rules are written");
        fs::write(path("passwords"), "").expect("the passwords are written");
        for (name, password) in &self.options.users {
            run_with_input("mosquitto_passwd", &["-b", utf8(&path("passwords")), name, password], b"");
        }
    }

    fn try_restart(&mut self) -> bool {
        self.stop();
        self.write_files();
        let log = self.folder.path().join("mosquitto.log");
        let child = command(mosquitto())
            .arg("-c")
            .arg(self.folder.path().join("mosquitto.conf"))
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).expect("the folder is writable"))
            .spawn()
            .expect("setpriv is installed; it is part of util-linux");
        self.process = Some(Process::new(child));
        // A successful connection to the port proves nothing, as another process may have bound it first. Mosquitto's own
        // log shows whether it listens.
        until("mosquitto to listen", || {
            let process = self.process.as_mut()?;
            let has_exited = process.try_wait().expect("the state of a child is known").is_some();
            let listens = fs::read_to_string(&log).is_ok_and(|log| log.lines().any(|line| line.ends_with(" running")));
            (has_exited || listens).then_some(listens && !has_exited)
        })
    }

    /// Subscribes to a topic filter.
    pub fn subscribe(&self, filter: &str) -> Subscriber {
        Subscriber::with(&self.connect_options(), filter)
    }

    /// Publishes with QoS 1, and returns once the broker has acknowledged. An empty payload clears a retained message.
    ///
    /// # Panics
    /// If the broker does not acknowledge.
    pub fn publish(&self, topic: &str, payload: impl AsRef<[u8]>, retain: bool) {
        let payload = payload.as_ref();
        let flags = self.connect_options().flags();
        // `-s` reads the payload from stdin, but rejects an empty one.
        let source = if payload.is_empty() { "-n" } else { "-s" };
        let mut arguments: Vec<&str> = flags.iter().map(String::as_str).collect();
        arguments.extend(["-q", "1", "-t", topic, source]);
        arguments.extend(retain.then_some("-r"));
        run_with_input("mosquitto_pub", &arguments, payload);
    }

    /// Publishes the same payload, which is one line, many times over one connection with QoS 1.
    ///
    /// # Panics
    /// If the broker does not acknowledge.
    pub fn publish_repeatedly(&self, topic: &str, payload: &str, count: usize) {
        let flags = self.connect_options().flags();
        let mut arguments: Vec<&str> = flags.iter().map(String::as_str).collect();
        arguments.extend(["-q", "1", "-t", topic, "-l"]);
        run_with_input("mosquitto_pub", &arguments, format!("{payload}\n").repeat(count).as_bytes());
    }
}

/// Debian installs daemons in a folder that is not in the PATH of an ordinary user.
fn mosquitto() -> &'static str {
    if std::path::Path::new("/usr/sbin/mosquitto").exists() { "/usr/sbin/mosquitto" } else { "mosquitto" }
}

/// A message as a subscriber received it.
#[derive(Debug, Clone)]
pub struct Message {
    /// The topic.
    pub topic: String,
    /// Whether the message was retained by the broker.
    pub retained: bool,
    /// The QoS of the delivery.
    pub qos: u8,
    /// The payload: JSON, or a string if it is not JSON.
    pub payload: Value,
}

/// A `mosquitto_sub` process and the messages it has received.
pub struct Subscriber {
    _process: Process,
    messages: Arc<Mutex<Vec<Message>>>,
}

impl Subscriber {
    /// Subscribes at a broker without authentication. The subscription is active when this returns.
    ///
    /// # Panics
    /// If `mosquitto_sub` is not installed.
    pub fn start(port: u16, filter: &str) -> Self {
        Self::with(&ConnectOptions::at(port), filter)
    }

    /// Subscribes at any broker.
    ///
    /// # Panics
    /// If `mosquitto_sub` is not installed.
    pub fn with(options: &ConnectOptions, filter: &str) -> Self {
        // With `-d`, mosquitto_sub prints when the subscription is granted; `stdbuf` makes it print at once. Lines with
        // messages start with a tab.
        let mut child = command("stdbuf")
            .args(["-oL", "mosquitto_sub", "-q", "1", "-d", "-F", "\t%t\t%r\t%q\t%p", "-t", filter])
            .args(options.flags())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("setpriv is installed; it is part of util-linux");
        let messages = Arc::new(Mutex::new(Vec::new()));
        let granted = Arc::new(Mutex::new(false));
        let lines = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let process = Process::new(child);
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
        Self { _process: process, messages }
    }

    /// All messages so far.
    pub fn messages(&self) -> Vec<Message> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The payloads of messages whose topic has this suffix.
    pub fn payloads(&self, topic_suffix: &str) -> Vec<Value> {
        self.messages()
            .into_iter()
            .filter(|message| message.topic.ends_with(topic_suffix))
            .map(|message| message.payload)
            .collect()
    }

    /// Waits for at least `count` messages whose topic has this suffix, and returns their payloads.
    ///
    /// # Panics
    /// If they do not arrive in time.
    pub fn wait_for(&self, topic_suffix: &str, count: usize) -> Vec<Value> {
        until_true(&format!("{count} messages on {topic_suffix}"), || self.payloads(topic_suffix).len() >= count);
        self.payloads(topic_suffix)
    }
}
