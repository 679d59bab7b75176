//! The names of a parsed expression: which variables and functions it uses, and where comprehensions bind variables.
//!
//! The walks recurse on the expression, whose depth [`crate::bounds`] limits.

use cel::IdedExpr;
use cel::common::ast::{EntryExpr, Expr, LiteralValue};

use crate::RuleError;

/// The variables of an expression.
pub(crate) const VARIABLES: [&str; 5] = ["task", "classes", "detections", "score", "frame"];
/// Functions that are called with arguments only. Macros are no calls any more when an expression has been parsed.
const FUNCTIONS: [&str; 10] = ["size", "matches", "int", "uint", "double", "string", "bytes", "bool", "dyn", "type"];
/// Functions that are called on a value, such as `frame.name.startsWith("a")`.
const METHODS: [&str; 5] = ["size", "contains", "startsWith", "endsWith", "matches"];

/// Checks that every variable and every function is known.
pub(crate) fn check(expression: &IdedExpr) -> Result<(), RuleError> {
    check_in(expression, &mut Vec::new())
}

/// Checks an expression inside the comprehensions that bind `bound`.
fn check_in<'a>(expression: &'a IdedExpr, bound: &mut Vec<&'a str>) -> Result<(), RuleError> {
    match &expression.expr {
        Expr::Ident(name) => {
            let is_known = VARIABLES.contains(&name.as_str()) || bound.contains(&name.as_str());
            if is_known { Ok(()) } else { Err(RuleError::UnknownName { name: name.clone() }) }
        }
        Expr::Call(call) => {
            let name = call.func_name.as_str();
            let known: &[&str] = if call.target.is_some() { &METHODS } else { &FUNCTIONS };
            if is_word(name) && !known.contains(&name) {
                return Err(RuleError::UnknownFunction { name: name.to_owned() });
            }
            children(expression).into_iter().try_for_each(|child| check_in(child, bound))
        }
        Expr::Comprehension(comprehension) => {
            check_in(&comprehension.iter_range, bound)?;
            check_in(&comprehension.accu_init, bound)?;
            let depth = bound.len();
            bound.extend([comprehension.iter_var.as_str(), comprehension.accu_var.as_str()]);
            bound.extend(comprehension.iter_var2.as_deref());
            let inside = [&comprehension.loop_cond, &comprehension.loop_step, &comprehension.result];
            let checked = inside.into_iter().try_for_each(|part| check_in(part, bound));
            bound.truncate(depth);
            checked
        }
        _ => children(expression).into_iter().try_for_each(|child| check_in(child, bound)),
    }
}

/// Whether the name of a call is that of a function and not that of an operator, such as `_+_` or `!_`.
pub(crate) fn is_word(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphabetic())
}

/// The direct parts of an expression in the order of their evaluation.
pub(crate) fn children(expression: &IdedExpr) -> Vec<&IdedExpr> {
    match &expression.expr {
        Expr::Unspecified | Expr::Ident(_) | Expr::Literal(_) => Vec::new(),
        Expr::Call(call) => call.target.as_deref().into_iter().chain(&call.args).collect(),
        Expr::Comprehension(comprehension) => vec![
            &comprehension.iter_range,
            &comprehension.accu_init,
            &comprehension.loop_cond,
            &comprehension.loop_step,
            &comprehension.result,
        ],
        Expr::List(list) => list.elements.iter().collect(),
        Expr::Select(select) => vec![&select.operand],
        Expr::Map(map) => map.entries.iter().flat_map(|entry| entry_parts(&entry.expr)).collect(),
        Expr::Struct(message) => message.entries.iter().flat_map(|entry| entry_parts(&entry.expr)).collect(),
    }
}

fn entry_parts(entry: &EntryExpr) -> Vec<&IdedExpr> {
    match entry {
        EntryExpr::StructField(field) => vec![&field.value],
        EntryExpr::MapEntry(entry) => vec![&entry.key, &entry.value],
    }
}

/// Calls `visit` for an expression and all its parts.
pub(crate) fn visit_all<'a>(expression: &'a IdedExpr, visit: &mut impl FnMut(&'a IdedExpr)) {
    visit(expression);
    children(expression).into_iter().for_each(|child| visit_all(child, visit));
}

/// The text of a literal.
pub(crate) fn text_literal(expression: &IdedExpr) -> Option<&str> {
    match &expression.expr {
        Expr::Literal(LiteralValue::String(text)) => Some(text.inner()),
        _ => None,
    }
}
