//! The structural rules that the compiler does not check: which crate uses which, that modules form no circle, one door per
//! dependency, and what the data plane and the decisions may not use.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lineside_tests::root;
use serde_json::Value;

/// Our crates with the crates of ours that each may use. Lower crates stand first.
const EDGES: [(&str, &str, &[&str]); 14] = [
    ("lineside-common", "runtime/common", &[]),
    ("lineside-api", "runtime/api", &["common"]),
    ("lineside-ipc", "runtime/ipc", &[]),
    ("lineside-inference", "runtime/inference", &["api", "ipc"]),
    ("lineside-rules", "runtime/rules", &["api"]),
    ("lineside-worker", "runtime/worker", &["common", "api", "ipc", "inference", "rules"]),
    ("lineside-scheduler", "runtime/scheduler", &["common", "api", "ipc", "worker"]),
    ("lineside-capture", "runtime/capture", &["common", "api", "ipc"]),
    ("lineside-spool", "agent/spool", &["common"]),
    ("lineside-models", "agent/models", &["common", "api", "ipc", "inference"]),
    ("lineside-mqtt", "agent/mqtt", &["common", "api", "spool"]),
    ("lineside-kube", "agent/kube", &["common", "api"]),
    ("lineside-controller", "agent/controller", &["common", "api", "kube"]),
    (
        "lineside",
        "agent/lineside",
        &[
            "common",
            "api",
            "ipc",
            "inference",
            "rules",
            "worker",
            "scheduler",
            "capture",
            "spool",
            "models",
            "mqtt",
            "kube",
            "controller",
        ],
    ),
];

/// The only place that may name each crate: a file, or a folder with everything in it.
const DOORS: [(&str, &str); 23] = [
    ("kube", "agent/kube/src"),
    ("k8s_openapi", "agent/kube/src"),
    ("tract_onnx", "runtime/inference/src/engine/tract"),
    ("image", "runtime/inference/src/decode"),
    ("jpeg_decoder", "runtime/inference/src/decode"),
    ("fast_image_resize", "runtime/inference/src/preprocess"),
    ("landlock", "runtime/common/src/sandbox.rs"),
    ("libc", "runtime/common/src/sandbox.rs"),
    ("seccompiler", "runtime/common/src/sandbox.rs"),
    ("memmap2", "runtime/ipc/src/shared_memory.rs"),
    ("postcard", "runtime/ipc/src/channel.rs"),
    ("rumqttc", "agent/mqtt/src"),
    ("sled", "agent/models/src/store/index.rs"),
    ("object_store", "agent/models/src/fetch"),
    ("http_auth", "agent/models/src/fetch/oci.rs"),
    ("ring", "agent/models/src/signing"),
    ("indicatif", "agent/lineside/src/cli/progress.rs"),
    ("crc32c", "agent/spool/src"),
    ("prost", "agent/mqtt/src"),
    ("rustls_native_certs", "runtime/common/src/tls_roots.rs"),
    ("x509_cert", "agent/mqtt/src/credentials.rs"),
    ("cel", "runtime/rules/src"),
    ("serde_saphyr", "runtime/api/src/kinds/yaml.rs"),
];

/// The Rust files below a folder, with their code: without comments and string literals, so that prose may name what code
/// may not.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|suffix| suffix == "rs") {
            found.push((path.clone(), code(&fs::read_to_string(&path).unwrap())));
        }
    }
    found
}

/// All files of the product.
fn product() -> Vec<(PathBuf, String)> {
    EDGES.iter().flat_map(|(_, folder, _)| sources(&root().join(folder).join("src"))).collect()
}

fn code(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let line = line.split("//").next().unwrap_or_default();
        let outside: Vec<&str> = line.split('"').step_by(2).collect();
        out.push_str(&outside.join("\"\""));
        out.push('\n');
    }
    out
}

/// The code of a file up to its unit tests.
fn without_tests(code: &str) -> &str {
    code.split("#[cfg(test)]\nmod tests").next().unwrap_or_default()
}

/// Whether `word::` is the beginning of a path in the code.
fn names(code: &str, word: &str) -> bool {
    code.match_indices(&format!("{word}::")).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        !before.is_some_and(|character| character.is_alphanumeric() || character == '_' || character == ':')
    })
}

#[test]
fn crates_use_only_the_crates_they_may() {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut seen = BTreeSet::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        if matches!(name, "lineside-tests" | "lineside-fuzz" | "lineside-examples") {
            continue;
        }
        let (_, _, allowed) = EDGES
            .iter()
            .find(|(known, ..)| *known == name)
            .unwrap_or_else(|| panic!("{name} is not in the list of crates; add it to EDGES and to ARCHITECTURE.md"));
        seen.insert(name.to_owned());
        for dependency in package["dependencies"].as_array().unwrap() {
            let used = dependency["name"].as_str().unwrap();
            let Some(used) = used.strip_prefix("lineside-").filter(|_| dependency["kind"] != "dev") else { continue };
            assert!(allowed.contains(&used), "{name} must not use lineside-{used}");
        }
    }
    assert_eq!(seen.len(), EDGES.len(), "{seen:?}");
    for (index, (name, _, allowed)) in EDGES.iter().enumerate() {
        for used in *allowed {
            let position = EDGES.iter().position(|(known, ..)| known.strip_prefix("lineside-") == Some(used));
            assert!(position.is_some_and(|position| position < index), "{name} stands above {used} in the list");
        }
    }
}

/// The top-level module of a file within its crate: `store` for `store/index.rs`; empty for `lib.rs` and `main.rs`.
fn module(inside: &Path) -> String {
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    let name = first.trim_end_matches(".rs");
    if matches!(name, "lib" | "main") { String::new() } else { name.to_owned() }
}

/// The first names of all `crate::` paths, also inside braces.
fn used_modules(code: &str) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let heads: Vec<&str> = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap_or_default().split(',').collect(),
            None => vec![rest],
        };
        for head in heads {
            used.insert(head.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        }
    }
    used
}

#[test]
fn modules_of_a_crate_form_no_circle() {
    for (name, folder, _) in EDGES {
        let source = root().join(folder).join("src");
        let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (path, code) in sources(&source) {
            let inside = path.strip_prefix(&source).unwrap();
            let own = module(inside);
            let mut used = used_modules(without_tests(&code));
            // `super::` from a top-level file leads to the crate's root, and from there into a module.
            if inside.components().count() == 1 {
                used.extend(used_modules(&without_tests(&code).replace("super::", "crate::")));
            }
            uses.entry(own).or_default().extend(used);
        }
        let modules: BTreeSet<String> = uses.keys().cloned().collect();
        for (own, used) in &mut uses {
            used.retain(|other| other != own && modules.contains(other));
        }
        uses.remove("");
        // Remove what uses nothing that is left, until nothing changes; a circle stays.
        while let Some(free) = uses.iter().find(|(_, used)| !used.iter().any(|other| uses.contains_key(other))) {
            let free = free.0.clone();
            uses.remove(&free);
        }
        assert!(uses.is_empty(), "{name}: these modules use each other in a circle: {uses:?}");
    }
}

#[test]
fn each_dependency_has_one_door() {
    let mut seen = BTreeSet::new();
    for (path, code) in product() {
        for (name, door) in DOORS {
            if names(&code, name) {
                assert!(path.starts_with(root().join(door)), "{} names {name}; its door is {door}", path.display());
                seen.insert(name);
            }
        }
    }
    assert_eq!(seen.len(), DOORS.len(), "a door that nobody goes through: {seen:?}");
}

#[test]
fn inference_has_no_network_no_files_and_no_runtime() {
    for crate_name in ["ipc", "inference", "rules"] {
        let folder = root().join("runtime").join(crate_name);
        for (path, code) in sources(&folder.join("src")) {
            // Shared memory is a file without a name, and a channel is a socket that was given.
            if path.ends_with("ipc/src/shared_memory.rs") || path.ends_with("ipc/src/channel.rs") {
                continue;
            }
            for forbidden in ["tokio", "std::net", "std::fs", "std::process", "async fn", ".await"] {
                assert!(!code.contains(forbidden), "{} uses {forbidden}", path.display());
            }
        }
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        assert!(!manifest.contains("tokio") && !manifest.contains("reqwest"));
    }
}

/// The files whose decisions are pure: no async, no I/O, and time is an argument.
const PURE: [&str; 11] = [
    "agent/lineside/src/reconciler/plan.rs",
    "agent/lineside/src/desired/object_set.rs",
    "agent/lineside/src/streams/health.rs",
    "agent/lineside/src/streams/report_filter.rs",
    "agent/lineside/src/telemetry/rate_limit.rs",
    "agent/kube/src/status_events.rs",
    "agent/controller/src/aggregate.rs",
    "agent/controller/src/liveness.rs",
    "agent/lineside/src/reconciler/status_builder.rs",
    "agent/mqtt/src/publisher/send_window.rs",
    "runtime/scheduler/src/dispatcher/mod.rs",
];

#[test]
fn decisions_are_pure() {
    for file in PURE {
        let code = code(&fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}")));
        for forbidden in ["tokio", "async ", ".await", "std::fs", "std::net", "Instant::now", "SystemTime::now"] {
            assert!(!without_tests(&code).contains(forbidden), "{file} uses {forbidden}");
        }
    }
}

#[test]
fn no_two_public_types_share_a_name() {
    let mut defined: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, code) in product() {
        for line in without_tests(&code).lines() {
            // Only what is public to other crates; `pub(crate)` and `pub(super)` are a crate's own matter.
            let Some(rest) = line.strip_prefix("pub ") else { continue };
            let mut words = rest.split_whitespace();
            if !matches!(words.next(), Some("struct" | "enum" | "trait" | "type")) {
                continue;
            }
            let name: String =
                words.next().unwrap_or_default().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !["Result", "Error"].contains(&name.as_str()) {
                defined.entry(name).or_default().insert(path.display().to_string());
            }
        }
    }
    assert!(defined.len() > 100, "only {} types were found; the test reads the code wrongly", defined.len());
    let shared: Vec<_> = defined.iter().filter(|(_, places)| places.len() > 1).collect();
    assert!(shared.is_empty(), "{shared:#?}");
}

#[test]
fn public_functions_have_typed_errors() {
    for (path, code) in product() {
        let code = without_tests(&code);
        for (at, _) in code.match_indices("pub fn ").chain(code.match_indices("pub async fn ")) {
            let signature: String = code[at..].chars().take_while(|c| *c != '{' && *c != ';').collect();
            let returned = signature.split("->").last().unwrap_or_default().split_whitespace().collect::<String>();
            assert!(
                !(returned.starts_with("Result<") && returned.trim_end_matches("where").ends_with(",String>")),
                "{}: {signature}",
                path.display()
            );
        }
    }
}

#[test]
fn no_state_is_read_back_from_a_metric() {
    let is_test = |path: &Path| path.file_stem().is_some_and(|name| name.to_string_lossy().ends_with("tests"));
    for (path, code) in product().into_iter().filter(|(path, _)| !is_test(path)) {
        // `Metrics` structs hold gauges and counters; `.get()` on one of their fields reads it back.
        for (number, line) in without_tests(&code).lines().enumerate() {
            let reads = line.contains("metrics.") && line.contains(".get()") && !line.contains("get_");
            assert!(!reads, "{}:{}: {line}", path.display(), number + 1);
        }
    }
}

#[test]
fn main_wires_and_nothing_else() {
    let main = fs::read_to_string(root().join("agent/lineside/src/main.rs")).unwrap();
    assert!(main.lines().count() < 100);
}

#[test]
fn the_rules_would_be_noticed() {
    assert!(names("use tract_onnx::prelude;", "tract_onnx"));
    assert!(!names("use my_tract_onnx::prelude;", "tract_onnx"));
    assert!(!names(&code("// tract_onnx::x\n\"tract_onnx::y\""), "tract_onnx"));
    let used = used_modules("use crate::{base::x, plan};\nuse crate::tasks::deploy;");
    assert_eq!(used, BTreeSet::from(["base", "plan", "tasks"].map(str::to_owned)));
    assert_eq!(module(Path::new("store/index.rs")), "store");
    assert_eq!(module(Path::new("lib.rs")), "");
}
