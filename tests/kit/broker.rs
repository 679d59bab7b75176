//! A real mosquitto, set up as a test wants it, and its own clients.
//!
//! It drops nothing for a subscriber's sake: queues and windows have no bounds, so that whatever a connected subscriber
//! misses was not published. The kit's own clients use the first user of the setup and a certificate of its authority.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tempfile::TempDir;

use crate::certificates::Certificates;
use crate::plant::{feed, utf8};
use crate::wait::until_true;

/// A port nobody listens on. It is given back before it is used, so somebody may be faster; callers try again.
///
/// # Panics
/// When the machine has no free port.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// How a broker is set up. The default is open to everybody and keeps nothing when it ends.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Whether it keeps sessions and messages, which are saved after every change so that a crash takes next to none.
    pub persistence: bool,
    /// With what it speaks TLS, if it does.
    pub tls: Option<Certificates>,
    /// Whether clients need a certificate of the same authority; only with TLS.
    pub client_certificates: bool,
    /// Names and passwords of those who may connect; everybody may when there are none.
    pub users: Vec<(String, String)>,
    /// The contents of its file of access rules, in mosquitto's words.
    pub acl: Option<String>,
    /// Further lines of its configuration.
    pub extra: String,
}

/// What a client needs to get at a broker.
#[derive(Debug, Clone)]
pub struct Access {
    /// The host's name.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The authority to trust; with it the client speaks TLS.
    pub ca: Option<PathBuf>,
    /// The client's certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The user's name and password.
    pub user: Option<(String, String)>,
}

impl Access {
    /// To an open broker at this port of loopback.
    pub fn at(port: u16) -> Self {
        Self { host: "127.0.0.1".to_owned(), port, ca: None, certificate: None, user: None }
    }

    /// As flags of mosquitto's clients, which `subscriber.py` shares.
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

/// A mosquitto that can be stopped and started on one port.
pub struct Broker {
    port: u16,
    setup: Setup,
    folder: TempDir,
    child: Option<Child>,
}

impl Broker {
    /// Starts one that keeps nothing when it ends.
    ///
    /// # Panics
    /// When mosquitto is not installed or does not come up.
    pub fn start() -> Self {
        Self::with(Setup::default())
    }

    /// Starts one that is set up like this.
    ///
    /// # Panics
    /// When mosquitto is not installed or does not come up.
    pub fn with(setup: Setup) -> Self {
        // In memory it costs little to save after every change, and a crash of the process takes nothing from there.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a temporary folder");
        let mut broker = Self { port: 0, setup, folder, child: None };
        // Somebody else may have taken the port in between; then mosquitto ends, and another port is tried.
        for _ in 0..5 {
            broker.port = free_port();
            if broker.try_restart() {
                return broker;
            }
        }
        panic!("mosquitto does not start; is it installed? run `make test-tools` once\n{}", broker.configuration());
    }

    /// Its address. Over TLS it has the host's name, which the certificate has too.
    pub fn url(&self) -> String {
        let scheme = if self.setup.tls.is_some() { "mqtts" } else { "mqtt" };
        format!("{scheme}://{}:{}", self.access().host, self.port)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What the kit's own clients need to get at it.
    pub fn access(&self) -> Access {
        let user = self.setup.users.first().cloned();
        match &self.setup.tls {
            None => Access { user, ..Access::at(self.port) },
            Some(tls) => Access {
                host: "localhost".to_owned(),
                port: self.port,
                ca: Some(tls.ca()),
                certificate: self.setup.client_certificates.then(|| tls.client()),
                user,
            },
        }
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

    /// Ends it at once, and starts it again on its port with another setup.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn reconfigure(&mut self, setup: Setup) {
        self.setup = setup;
        self.restart();
    }

    /// What its configuration says. Files that it names are written by [`Broker::write_files`].
    fn configuration(&self) -> String {
        let Setup { persistence, tls, client_certificates, users, acl, extra } = &self.setup;
        let folder = utf8(self.folder.path());
        let mut lines = vec![
            format!("listener {} 127.0.0.1", self.port),
            // Started as root it would become another user, who may not read this folder. For others this says nothing.
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
        fs::write(path("acl"), self.setup.acl.as_deref().unwrap_or_default()).expect("the rules are written");
        fs::write(path("passwords"), "").expect("the passwords are written");
        for (name, password) in &self.setup.users {
            feed("mosquitto_passwd", &["-b", utf8(&path("passwords")), name, password], b"");
        }
    }

    fn try_restart(&mut self) -> bool {
        self.stop();
        self.write_files();
        let log = self.folder.path().join("mosquitto.log");
        let child = Command::new(mosquitto())
            .arg("-c")
            .arg(self.folder.path().join("mosquitto.conf"))
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).expect("the folder is ours"))
            .spawn()
            .expect("mosquitto is installed; run `make test-tools` once");
        self.child = Some(child);
        // Its own word counts: somebody else may listen on that port and have been faster.
        crate::wait::until("mosquitto to listen", || {
            let has_ended =
                self.child.as_mut().is_some_and(|child| child.try_wait().expect("the process can be asked").is_some());
            let runs = fs::read_to_string(&log).is_ok_and(|said| said.lines().any(|line| line.ends_with(" running")));
            (has_ended || runs).then_some(runs && !has_ended)
        })
    }

    /// Subscribes to a topic filter.
    pub fn subscribe(&self, filter: &str) -> Subscriber {
        Subscriber::with(&self.access(), filter)
    }

    /// Publishes with QoS 1, and returns when the broker has it. An empty payload clears what is retained.
    ///
    /// # Panics
    /// When the broker does not take it.
    pub fn publish(&self, topic: &str, payload: impl AsRef<[u8]>, retain: bool) {
        let payload = payload.as_ref();
        let flags = self.access().flags();
        // Its `-s` reads the payload whole, but refuses one that is empty.
        let source = if payload.is_empty() { "-n" } else { "-s" };
        let mut arguments: Vec<&str> = flags.iter().map(String::as_str).collect();
        arguments.extend(["-q", "1", "-t", topic, source]);
        arguments.extend(retain.then_some("-r"));
        feed("mosquitto_pub", &arguments, payload);
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
    /// Starts one at an open broker, which has subscribed when this returns.
    ///
    /// # Panics
    /// When `mosquitto_sub` is not installed.
    pub fn start(port: u16, filter: &str) -> Self {
        Self::with(&Access::at(port), filter)
    }

    /// The same at any broker.
    ///
    /// # Panics
    /// When `mosquitto_sub` is not installed.
    pub fn with(access: &Access, filter: &str) -> Self {
        // `-d` makes it say on stdout when the subscription was granted, which it would keep in its buffer without
        // `stdbuf`; messages begin with a tab.
        let mut child = Command::new("stdbuf")
            .args(["-oL", "mosquitto_sub", "-q", "1", "-d", "-F", "\t%t\t%r\t%q\t%p", "-t", filter])
            .args(access.flags())
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
