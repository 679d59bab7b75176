//! The check of a rule when a manifest is read: it is evaluated for sample predictions of every task.
//!
//! A rule is refused if no model could make it right: a comparison of a score with a text, a field that does not exist, a value
//! that is not a verdict. A failure that depends on the prediction is not refused, such as an index behind the end of a list:
//! it is an error of the frame, whose verdict is `onError`.

use cel::common::ast::operators::{
    CONDITIONAL, EQUALS, GREATER, GREATER_EQUALS, IN, LESS, LESS_EQUALS, LOGICAL_AND, LOGICAL_NOT, LOGICAL_OR,
    NOT_EQUALS,
};
use cel::common::ast::{Expr, LiteralValue};
use cel::{ExecutionError, IdedExpr, Value};
use lineside_api::prediction::{Class, Detection, Prediction};

use crate::cost::{self, COST_MAX};
use crate::names::{text_literal, visit_all};
use crate::{Failure, FrameFacts, Rule, RuleError, items, one_line, verdict_of, wrong_type};

/// Most labels of the samples. They are the text literals of the expression, so that the samples reach what is written for
/// one label.
const LABELS_MAX: usize = 8;
/// A label that no expression compares with.
const OTHER_LABEL: &str = "lineside sample";
/// Length of the long lists of the samples.
const MANY: usize = 100;
/// Most steps of all samples together: about 1 s.
const STEPS_MAX: u64 = 4 * COST_MAX;
/// Operators whose value is true or false.
const CONDITIONS: [&str; 10] =
    [EQUALS, NOT_EQUALS, LESS, LESS_EQUALS, GREATER, GREATER_EQUALS, IN, LOGICAL_AND, LOGICAL_OR, LOGICAL_NOT];

/// Checks a rule as far as it can be checked without a model. It may take a second and 100 MiB, and a rule may break the
/// interpreter, which is why it runs in a child process.
///
/// # Errors
/// Those of [`Rule::compile`], [`crate::RuleErrorKind::Type`] and [`crate::RuleErrorKind::WrongType`].
pub fn check(source: &str) -> Result<(), RuleError> {
    let rule = Rule::compile(source)?;
    let expression = rule.program.expression();
    check_results(expression)?;
    let texts = texts(expression);
    let mut budget = STEPS_MAX;
    for (task, prediction) in samples(&texts) {
        for name in [Some("part-0001.jpg"), None] {
            // A rule near the limit of one evaluation is evaluated for the first samples only.
            let steps = cost::estimate(expression, items(&prediction));
            if steps > budget {
                continue;
            }
            budget -= steps;
            let frame = FrameFacts { width: 1920, height: 1080, name };
            let failure = match rule.execute(task, &prediction, frame) {
                Ok(value) => check_value(&value, &texts).err(),
                Err(Failure::Execution(error)) => refusal(&error, expression),
                Err(Failure::Rule(error)) => Some(error),
            };
            if let Some(failure) = failure {
                return Err(failure);
            }
        }
    }
    Ok(())
}

/// Checks the values that the expression can have, as far as they are written in it. No sample may reach them.
fn check_results(expression: &IdedExpr) -> Result<(), RuleError> {
    let wrong = |value: &str| Err(RuleError::WrongType { value: value.to_owned() });
    match &expression.expr {
        Expr::Call(call) if call.func_name == CONDITIONAL => call.args.iter().skip(1).try_for_each(check_results),
        Expr::Call(call) if CONDITIONS.contains(&call.func_name.as_str()) => {
            wrong("true or false, as in `score > 0.5` instead of `score > 0.5 ? \"reject\" : \"pass\"`")
        }
        Expr::Comprehension(comprehension) => match comprehension.accu_init.expr {
            Expr::Literal(LiteralValue::Boolean(_)) => {
                wrong("true or false, as in `LIST.exists(...)` instead of `LIST.exists(...) ? \"reject\" : \"pass\"`")
            }
            Expr::List(_) => wrong("a list"),
            _ => Ok(()),
        },
        Expr::Literal(LiteralValue::String(text)) => verdict_of(text.inner()).map(drop),
        Expr::Literal(LiteralValue::Boolean(_)) => wrong("true or false"),
        Expr::Literal(LiteralValue::Null) => wrong("null"),
        Expr::Literal(LiteralValue::Bytes(_)) => wrong("a byte string"),
        Expr::Literal(_) => wrong("a number"),
        Expr::List(_) => wrong("a list"),
        Expr::Map(_) | Expr::Struct(_) => wrong("a map"),
        Expr::Call(_) | Expr::Ident(_) | Expr::Select(_) | Expr::Unspecified => Ok(()),
    }
}

/// Checks the value of the expression for a sample. A label of the model may be a verdict, so that a text that does not stand
/// in the expression is accepted.
fn check_value(value: &Value, texts: &[&str]) -> Result<(), RuleError> {
    match value {
        Value::String(text) if texts.contains(&text.as_str()) => verdict_of(text).map(drop),
        Value::String(_) => Ok(()),
        other => Err(wrong_type(other)),
    }
}

/// Why a failed evaluation shows that the rule is wrong; `None` when the failure depends on the prediction.
fn refusal(error: &ExecutionError, expression: &IdedExpr) -> Option<RuleError> {
    let mut reason = one_line(&error.to_string());
    match error {
        ExecutionError::IndexOutOfBounds(_)
        | ExecutionError::DivisionByZero(_)
        | ExecutionError::RemainderByZero(_)
        | ExecutionError::Overflow(..)
        | ExecutionError::DuplicateKey(_) => return None,
        // A pattern is a literal, and an invalid one is invalid for every frame.
        ExecutionError::FunctionError { function, .. } if function != "matches" => return None,
        ExecutionError::NoSuchKey(key) => {
            let mut is_field = false;
            visit_all(expression, &mut |part| {
                is_field |= matches!(&part.expr, Expr::Select(select) if select.field == **key);
            });
            if !is_field {
                return None;
            }
            reason = format!(
                "there is no field `{key}`; a class has label, class and score, a detection also has box, and frame has \
                 width, height and name"
            );
        }
        ExecutionError::NoSuchOverload(overload) => {
            let types = overload.argument_types();
            reason = match (overload.function(), types.first().map(String::as_str)) {
                ("_._", Some("list")) => {
                    "a list has no fields; write detections.exists(d, d.label == \"scratch\") to look at each detection"
                        .to_owned()
                }
                (operator, _) => {
                    format!("`{}` cannot be applied to {}", operator.trim_matches(['_', '@']), types.join(" and "))
                }
            };
        }
        ExecutionError::UnsupportedBinaryOperator(_, Value::Int(_), Value::Float(_))
        | ExecutionError::UnsupportedBinaryOperator(_, Value::Float(_), Value::Int(_)) => {
            reason.push_str("; convert the whole number with double(), or write it as 2.0");
        }
        _ => {}
    }
    Some(RuleError::Type { reason })
}

/// The text literals of an expression, each once.
fn texts(expression: &IdedExpr) -> Vec<&str> {
    let mut texts = Vec::new();
    visit_all(expression, &mut |part| {
        texts.extend(text_literal(part).filter(|text| !texts.contains(text)));
    });
    texts
}

/// Predictions of each task: none, many and one classes or detections, with low and high scores.
fn samples(texts: &[&str]) -> Vec<(&'static str, Prediction)> {
    let labels: Vec<&str> = texts.iter().copied().take(LABELS_MAX).chain([OTHER_LABEL]).collect();
    let many = labels.iter().cycle().take(MANY).enumerate();
    let many = many.map(|(index, label)| class(label, index as u32, 1.0 - index as f32 / MANY as f32)).collect();
    let mut lists = vec![Vec::new(), many];
    for label in &labels {
        lists.extend([0.05, 0.95].map(|score| vec![class(label, 0, score)]));
    }

    let detection = |class: &Class| {
        let left = class.class as f32 * 10.0;
        Detection { class: class.clone(), bbox: [left, 20.0, left + 40.0, 60.0] }
    };
    let mut samples = Vec::new();
    for list in lists {
        samples.push(("detect", Prediction::Detections(list.iter().map(detection).collect())));
        samples.push(("classify", Prediction::Classes(list)));
    }
    samples.extend([0.0, 0.5, 1000.0].map(|score| ("anomaly", Prediction::Anomaly { score, map: None })));
    samples.push(("tensor", Prediction::Tensors(Vec::new())));
    samples
}

fn class(label: &str, index: u32, score: f32) -> Class {
    Class { label: label.into(), class: index, score }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RuleErrorKind;

    fn refused(source: &str) -> (RuleErrorKind, String) {
        let error = check(source).unwrap_err();
        assert!(!error.to_string().contains('\n'), "{error}");
        (error.kind(), error.to_string())
    }

    #[test]
    fn rules_that_fit_some_model_are_accepted() {
        for source in [
            r#"detections.exists(d, d.label == "scratch" && d.score > 0.6) ? "reject" : "pass""#,
            r#"classes[0].label == "good" ? "pass" : "reject""#,
            r#"classes.size() > 0 && classes[0].label == "good" ? "pass" : "reject""#,
            r#"score > 7.0 ? "reject" : score > 5 ? "none" : "pass""#,
            r#"frame.name.startsWith("part") && frame.width == 640 && task == "detect" ? "pass" : "none""#,
            r#"detections.all(d, d.box[2] - d.box[0] < 10.0) ? "pass" : "reject""#,
            r#"{"scratch": 0.5, "dent": 0.8}[detections[0].label] < detections[0].score ? "reject" : "pass""#,
            r#"int(frame.name) > 3 ? "pass" : "none""#,
            r#"10 / classes.size() > 3 ? "pass" : "none""#,
            r#"has(detections[0].extra) ? "pass" : "none""#,
            r#""none""#,
            "classes.size() > 0 ? classes[0].label : \"none\"",
            "classes[0].label",
        ] {
            assert_eq!(check(source), Ok(()), "{source}");
        }
    }

    #[test]
    fn type_errors_are_refused_although_no_model_is_known() {
        for (source, expected) in [
            (
                r#"detections.exists(d, d.score > "x") ? "reject" : "pass""#,
                "`>` cannot be applied to double and string",
            ),
            (r#"detections.exists(d, d.label == "scratch" && d.score > "x") ? "reject" : "pass""#, "double and string"),
            (r#"classes[0].labell == "x" ? "reject" : "pass""#, "no field `labell`; a class has label"),
            (r#"frame.width * 0.5 > 100.0 ? "pass" : "none""#, "double()"),
            (r#"detections.label == "x" ? "pass" : "none""#, "a list has no fields"),
            (r#"frame.name.matches("(") ? "pass" : "none""#, "regex"),
            (r#"size(1) > 0 ? "pass" : "none""#, "size"),
            (r#"frame.name && true ? "pass" : "none""#, "`&&` cannot be applied to string and bool"),
        ] {
            let (kind, message) = refused(source);
            assert_eq!(kind, RuleErrorKind::Type, "{source}: {message}");
            assert!(message.contains(expected), "{source}: {message}");
        }
    }

    #[test]
    fn values_that_are_no_verdict_are_refused() {
        for source in [
            "\"maybe\"",
            "1 + 1",
            "score > 0.5",
            "detections.exists(d, d.score > 0.5)",
            "detections.map(d, d.score)",
            "score > 1e30 ? \"Reject\" : \"pass\"",
            "score > 1e30 ? true : \"pass\"",
            "[\"pass\"]",
            "classes.size()",
            "frame",
            "null",
        ] {
            assert_eq!(refused(source).0, RuleErrorKind::WrongType, "{source}");
        }
        assert!(refused("score > 0.5").1.contains("? \"reject\" : \"pass\""));
    }

    #[test]
    fn a_rule_near_the_limit_of_cost_is_checked_with_some_samples() {
        let list = vec!["1"; 100].join(",");
        let source = format!("[{list}].all(a, [{list}].all(b, a == b || a != b && a < b)) ? \"pass\" : \"none\"");
        let steps = cost::estimate(Rule::compile(&source).unwrap().program.expression(), 0);
        let evaluations = 2 * samples(&["pass", "none"]).len() as u64;
        assert!(steps * evaluations > STEPS_MAX, "all samples together would exceed the limit: {steps}");
        assert_eq!(check(&source), Ok(()));
    }

    #[test]
    fn likely_mistakes_are_named() {
        for (source, expected) in [
            ("score > 0.5 ? reject : pass", "write a verdict with quotes"),
            ("score = 0.5 ? \"reject\" : \"pass\"", "write =="),
            ("score > 0.5 and task == \"anomaly\" ? \"reject\" : \"pass\"", "write && for and"),
            ("if score > 0.5 then \"reject\"", "write CONDITION ?"),
            ("label == \"scratch\" ? \"reject\" : \"pass\"", "detections.exists"),
            ("detections.exists(d.score > 0.5) ? \"reject\" : \"pass\"", "exists(d, "),
            ("max(score, 1.0) > 2.0 ? \"reject\" : \"pass\"", "unknown function `max`"),
        ] {
            let message = refused(source).1;
            assert!(message.contains(expected), "{source}: {message}");
        }
    }
}
