//! The rules child: a process that parses and checks verdict rules, so that no rule can stop the agent.
//!
//! The agent scans a rule ([`lineside_rules::bounds`]) and sends it to the child; [`RuleChecker`] starts the child, and
//! [`child_main`] is its program. The protocol is `lineside-rules 1`: after the handshake each line of standard input is a
//! [`Request`] in JSON, and each line of standard output the [`Reply`] to it.

mod child;
mod rule_checker;

use serde::{Deserialize, Serialize};

pub use child::main as child_main;
pub use rule_checker::{RuleCheckError, RuleCheckErrorKind, RuleChecker};

/// The hidden subcommand of the child.
pub const SUBCOMMAND: &str = "rules-child";
/// Protocol and version.
const HANDSHAKE: &str = "lineside-rules 1";
/// Longest line of either direction in bytes: the longest rule with every character escaped.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// A rule to be checked.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    rule: String,
}

/// What the check found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Reply {
    /// The rule can be evaluated.
    Accepted,
    /// The rule is invalid for this reason, in one line.
    Refused(String),
}
