//! What is to happen to a part.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is to happen to the part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Let it go.
    Pass,
    /// Take it out.
    Reject,
    /// The stream has no rule, or the rule could not be applied.
    None,
}

impl Verdict {
    /// As it stands in results and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Reject => "reject",
            Self::None => "none",
        }
    }
}
