//! An expression that the token scan accepts is compiled and evaluated in a quarter of the stack of a thread.
//!
//! A stack overflow kills the process, so the expressions run in a child: this same test binary.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the message")]

use std::io::Write as _;
use std::process::Command;
use std::time::{Duration, Instant};

use fastrand::Rng;
use lineside_api::prediction::{Class, Detection, Prediction};
use lineside_rules::{FrameFacts, Rule, bounds};

/// Makes the ignored test below run in the child.
const SEED_VARIABLE: &str = "LINESIDE_RULES_TEST_SEED";
/// A quarter of the stack of a thread.
const STACK_BYTES: usize = 512 << 10;
const EXPRESSIONS: usize = 10_000;

/// Expressions at the limits of the scan: every kind of nesting alone, and all of it at once.
fn extremes() -> Vec<String> {
    let brackets = bounds::BRACKETS_MAX;
    let operators = bounds::OPERATORS_MAX;
    let around = |open: &str, inner: &str, close: &str, depth: usize| {
        format!("{}{inner}{}", open.repeat(depth), close.repeat(depth))
    };
    let mut all = Vec::new();
    for (open, close) in [("(", ")"), ("[", "]"), ("{1:", "}"), ("size(", ")"), ("detections[", "]")] {
        all.push(around(open, "1", close, brackets));
    }
    for link in ["+1", "<1", "==1", " in a", ".a", "*1", "-1", "?1:1", "&&true", "||true"] {
        for count in [operators, operators / 2, operators / 3] {
            all.push(format!("1{}", link.repeat(count)));
        }
    }
    all.push(format!("detections{}", "[0]".repeat(operators - 1)));
    all.push(format!("detections{}", ".size()".repeat(operators / 2 - 1)));
    for prefix in ["!", "-"] {
        all.push(format!("{}1", prefix.repeat(operators)));
    }
    // Operators and brackets share the path: each level adds as many operators as the limit leaves for it.
    let share = (operators - brackets) / brackets;
    for (operator, open, close) in [
        ("1+", "(", ")"),
        ("1<", "[", "]"),
        ("true?1:", "(", ")"),
        ("1+", "size(", ")"),
        ("!", "(", ")"),
        ("-", "(", ")"),
    ] {
        // A call counts as an operator.
        let share = share - usize::from(open == "size(");
        all.push(around(&format!("{}{open}", operator.repeat(share)), "1", close, brackets));
        all.push(around(open, "1", &format!("{close}{}", "+1".repeat(share)), brackets));
    }
    let chain = |list: &str, link: &str| format!("{list}{}", link.repeat(bounds::COMPREHENSIONS_MAX));
    all.push(chain("[1]", ".map(x, x)"));
    all.push(chain("[1]", ".filter(x, true)"));
    let nested = |inner: &str| format!("detections.all(a, classes.all(b, {inner}))");
    all.push(nested(&around("(", "true", ")", brackets - 2)));
    all.push(nested(&format!("{}1", "true ? 1 : ".repeat(operators / 2))));
    all
}

/// A random expression. `depth` bounds the nesting.
fn random_expression(random: &mut Rng, depth: usize) -> String {
    let inner = |random: &mut Rng| random_expression(random, depth - 1);
    if depth == 0 {
        let leaves = [
            "1",
            "2.5",
            "\"pass\"",
            "'x'",
            "true",
            "null",
            "task",
            "score",
            "frame.name",
            "detections",
            "classes",
            "d",
            "e",
            "[]",
            "{}",
            "classes[0].label",
            "b'\\x00'",
            "r\"\\d\"",
            "1u",
            "0x1F",
        ];
        return leaves[random.usize(..leaves.len())].to_owned();
    }
    match random.usize(..14) {
        0 => format!("({})", inner(random)),
        1 => format!("[{}, {}]", inner(random), inner(random)),
        2 => format!("{{{}: {}}}", inner(random), inner(random)),
        3 => format!("{} ? {} : {}", inner(random), inner(random), inner(random)),
        4 | 5 => {
            let operators = ["+", "-", "*", "/", "%", "<", ">=", "==", "!=", " in ", "&&", "||"];
            let operator = operators[random.usize(..operators.len())];
            let terms = random.usize(2..12);
            (0..terms).map(|_| random_expression(random, depth / 3)).collect::<Vec<_>>().join(operator)
        }
        6 => format!("{}{}", "!".repeat(random.usize(1..5)), inner(random)),
        7 => format!("-{}", inner(random)),
        8 | 9 => {
            let macros = ["exists", "all", "filter", "map", "exists_one"];
            let name = macros[random.usize(..macros.len())];
            let variable = ["d", "e"][random.usize(..2)];
            format!("{}.{name}({variable}, {})", random_expression(random, depth / 3), inner(random))
        }
        10 => format!("{}.{}", inner(random), ["label", "score", "box", "size()", "name"][random.usize(..5)]),
        11 => format!("{}[{}]", inner(random), inner(random)),
        12 => format!("{}({})", ["size", "string", "int", "type", "dyn", "has"][random.usize(..6)], inner(random)),
        _ => format!("{}.matches(\"^a{{1,9}}$\")", inner(random)),
    }
}

/// Removes, doubles, swaps or inserts a few characters.
fn mutate(random: &mut Rng, source: &str) -> String {
    let mut characters: Vec<char> = source.chars().collect();
    for _ in 0..random.usize(1..4) {
        let at = random.usize(..=characters.len());
        match random.usize(..4) {
            0 if at < characters.len() => drop(characters.remove(at)),
            1 if at < characters.len() => characters.insert(at, characters[at]),
            2 if at + 1 < characters.len() => characters.swap(at, at + 1),
            _ => {
                let signs: Vec<char> = "()[]{}.,?:+-!<>=&|\"'\\ 01ad/%*".chars().collect();
                characters.insert(at, signs[random.usize(..signs.len())]);
            }
        }
    }
    characters.into_iter().collect()
}

/// Quotes, prefixes, escapes and numbers in any order, most of which are no expression.
fn random_characters(random: &mut Rng) -> String {
    let pieces = [
        "\"",
        "'",
        "\"\"\"",
        "'''",
        "r",
        "b",
        "br",
        "R\"",
        "B'",
        "\\",
        "\\n",
        "\\x4",
        "\\u00e9",
        "\\101",
        "\\8",
        "\n",
        "//",
        " ",
        "a",
        "0",
        "0x",
        "1.",
        ".5",
        "1e",
        "e+1",
        "u",
        "+",
        "-",
        ".",
        ",",
        "\u{e9}",
        "\u{1F600}",
        "in",
        "=",
        "&&",
        "<",
        "\u{0}",
        "\t",
        "\u{c}",
        "\r",
    ];
    (0..random.usize(1..16)).map(|_| pieces[random.usize(..pieces.len())]).collect()
}

/// Compiles and evaluates an expression. The time of either is bounded too.
fn run(source: &str) -> bool {
    if bounds::scan(source).is_err() {
        return false;
    }
    let started = Instant::now();
    match Rule::compile(source) {
        Ok(rule) => {
            let frame = FrameFacts { width: 640, height: 480, name: Some("part-1.jpg") };
            let class = |index| Class { label: "scratch".into(), class: index, score: 0.5 };
            let classes = (0..100).map(class).collect();
            let detections = (0..100).map(|index| Detection { class: class(index), bbox: [1.0; 4] }).collect();
            rule.evaluate("classify", &Prediction::Classes(classes), frame).ok();
            rule.evaluate("detect", &Prediction::Detections(detections), frame).ok();
        }
        // The scan and the lexer of the parser must agree on every token.
        Err(error) => assert!(!error.to_string().contains("token recognition error"), "{error}"),
    }
    let elapsed = started.elapsed();
    assert!(elapsed < Duration::from_secs(60), "{elapsed:?}: {source}");
    true
}

#[test]
fn accepted_expressions_fit_a_quarter_of_a_stack() {
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program)
        .args(["--exact", "in_the_child", "--ignored", "--nocapture"])
        .env(SEED_VARIABLE, "7")
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().rfind(|line| line.starts_with("next ")).unwrap_or_default();
    assert!(output.status.success(), "{}\n{}\n{last}", output.status, String::from_utf8_lossy(&output.stderr));
    let ran: usize = text.lines().find_map(|line| line.strip_prefix("accepted ")?.parse().ok()).unwrap();
    assert!(ran > EXPRESSIONS / 4, "the scan accepted {ran} of {EXPRESSIONS} expressions");
}

#[test]
#[ignore = "runs in the child of the test above"]
fn in_the_child() {
    let seed: u64 = std::env::var(SEED_VARIABLE).unwrap().parse().unwrap();
    // A panic of the parser or the interpreter is caught, and is no failure.
    std::panic::set_hook(Box::new(|_| {}));
    let body = move || {
        let mut out = std::io::stdout();
        let mut run = |source: &str| {
            writeln!(out, "next {}", source.escape_debug()).unwrap();
            run(source)
        };
        let extremes = extremes();
        for source in &extremes {
            assert!(bounds::scan(source).is_ok(), "{source}");
            run(source);
        }
        let mut random = Rng::with_seed(seed);
        let (mut accepted, mut slowest) = (0, (Duration::ZERO, String::new()));
        for number in 0..EXPRESSIONS {
            let source = match number % 5 {
                0 => {
                    let extreme = &extremes[random.usize(..extremes.len())];
                    mutate(&mut random, extreme)
                }
                1 => {
                    let depth = random.usize(1..6);
                    let source = random_expression(&mut random, depth);
                    mutate(&mut random, &source)
                }
                2 => random_characters(&mut random),
                _ => {
                    let depth = random.usize(1..6);
                    random_expression(&mut random, depth)
                }
            };
            let started = Instant::now();
            accepted += usize::from(run(&source));
            slowest = slowest.max((started.elapsed(), source));
        }
        writeln!(out, "slowest {slowest:?}\naccepted {accepted}").unwrap();
    };
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(body).unwrap();
    assert!(thread.join().is_ok(), "the last expression of the output");
}
