//! A subscriber based on Eclipse Paho, which is independent of the product and of mosquitto, and a check of the
//! recorded results for gaps and duplicates.
//!
//! With a persistent session the subscriber receives everything that the broker stores for it. The broker may then
//! redeliver in-flight messages with `dup` set; such a repeat does not come from the publisher.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tempfile::TempDir;

use crate::broker::ConnectOptions;
use crate::process::{Process, command};
use crate::wait::until_true;

/// A Python program of the kit that prints `ready` whenever its subscription is granted. It is killed when it is
/// dropped.
pub(crate) struct PythonSubscriber {
    _process: Process,
    ready: Arc<AtomicUsize>,
}

impl PythonSubscriber {
    /// Starts a program. Its subscription is active when this returns.
    pub(crate) fn start(program: &str, arguments: &[String]) -> Self {
        Self::start_with(command(crate::python()), program, arguments)
    }

    /// Starts a program with another Python command, for example in a network namespace.
    fn start_with(mut python: Command, program: &str, arguments: &[String]) -> Self {
        let mut child = python
            .arg(crate::root().join("tests/kit").join(program))
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python starts");
        let lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let subscriber = Self { _process: Process::new(child), ready: Arc::default() };
        std::thread::spawn({
            let ready = subscriber.ready.clone();
            move || {
                for _ in lines.map_while(Result::ok) {
                    ready.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        until_true(&format!("{program} {arguments:?} to subscribe"), || subscriber.ready() > 0);
        subscriber
    }

    /// The number of granted subscriptions so far.
    pub(crate) fn ready(&self) -> usize {
        self.ready.load(Ordering::SeqCst)
    }
}

/// The part of the record that has been read: topics with their lines, which need less memory than parsed messages.
#[derive(Default)]
struct Record {
    bytes: u64,
    lines: Vec<(String, String)>,
}

/// A subscriber that records every message, and reconnects by itself.
pub struct Paho {
    process: PythonSubscriber,
    folder: TempDir,
    record: Mutex<Record>,
}

impl Paho {
    /// Subscribes with QoS 1. The subscription is active when this returns. With a session name the broker keeps the
    /// subscription and stores messages while the subscriber is disconnected.
    ///
    /// # Panics
    /// If the broker does not grant the subscription.
    pub fn start(options: &ConnectOptions, filter: &str, session: Option<&str>) -> Self {
        Self::start_with(command(crate::python()), options, filter, session)
    }

    /// Like [`Paho::start`], with another Python command, for example in a network namespace.
    ///
    /// # Panics
    /// If the broker does not grant the subscription.
    pub fn start_with(python: Command, options: &ConnectOptions, filter: &str, session: Option<&str>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut arguments = options.flags();
        arguments.extend(["-t".to_owned(), filter.to_owned()]);
        arguments.extend(session.into_iter().flat_map(|name| ["--session".to_owned(), name.to_owned()]));
        arguments.push(crate::utf8(&folder.path().join("record")).to_owned());
        Self {
            process: PythonSubscriber::start_with(python, "subscriber.py", &arguments),
            folder,
            record: Mutex::default(),
        }
    }

    /// The number of granted subscriptions so far: one, plus one per reconnection.
    pub fn subscriptions(&self) -> usize {
        self.process.ready()
    }

    /// The path of the record, which has one message per line.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("record")
    }

    /// All messages so far: `topic`, `qos`, `retain`, `dup`, `received_at` in seconds since 1970, and `payload`, which
    /// is `{"base64": ...}` if it is not JSON.
    ///
    /// # Panics
    /// If the record is not valid.
    pub fn messages(&self) -> Vec<Value> {
        self.with_lines(|lines| lines.iter().map(|(_, line)| parse(line)).collect())
    }

    /// The payloads of messages whose topic has this suffix.
    ///
    /// # Panics
    /// If the record is not valid.
    pub fn payloads(&self, topic_suffix: &str) -> Vec<Value> {
        self.with_lines(|lines| {
            let lines = lines.iter().filter(|(topic, _)| topic.ends_with(topic_suffix));
            lines.map(|(_, line)| parse(line)["payload"].take()).collect()
        })
    }

    /// The payloads of all results.
    pub fn results(&self) -> Vec<Value> {
        self.payloads("/result")
    }

    /// The number of messages whose topic has this suffix; much faster than reading their payloads.
    pub fn count(&self, topic_suffix: &str) -> usize {
        self.with_lines(|lines| lines.iter().filter(|(topic, _)| topic.ends_with(topic_suffix)).count())
    }

    /// Waits for at least `count` messages whose topic has this suffix, and returns their payloads.
    ///
    /// # Panics
    /// If they do not arrive in time.
    pub fn wait_for(&self, topic_suffix: &str, count: usize) -> Vec<Value> {
        until_true(&format!("{count} messages on {topic_suffix}"), || self.count(topic_suffix) >= count);
        self.payloads(topic_suffix)
    }

    /// Reads the new part of the record, up to the last complete line.
    fn with_lines<T>(&self, read: impl FnOnce(&[(String, String)]) -> T) -> T {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = File::open(self.file()).expect("the subscriber has created its record");
        file.seek(SeekFrom::Start(record.bytes)).expect("a record is a file");
        let mut fresh = Vec::new();
        file.read_to_end(&mut fresh).expect("a record is a file");
        let whole = fresh.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        record.bytes += whole as u64;
        for line in String::from_utf8_lossy(&fresh[..whole]).lines() {
            let topic = parse(line)["topic"].as_str().unwrap_or_default().to_owned();
            record.lines.push((topic, line.to_owned()));
        }
        read(&record.lines)
    }
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).expect("the subscriber writes JSON")
}

/// A range of sequence numbers that were never received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The node's name and the id of its data folder, `node:folder`.
    pub node: String,
    /// The boot epoch of the agent.
    pub epoch: u64,
    /// The first and the last missing number.
    pub missing: RangeInclusive<u64>,
}

/// The outcome of a sequence check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SequenceSummary {
    /// The number of distinct ids.
    pub distinct: usize,
    /// The number of results whose id was received before.
    pub duplicates: usize,
    /// The gaps between 1 and the highest number of each epoch.
    pub gaps: Vec<Gap>,
    /// The highest number by `node:folder` and epoch. Results that are missing after it cannot be detected here.
    pub highest: BTreeMap<(String, u64), u64>,
}

/// Checks results for duplicates and gaps, by their ids.
///
/// # Panics
/// If an id is not of the form `node:folder.epoch:seq`, or if a duplicate differs from the first result in more than
/// `historical`.
pub fn check_sequence(results: &[Value]) -> SequenceSummary {
    let contents = |result: &Value| {
        let mut result = result.clone();
        result.as_object_mut().map(|fields| fields.remove("historical"));
        result
    };
    let mut summary = SequenceSummary::default();
    let mut epochs: BTreeMap<(String, u64), HashMap<u64, &Value>> = BTreeMap::new();
    for result in results {
        let id = result["id"].as_str().unwrap_or_default();
        let mut parts = id.rsplitn(3, ':');
        let seq = parts.next().and_then(|seq| seq.parse().ok());
        let run = parts.next().and_then(|run| run.split_once('.'));
        let run = run.and_then(|(folder, epoch)| Some((folder, epoch.parse().ok()?)));
        let (Some(seq), Some((folder, epoch)), Some(node)) = (seq, run, parts.next()) else {
            panic!("no id of the form node:folder.epoch:seq in {result}");
        };
        match epochs.entry((format!("{node}:{folder}"), epoch)).or_default().insert(seq, result) {
            None => summary.distinct += 1,
            Some(before) => {
                summary.duplicates += 1;
                assert_eq!(contents(before), contents(result), "{id} was received again with different contents");
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
