//! Compiled verdict rules by their text.
//!
//! This file has no unit tests: `in_process.rs` tests it.

use std::collections::HashMap;
use std::sync::Arc;

use lineside_api::prediction::Inspection;
use lineside_api::verdict::RuleOutcome;
use lineside_rules::{FrameFacts, Rule};

/// Compiled rules that are kept. A node has fewer streams.
const RULES_MAX: usize = 256;

/// The rules that a thread has evaluated.
#[derive(Default)]
pub(crate) struct RuleCache(HashMap<Arc<str>, Result<Rule, String>>);

impl RuleCache {
    /// Evaluates a rule on the answer to a frame of this name.
    pub(crate) fn evaluate(&mut self, rule: &Arc<str>, inspection: &Inspection, name: Option<&str>) -> RuleOutcome {
        if self.0.len() >= RULES_MAX && !self.0.contains_key(rule) {
            self.0.clear();
        }
        let compile = || Rule::compile(rule).map_err(|error| error.to_string());
        match self.0.entry(rule.clone()).or_insert_with(compile) {
            Err(reason) => RuleOutcome::Failed(reason.clone()),
            Ok(rule) => {
                let facts = FrameFacts { width: inspection.width, height: inspection.height, name };
                let task = inspection.prediction.task().name();
                match rule.evaluate(task, &inspection.prediction, facts) {
                    Ok(verdict) => RuleOutcome::Verdict(verdict),
                    Err(error) => RuleOutcome::Failed(error.to_string()),
                }
            }
        }
    }
}
