//! Verdict rules: CEL expressions that turn the prediction for one frame into `pass`, `reject` or `none`. Only this crate uses
//! `cel`.
//!
//! The language is the Common Expression Language of Google's `cel-spec`. An expression may use these variables:
//!
//! ```text
//! task        string: classify, detect, anomaly or tensor
//! classes     classify: list of {label, class, score}, best first
//! detections  detect: list of {label, class, score, box: [left, top, right, bottom]}, best first
//! score       anomaly: double
//! frame       {width, height, name}; name is "" when the source gives no names
//! ```
//!
//! A list that does not belong to the task is empty, and the score is 0.0 for other tasks than anomaly, so that one expression
//! can serve models of several tasks.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cel::{Context, Program, Value};
use lineside_api::prediction::{Class, Detection, Prediction};
use lineside_api::verdict::Verdict;

/// Longest expression in bytes.
const EXPRESSION_BYTES_MAX: usize = 4096;
/// The variables of an expression.
const VARIABLES: [&str; 5] = ["task", "classes", "detections", "score", "frame"];

/// Why a rule cannot be compiled or evaluated. Every message is a single line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// The expression is longer than the limit.
    #[error("the expression has {bytes} bytes; at most {EXPRESSION_BYTES_MAX} are accepted")]
    TooLong {
        /// Length of the expression in bytes.
        bytes: usize,
    },
    /// The expression is not valid CEL.
    #[error("{reason}")]
    Syntax {
        /// Message of the parser.
        reason: String,
    },
    /// The expression uses an unknown variable.
    #[error("unknown name `{name}`; the expression may use task, classes, detections, score and frame")]
    UnknownName {
        /// The unknown variable.
        name: String,
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
    /// The expression is not valid CEL.
    Syntax,
    /// The expression uses an unknown variable.
    UnknownName,
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
            Self::Syntax { .. } => RuleErrorKind::Syntax,
            Self::UnknownName { .. } => RuleErrorKind::UnknownName,
            Self::Evaluation { .. } => RuleErrorKind::Evaluation,
            Self::WrongType { .. } => RuleErrorKind::WrongType,
        }
    }
}

/// A compiled rule. Two rules are equal when their expressions are.
pub struct Rule {
    program: Program,
    source: String,
}

impl fmt::Debug for Rule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Rule").field(&self.source).finish()
    }
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

/// The frame of a prediction, as the variable `frame` shows it.
#[derive(Debug, Clone, Copy)]
pub struct FrameFacts<'a> {
    /// Width of the source picture in pixels.
    pub width: u32,
    /// Height of the source picture in pixels.
    pub height: u32,
    /// Name of the frame, such as its file name; `None` when the source gives no names.
    pub name: Option<&'a str>,
}

impl Rule {
    /// Compiles an expression and checks the names of its variables.
    ///
    /// # Errors
    /// [`RuleErrorKind::TooLong`], [`RuleErrorKind::Syntax`] and [`RuleErrorKind::UnknownName`].
    pub fn compile(source: &str) -> Result<Self, RuleError> {
        if source.len() > EXPRESSION_BYTES_MAX {
            return Err(RuleError::TooLong { bytes: source.len() });
        }
        let syntax = |reason: &str| RuleError::Syntax { reason: one_line(reason) };
        // A panic of the parser, which is generated code, must not end the agent.
        let program = catch_unwind(|| Program::compile(source))
            .map_err(|_| syntax("the expression cannot be parsed"))?
            .map_err(|errors| syntax(&errors.to_string()))?;
        let rule = Self { program, source: source.to_owned() };
        let references = rule.program.references();
        let unknown = references.variables().into_iter().find(|name| !rule.is_defined(name));
        match unknown {
            Some(name) => Err(RuleError::UnknownName { name: name.to_owned() }),
            None => Ok(rule),
        }
    }

    fn is_defined(&self, name: &str) -> bool {
        VARIABLES.contains(&name) || self.is_bound_by_macro(name)
    }

    /// Whether a macro of the expression, such as `exists(d, ...)`, introduces this variable.
    fn is_bound_by_macro(&self, name: &str) -> bool {
        let spaceless: String = self.source.chars().filter(|character| !character.is_whitespace()).collect();
        ["exists", "exists_one", "all", "map", "filter"]
            .iter()
            .any(|macro_name| spaceless.contains(&format!("{macro_name}({name},")))
    }

    /// Evaluates the rule for one frame.
    ///
    /// # Errors
    /// [`RuleErrorKind::Evaluation`] and [`RuleErrorKind::WrongType`].
    pub fn evaluate(&self, task: &str, prediction: &Prediction, frame: FrameFacts<'_>) -> Result<Verdict, RuleError> {
        let failure = |reason: &str| RuleError::Evaluation { reason: one_line(reason) };
        let context = context(task, prediction, frame);
        let value = catch_unwind(AssertUnwindSafe(|| self.program.execute(&context)))
            .map_err(|_| failure("the expression cannot be evaluated"))?
            .map_err(|error| failure(&error.to_string()))?;
        let Value::String(text) = &value else { return Err(RuleError::WrongType { value: format!("{value:?}") }) };
        match text.as_str() {
            "pass" => Ok(Verdict::Pass),
            "reject" => Ok(Verdict::Reject),
            "none" => Ok(Verdict::None),
            other => Err(RuleError::WrongType { value: format!("\"{other}\"") }),
        }
    }
}

/// The variables of an expression.
fn context(task: &str, prediction: &Prediction, frame: FrameFacts<'_>) -> Context<'static, 'static> {
    let (mut classes, mut detections, mut score) = (Vec::new(), Vec::new(), 0.0);
    match prediction {
        Prediction::Classes(list) => classes = list.iter().map(class_value).collect(),
        Prediction::Detections(list) => detections = list.iter().map(detection_value).collect(),
        Prediction::Anomaly { score: value, .. } => score = f64::from(*value),
        Prediction::Tensors(_) => {}
    }
    let frame = map([
        ("width", Value::Int(i64::from(frame.width))),
        ("height", Value::Int(i64::from(frame.height))),
        ("name", text(frame.name.unwrap_or_default())),
    ]);
    let mut context = Context::default();
    context.add_variable_from_value("task", text(task));
    context.add_variable_from_value("classes", Value::List(classes.into()));
    context.add_variable_from_value("detections", Value::List(detections.into()));
    context.add_variable_from_value("score", Value::Float(score));
    context.add_variable_from_value("frame", frame);
    context
}

fn class_value(class: &Class) -> Value {
    map([("label", text(&class.label)), ("class", Value::Int(i64::from(class.class))), ("score", number(class.score))])
}

fn detection_value(detection: &Detection) -> Value {
    map([
        ("label", text(&detection.class.label)),
        ("class", Value::Int(i64::from(detection.class.class))),
        ("score", number(detection.class.score)),
        ("box", Value::List(detection.bbox.iter().copied().map(number).collect::<Vec<_>>().into())),
    ])
}

fn number(value: f32) -> Value {
    Value::Float(f64::from(value))
}

fn text(value: &str) -> Value {
    Value::String(value.to_owned().into())
}

fn map<const N: usize>(entries: [(&str, Value); N]) -> Value {
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<std::collections::HashMap<_, _>>().into()
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: FrameFacts<'static> = FrameFacts { width: 640, height: 480, name: Some("part-1.jpg") };

    fn class(label: &str, score: f32) -> Class {
        Class { label: label.into(), class: 0, score }
    }

    fn evaluate(source: &str, prediction: &Prediction) -> Result<Verdict, RuleError> {
        Rule::compile(source)?.evaluate("detect", prediction, FRAME)
    }

    #[test]
    fn the_documented_example_rejects_a_scratch() {
        let source = r#"detections.exists(d, d.label == "scratch" && d.score > 0.6) ? "reject" : "pass""#;
        let scratch =
            |score| Prediction::Detections(vec![Detection { class: class("scratch", score), bbox: [0.0; 4] }]);
        assert_eq!(evaluate(source, &scratch(0.9)), Ok(Verdict::Reject));
        assert_eq!(evaluate(source, &scratch(0.5)), Ok(Verdict::Pass));
        assert_eq!(evaluate(source, &Prediction::Detections(vec![])), Ok(Verdict::Pass));
    }

    #[test]
    fn every_task_has_its_variables() {
        let classes = Prediction::Classes(vec![class("good", 0.8)]);
        assert_eq!(evaluate(r#"classes[0].label == "good" ? "pass" : "reject""#, &classes), Ok(Verdict::Pass));
        let anomaly = Prediction::Anomaly { score: 7.5, map: None };
        assert_eq!(evaluate(r#"score > 7.0 ? "reject" : "pass""#, &anomaly), Ok(Verdict::Reject));
        let named = r#"frame.name.startsWith("part") && frame.width == 640 && task == "detect" ? "pass" : "none""#;
        assert_eq!(evaluate(named, &anomaly), Ok(Verdict::Pass));
        let boxes = r#"detections.all(d, d.box[2] - d.box[0] < 10.0) ? "pass" : "reject""#;
        assert_eq!(evaluate(boxes, &anomaly), Ok(Verdict::Pass));
    }

    #[test]
    fn invalid_rules_are_rejected_by_kind() {
        let kind = |source: &str| Rule::compile(source).unwrap_err().kind();
        for source in ["", "detections.exists(", "\"unfinished"] {
            assert_eq!(kind(source), RuleErrorKind::Syntax, "{source}");
        }
        assert_eq!(kind(&"1+".repeat(4000)), RuleErrorKind::TooLong);
        assert_eq!(kind("detection.size() > 0 ? \"a\" : \"b\""), RuleErrorKind::UnknownName);
        let error = Rule::compile("parts.size() > 0").unwrap_err();
        assert_eq!(error, RuleError::UnknownName { name: "parts".to_owned() });
        assert!(error.to_string().contains("`parts`"), "{error}");
    }

    #[test]
    fn failed_evaluations_are_reported_by_kind() {
        let empty = Prediction::Detections(vec![]);
        let error = evaluate(r#""maybe""#, &empty).unwrap_err();
        assert_eq!(error.kind(), RuleErrorKind::WrongType);
        assert!(error.to_string().contains("\"maybe\""), "{error}");
        assert_eq!(evaluate("1 + 1", &empty).unwrap_err().kind(), RuleErrorKind::WrongType);
        let first = evaluate("classes[0].label", &empty).unwrap_err();
        assert_eq!(first.kind(), RuleErrorKind::Evaluation, "the list is empty");
    }
}
