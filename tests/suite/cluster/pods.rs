//! What a node survives: its pod deleted, killed, out of memory, drained, updated; its link to the cluster pulled.

use std::process::Command;
use std::time::{Duration, Instant};

use lineside_tests::lab::{Lab, NAMESPACE, NODE};
use lineside_tests::paho::{Gap, Paho, Summary, check_sequence};
use serde_json::{Value, json};

/// Waits for so many results more than there are.
fn more(lab: &Lab, subscriber: &Paho, count: usize) {
    let before = subscriber.count("/line-1/result");
    lab.until("more results", || (subscriber.count("/line-1/result") >= before + count).then_some(()));
}

/// Nothing is missing since the subscription; what the first epoch had said before it, nobody asked for.
fn check_gaps(results: &[Value]) -> Summary {
    let summary = check_sequence(results);
    let first = summary.highest.keys().next().map(|(_, epoch)| *epoch);
    let missing: Vec<&Gap> =
        summary.gaps.iter().filter(|gap| Some(gap.epoch) != first || *gap.missing.start() != 1).collect();
    assert!(missing.is_empty(), "{missing:?}");
    summary
}

/// The results of a stream.
fn of(stream: &str, messages: &[Value]) -> Vec<Value> {
    let topic = format!("/{stream}/result");
    let is_of = |message: &&Value| message["topic"].as_str().is_some_and(|of| of.ends_with(&topic));
    messages.iter().filter(is_of).cloned().collect()
}

/// The longest time between two frames of the results, in seconds, by when they came to the subscriber.
fn longest_gap(results: &[Value]) -> f64 {
    let seconds = |result: &Value| result["received_at"].as_f64().unwrap_or_default();
    results.windows(2).map(|pair| seconds(&pair[1]) - seconds(&pair[0])).fold(0.0, f64::max)
}

/// The epoch of the newest result.
fn epoch(subscriber: &Paho) -> u64 {
    let results = subscriber.results();
    let id = results.last().and_then(|result| result["id"].as_str()).unwrap_or_default();
    id.split(':').nth(1).and_then(|epoch| epoch.parse().ok()).unwrap_or_default()
}

#[test]
fn a_pod_that_goes_in_whatever_way_comes_back_and_loses_nothing() {
    let Some(lab) = Lab::take_own() else { return };
    lab.install();
    let subscriber = lab.subscribe("pods");
    lab.apply_samples();
    more(&lab, &subscriber, 5);
    let mut begun = Instant::now();
    let mut before = epoch(&subscriber);
    let mut back = |what: &str| {
        lab.until(&format!("a new epoch after {what}"), || (epoch(&subscriber) > before).then_some(()));
        more(&lab, &subscriber, 5);
        before = epoch(&subscriber);
        eprintln!("{what}: results again after {:.1} s", begun.elapsed().as_secs_f64());
        begun = Instant::now();
    };

    let name = lab.agent_pod()["metadata"]["name"].as_str().unwrap().to_owned();
    lab.done(&["delete", "pod", &name, "-n", NAMESPACE]);
    back("kubectl delete pod");

    lab.settled();
    let (pid, _) = lab.process(&lab.agent_pod());
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    back("SIGKILL");

    // A guest in the container's group eats up to the limit, and the kernel is told whom to choose.
    let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(0);
    lab.settled();
    let pod = lab.agent_pod();
    let (pid, _) = lab.process(&pod);
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), "1000").unwrap();
    let group = lab.memory_group(pid).join("cgroup.procs");
    let eater = "import sys\nopen(sys.argv[1], 'w').write('0')\nheld = []\nwhile True: held.append(b'x' * (1 << 22))";
    let mut guest = Command::new("python3").args(["-c", eater]).arg(&group).spawn().unwrap();
    lab.until("the kernel to end the agent", || (restarts(&lab.agent_pod()) > restarts(&pod)).then_some(()));
    drop((guest.kill(), guest.wait()));
    let killed = lab.agent_pod()["status"]["containerStatuses"][0]["lastState"]["terminated"]["reason"].clone();
    assert_eq!(killed, "OOMKilled");
    back("an OOM kill");

    // A drain leaves DaemonSets alone by itself; what a maintainer means is that the node's agent goes and comes again.
    lab.done(&[
        "drain",
        NODE,
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--force",
        "--disable-eviction",
        "--timeout=60s",
    ]);
    more(&lab, &subscriber, 5);
    lab.done(&["uncordon", NODE]);
    lab.settled();

    // An update of the image, here the same content under another name, while two streams give a hundred frames a second.
    let second = lab.get(&["cam", "line-1", "-n", NAMESPACE])["spec"].clone();
    let second = json!({
        "apiVersion": "lineside.dev/v1alpha1", "kind": "CameraStream", "spec": second,
        "metadata": {"name": "line-2", "namespace": NAMESPACE},
    });
    lab.applied(&second.to_string());
    for stream in ["line-1", "line-2"] {
        lab.patched("cam", stream, &json!({"fps": 50}));
    }
    lab.until("both to be fast", || (subscriber.count("/line-2/result") >= 200).then_some(()));
    let image = "lineside.dev/lineside:0.1.0";
    lab.ctr(&["images", "tag", "--force", image, "lineside.dev/lineside:next"]);
    let loaded = subscriber.messages().len();
    lab.done(&["set", "image", "daemonset/lineside-agent", "agent=lineside.dev/lineside:next", "-n", NAMESPACE]);
    lab.settled();
    lab.until("a new epoch after the update", || (epoch(&subscriber) > before).then_some(()));
    more(&lab, &subscriber, 100);
    let messages = subscriber.messages();
    for stream in ["line-1", "line-2"] {
        let of_stream: Vec<Value> = of(stream, &messages[loaded..]);
        let (count, gap) = (of_stream.len(), longest_gap(&of_stream));
        eprintln!("an image update under load: {count} results of {stream}, longest gap {gap:.1} s");
    }
    lab.done(&["set", "image", "daemonset/lineside-agent", &format!("agent={image}"), "-n", NAMESPACE]);
    lab.settled();
    more(&lab, &subscriber, 5);

    eprintln!("longest gap of line-1 over all of it: {:.1} s", longest_gap(&of("line-1", &subscriber.messages())));
    let results = subscriber.results();
    let summary = check_gaps(&results);
    eprintln!("{} results, {} repeats", summary.distinct, summary.duplicates);
}

#[test]
fn without_its_link_a_node_goes_on_and_restarts_and_takes_up_the_newest_spec_afterwards() {
    let Some(lab) = Lab::take_own() else { return };
    lab.install();
    let subscriber = lab.subscribe("link");
    let version = lab.apply_samples();
    lab.until("the model to be ready", || (lab.ready("em", "surface-defects").0 == "True").then_some(()));
    more(&lab, &subscriber, 5);
    let before = epoch(&subscriber);
    lab.wan("down");
    more(&lab, &subscriber, 10);

    // The agent dies while nothing of the cluster can be reached; the kubelet starts it again from what it knows.
    let tasks = lab.ctr(&["tasks", "list"]);
    let pid = tasks
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .find(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("lineside\0run"))
        })
        .expect("the agent runs");
    let killed = Instant::now();
    assert!(Command::new("kill").args(["-9", pid]).status().unwrap().success());
    lab.until("results of a new epoch without the cluster", || (epoch(&subscriber) > before).then_some(()));
    eprintln!("killed without the cluster: results again after {:.1} s", killed.elapsed().as_secs_f64());
    more(&lab, &subscriber, 10);

    // Meanwhile the spec changes twice.
    for version in [version + 1, version + 2] {
        lab.patched("em", "surface-defects", &json!({"version": version}));
    }
    more(&lab, &subscriber, 10);
    assert!(subscriber.results().iter().all(|result| result["model"]["version"] == version), "the cut is real");
    lab.wan("up");
    let healed = Instant::now();
    lab.until("results of the newest version", || {
        subscriber.results().last().filter(|result| result["model"]["version"] == version + 2).map(drop)
    });
    eprintln!("after the heal the newest spec was in force within {:.1} s", healed.elapsed().as_secs_f64());
    assert!(healed.elapsed() <= Duration::from_secs(65));
    check_gaps(&subscriber.results());
    lab.until("the cluster to know it", || (lab.edge_node()["models"][0]["version"] == version + 2).then_some(()));

    // And once more with the node's label: what the node is when the link is back counts.
    lab.wan("down");
    more(&lab, &subscriber, 5);
    lab.done(&["label", "node", NODE, "lineside.dev/line-"]);
    lab.wan("up");
    let healed = Instant::now();
    lab.until("the model to be unloaded", || lab.runs_nothing(false).then_some(()));
    eprintln!("after the heal the node's new labels were followed within {:.1} s", healed.elapsed().as_secs_f64());
    assert!(healed.elapsed() <= Duration::from_secs(65));
    lab.done(&["label", "node", NODE, "lineside.dev/line=a"]);
}

#[test]
fn one_of_two_controllers_leads_and_the_other_takes_over_without_a_flap() {
    let Some(lab) = Lab::take_own() else { return };
    lab.install();
    let version = lab.apply_samples();
    lab.until("the model to be ready", || (lab.ready("em", "surface-defects").0 == "True").then_some(()));
    let holder = || {
        let lease = lab.get(&["lease", "lineside-controller", "-n", NAMESPACE]);
        lease["spec"]["holderIdentity"].as_str().map(str::to_owned).filter(|holder| !holder.is_empty())
    };
    let first = lab.until("a leader", holder);
    let since = |object: &Value| object["status"]["conditions"][0]["lastTransitionTime"].clone();
    let model = lab.get(&["em", "surface-defects", "-n", NAMESPACE]);
    let pod = lab.get(&["pod", &first, "-n", NAMESPACE]);
    let (pid, _) = lab.process(&pod);
    // Stopped, not ended: a leader that hangs cannot give its lease back.
    assert!(Command::new("kill").args(["-STOP", &pid.to_string()]).status().unwrap().success());
    let begun = Instant::now();
    let second = lab.until("another leader", || holder().filter(|holder| *holder != first));
    eprintln!("a hung leader was replaced after {:.1} s", begun.elapsed().as_secs_f64());
    // Nothing has changed, so nothing was written.
    let after = lab.get(&["em", "surface-defects", "-n", NAMESPACE]);
    assert_eq!(since(&model), since(&after));
    assert_eq!(model["metadata"]["resourceVersion"], after["metadata"]["resourceVersion"]);
    assert!(Command::new("kill").args(["-CONT", &pid.to_string()]).status().unwrap().success());
    // The new leader does its work.
    lab.patched("em", "surface-defects", &json!({"version": version + 1}));
    lab.until("the new leader to add up", || {
        let model = lab.get(&["em", "surface-defects", "-n", NAMESPACE]);
        (model["status"]["observedGeneration"] == model["metadata"]["generation"]
            && model["status"]["nodes"]["ready"] == 1)
            .then_some(())
    });
    assert_eq!(holder(), Some(second.clone()), "the one that hung does not take the lease back");
    // One that is ended in order gives the lease back, and nobody waits for it to run out.
    lab.done(&["delete", "pod", &second, "-n", NAMESPACE, "--wait=false"]);
    let begun = Instant::now();
    lab.until("a third leader", || holder().filter(|holder| *holder != second));
    eprintln!("a leader that was told to end was replaced after {:.1} s", begun.elapsed().as_secs_f64());
    lab.settled();
}
