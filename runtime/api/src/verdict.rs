//! The verdict on an inspected part.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The verdict on an inspected part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The part is good.
    Pass,
    /// The part is to be removed.
    Reject,
    /// The stream has no verdict rule, or the rule could not be evaluated and `onError` is `none`.
    None,
}

impl Verdict {
    /// The name in results and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Reject => "reject",
            Self::None => "none",
        }
    }
}

/// What a verdict rule gave for one frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RuleOutcome {
    /// The verdict.
    Verdict(Verdict),
    /// The rule failed or exceeded its bounds; the reason, in one line. The verdict is the `onError` of the stream.
    Failed(String),
}

/// The verdict on a part for which the verdict rule fails or exceeds its bounds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The verdict is none.
    #[default]
    None,
    /// The part is to be removed.
    Reject,
}

impl OnError {
    /// The verdict.
    pub fn verdict(self) -> Verdict {
        match self {
            Self::None => Verdict::None,
            Self::Reject => Verdict::Reject,
        }
    }
}
