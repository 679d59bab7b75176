//! The house rules that a compiler does not know: floors, doors, and what the data plane and the decisions may not use.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use lineside_tests::root;

/// The agent's modules by floor. A module may use its own floor and those below.
const FLOORS: [&[&str]; 7] = [
    &["base"],
    &["config", "message", "status", "trust", "verdict"],
    &["plan"],
    &["frames", "last_good", "outbox", "roster", "slot", "spool", "store"],
    &["bundle", "camera", "cluster", "fetch", "manifests", "mqtt", "serve", "vet"],
    &["tasks"],
    &["app", "telemetry", "commands"],
];

/// The only place that may name each crate: a file, or a folder with everything in it.
const DOORS: [(&str, &str); 17] = [
    ("kube", "agent/src/cluster"),
    ("k8s_openapi", "agent/src/cluster"),
    ("tract_onnx", "runtime/src/engine/tract"),
    ("image", "runtime/src/decode.rs"),
    ("fast_image_resize", "runtime/src/preprocess.rs"),
    ("rumqttc", "agent/src/mqtt"),
    ("sled", "agent/src/store/index.rs"),
    ("object_store", "agent/src/fetch"),
    ("http_auth", "agent/src/fetch/oci.rs"),
    ("ring", "agent/src/trust.rs"),
    ("indicatif", "agent/src/commands/progress.rs"),
    ("crc32c", "agent/src/spool"),
    ("prost", "agent/src/mqtt"),
    ("rustls_native_certs", "agent/src/mqtt/access.rs"),
    ("x509_cert", "agent/src/mqtt/access.rs"),
    ("cel", "agent/src/verdict.rs"),
    ("serde_saphyr", "agent/src/config/lenient.rs"),
];

fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|suffix| suffix == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, code(&text)));
        }
    }
    found
}

/// The text without comments and without string literals, so that prose may name what code may not.
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

/// Whether `word::` stands in the code as a path of its own.
fn names(code: &str, word: &str) -> bool {
    code.match_indices(&format!("{word}::")).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        !before.is_some_and(|character| character.is_alphanumeric() || character == '_' || character == ':')
    })
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
            let name: String = head.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            used.insert(name);
        }
    }
    used
}

fn floor_of(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

#[test]
fn a_lower_floor_never_uses_a_higher_one() {
    let source = root().join("agent/src");
    let mut checked = 0;
    for (path, code) in sources(&source) {
        let inside = path.strip_prefix(&source).unwrap();
        let module = inside.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
        if matches!(module, "lib" | "main") {
            continue;
        }
        let floor = floor_of(module).unwrap_or_else(|| panic!("{module} stands on no floor; give it one"));
        for used in used_modules(&code) {
            let Some(other) = floor_of(&used) else { continue };
            assert!(other <= floor, "{} is on floor {floor} and uses {used} on floor {other}", inside.display());
            checked += 1;
        }
    }
    assert!(checked > 50, "only {checked} uses were found; the test reads the code wrongly");
}

#[test]
fn each_dependency_has_one_door() {
    let mut seen = BTreeSet::new();
    for folder in ["runtime/src", "agent/src"] {
        for (path, code) in sources(&root().join(folder)) {
            for (name, door) in DOORS {
                if names(&code, name) {
                    assert!(path.starts_with(root().join(door)), "{} names {name}; its door is {door}", path.display());
                    seen.insert(name);
                }
            }
        }
    }
    assert_eq!(seen.len(), DOORS.len(), "a door that nobody goes through: {seen:?}");
}

#[test]
fn the_data_plane_knows_no_network_and_no_files() {
    for (path, code) in sources(&root().join("runtime/src")) {
        for forbidden in ["tokio", "std::net", "std::fs", "std::process", "async fn", ".await"] {
            assert!(!code.contains(forbidden), "{} uses {forbidden}", path.display());
        }
    }
    let manifest = fs::read_to_string(root().join("runtime/Cargo.toml")).unwrap();
    assert!(!manifest.contains("tokio") && !manifest.contains("reqwest"));
}

#[test]
fn decisions_are_pure() {
    for (path, code) in sources(&root().join("agent/src/plan")) {
        let product = code.split("mod tests").next().unwrap();
        for forbidden in ["tokio", "async ", ".await", "std::fs", "std::net", "Instant::now", "SystemTime::now"] {
            assert!(!product.contains(forbidden), "{} uses {forbidden}", path.display());
        }
    }
}

#[test]
fn main_wires_and_nothing_else() {
    let main = fs::read_to_string(root().join("agent/src/main.rs")).unwrap();
    assert!(main.lines().count() < 100);
}

#[test]
fn the_rules_would_be_noticed() {
    assert!(names("use tract_onnx::prelude;", "tract_onnx"));
    assert!(!names("use my_tract_onnx::prelude;", "tract_onnx"));
    assert!(!names(&code("// tract_onnx::x\n\"tract_onnx::y\""), "tract_onnx"));
    let used = used_modules("use crate::{base::x, plan};\nuse crate::tasks::deploy;");
    assert_eq!(used, BTreeSet::from(["base", "plan", "tasks"].map(str::to_owned)));
}
