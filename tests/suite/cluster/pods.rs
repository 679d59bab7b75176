//! Recovery of a node: deleted, killed and out-of-memory pods, a drain, an image update, and a lost link to the
//! cluster.

use std::process::Command;
use std::time::{Duration, Instant};

use lineside_tests::hostile::{Outburst, hostile_on_green};
use lineside_tests::lab::{Lab, NAMESPACE, NODE};
use lineside_tests::paho::{Gap, Paho, SequenceSummary, check_sequence};
use lineside_tests::png;
use lineside_tests::process::{Process, command};
use serde_json::{Value, json};

/// Waits for at least `count` further results of `line-1`.
fn wait_for_results(lab: &Lab, subscriber: &Paho, count: usize) {
    let before = subscriber.count("/line-1/result");
    lab.until("more results", || (subscriber.count("/line-1/result") >= before + count).then_some(()));
}

/// Checks that no result since the subscription is missing. Results of the first epoch before the subscription do not
/// count.
fn check_gaps(results: &[Value]) -> SequenceSummary {
    let summary = check_sequence(results);
    let first = summary.highest.keys().next().map(|(_, epoch)| *epoch);
    let missing: Vec<&Gap> =
        summary.gaps.iter().filter(|gap| Some(gap.epoch) != first || *gap.missing.start() != 1).collect();
    assert!(missing.is_empty(), "{missing:?}");
    summary
}

/// The results of one stream.
fn results_of(stream: &str, messages: &[Value]) -> Vec<Value> {
    let topic = format!("/{stream}/result");
    let is_result = |message: &&Value| message["topic"].as_str().is_some_and(|name| name.ends_with(&topic));
    messages.iter().filter(is_result).cloned().collect()
}

/// The longest time between two results, in seconds, by their arrival at the subscriber.
fn longest_gap(results: &[Value]) -> f64 {
    let seconds = |result: &Value| result["received_at"].as_f64().unwrap_or_default();
    results.windows(2).map(|pair| seconds(&pair[1]) - seconds(&pair[0])).fold(0.0, f64::max)
}

/// The epoch of the newest result.
fn epoch(subscriber: &Paho) -> u64 {
    let results = subscriber.results();
    let id = results.last().and_then(|result| result["id"].as_str()).unwrap_or_default();
    let run = id.split(':').nth(1).and_then(|run| run.split_once('.'));
    run.and_then(|(_, epoch)| epoch.parse().ok()).unwrap_or_default()
}

#[test]
fn pod_failures_and_updates_lose_no_result() {
    let Some(lab) = Lab::exclusive_local() else { return };
    lab.install();
    let subscriber = lab.subscribe("pods");
    lab.apply_samples();
    wait_for_results(&lab, &subscriber, 5);
    let mut started = Instant::now();
    let mut before = epoch(&subscriber);
    let mut expect_recovery = |what: &str| {
        lab.until(&format!("a new epoch after {what}"), || (epoch(&subscriber) > before).then_some(()));
        wait_for_results(&lab, &subscriber, 5);
        before = epoch(&subscriber);
        eprintln!("{what}: results resumed after {:.1} s", started.elapsed().as_secs_f64());
        started = Instant::now();
    };

    let name = lab.agent_pod()["metadata"]["name"].as_str().unwrap().to_owned();
    lab.kubectl_ok(&["delete", "pod", &name, "-n", NAMESPACE]);
    expect_recovery("kubectl delete pod");

    lab.wait_for_rollouts();
    let (pid, _) = lab.process(&lab.agent_pod());
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    expect_recovery("SIGKILL");

    // A process in the memory cgroup of the container allocates up to the limit. The score makes the kernel kill the agent.
    let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(0);
    lab.wait_for_rollouts();
    let pod = lab.agent_pod();
    let (pid, _) = lab.process(&pod);
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), "1000").unwrap();
    let group = lab.memory_cgroup(pid).join("cgroup.procs");
    let allocator =
        "import sys\nopen(sys.argv[1], 'w').write('0')\nheld = []\nwhile True: held.append(b'x' * (1 << 22))";
    let process = Process::new(command("python3").args(["-c", allocator]).arg(&group).spawn().unwrap());
    lab.until("the kernel to kill the agent", || (restarts(&lab.agent_pod()) > restarts(&pod)).then_some(()));
    drop(process);
    let killed = lab.agent_pod()["status"]["containerStatuses"][0]["lastState"]["terminated"]["reason"].clone();
    assert_eq!(killed, "OOMKilled");
    expect_recovery("an OOM kill");

    // A drain ignores DaemonSets, so the agent keeps running.
    lab.kubectl_ok(&[
        "drain",
        NODE,
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--force",
        "--disable-eviction",
        "--timeout=60s",
    ]);
    wait_for_results(&lab, &subscriber, 5);
    lab.kubectl_ok(&["uncordon", NODE]);
    lab.wait_for_rollouts();

    // An image update (the same content under another name) while two streams produce one hundred frames per second.
    let second = lab.get(&["cam", "line-1", "-n", NAMESPACE])["spec"].clone();
    let second = json!({
        "apiVersion": "lineside.dev/v1alpha1", "kind": "CameraStream", "spec": second,
        "metadata": {"name": "line-2", "namespace": NAMESPACE},
    });
    lab.apply_ok(&second.to_string());
    for stream in ["line-1", "line-2"] {
        lab.patch_ok("cam", stream, &json!({"fps": 50}));
    }
    lab.until("results of the second stream", || (subscriber.count("/line-2/result") >= 200).then_some(()));
    let image = "localhost/lineside:0.1.0";
    lab.ctr(&["images", "tag", "--force", image, "localhost/lineside:next"]);
    let loaded = subscriber.messages().len();
    lab.kubectl_ok(&["set", "image", "daemonset/lineside-agent", "agent=localhost/lineside:next", "-n", NAMESPACE]);
    lab.wait_for_rollouts();
    lab.until("a new epoch after the update", || (epoch(&subscriber) > before).then_some(()));
    wait_for_results(&lab, &subscriber, 100);
    let messages = subscriber.messages();
    for stream in ["line-1", "line-2"] {
        let of_stream: Vec<Value> = results_of(stream, &messages[loaded..]);
        let (count, gap) = (of_stream.len(), longest_gap(&of_stream));
        eprintln!("image update under load: {count} results of {stream}, longest gap {gap:.1} s");
    }
    lab.kubectl_ok(&["set", "image", "daemonset/lineside-agent", &format!("agent={image}"), "-n", NAMESPACE]);
    lab.wait_for_rollouts();
    wait_for_results(&lab, &subscriber, 5);

    eprintln!(
        "longest gap of line-1 in the whole test: {:.1} s",
        longest_gap(&results_of("line-1", &subscriber.messages()))
    );
    let results = subscriber.results();
    let summary = check_gaps(&results);
    eprintln!("{} results, {} duplicates", summary.distinct, summary.duplicates);
}

#[test]
fn a_disconnected_node_restarts_and_applies_the_newest_spec_once_reconnected() {
    let Some(lab) = Lab::exclusive_local() else { return };
    lab.install();
    let subscriber = lab.subscribe("link");
    let version = lab.apply_samples();
    lab.until("the model to be ready", || (lab.ready_condition("em", "surface-defects").0 == "True").then_some(()));
    wait_for_results(&lab, &subscriber, 5);
    let before = epoch(&subscriber);
    lab.wan("down");
    wait_for_results(&lab, &subscriber, 10);

    // The agent is killed while the cluster is unreachable; the kubelet restarts it from its local state.
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
    eprintln!("killed while disconnected: results resumed after {:.1} s", killed.elapsed().as_secs_f64());
    wait_for_results(&lab, &subscriber, 10);

    // The spec changes twice while the node is disconnected.
    for version in [version + 1, version + 2] {
        lab.patch_ok("em", "surface-defects", &json!({"version": version}));
    }
    wait_for_results(&lab, &subscriber, 10);
    assert!(
        subscriber.results().iter().all(|result| result["model"]["version"] == version),
        "the node is disconnected"
    );
    lab.wan("up");
    let reconnected = Instant::now();
    lab.until("results of the newest version", || {
        subscriber.results().last().filter(|result| result["model"]["version"] == version + 2).map(drop)
    });
    eprintln!("the newest spec was applied {:.1} s after the reconnection", reconnected.elapsed().as_secs_f64());
    assert!(reconnected.elapsed() <= Duration::from_secs(65));
    check_gaps(&subscriber.results());
    lab.until("the EdgeNode to report the version", || {
        (lab.edge_node()["models"][0]["version"] == version + 2).then_some(())
    });

    // The same for the label of the node: the labels at the time of the reconnection count.
    lab.wan("down");
    wait_for_results(&lab, &subscriber, 5);
    lab.kubectl_ok(&["label", "node", NODE, "lineside.dev/line-"]);
    lab.wan("up");
    let reconnected = Instant::now();
    lab.until("the model to be unloaded", || lab.is_idle(false).then_some(()));
    eprintln!(
        "the new labels of the node were applied {:.1} s after the reconnection",
        reconnected.elapsed().as_secs_f64()
    );
    assert!(reconnected.elapsed() <= Duration::from_secs(65));
    lab.kubectl_ok(&["label", "node", NODE, "lineside.dev/line=a"]);
}

#[test]
fn the_standby_controller_takes_over_without_changing_the_status() {
    let Some(lab) = Lab::exclusive_local() else { return };
    lab.install();
    let version = lab.apply_samples();
    lab.until("the model to be ready", || (lab.ready_condition("em", "surface-defects").0 == "True").then_some(()));
    let holder = || {
        let lease = lab.get(&["lease", "lineside-controller", "-n", NAMESPACE]);
        lease["spec"]["holderIdentity"].as_str().map(str::to_owned).filter(|holder| !holder.is_empty())
    };
    let first = lab.until("a leader", holder);
    let since = |object: &Value| object["status"]["conditions"][0]["lastTransitionTime"].clone();
    let model = lab.get(&["em", "surface-defects", "-n", NAMESPACE]);
    let pod = lab.get(&["pod", &first, "-n", NAMESPACE]);
    let (pid, _) = lab.process(&pod);
    // SIGSTOP, not SIGKILL: a leader that hangs cannot release its lease.
    assert!(Command::new("kill").args(["-STOP", &pid.to_string()]).status().unwrap().success());
    let started = Instant::now();
    let second = lab.until("another leader", || holder().filter(|holder| *holder != first));
    eprintln!("a hung leader was replaced after {:.1} s", started.elapsed().as_secs_f64());
    // The status has not changed, so the new leader did not write it.
    let after = lab.get(&["em", "surface-defects", "-n", NAMESPACE]);
    assert_eq!(since(&model), since(&after));
    assert_eq!(model["metadata"]["resourceVersion"], after["metadata"]["resourceVersion"]);
    assert!(Command::new("kill").args(["-CONT", &pid.to_string()]).status().unwrap().success());
    // The new leader reconciles.
    lab.patch_ok("em", "surface-defects", &json!({"version": version + 1}));
    lab.until("the new leader to aggregate the status", || {
        let model = lab.get(&["em", "surface-defects", "-n", NAMESPACE]);
        (model["status"]["observedGeneration"] == model["metadata"]["generation"]
            && model["status"]["nodes"]["ready"] == 1)
            .then_some(())
    });
    assert_eq!(holder(), Some(second.clone()), "the previous leader does not take the lease back");
    // A leader that is terminated releases the lease, so its successor does not wait for the lease to expire.
    lab.kubectl_ok(&["delete", "pod", &second, "-n", NAMESPACE, "--wait=false"]);
    let started = Instant::now();
    lab.until("a third leader", || holder().filter(|holder| *holder != second));
    eprintln!("a terminated leader was replaced after {:.1} s", started.elapsed().as_secs_f64());
    lab.wait_for_rollouts();
}

#[test]
fn a_model_that_hangs_in_a_pod_is_quarantined_and_the_pod_is_not_restarted() {
    let Some(lab) = Lab::exclusive_local() else { return };
    lab.install();
    let subscriber = lab.subscribe("hostile");
    lab.apply_samples();
    wait_for_results(&lab, &subscriber, 5);
    let pod = lab.agent_pod();
    let folder = lab.data().join("hostile");
    std::fs::create_dir_all(folder.join("frames")).unwrap();
    std::fs::write(folder.join("model.onnx"), hostile_on_green(Outburst::Time)).unwrap();
    for (index, pixel) in [[90; 3], [0, 255, 0], [90; 3]].into_iter().enumerate() {
        std::fs::write(folder.join(format!("frames/{index}.png")), png::flat(8, 8, pixel)).unwrap();
    }
    let node = lab.node();
    lab.apply_ok(&format!(
        "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: hostile, namespace: {NAMESPACE}}}\n\
         spec: {{version: 1, task: tensor, source: {{uri: 'file:///var/lib/lineside/hostile/model.onnx'}}}}\n---\n\
         apiVersion: lineside.dev/v1alpha1\nkind: CameraStream\nmetadata: {{name: line-2, namespace: {NAMESPACE}}}\n\
         spec: {{source: {{uri: 'dir:///var/lib/lineside/hostile/frames?loop=true'}}, nodeName: {node}, model: hostile, fps: 20}}\n"
    ));
    lab.until(&format!("the quarantine: {}", lab.edge_node()["models"]), || {
        let models = lab.edge_node()["models"].as_array()?.clone();
        models.into_iter().find(|model| model["name"] == "hostile" && model["state"] == "Quarantined")
    });
    wait_for_results(&lab, &subscriber, 5);
    check_gaps(&subscriber.results());
    let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].clone();
    assert_eq!(pod["metadata"]["uid"], lab.agent_pod()["metadata"]["uid"]);
    assert_eq!(restarts(&pod), restarts(&lab.agent_pod()));
}
