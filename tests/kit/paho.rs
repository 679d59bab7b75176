//! A subscriber that is neither the product's nor mosquitto's, Eclipse Paho, and what its record says of lost results.
//!
//! With a session it misses nothing that the broker keeps for it; the broker may then deliver what was on the way once
//! more, with `dup` set, which is no repeat of the publisher's.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tempfile::TempDir;

use crate::broker::Access;
use crate::wait::until_true;

/// A Python program of the kit that prints `ready` whenever a subscription stands, and is ended with its owner.
pub(crate) struct Listener {
    child: Child,
    ready: Arc<AtomicUsize>,
}

impl Listener {
    /// Starts one, which has subscribed when this returns.
    pub(crate) fn start(program: &str, arguments: &[String]) -> Self {
        Self::start_by(Command::new(crate::python()), program, arguments)
    }

    /// The same by a Python that may be elsewhere.
    fn start_by(mut python: Command, program: &str, arguments: &[String]) -> Self {
        let mut child = python
            .arg(crate::root().join("tests/kit").join(program))
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python starts");
        let lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let listener = Self { child, ready: Arc::default() };
        std::thread::spawn({
            let ready = listener.ready.clone();
            move || {
                for _ in lines.map_while(Result::ok) {
                    ready.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        until_true(&format!("{program} {arguments:?} to subscribe"), || listener.ready() > 0);
        listener
    }

    /// How often a subscription stood so far.
    pub(crate) fn ready(&self) -> usize {
        self.ready.load(Ordering::SeqCst)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What was read from the record so far: lines with their topics, which take less room than what they say.
#[derive(Default)]
struct Record {
    bytes: u64,
    lines: Vec<(String, String)>,
}

/// A subscriber that writes down what it gets, and connects again by itself.
pub struct Paho {
    listener: Listener,
    folder: TempDir,
    record: Mutex<Record>,
}

impl Paho {
    /// Starts one, which has subscribed with QoS 1 when this returns. A session is the name under which the broker
    /// keeps the subscription and what comes while the subscriber is away.
    ///
    /// # Panics
    /// When the broker does not grant the subscription.
    pub fn start(access: &Access, filter: &str, session: Option<&str>) -> Self {
        Self::start_by(Command::new(crate::python()), access, filter, session)
    }

    /// The same by a Python that may be in another network.
    ///
    /// # Panics
    /// As [`Paho::start`].
    pub fn start_by(python: Command, access: &Access, filter: &str, session: Option<&str>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut arguments = access.flags();
        arguments.extend(["-t".to_owned(), filter.to_owned()]);
        arguments.extend(session.into_iter().flat_map(|name| ["--session".to_owned(), name.to_owned()]));
        arguments.push(crate::plant::utf8(&folder.path().join("record")).to_owned());
        Self { listener: Listener::start_by(python, "subscriber.py", &arguments), folder, record: Mutex::default() }
    }

    /// How often its subscription stood so far: one more after every reconnection.
    pub fn subscriptions(&self) -> usize {
        self.listener.ready()
    }

    /// Where it writes its record, a message per line.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("record")
    }

    /// Everything that has come so far: `topic`, `qos`, `retain`, `dup`, `received_at` in seconds since 1970, and
    /// `payload`, which is `{"base64": ...}` where it is no JSON.
    ///
    /// # Panics
    /// When the record is broken.
    pub fn messages(&self) -> Vec<Value> {
        self.with_lines(|lines| lines.iter().map(|(_, line)| parse(line)).collect())
    }

    /// Payloads whose topic ends like this.
    ///
    /// # Panics
    /// When the record is broken.
    pub fn payloads(&self, topic_end: &str) -> Vec<Value> {
        self.with_lines(|lines| {
            let lines = lines.iter().filter(|(topic, _)| topic.ends_with(topic_end));
            lines.map(|(_, line)| parse(line)["payload"].take()).collect()
        })
    }

    /// All results.
    pub fn results(&self) -> Vec<Value> {
        self.payloads("/result")
    }

    /// How many messages with this end of a topic have come; much faster than their payloads.
    pub fn count(&self, topic_end: &str) -> usize {
        self.with_lines(|lines| lines.iter().filter(|(topic, _)| topic.ends_with(topic_end)).count())
    }

    /// Waits until so many messages with this end of a topic have come, and returns their payloads.
    ///
    /// # Panics
    /// When they do not come.
    pub fn wait_for(&self, topic_end: &str, count: usize) -> Vec<Value> {
        until_true(&format!("{count} messages on {topic_end}"), || self.count(topic_end) >= count);
        self.payloads(topic_end)
    }

    /// Reads what is new in the record, up to the last whole line.
    fn with_lines<T>(&self, look: impl FnOnce(&[(String, String)]) -> T) -> T {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = File::open(self.file()).expect("the subscriber has opened its record");
        file.seek(SeekFrom::Start(record.bytes)).expect("a record is a file");
        let mut fresh = Vec::new();
        file.read_to_end(&mut fresh).expect("a record is a file");
        let whole = fresh.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        record.bytes += whole as u64;
        for line in String::from_utf8_lossy(&fresh[..whole]).lines() {
            let topic = parse(line)["topic"].as_str().unwrap_or_default().to_owned();
            record.lines.push((topic, line.to_owned()));
        }
        look(&record.lines)
    }
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).expect("the subscriber writes JSON")
}

/// Sequence numbers that never came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The node.
    pub node: String,
    /// Its boot epoch.
    pub epoch: u64,
    /// The first missing number and the last.
    pub missing: RangeInclusive<u64>,
}

/// What a sequence of results holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Different ids.
    pub distinct: usize,
    /// Results whose id had come before.
    pub duplicates: usize,
    /// What is missing between 1 and the highest number of each epoch.
    pub gaps: Vec<Gap>,
    /// The highest number by node and epoch. What is missing after it cannot be seen from here.
    pub highest: BTreeMap<(String, u64), u64>,
}

/// Looks through results for repeats and gaps, by their ids.
///
/// # Panics
/// When an id is not `node:epoch:seq`, or when a result comes again with other contents than before; `historical` may
/// differ.
pub fn check_sequence(results: &[Value]) -> Summary {
    let contents = |result: &Value| {
        let mut result = result.clone();
        result.as_object_mut().map(|fields| fields.remove("historical"));
        result
    };
    let mut summary = Summary::default();
    let mut epochs: BTreeMap<(String, u64), HashMap<u64, &Value>> = BTreeMap::new();
    for result in results {
        let id = result["id"].as_str().unwrap_or_default();
        let mut parts = id.rsplitn(3, ':');
        let seq = parts.next().and_then(|seq| seq.parse().ok());
        let epoch = parts.next().and_then(|epoch| epoch.parse().ok());
        let (Some(seq), Some(epoch), Some(node)) = (seq, epoch, parts.next()) else {
            panic!("no id of the form node:epoch:seq in {result}");
        };
        match epochs.entry((node.to_owned(), epoch)).or_default().insert(seq, result) {
            None => summary.distinct += 1,
            Some(before) => {
                summary.duplicates += 1;
                assert_eq!(contents(before), contents(result), "{id} came again with other contents");
            }
        }
    }
    for ((node, epoch), seen) in epochs {
        let mut numbers: Vec<u64> = seen.into_keys().collect();
        numbers.sort_unstable();
        let mut next = 1;
        for number in numbers {
            if number > next {
                summary.gaps.push(Gap { node: node.clone(), epoch, missing: next..=number - 1 });
            }
            next = number + 1;
        }
        summary.highest.insert((node, epoch), next - 1);
    }
    summary
}
