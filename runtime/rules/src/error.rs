//! Why a rule is refused or cannot be evaluated.

use crate::bounds::{BYTES_MAX, Measure};
use crate::cost::COST_MAX;

/// Longest reason in characters that a message repeats of the parser or the interpreter.
const REASON_CHARACTERS_MAX: usize = 400;

/// Why a rule is refused or cannot be evaluated. Every message is a single line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// The expression is longer than the limit.
    #[error("the expression has {bytes} bytes; at most {BYTES_MAX} are accepted")]
    TooLong {
        /// Length of the expression in bytes.
        bytes: usize,
    },
    /// The expression exceeds a bound of [`crate::bounds`].
    #[error(
        "the expression has more than {} {}; it must be simpler to be evaluated for every frame",
        .measure.limit(),
        .measure.name()
    )]
    TooComplex {
        /// The exceeded bound.
        measure: Measure,
        /// The value at which the scan ended.
        value: usize,
    },
    /// The evaluation would take too long.
    #[error(
        "the evaluation takes up to {cost} steps for lists of {items} elements; at most {COST_MAX} are accepted; avoid one \
         exists, all, map or filter inside another one"
    )]
    TooCostly {
        /// The estimated steps.
        cost: u64,
        /// The length of the lists that the estimate is for.
        items: u64,
    },
    /// The expression is not valid CEL.
    #[error("{reason}")]
    Syntax {
        /// Message of the scan or of the parser.
        reason: String,
    },
    /// The expression uses an unknown variable.
    #[error(
        "unknown name `{name}`; the expression may use task, classes, detections, score and frame{}",
        advice_for_name(.name)
    )]
    UnknownName {
        /// The unknown variable.
        name: String,
    },
    /// The expression calls an unknown function.
    #[error(
        "unknown function `{name}`; the functions are size, contains, startsWith, endsWith, matches, has, exists, exists_one, \
         all, filter, map, int, uint, double, string, bytes, bool, dyn and type{}",
        advice_for_function(.name)
    )]
    UnknownFunction {
        /// The unknown function.
        name: String,
    },
    /// The expression cannot be evaluated, whatever the model finds.
    #[error("{reason}")]
    Type {
        /// What does not fit together.
        reason: String,
    },
    /// The evaluation failed, such as for an index outside of a list.
    #[error("{reason}")]
    Evaluation {
        /// Message of the interpreter.
        reason: String,
    },
    /// The value of the expression is not a verdict.
    #[error("the value of the expression is {value}; it must be \"pass\", \"reject\" or \"none\"")]
    WrongType {
        /// The value.
        value: String,
    },
}

/// The kind of a [`RuleError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleErrorKind {
    /// The expression is longer than the limit.
    TooLong,
    /// The expression exceeds a bound of the token scan.
    TooComplex,
    /// The evaluation would take too long.
    TooCostly,
    /// The expression is not valid CEL.
    Syntax,
    /// The expression uses an unknown variable.
    UnknownName,
    /// The expression calls an unknown function.
    UnknownFunction,
    /// The expression cannot be evaluated, whatever the model finds.
    Type,
    /// The evaluation failed.
    Evaluation,
    /// The value of the expression is not a verdict.
    WrongType,
}

impl RuleError {
    /// The kind, to branch on.
    pub fn kind(&self) -> RuleErrorKind {
        match self {
            Self::TooLong { .. } => RuleErrorKind::TooLong,
            Self::TooComplex { .. } => RuleErrorKind::TooComplex,
            Self::TooCostly { .. } => RuleErrorKind::TooCostly,
            Self::Syntax { .. } => RuleErrorKind::Syntax,
            Self::UnknownName { .. } => RuleErrorKind::UnknownName,
            Self::UnknownFunction { .. } => RuleErrorKind::UnknownFunction,
            Self::Type { .. } => RuleErrorKind::Type,
            Self::Evaluation { .. } => RuleErrorKind::Evaluation,
            Self::WrongType { .. } => RuleErrorKind::WrongType,
        }
    }
}

/// The likely mistake behind an unknown name.
fn advice_for_name(name: &str) -> &'static str {
    match name {
        "pass" | "reject" | "none" => "; write a verdict with quotes, such as \"pass\"",
        "label" | "class" | "box" => "; write detections.exists(d, d.label == \"scratch\") to look at each detection",
        _ => "",
    }
}

/// The likely mistake behind an unknown function.
fn advice_for_function(name: &str) -> &'static str {
    match name {
        "exists" | "exists_one" | "existsOne" | "all" | "filter" | "map" => {
            "; write it behind a list and with a variable, such as detections.exists(d, d.score > 0.5)"
        }
        "has" => "; write it with a field, such as has(d.label)",
        _ => "",
    }
}

/// A message of the parser or the interpreter in one line of bounded length. It may repeat a whole list.
pub(crate) fn one_line(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(REASON_CHARACTERS_MAX) {
        Some((end, _)) => format!("{}...", line.get(..end).unwrap_or_default()),
        None => line,
    }
}
