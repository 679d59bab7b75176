//! Attacks on the data folder: two agents in one folder, a damaged or copied identity, two agents with one node name, and a disk
//! that accepts no writes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use lineside_tests::agent::{Agent, AgentOptions, lineside, program};
use lineside_tests::process::{command, output_text};
use lineside_tests::site::{TestSite, folder_id, status};
use lineside_tests::utf8;
use lineside_tests::wait::{until_long, until_true};

const PROCESSED: &str = "lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}";

/// The names and contents of the files in a folder, without those of `store/index`, which sled writes at any time.
fn contents(folder: &Path) -> BTreeSet<(String, Vec<u8>)> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_file() {
            found.insert((utf8(&path).to_owned(), fs::read(&path).unwrap()));
        } else if !path.ends_with("store/index") {
            found.extend(contents(&path));
        }
    }
    found
}

#[test]
fn a_second_agent_states_who_uses_the_data_folder_and_changes_nothing() {
    // No stream: the first agent writes nothing meanwhile but its spool's clock.
    let site = TestSite::offline();
    let mut agent = site.start(&[]);
    agent.wait_until_ready();
    let identity = fs::read(site.data().join("identity.json")).unwrap();
    let before: BTreeSet<String> = contents(&site.data()).into_iter().map(|(name, _)| name).collect();
    let second = lineside(&[
        "run",
        "--manifests",
        utf8(&site.path("manifests")),
        "--data-dir",
        utf8(&site.data()),
        "--node",
        "edge-2",
        "--mqtt",
        "mqtt://127.0.0.1:1",
        "--http",
        "127.0.0.1:0",
    ]);
    assert_eq!(second.status.code(), Some(1));
    let text = output_text(&second);
    assert!(text.contains(&format!("in use by process {} (edge-1) since 20", agent.pid())), "{text}");
    assert_eq!(fs::read(site.data().join("identity.json")).unwrap(), identity, "no start was counted");
    let after: BTreeSet<String> = contents(&site.data()).into_iter().map(|(name, _)| name).collect();
    assert_eq!(after, before);

    // The kernel releases the lock of a killed process at once.
    agent.signal("KILL");
    agent.wait();
    let mut next = site.start(&[]);
    next.wait_until_ready();
    assert!(next.terminate().success());
}

#[test]
fn a_damaged_identity_loses_nothing_and_no_id_is_used_twice() {
    let site = TestSite::with_broker_and_stream(20);
    let mut ids = BTreeSet::new();
    let mut seen = 0;
    for damage in [None, Some("many"), Some(""), Some("{\"epoch\": 1}")] {
        if let Some(damage) = damage {
            fs::write(site.data().join("identity.json"), damage).unwrap();
        }
        let mut agent = site.start(&[]);
        until_long("more results", || (site.results().len() >= seen + 5).then_some(()));
        assert_eq!(agent.events("folder_id_replaced").len(), usize::from(damage.is_some()));
        assert!(agent.terminate().success());
        assert!(ids.insert(folder_id(&site.data())), "a new folder id is drawn");
        seen = site.results().len();
    }
    let results = site.results();
    let distinct: BTreeSet<&str> = results.iter().map(|result| result["id"].as_str().unwrap()).collect();
    assert_eq!(distinct.len(), results.len());
}

#[test]
fn a_cloned_data_folder_publishes_under_ids_of_its_own_and_the_clash_of_names_is_reported() {
    let site = TestSite::with_broker_and_stream(20);
    let mut agent = site.start(&[]);
    until_long("results", || (site.results().len() >= 5).then_some(()));
    assert!(agent.terminate().success());
    let clone = site.path("clone");
    let copied = Command::new("cp").args(["-a", utf8(&site.data()), utf8(&clone)]).status().unwrap();
    assert!(copied.success());

    let original = site.start(&[]);
    let twin = Agent::start(&AgentOptions {
        manifests: &site.path("manifests"),
        data: &clone,
        mqtt: &site.broker_url(),
        flags: &[],
    });
    twin.wait_for_event("folder_id_replaced");
    assert_ne!(folder_id(&clone), folder_id(&site.data()));
    for agent in [&original, &twin] {
        until_long("the clash to be reported", || {
            status(agent)["conditions"].to_string().contains("NodeNameClash").then_some(())
        });
    }
    assert_eq!(original.events("node_name_clash").len(), 1, "a clash is logged once");
}

/// A tmpfs on a folder, until it is dropped.
struct Mount<'a>(&'a Path);

impl<'a> Mount<'a> {
    /// `None` where mounting is not permitted.
    fn tmpfs(folder: &'a Path) -> Option<Self> {
        fs::create_dir_all(folder).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "tmpfs", utf8(folder)]).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Self(folder))
    }

    fn read_only(&self) {
        let status = Command::new("mount").args(["-o", "remount,ro", utf8(self.0)]).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.0).status());
    }
}

#[test]
fn a_start_on_a_disk_that_accepts_no_writes_serves_cached_models() {
    let site = TestSite::with_broker_and_stream(20);
    let data = site.data();
    let Some(mount) = Mount::tmpfs(&data) else {
        return eprintln!("skipped: mounting a file system is not permitted");
    };
    let mut agent = site.start(&[]);
    until_long("results", || (site.results().len() >= 5).then_some(()));
    assert!(agent.terminate().success());
    let stored = folder_id(&data);

    // A full disk, then a read-only one.
    let filler = data.join("filler");
    drop(fs::write(&filler, vec![0; 32 << 20]).unwrap_err());
    for is_read_only in [false, true] {
        if is_read_only {
            fs::remove_file(&filler).unwrap();
            mount.read_only();
        }
        let seen = site.results().len();
        let mut agent = site.start(&[]);
        agent.wait_for_event("data_folder_unwritable");
        agent.wait_for_metric(PROCESSED, 10.0);
        until_long("results", || (site.results().len() >= seen + 10).then_some(()));
        until_true("the conditions", || status(&agent)["conditions"].to_string().contains("DataFolderUnwritable"));
        assert!(agent.terminate().success());
    }
    assert_eq!(folder_id(&data), stored);
    let results = site.results();
    let distinct: BTreeSet<&str> = results.iter().map(|result| result["id"].as_str().unwrap()).collect();
    let folders: BTreeSet<&str> = distinct.iter().map(|id| id.split([':', '.']).nth(1).unwrap()).collect();
    assert_eq!(
        (distinct.len(), folders.len()),
        (results.len(), 3),
        "each run without writes has a folder id of its own"
    );
}

#[test]
fn a_new_folder_of_another_user_ends_the_start_with_the_remedy() {
    let site = TestSite::offline();
    let data = site.path("foreign");
    fs::create_dir(&data).unwrap();
    if std::os::unix::fs::chown(&data, Some(4711), Some(4711)).is_err() {
        return eprintln!("skipped: only root may give a folder to another user");
    }
    let mut confined = command("setpriv");
    confined.args(["--bounding-set", "-dac_override,-dac_read_search", "--"]).arg(program());
    confined.args(["run", "--mqtt", "mqtt://127.0.0.1:1", "--http", "127.0.0.1:0", "--data-dir", utf8(&data)]);
    let output = confined.arg("--manifests").arg(site.path("manifests")).output().unwrap();
    let text = output_text(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let remedy = format!(
        "{0} belongs to user 4711, and the agent runs as user 0; as root on the node: install -d -o 0 -g 0 -m 0700 {0}",
        data.display()
    );
    assert!(text.contains(&remedy), "{text}");
}
