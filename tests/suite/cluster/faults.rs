//! What the agent makes of an API server in trouble, and of none.

use std::time::{Duration, Instant};

use lineside_tests::agent::Agent;
use lineside_tests::plant::{Plant, model, until_late};
use lineside_tests::scripted_api::{Script, ScriptedApi};
use lineside_tests::wait::until_true;
use serde_json::json;

/// Asks for a version of the plant's model.
fn ask(plant: &Plant, api: &ScriptedApi, version: u64) {
    let uri = format!("file://{}", plant.path("parts.onnx").display());
    api.put("edgemodels", "parts", version, &json!({"version": version, "source": {"uri": uri}}));
}

#[test]
fn a_server_in_trouble_gets_few_lists_and_the_final_state_is_right() {
    let (plant, api) = (Plant::playing(5), ScriptedApi::start());
    ask(&plant, &api, 1);
    let agent = Agent::follow(&api.kubeconfig(&plant.path("")), &plant.data(), "mqtt://127.0.0.1:1");
    until_true("the model to serve", || model(&agent, "parts")["serving"]["version"] == 1);

    for (script, version) in
        [(Script::Expired, 2), (Script::LimitExceeded, 3), (Script::Unavailable, 4), (Script::Truncated, 5)]
    {
        let lists = api.lists("edgemodels").len();
        api.follow(script);
        ask(&plant, &api, version);
        until_late(&format!("{script:?} to be met twice"), || {
            (api.lists("edgemodels").len() >= lists + 2).then_some(())
        });
        if script != Script::Expired {
            assert_ne!(model(&agent, "parts")["version"], version, "nobody has told it yet");
        }
        assert!(model(&agent, "parts")["serving"]["version"].as_u64() >= Some(1), "what served goes on");
    }
    api.follow(Script::Well);
    let healed = Instant::now();
    until_late("the newest version to serve", || (model(&agent, "parts")["serving"]["version"] == 5).then_some(()));
    eprintln!("after the trouble the newest spec was in force within {:.1} s", healed.elapsed().as_secs_f64());
    assert!(healed.elapsed() <= Duration::from_secs(65));
    assert!(api.watches() >= 3);
    for kind in ["edgemodels", "camerastreams"] {
        let lists = api.lists(kind);
        let closest = lists.windows(2).map(|pair| pair[1] - pair[0]).min().unwrap_or(Duration::MAX);
        eprintln!("{} lists of {kind}, {:.1} s apart at least", lists.len(), closest.as_secs_f64());
        // They leave ten seconds apart, and may take differently long to arrive.
        assert!(closest >= Duration::from_millis(9500), "{closest:?}");
    }
}

#[test]
fn an_agent_that_starts_with_nothing_reachable_serves_what_was_asked_for_last() {
    let plant = Plant::with_stream(10);
    let api = ScriptedApi::start();
    let (model_file, frames) = (plant.path("parts.onnx"), lineside_tests::example("frames"));
    ask(&plant, &api, 1);
    let stream = json!({"source": {"uri": format!("dir://{}?loop=true", frames.display())}, "model": "parts", "fps": 10, "nodeName": "edge-1"});
    api.put("camerastreams", "line-1", 1, &stream);
    let kubeconfig = api.kubeconfig(&plant.path(""));
    let url = plant.broker_url();
    let mut agent = Agent::follow(&kubeconfig, &plant.data(), &url);
    until_true("results", || plant.results().len() > 3);
    agent.signal("KILL");
    agent.wait();
    // Neither an API server nor the model's source is there any more.
    std::fs::write(&kubeconfig, std::fs::read_to_string(&kubeconfig).unwrap().replace("127.0.0.1:", "127.0.0.2:"))
        .unwrap();
    std::fs::remove_file(&model_file).unwrap();
    let before = plant.results().len();
    let started = Instant::now();
    let agent = Agent::follow(&kubeconfig, &plant.data(), &url);
    until_true("results of the second start", || {
        plant.results()[before..].iter().any(|result| result["id"].as_str().is_some_and(|id| id.contains(":2:")))
    });
    eprintln!(
        "without an API server and a source: first result {:.2} s after the start",
        started.elapsed().as_secs_f64()
    );
    assert_eq!(agent_ready(&agent), 200);
}

#[test]
fn an_agent_whose_credentials_cannot_be_had_serves_and_follows_once_they_can() {
    let (plant, api) = (Plant::playing(5), ScriptedApi::start());
    ask(&plant, &api, 1);
    let kubeconfig = api.kubeconfig(&plant.path(""));
    let mut agent = Agent::follow(&kubeconfig, &plant.data(), "mqtt://127.0.0.1:1");
    until_true("the model to serve", || model(&agent, "parts")["serving"]["version"] == 1);
    agent.signal("KILL");
    agent.wait();
    // Credentials come from a program, as those of clouds do, which fails while the network does.
    let (granted, plugin) = (plant.path("granted"), plant.path("credentials"));
    let script = format!("#!/bin/sh\ncat {} && exit 0\necho 'no network' >&2\nexit 1\n", granted.display());
    std::fs::write(&plugin, script).unwrap();
    std::fs::set_permissions(&plugin, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut text: serde_json::Value = serde_json::from_slice(&std::fs::read(&kubeconfig).unwrap()).unwrap();
    let version = "client.authentication.k8s.io/v1";
    text["users"][0]["user"] = json!({"exec": {"apiVersion": version, "command": plugin, "interactiveMode": "Never"}});
    std::fs::write(&kubeconfig, text.to_string()).unwrap();
    let agent = Agent::follow(&kubeconfig, &plant.data(), "mqtt://127.0.0.1:1");
    until_true("the model to serve from memory", || model(&agent, "parts")["serving"]["version"] == 1);
    agent.wait_for_event("cluster_watch_failed");
    ask(&plant, &api, 2);
    let credential = json!({"kind": "ExecCredential", "apiVersion": version, "status": {"token": "t"}});
    std::fs::write(&granted, credential.to_string()).unwrap();
    until_late("the new version to serve", || (model(&agent, "parts")["serving"]["version"] == 2).then_some(()));
}

fn agent_ready(agent: &Agent) -> u16 {
    lineside_tests::http::get(agent.http(), "/readyz").map_or(0, |(code, _)| code)
}
