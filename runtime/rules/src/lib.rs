//! The stream's rule: a CEL expression over a prediction that says `pass`, `reject` or `none`. The only door to `cel`.
//!
//! Language: the Common Expression Language of Google's `cel-spec`. The expression sees
//!
//! ```text
//! task        string: classify, detect, anomaly or tensor
//! classes     classify: list of {label, class, score}, best first
//! detections  detect: list of {label, class, score, box: [left, top, right, bottom]}, best first
//! score       anomaly: double
//! frame       {width, height, name}; name is "" where the source has none
//! ```
//!
//! A list that does not belong to the task is empty and the score is 0.0, so one expression may serve several models.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cel::{Context, Program, Value};
use lineside_api::prediction::{Class, Detection, Prediction};
use lineside_api::verdict::Verdict;

/// Longest expression taken, in bytes.
const EXPRESSION_BYTES_MAX: usize = 4096;

/// A compiled rule.
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

/// The picture that the prediction is about.
#[derive(Debug, Clone, Copy)]
pub struct FrameFacts<'a> {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Its name, where the source gives names.
    pub name: Option<&'a str>,
}

impl Rule {
    /// Compiles an expression and tries it on an empty prediction, so that a wrong name is found now.
    ///
    /// # Errors
    /// What is wrong with the expression, in one line.
    pub fn compile(source: &str) -> Result<Self, String> {
        if source.len() > EXPRESSION_BYTES_MAX {
            return Err(format!("the expression has {} bytes; at most {EXPRESSION_BYTES_MAX} are taken", source.len()));
        }
        // The parser is a port of a generated one; a panic of its must not end the agent.
        let program = catch_unwind(|| Program::compile(source))
            .map_err(|_| "the expression cannot be parsed".to_owned())?
            .map_err(|errors| one_line(&errors.to_string()))?;
        let rule = Self { program, source: source.to_owned() };
        let names = rule.program.references();
        let unknown: Vec<&str> = names
            .variables()
            .into_iter()
            .filter(|name| !["task", "classes", "detections", "score", "frame"].contains(name))
            .filter(|name| !rule.binds(name))
            .collect();
        if let Some(name) = unknown.first() {
            return Err(format!("unknown name `{name}`; there are task, classes, detections, score and frame"));
        }
        Ok(rule)
    }

    /// Whether a macro of the expression (`exists(d, ...)` and its kin) introduces this name.
    fn binds(&self, name: &str) -> bool {
        let spaceless: String = self.source.chars().filter(|character| !character.is_whitespace()).collect();
        ["exists", "exists_one", "all", "map", "filter"]
            .iter()
            .any(|macro_name| spaceless.contains(&format!("{macro_name}({name},")))
    }

    /// Applies the rule.
    ///
    /// # Errors
    /// When it cannot be evaluated, or says something other than `pass`, `reject` or `none`.
    pub fn judge(&self, task: &str, prediction: &Prediction, subject: FrameFacts<'_>) -> Result<Verdict, String> {
        let (mut classes, mut detections, mut score) = (Vec::new(), Vec::new(), 0.0);
        match prediction {
            Prediction::Classes(found) => classes = found.iter().map(class_value).collect(),
            Prediction::Detections(found) => detections = found.iter().map(detection_value).collect(),
            Prediction::Anomaly { score: found, .. } => score = f64::from(*found),
            Prediction::Tensors(_) => {}
        }
        let mut context = Context::default();
        context.add_variable_from_value("task", text(task));
        context.add_variable_from_value("classes", Value::List(classes.into()));
        context.add_variable_from_value("detections", Value::List(detections.into()));
        context.add_variable_from_value("score", Value::Float(score));
        context.add_variable_from_value(
            "frame",
            map([
                ("width", Value::Int(i64::from(subject.width))),
                ("height", Value::Int(i64::from(subject.height))),
                ("name", text(subject.name.unwrap_or_default())),
            ]),
        );
        let answer = catch_unwind(AssertUnwindSafe(|| self.program.execute(&context)))
            .map_err(|_| "the expression could not be evaluated".to_owned())?
            .map_err(|error| one_line(&error.to_string()))?;
        let Value::String(answer) = &answer else {
            return Err(format!("the expression gave {answer:?}; it must give \"pass\", \"reject\" or \"none\""));
        };
        match answer.as_str() {
            "pass" => Ok(Verdict::Pass),
            "reject" => Ok(Verdict::Reject),
            "none" => Ok(Verdict::None),
            other => Err(format!("the expression gave \"{other}\"; it must give \"pass\", \"reject\" or \"none\"")),
        }
    }
}

fn class_value(class: &Class) -> Value {
    map([("label", text(&class.label)), ("class", Value::Int(i64::from(class.class))), ("score", number(class.score))])
}

fn detection_value(found: &Detection) -> Value {
    map([
        ("label", text(&found.class.label)),
        ("class", Value::Int(i64::from(found.class.class))),
        ("score", number(found.class.score)),
        ("box", Value::List(found.bbox.iter().copied().map(number).collect::<Vec<_>>().into())),
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

    const SUBJECT: FrameFacts<'static> = FrameFacts { width: 640, height: 480, name: Some("part-1.jpg") };

    fn class(label: &str, score: f32) -> Class {
        Class { label: label.into(), class: 0, score }
    }

    fn judged(source: &str, prediction: &Prediction) -> Result<Verdict, String> {
        Rule::compile(source)?.judge("detect", prediction, SUBJECT)
    }

    #[test]
    fn the_contracts_example_tells_a_scratch_from_a_good_part() {
        let source = r#"detections.exists(d, d.label == "scratch" && d.score > 0.6) ? "reject" : "pass""#;
        let found = |score| Prediction::Detections(vec![Detection { class: class("scratch", score), bbox: [0.0; 4] }]);
        assert_eq!(judged(source, &found(0.9)), Ok(Verdict::Reject));
        assert_eq!(judged(source, &found(0.5)), Ok(Verdict::Pass));
        assert_eq!(judged(source, &Prediction::Detections(vec![])), Ok(Verdict::Pass));
    }

    #[test]
    fn every_task_has_its_names() {
        let classes = Prediction::Classes(vec![class("good", 0.8)]);
        assert_eq!(judged(r#"classes[0].label == "good" ? "pass" : "reject""#, &classes), Ok(Verdict::Pass));
        let anomaly = Prediction::Anomaly { score: 7.5, map: None };
        assert_eq!(judged(r#"score > 7.0 ? "reject" : "pass""#, &anomaly), Ok(Verdict::Reject));
        let named = r#"frame.name.startsWith("part") && frame.width == 640 && task == "detect" ? "pass" : "none""#;
        assert_eq!(judged(named, &anomaly), Ok(Verdict::Pass));
        let wide = r#"detections.all(d, d.box[2] - d.box[0] < 10.0) ? "pass" : "reject""#;
        assert_eq!(judged(wide, &anomaly), Ok(Verdict::Pass));
    }

    #[test]
    fn a_rule_that_cannot_work_is_refused_or_says_so() {
        for source in ["", "detections.exists(", "detection.size() > 0 ? \"a\" : \"b\"", "\"unfinished"] {
            assert!(Rule::compile(source).is_err(), "{source}");
        }
        assert!(Rule::compile(&"1+".repeat(4000)).unwrap_err().contains("at most"));
        assert!(Rule::compile("parts.size() > 0").unwrap_err().contains("`parts`"));
        let none = Prediction::Detections(vec![]);
        assert!(judged(r#""maybe""#, &none).unwrap_err().contains("\"maybe\""));
        assert!(judged("1 + 1", &none).is_err());
        assert!(judged("classes[0].label", &none).is_err(), "there is no first class");
    }
}
