//! The agent with an API server that returns errors, and without one.

use std::time::{Duration, Instant};

use lineside_tests::agent::Agent;
use lineside_tests::broker::UNREACHABLE_BROKER;
use lineside_tests::scripted_api::{ApiScript, ScriptedApi};
use lineside_tests::site::{TestSite, model_status};
use lineside_tests::wait::{until_long, until_true};
use serde_json::json;

/// Sets the desired version of the site's model.
fn request_version(site: &TestSite, api: &ScriptedApi, version: u64) {
    let uri = format!("file://{}", site.path("parts.onnx").display());
    api.put("edgemodels", "parts", version, &json!({"version": version, "source": {"uri": uri}}));
}

#[test]
fn api_server_errors_cause_few_lists_and_the_final_state_converges() {
    let (site, api) = (TestSite::with_stream(5), ScriptedApi::start());
    request_version(&site, &api, 1);
    let agent = Agent::start_with_kubeconfig(&api.kubeconfig(&site.path("")), &site.data(), UNREACHABLE_BROKER);
    until_true("the model to serve", || model_status(&agent, "parts")["serving"]["version"] == 1);

    for (script, version) in
        [(ApiScript::Expired, 2), (ApiScript::LimitExceeded, 3), (ApiScript::Unavailable, 4), (ApiScript::Truncated, 5)]
    {
        let lists = api.lists("edgemodels").len();
        api.set(script);
        request_version(&site, &api, version);
        until_long(&format!("two lists under {script:?}"), || {
            (api.lists("edgemodels").len() >= lists + 2).then_some(())
        });
        if script != ApiScript::Expired {
            assert_ne!(model_status(&agent, "parts")["version"], version, "the agent cannot know this version yet");
        }
        assert!(
            model_status(&agent, "parts")["serving"]["version"].as_u64() >= Some(1),
            "the previous version still serves"
        );
    }
    api.set(ApiScript::Healthy);
    let recovered = Instant::now();
    until_long("the newest version to serve", || {
        (model_status(&agent, "parts")["serving"]["version"] == 5).then_some(())
    });
    eprintln!("the newest spec was applied {:.1} s after the recovery", recovered.elapsed().as_secs_f64());
    assert!(recovered.elapsed() <= Duration::from_secs(65));
    assert!(api.watches() >= 3);
    for kind in ["edgemodels", "camerastreams"] {
        let lists = api.lists(kind);
        let closest = lists.windows(2).map(|pair| pair[1] - pair[0]).min().unwrap_or(Duration::MAX);
        eprintln!("{} lists of {kind}, at least {:.1} s apart", lists.len(), closest.as_secs_f64());
        // The agent sends lists at least ten seconds apart, but their transmission times may differ.
        assert!(closest >= Duration::from_millis(9500), "{closest:?}");
    }
}

#[test]
fn an_offline_start_serves_the_cached_desired_state() {
    let site = TestSite::with_broker_and_stream(10);
    let api = ScriptedApi::start();
    let (model_file, frames) = (site.path("parts.onnx"), lineside_tests::example("frames"));
    request_version(&site, &api, 1);
    let stream = json!({"source": {"uri": format!("dir://{}?loop=true", frames.display())}, "model": "parts", "fps": 10, "nodeName": "edge-1"});
    api.put("camerastreams", "line-1", 1, &stream);
    let kubeconfig = api.kubeconfig(&site.path(""));
    let url = site.broker_url();
    let mut agent = Agent::start_with_kubeconfig(&kubeconfig, &site.data(), &url);
    until_true("results", || site.results().len() > 3);
    agent.signal("KILL");
    agent.wait();
    // Neither the API server nor the source of the model is reachable any more.
    std::fs::write(&kubeconfig, std::fs::read_to_string(&kubeconfig).unwrap().replace("127.0.0.1:", "127.0.0.2:"))
        .unwrap();
    std::fs::remove_file(&model_file).unwrap();
    let before = site.results().len();
    let started = Instant::now();
    let agent = Agent::start_with_kubeconfig(&kubeconfig, &site.data(), &url);
    until_true("results of the second run", || {
        site.results()[before..].iter().any(|result| result["id"].as_str().is_some_and(|id| id.contains(".2:")))
    });
    eprintln!(
        "without an API server and a model source, the first result came {:.2} s after the start",
        started.elapsed().as_secs_f64()
    );
    assert_eq!(readiness(&agent), 200);
}

#[test]
fn an_agent_without_credentials_serves_the_cache_and_recovers() {
    let (site, api) = (TestSite::with_stream(5), ScriptedApi::start());
    request_version(&site, &api, 1);
    let kubeconfig = api.kubeconfig(&site.path(""));
    let mut agent = Agent::start_with_kubeconfig(&kubeconfig, &site.data(), UNREACHABLE_BROKER);
    until_true("the model to serve", || model_status(&agent, "parts")["serving"]["version"] == 1);
    agent.signal("KILL");
    agent.wait();
    // The credentials come from an exec plugin, as with cloud providers, which fails while the network is unavailable.
    let (granted, plugin) = (site.path("granted"), site.path("credentials"));
    let script = format!("#!/bin/sh\ncat {} && exit 0\necho 'no network' >&2\nexit 1\n", granted.display());
    std::fs::write(&plugin, script).unwrap();
    std::fs::set_permissions(&plugin, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut text: serde_json::Value = serde_json::from_slice(&std::fs::read(&kubeconfig).unwrap()).unwrap();
    let version = "client.authentication.k8s.io/v1";
    text["users"][0]["user"] = json!({"exec": {"apiVersion": version, "command": plugin, "interactiveMode": "Never"}});
    std::fs::write(&kubeconfig, text.to_string()).unwrap();
    let agent = Agent::start_with_kubeconfig(&kubeconfig, &site.data(), UNREACHABLE_BROKER);
    until_true("the model to serve from the cache", || model_status(&agent, "parts")["serving"]["version"] == 1);
    agent.wait_for_event("cluster_watch_failed");
    request_version(&site, &api, 2);
    let credential = json!({"kind": "ExecCredential", "apiVersion": version, "status": {"token": "t"}});
    std::fs::write(&granted, credential.to_string()).unwrap();
    until_long("the new version to serve", || (model_status(&agent, "parts")["serving"]["version"] == 2).then_some(()));
}

fn readiness(agent: &Agent) -> u16 {
    lineside_tests::http::get(agent.http(), "/readyz").map_or(0, |(code, _)| code)
}
