//! The cost of an evaluation: an upper bound of its steps, from the expression and the length of the lists.
//!
//! A step is one node of the expression that is evaluated, about 0.3 microseconds. The estimate follows the sizes of values,
//! because a comprehension copies each element, and `map(s, s + s)` doubles what it is applied to: a step is also charged for
//! every [`COPY_BYTES`] that are copied, and for every [`COMPARE_BYTES`] that are compared. The bound of the steps is therefore
//! a bound of the allocated memory too. Both branches of a condition are charged, and every element of a list.
//!
//! The estimate recurses on the expression, whose depth [`crate::bounds`] limits. All sums saturate.

use cel::IdedExpr;
use cel::common::ast::operators::{ADD, CONDITIONAL, EQUALS, IN, INDEX, NOT_EQUALS};
use cel::common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, LiteralValue, SelectExpr};

use crate::RuleError;
use crate::names::{is_word, text_literal};

/// Most steps of an evaluation: about 0.3 s.
pub(crate) const COST_MAX: u64 = 1_000_000;
/// Length of the lists that a rule is checked for. A longer list is checked when the rule is evaluated.
pub(crate) const ITEMS: u64 = 100;

/// Bytes that are copied in one step.
const COPY_BYTES: u64 = 32;
/// Bytes that are compared or searched in one step.
const COMPARE_BYTES: u64 = 256;
/// Bytes of a number, and of the header of any value.
const VALUE_BYTES: u64 = 32;
/// Bytes of a class or a detection: a map with four entries, whose label has up to 256 characters.
const PREDICTION_BYTES: u64 = 640;
/// Bytes of a label.
const LABEL_BYTES: u64 = 288;
/// Bytes of the frame's name, such as the longest name of a file.
const NAME_BYTES: u64 = 288;

/// Steps to compile a regular expression, which happens in each evaluation of `matches`.
const PATTERN_STEPS: u64 = 400;

/// What is known of a value: upper bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    /// The whole value in bytes.
    bytes: u64,
    /// Elements of a list, or entries of a map.
    items: u64,
    /// Bytes of the largest element.
    item_bytes: u64,
    kind: Kind,
}

/// Values with known parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    /// One class or detection.
    Prediction,
    /// A list of classes or detections.
    Predictions,
}

const SCALAR: Size = Size { bytes: VALUE_BYTES, items: 0, item_bytes: 0, kind: Kind::Plain };
const NOTHING: Size = Size { bytes: 0, items: 0, item_bytes: 0, kind: Kind::Plain };
const PREDICTION: Size = Size { bytes: PREDICTION_BYTES, items: 4, item_bytes: LABEL_BYTES, kind: Kind::Prediction };

impl Size {
    fn text(bytes: u64) -> Self {
        Self { bytes: bytes.saturating_add(VALUE_BYTES), ..SCALAR }
    }

    fn predictions(items: u64) -> Self {
        let bytes = items.saturating_mul(PREDICTION_BYTES);
        Self { bytes, items, item_bytes: PREDICTION_BYTES, kind: Kind::Predictions }
    }

    /// An element of a list, a key or a value of a map.
    fn item(self) -> Self {
        match self.kind {
            Kind::Predictions => PREDICTION,
            // The elements of an element are unknown: they may be as many and as large as they fit into it.
            Kind::Plain | Kind::Prediction => {
                let bytes = self.item_bytes.max(VALUE_BYTES);
                Self { bytes, items: bytes / VALUE_BYTES, item_bytes: bytes, kind: Kind::Plain }
            }
        }
    }

    /// A value that is either of two.
    fn or(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.max(other.bytes),
            items: self.items.max(other.items),
            item_bytes: self.item_bytes.max(other.item_bytes),
            kind: self.common_kind(other),
        }
    }

    /// A value that contains everything of two: a sum, or a list literal.
    fn and(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_add(other.bytes),
            items: self.items.saturating_add(other.items),
            item_bytes: self.item_bytes.max(other.item_bytes),
            kind: self.common_kind(other),
        }
    }

    fn common_kind(self, other: Self) -> Kind {
        if self == NOTHING || self.kind == other.kind {
            other.kind
        } else if other == NOTHING {
            self.kind
        } else {
            Kind::Plain
        }
    }

    /// Steps to copy the value.
    fn copy_steps(self) -> u64 {
        self.bytes / COPY_BYTES
    }

    /// Steps to compare the value.
    fn compare_steps(self) -> u64 {
        self.bytes / COMPARE_BYTES
    }
}

/// The steps that an evaluation may take with lists of `items` classes or detections.
pub(crate) fn estimate(expression: &IdedExpr, items: u64) -> u64 {
    Estimator { items, scopes: Vec::new() }.visit(expression).0
}

/// Checks the steps with lists of `items` classes or detections.
pub(crate) fn check(expression: &IdedExpr, items: u64) -> Result<(), RuleError> {
    let cost = estimate(expression, items);
    if cost > COST_MAX { Err(RuleError::TooCostly { cost, items }) } else { Ok(()) }
}

struct Estimator<'a> {
    items: u64,
    /// The variables that enclosing comprehensions bind, innermost last.
    scopes: Vec<(&'a str, Size)>,
}

impl<'a> Estimator<'a> {
    /// The steps to evaluate an expression, and the size of its value.
    fn visit(&mut self, expression: &'a IdedExpr) -> (u64, Size) {
        match &expression.expr {
            Expr::Unspecified => (1, SCALAR),
            Expr::Ident(name) => (1, self.variable(name)),
            Expr::Literal(LiteralValue::String(text)) => (1, Size::text(text.inner().len() as u64)),
            Expr::Literal(LiteralValue::Bytes(bytes)) => (1, Size::text(bytes.inner().len() as u64)),
            Expr::Literal(_) => (1, SCALAR),
            Expr::Call(call) => self.call(call),
            Expr::Comprehension(comprehension) => self.comprehension(comprehension),
            Expr::List(list) => self.collection(list.elements.iter()),
            Expr::Select(select) => self.select(select),
            Expr::Map(map) => self.collection(map.entries.iter().flat_map(|entry| parts(&entry.expr))),
            Expr::Struct(message) => self.collection(message.entries.iter().flat_map(|entry| parts(&entry.expr))),
        }
    }

    fn variable(&self, name: &str) -> Size {
        let bound = self.scopes.iter().rev().find(|(known, _)| *known == name).map(|(_, size)| *size);
        bound.unwrap_or_else(|| match name {
            "classes" | "detections" => Size::predictions(self.items),
            "frame" => {
                Size { bytes: NAME_BYTES + 3 * VALUE_BYTES, items: 3, item_bytes: NAME_BYTES, kind: Kind::Plain }
            }
            _ => SCALAR,
        })
    }

    /// A list or a map, which copies its elements.
    fn collection(&mut self, elements: impl Iterator<Item = &'a IdedExpr>) -> (u64, Size) {
        let (mut cost, mut size) = (1_u64, NOTHING);
        for element in elements {
            let (steps, item) = self.visit(element);
            cost = cost.saturating_add(steps).saturating_add(item.copy_steps());
            let kind = if item.kind == Kind::Prediction { Kind::Predictions } else { Kind::Plain };
            size = size.and(Size { bytes: item.bytes, items: 1, item_bytes: item.bytes, kind });
        }
        (cost, size)
    }

    fn select(&mut self, select: &'a SelectExpr) -> (u64, Size) {
        let (cost, operand) = self.visit(&select.operand);
        let size = match (operand.kind, select.field.as_str()) {
            _ if select.test => SCALAR,
            (Kind::Prediction, "label") => Size::text(LABEL_BYTES),
            (Kind::Prediction, "box") => {
                Size { bytes: 4 * VALUE_BYTES, items: 4, item_bytes: VALUE_BYTES, kind: Kind::Plain }
            }
            (Kind::Prediction, _) => SCALAR,
            _ => operand.item(),
        };
        (cost.saturating_add(1), size)
    }

    fn call(&mut self, call: &'a CallExpr) -> (u64, Size) {
        let (mut cost, mut all) = (1_u64, NOTHING);
        let mut sizes = Vec::new();
        for argument in call.target.as_deref().into_iter().chain(&call.args) {
            let (steps, size) = self.visit(argument);
            cost = cost.saturating_add(steps);
            all = all.and(size);
            sizes.push(size);
        }
        let name = call.func_name.as_str();
        match name {
            CONDITIONAL => {
                let branches = sizes.iter().skip(1).copied().reduce(Size::or);
                (cost, branches.unwrap_or(SCALAR))
            }
            INDEX => {
                let item = sizes.first().copied().unwrap_or(SCALAR).item();
                (cost.saturating_add(item.copy_steps()), item)
            }
            ADD => (cost.saturating_add(all.copy_steps()), all),
            EQUALS | NOT_EQUALS | IN => (cost.saturating_add(all.compare_steps()), SCALAR),
            "matches" => (cost.saturating_add(all.compare_steps()).saturating_add(pattern_steps(call)), SCALAR),
            // The conversions return at most what they are given, with some more characters for a number.
            _ if is_word(name) => (cost.saturating_add(all.copy_steps()), all.and(SCALAR)),
            _ => (cost.saturating_add(all.compare_steps()), SCALAR),
        }
    }

    fn comprehension(&mut self, comprehension: &'a ComprehensionExpr) -> (u64, Size) {
        let (range_steps, range) = self.visit(&comprehension.iter_range);
        let item = range.item();
        let builds_list = matches!(comprehension.accu_init.expr, Expr::List(_));
        let depth = self.scopes.len();
        self.scopes.push((&comprehension.iter_var, item));
        if let Some(second) = &comprehension.iter_var2 {
            self.scopes.push((second, item));
        }
        // `map` and `filter` append to their result in place, so that it is not copied in each round.
        self.scopes.push((&comprehension.accu_var, if builds_list { NOTHING } else { SCALAR }));
        let (condition_steps, _) = self.visit(&comprehension.loop_cond);
        let (step_steps, appended) = self.visit(&comprehension.loop_step);
        let (result_steps, _) = self.visit(&comprehension.result);
        self.scopes.truncate(depth);
        let round = condition_steps.saturating_add(step_steps).saturating_add(item.copy_steps()).saturating_add(2);
        let cost = range_steps.saturating_add(range.items.saturating_mul(round)).saturating_add(result_steps);
        if !builds_list {
            return (cost.saturating_add(1), SCALAR);
        }
        let size = Size {
            bytes: appended.bytes.saturating_mul(range.items),
            items: appended.items.saturating_mul(range.items),
            ..appended
        };
        (cost.saturating_add(size.copy_steps()), size)
    }
}

fn parts(entry: &EntryExpr) -> Vec<&IdedExpr> {
    match entry {
        EntryExpr::StructField(field) => vec![&field.value],
        EntryExpr::MapEntry(entry) => vec![&entry.key, &entry.value],
    }
}

/// The steps to compile the pattern of a call of `matches`. A pattern that is not a literal is refused by
/// [`crate::check_patterns`].
fn pattern_steps(call: &CallExpr) -> u64 {
    let pattern = call.args.last().and_then(text_literal).unwrap_or_default();
    let factor = if pattern.contains("(?") { 4 } else { 1 };
    PATTERN_STEPS.saturating_add(repeated(pattern).saturating_mul(factor))
}

/// The size of a compiled pattern in steps: each repetition, such as `{20}`, multiplies what stands before it.
fn repeated(pattern: &str) -> u64 {
    let mut characters = pattern.chars().peekable();
    // The sum of the present group, its last item, and those of the groups around it.
    let (mut sum, mut last, mut groups) = (0_u64, 0_u64, Vec::new());
    while let Some(character) = characters.next() {
        let item = match character {
            '\\' => match characters.next() {
                Some('w' | 'W' | 'p' | 'P') => 3000,
                Some('d' | 'D' | 's' | 'S' | 'b' | 'B') => 400,
                _ => 10,
            },
            '(' => {
                groups.push(sum.saturating_add(last));
                (sum, last) = (0, 0);
                continue;
            }
            ')' => {
                last = sum.saturating_add(last);
                sum = groups.pop().unwrap_or_default();
                continue;
            }
            '{' => {
                let counts: String =
                    std::iter::from_fn(|| characters.next_if(|next| next.is_ascii_digit() || *next == ',')).collect();
                let count = counts.split(',').filter_map(|count| count.parse::<u64>().ok()).max();
                last = last.saturating_mul(count.unwrap_or(1).max(1));
                continue;
            }
            // The end of a repetition, whose count has been read.
            '}' => continue,
            '.' | '[' | '^' => 100,
            _ => 10,
        };
        sum = sum.saturating_add(last);
        last = item;
    }
    groups.into_iter().fold(sum.saturating_add(last), u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use cel::Program;

    use super::*;

    fn cost(source: &str) -> u64 {
        estimate(Program::compile(source).unwrap().expression(), ITEMS)
    }

    #[test]
    fn rules_of_practice_are_far_below_the_limit() {
        for source in [
            r#"detections.exists(d, d.label == "scratch" && d.score > 0.6) ? "reject" : "pass""#,
            r#"detections.filter(d, d.label == "bolt" && d.score > 0.5).size() == 4 ? "pass" : "reject""#,
            r#"detections.all(d, d.box[2] - d.box[0] < 10.0) && frame.name.matches("^part-\\d{1,6}[.]jpg$") ? "pass" : "reject""#,
            r#"classes[0].label == "good" && classes[0].score > 0.9 ? "pass" : "reject""#,
            r#"["a", "b", "c"].exists(l, detections.exists(d, d.label == l)) ? "reject" : "none""#,
        ] {
            assert!(cost(source) < COST_MAX / 5, "{} {source}", cost(source));
        }
        let pairs =
            "detections.all(a, detections.all(b, a.label == b.label || a.box[2] < b.box[0] || b.box[2] < a.box[0]))";
        assert!((COST_MAX / 10..COST_MAX).contains(&cost(pairs)), "{}", cost(pairs));
    }

    #[test]
    fn nested_and_chained_comprehensions_exceed_the_limit() {
        let doubled = format!("[\"aaaaaaaa\"]{}", ".map(s, s + s)".repeat(10));
        assert!(cost(&doubled) < COST_MAX, "1024 times 8 bytes are admitted");
        let doubled = format!("[\"aaaaaaaa\"]{}", ".map(s, s + s)".repeat(40));
        assert!(cost(&doubled) > COST_MAX);
        let chained = format!("detections{}.size()", ".map(s, [s, s, s, s])".repeat(4));
        assert!(cost(&chained) > COST_MAX, "{}", cost(&chained));
        assert!(cost("detections.all(a, detections.all(b, detections.all(c, true)))") > COST_MAX);
        assert!(cost("detections.map(a, detections.map(b, detections))") > COST_MAX);
        assert!(cost("detections.all(a, detections.all(b, detections == detections))") > COST_MAX);
        let literal = format!("[{}].all(a, [{}].all(b, true))", vec!["1"; 1000].join(","), vec!["1"; 1000].join(","));
        assert!(cost(&literal) > COST_MAX, "a literal list counts by its length");
    }

    #[test]
    fn patterns_count_by_what_they_repeat() {
        assert_eq!(repeated("abc"), 30);
        assert_eq!(repeated("a(bc){10}d"), 220);
        assert_eq!(repeated("((a{20}){20}){20}"), 80_000);
        assert!(cost(r#"frame.name.matches("^part-[0-9]{6}$")"#) < 5_000);
        assert!(cost(r#"frame.name.matches("((\\w{20}){20}){20}")"#) > COST_MAX);
        assert!(cost(r#"detections.all(d, d.label.matches("\\w{20}\\w{20}"))"#) > COST_MAX);
        assert!(cost(r#"detections.all(d, d.label.matches("^\\w+$"))"#) < COST_MAX);
    }

    #[test]
    fn longer_lists_cost_more() {
        let program = Program::compile("detections.all(a, detections.all(b, a.score < b.score))").unwrap();
        let at = |items| estimate(program.expression(), items);
        assert!(at(1) < at(10) && at(10) < at(100));
        assert!(at(100) < COST_MAX && at(1000) > COST_MAX);
        assert_eq!(at(u64::MAX), u64::MAX, "the sums saturate");
    }
}
