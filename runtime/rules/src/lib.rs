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

//!
//! A rule is a program from outside. [`bounds`] bounds its text before it is parsed, [`Rule::compile`] its names and its cost,
//! and [`check`] refuses one that cannot be evaluated. The agent itself only scans; a child process compiles and checks rules,
//! and the process of the model evaluates them.

pub mod bounds;
mod check;
mod cost;
mod error;
mod names;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cel::{Context, ExecutionError, IdedExpr, Program, Value};
use lineside_api::prediction::{Class, Detection, Prediction};
use lineside_api::verdict::Verdict;

pub use check::check;
use error::one_line;
pub use error::{RuleError, RuleErrorKind};

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

/// Why an evaluation has no value.
enum Failure {
    /// The interpreter ended with an error.
    Execution(ExecutionError),
    /// The interpreter was not started, or panicked.
    Rule(RuleError),
}

impl From<Failure> for RuleError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Execution(error) => Self::Evaluation { reason: one_line(&error.to_string()) },
            Failure::Rule(error) => error,
        }
    }
}

impl Rule {
    /// Compiles an expression and checks its names and its cost. An expression that [`bounds::scan`] accepts needs less than
    /// 512 KiB of stack here and in [`Rule::evaluate`].
    ///
    /// # Errors
    /// Those of [`bounds::scan`], [`RuleErrorKind::Syntax`], [`RuleErrorKind::UnknownName`],
    /// [`RuleErrorKind::UnknownFunction`], [`RuleErrorKind::TooCostly`] and [`RuleErrorKind::Type`].
    pub fn compile(source: &str) -> Result<Self, RuleError> {
        let scan = bounds::scan(source)?;
        let syntax = |reason: &str| {
            let advice = scan.advice.map(|advice| format!("; {advice}")).unwrap_or_default();
            RuleError::Syntax { reason: one_line(reason) + &advice }
        };
        // A panic of the parser, which is generated code, must not end the process.
        let program = catch_unwind(|| Program::compile(source))
            .map_err(|_| syntax("the expression cannot be parsed"))?
            .map_err(|errors| syntax(&errors.to_string()))?;
        names::check(program.expression())?;
        check_patterns(program.expression())?;
        cost::check(program.expression(), cost::ITEMS)?;
        Ok(Self { program, source: source.to_owned() })
    }

    /// Evaluates the rule for one frame.
    ///
    /// # Errors
    /// [`RuleErrorKind::TooCostly`], for more classes or detections than the rule was compiled for,
    /// [`RuleErrorKind::Evaluation`] and [`RuleErrorKind::WrongType`].
    pub fn evaluate(&self, task: &str, prediction: &Prediction, frame: FrameFacts<'_>) -> Result<Verdict, RuleError> {
        match self.execute(task, prediction, frame)? {
            Value::String(text) => verdict_of(&text),
            other => Err(wrong_type(&other)),
        }
    }

    fn execute(&self, task: &str, prediction: &Prediction, frame: FrameFacts<'_>) -> Result<Value, Failure> {
        let items = items(prediction);
        if items > cost::ITEMS {
            cost::check(self.program.expression(), items).map_err(Failure::Rule)?;
        }
        let context = context(task, prediction, frame);
        match catch_unwind(AssertUnwindSafe(|| self.program.execute(&context))) {
            Ok(value) => value.map_err(Failure::Execution),
            Err(_) => {
                let reason = "the expression cannot be evaluated".to_owned();
                Err(Failure::Rule(RuleError::Evaluation { reason }))
            }
        }
    }
}

/// Checks that every pattern of `matches` is a literal. Otherwise its cost would not be known.
fn check_patterns(expression: &IdedExpr) -> Result<(), RuleError> {
    let mut is_literal = true;
    names::visit_all(expression, &mut |part| {
        if let cel::common::ast::Expr::Call(call) = &part.expr
            && call.func_name == "matches"
        {
            is_literal &= call.args.last().is_some_and(|pattern| names::text_literal(pattern).is_some());
        }
    });
    let reason = || "the pattern of matches() must be a text in quotes".to_owned();
    if is_literal { Ok(()) } else { Err(RuleError::Type { reason: reason() }) }
}

/// The number of classes or detections.
fn items(prediction: &Prediction) -> u64 {
    let items = match prediction {
        Prediction::Classes(list) => list.len(),
        Prediction::Detections(list) => list.len(),
        Prediction::Anomaly { .. } | Prediction::Tensors(_) => 0,
    };
    items as u64
}

/// The error for a value that is not text.
fn wrong_type(value: &Value) -> RuleError {
    let value = match value {
        Value::Bool(_) => "true or false".to_owned(),
        Value::Int(number) => format!("the number {number}"),
        Value::UInt(number) => format!("the number {number}"),
        Value::Float(number) => format!("the number {number}"),
        Value::List(_) => "a list".to_owned(),
        Value::Map(_) => "a map".to_owned(),
        Value::Null => "null".to_owned(),
        _ => "no text".to_owned(),
    };
    RuleError::WrongType { value }
}

/// The verdict with this name.
fn verdict_of(name: &str) -> Result<Verdict, RuleError> {
    match name {
        "pass" => Ok(Verdict::Pass),
        "reject" => Ok(Verdict::Reject),
        "none" => Ok(Verdict::None),
        other => Err(RuleError::WrongType { value: one_line(&format!("\"{other}\"")) }),
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
        assert_eq!(kind("score.foo() ? \"pass\" : \"none\""), RuleErrorKind::UnknownFunction);
        assert_eq!(kind("frame.name.matches(frame.name) ? \"pass\" : \"none\""), RuleErrorKind::Type);
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

    #[test]
    fn a_name_is_known_only_where_a_comprehension_binds_it() {
        let unknown = |source: &str| match Rule::compile(source).unwrap_err() {
            RuleError::UnknownName { name } => name,
            other => panic!("{source}: {other}"),
        };
        for source in [
            "detections.exists(d, true) && d.score > 0.5 ? \"reject\" : \"pass\"",
            "d.exists(d, true) ? \"reject\" : \"pass\"",
            "\"exists(d,\" == d ? \"reject\" : \"pass\"",
            "d == 1 ? \"pass\" : \"none\" // all(d, true)",
        ] {
            assert_eq!(unknown(source), "d", "{source}");
        }
        for source in [
            "detections . exists ( d , d.score > 0.5) ? \"reject\" : \"pass\"",
            "detections.exists(// all of them\nd, d.score > 0.5) ? \"reject\" : \"pass\"",
            "detections.exists(a, detections.exists(b, a.score > b.score)) ? \"reject\" : \"pass\"",
        ] {
            assert!(Rule::compile(source).is_ok(), "{source}");
        }
    }

    #[test]
    fn the_rules_of_the_attack_are_refused_when_they_are_compiled() {
        let terms = format!("1{} > 0 ? \"pass\" : \"none\"", "+1".repeat(1360));
        let doublings = format!("[\"a\"]{}.size() > 0 ? \"pass\" : \"none\"", ".map(s, s+s)".repeat(52));
        let list = vec!["1"; 100].join(",");
        let nested = (0..5).rev().fold("true".to_owned(), |inner, depth| format!("[{list}].all(v{depth}, {inner})"));
        let nested = format!("{nested} ? \"pass\" : \"none\"");
        for (source, measure) in [
            (&terms, bounds::Measure::Tokens),
            (&doublings, bounds::Measure::Comprehensions),
            (&nested, bounds::Measure::ComprehensionDepth),
        ] {
            let error = bounds::scan(source).unwrap_err();
            assert!(matches!(error, RuleError::TooComplex { measure: exceeded, .. } if exceeded == measure), "{error}");
            assert_eq!(Rule::compile(source).unwrap_err(), error);
        }
        let short = "detections.all(a, detections.all(b, detections.all(c, true))) ? \"pass\" : \"none\"";
        let error = bounds::scan(short).unwrap_err();
        assert!(error.to_string().contains("inside each other"), "{error}");
    }

    #[test]
    fn a_list_that_is_longer_than_checked_ends_the_evaluation_before_it_begins() {
        let source = "detections.all(a, detections.all(b, a.score < b.score)) ? \"pass\" : \"reject\"";
        let detections =
            |count| Prediction::Detections(vec![Detection { class: class("a", 0.5), bbox: [0.0; 4] }; count]);
        assert_eq!(evaluate(source, &detections(100)), Ok(Verdict::Reject));
        let error = evaluate(source, &detections(100_000)).unwrap_err();
        assert_eq!(error.kind(), RuleErrorKind::TooCostly);
        let simple = "detections.exists(d, d.score > 0.6) ? \"reject\" : \"pass\"";
        assert_eq!(evaluate(simple, &detections(1000)), Ok(Verdict::Pass));
    }
}
