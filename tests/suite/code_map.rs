//! The code map of `ARCHITECTURE.md`: a table of the crates and their files with the first sentence of each file's head. It is
//! generated (`make generate`), so that it cannot differ from the tree.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use lineside_tests::root;

const BEGIN: &str = "<!-- code map: `make generate` writes this table -->\n";
const END: &str = "<!-- end of code map -->";

/// The folders of the crates of the product, sorted.
fn crates() -> Vec<PathBuf> {
    let inside = |folder: &str| fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut crates: Vec<PathBuf> =
        inside("agent").chain(inside("runtime")).filter(|folder| folder.join("Cargo.toml").exists()).collect();
    crates.sort();
    crates
}

/// The Rust files below a folder, sorted.
fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|suffix| suffix == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The first sentence of the module comment at the top of a file. Generated files have none.
fn summary(text: &str) -> Option<String> {
    if text.starts_with("// This file is @generated") {
        return Some("Generated code.".to_owned());
    }
    let head: Vec<&str> = text
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .map(str::trim)
        .take_while(|line| !line.is_empty())
        .collect();
    let paragraph = head.join(" ");
    let end = paragraph.find(". ").map_or(paragraph.len(), |at| at + 1);
    Some(paragraph[..end].replace('|', "\\|")).filter(|sentence| !sentence.is_empty())
}

fn description(manifest: &Path) -> String {
    let text = fs::read_to_string(manifest).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("description = \""));
    line.unwrap_or_else(|| panic!("{} has no description", manifest.display())).trim_end_matches('"').to_owned()
}

fn table() -> String {
    let mut table = "| Path | Content |\n|---|---|\n".to_owned();
    for folder in crates() {
        let name = |path: &Path| path.strip_prefix(root()).unwrap().display().to_string();
        writeln!(table, "| **`{}`** | **{}** |", name(&folder), description(&folder.join("Cargo.toml"))).unwrap();
        for file in rust_files(&folder.join("src")) {
            let text = fs::read_to_string(&file).unwrap();
            let summary = summary(&text).unwrap_or_else(|| panic!("{} does not begin with `//!`", file.display()));
            writeln!(table, "| `{}` | {summary} |", name(&file)).unwrap();
        }
    }
    table
}

#[test]
fn the_committed_code_map_matches_the_tree() {
    let path = root().join("ARCHITECTURE.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("ARCHITECTURE.md has the begin mark of the code map");
    let (committed, after) = rest.split_once(END).expect("ARCHITECTURE.md has the end mark of the code map");
    let generated = table();
    if std::env::var_os("LINESIDE_UPDATE_GENERATED").is_some() {
        fs::write(&path, format!("{before}{BEGIN}{generated}{END}{after}")).unwrap();
    } else {
        assert!(committed == generated, "the code map of ARCHITECTURE.md is stale; run `make generate`");
    }
}

#[test]
fn the_summary_is_the_first_sentence_of_the_head() {
    assert_eq!(summary("//! One. Two.\n//! Three.\nuse x;"), Some("One.".to_owned()));
    assert_eq!(
        summary("//! A sentence\n//! over lines, v1.2.\n//!\n//! More."),
        Some("A sentence over lines, v1.2.".to_owned())
    );
    assert_eq!(summary("use x;\n//! Late."), None);
}
