//! Words of the project's former private language, which must not return to code, messages and documentation. The
//! standard terms are those of Kubernetes, Prometheus, MQTT and Triton.

use std::fs;
use std::path::{Path, PathBuf};

use lineside_tests::root;

/// Whole words and phrases, in lower case. Words with an ordinary technical use are not listed.
const WORDS: [&str; 26] = [
    "anew",
    "asked for",
    "can be had",
    "comes of it",
    "gives way",
    "goes on",
    "heard",
    "hears",
    "knock",
    "lane",
    "lanes",
    "mood",
    "obey",
    "obeys",
    "stands in",
    "tells",
    "the last word",
    "told",
    "trouble",
    "troubles",
    "untold",
    "vet",
    "vets",
    "vetted",
    "whoever",
    "wish",
];
/// Files that name the words because they list the old names, or this list.
const EXCEPTIONS: [&str; 2] = ["CHANGELOG.md", "tests/suite/dialect.rs"];

/// The files of the project that people write.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let suffix = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && !["target", "dist", "shared"].contains(&name.as_str()) {
                found.extend(files(&path));
            }
        } else if ["rs", "md", "yaml", "sh", "py", "toml", "json"].contains(&suffix.as_str()) {
            found.push(path);
        }
    }
    found
}

/// The words of a line in lower case, separated by single spaces; identifiers are split at `_` and at capital letters.
fn normalized(line: &str) -> String {
    let mut text = " ".to_owned();
    let mut is_lower = false;
    for character in line.chars() {
        if character.is_alphabetic() {
            if character.is_uppercase() && is_lower {
                text.push(' ');
            }
            text.extend(character.to_lowercase());
        } else if !text.ends_with(' ') {
            text.push(' ');
        }
        is_lower = character.is_lowercase();
    }
    text.push(' ');
    text
}

fn dialect(line: &str) -> Option<&'static str> {
    let text = normalized(line);
    WORDS.into_iter().find(|word| text.contains(&format!(" {word} ")))
}

#[test]
fn words_of_the_former_dialect_are_absent() {
    let mut found = Vec::new();
    for path in files(&root()) {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        if EXCEPTIONS.contains(&name.as_str()) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for (index, line) in text.lines().enumerate() {
            found.extend(dialect(line).map(|word| format!("{name}:{}: {word}", index + 1)));
        }
    }
    assert!(found.is_empty(), "use the standard terms instead of:\n{}", found.join("\n"));
}

#[test]
fn words_are_found_in_prose_and_identifiers_and_not_within_other_words() {
    assert_eq!(dialect("/// What is asked for."), Some("asked for"));
    assert_eq!((dialect("fn was_told()"), dialect("wasTold")), (Some("told"), Some("told")));
    assert_eq!(dialect("velvet stands, unheard; plane; Vetting"), None);
}
