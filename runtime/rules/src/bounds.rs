//! The token scan: bounds an expression before it is parsed.
//!
//! The parser and the interpreter of `cel` recurse on the nesting of an expression, a chain of operators included, and a
//! comprehension inside another one is evaluated for each pair of elements. This scan therefore bounds length, tokens,
//! nesting and comprehensions. It is total: one pass over the bytes, no recursion, and memory only for open brackets.
//!
//! The scan accepts only what the lexer of `cel` accepts, token for token. The lexer continues behind text that it does not
//! recognize, so that a scan with another opinion of where a text literal ends would not see the tokens that are parsed.
//!
//! The limits of nesting leave a factor of four of a stack of 2 MiB, which is what a thread has. Measured with an unoptimized
//! parser: a bracket takes 9 to 12 KiB while it is parsed, an operator 1.4 KiB while it is evaluated, and everything else
//! 60 KiB, so that the limits admit 24 x 12 + 96 x 1.4 + 60 = 482 KiB.

use crate::RuleError;

/// Longest expression in bytes.
pub const BYTES_MAX: usize = 4096;
/// Most tokens: words, numbers, text literals, operators and brackets.
pub const TOKENS_MAX: usize = 1024;
/// Most brackets inside each other.
pub const BRACKETS_MAX: usize = 24;
/// Most operators inside each other, such as the 95 additions of a sum of 96 terms. Selections, indices, calls and `?` count.
pub const OPERATORS_MAX: usize = 96;
/// Most comprehensions: `exists`, `exists_one`, `all`, `filter` and `map`.
pub const COMPREHENSIONS_MAX: usize = 16;
/// Most comprehensions inside each other.
pub const COMPREHENSION_DEPTH_MAX: usize = 2;

/// The macros of CEL that loop over a list.
const COMPREHENSIONS: [&str; 6] = ["exists", "exists_one", "existsOne", "all", "filter", "map"];

/// What the scan counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// [`TOKENS_MAX`].
    Tokens,
    /// [`BRACKETS_MAX`].
    Brackets,
    /// [`OPERATORS_MAX`].
    Operators,
    /// [`COMPREHENSIONS_MAX`].
    Comprehensions,
    /// [`COMPREHENSION_DEPTH_MAX`].
    ComprehensionDepth,
}

impl Measure {
    /// The largest value that is accepted.
    pub fn limit(self) -> usize {
        match self {
            Self::Tokens => TOKENS_MAX,
            Self::Brackets => BRACKETS_MAX,
            Self::Operators => OPERATORS_MAX,
            Self::Comprehensions => COMPREHENSIONS_MAX,
            Self::ComprehensionDepth => COMPREHENSION_DEPTH_MAX,
        }
    }

    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokens => "words and signs",
            Self::Brackets => "brackets inside each other",
            Self::Operators => "operators inside each other",
            Self::Comprehensions => "calls of exists, exists_one, all, filter and map",
            Self::ComprehensionDepth => "calls of exists, exists_one, all, filter and map inside each other",
        }
    }

    fn check(self, value: usize) -> Result<(), RuleError> {
        if value > self.limit() { Err(RuleError::TooComplex { measure: self, value }) } else { Ok(()) }
    }
}

/// What the scan knows of an accepted expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scan {
    /// Advice for the case that the parser rejects the expression.
    pub(crate) advice: Option<&'static str>,
}

/// Bounds an expression without parsing it.
///
/// # Errors
/// [`crate::RuleErrorKind::TooLong`], [`crate::RuleErrorKind::TooComplex`], and [`crate::RuleErrorKind::Syntax`] for text
/// that is not a token and for a bracket without its partner.
pub fn scan(source: &str) -> Result<Scan, RuleError> {
    if source.len() > BYTES_MAX {
        return Err(RuleError::TooLong { bytes: source.len() });
    }
    let mut lexer = Lexer { source, position: 0 };
    let mut scanner = Scanner::default();
    while let Some((start, token)) = lexer.next_token()? {
        scanner.take(start, token, source)?;
    }
    scanner.finish(source)?;
    Ok(Scan { advice: scanner.advice })
}

/// A token, as far as the scan distinguishes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    /// An identifier, or a keyword other than `in`.
    Word(&'a str),
    /// A number or a text literal.
    Literal,
    Open(u8),
    Close(u8),
    Comma,
    Dot,
    /// `?`.
    Question,
    Colon,
    /// `&&` or `||`, whose chains are balanced by the parser.
    Logical,
    /// Any other operator.
    Operator,
}

/// One open bracket, or the whole expression. The depth of a level is that of the deepest of its parts, which commas separate.
/// A part consists of pieces, between which stand `?`, `:`, `&&` and `||`.
#[derive(Debug, Default, Clone, Copy)]
struct Level {
    bracket: u8,
    is_comprehension: bool,
    /// Operators of the present piece, and the deepest bracket in it.
    operators: usize,
    inner: usize,
    /// The deepest piece of the present part.
    piece: usize,
    questions: usize,
    logicals: usize,
    /// The deepest part.
    part: usize,
}

impl Level {
    fn end_piece(&mut self) {
        self.piece = self.piece.max(self.operators + self.inner);
        (self.operators, self.inner) = (0, 0);
    }

    fn end_part(&mut self) {
        self.end_piece();
        // A chain of n logical operators is a tree with the depth of the logarithm of n.
        let logical_depth = (usize::BITS - self.logicals.leading_zeros()) as usize;
        self.part = self.part.max(self.questions + logical_depth + self.piece);
        (self.piece, self.questions, self.logicals) = (0, 0, 0);
    }
}

#[derive(Debug, Default)]
struct Scanner {
    tokens: usize,
    comprehensions: usize,
    whole: Level,
    open: Vec<Level>,
    /// Whether the previous token is a dot, and whether it is the name of a comprehension behind one.
    is_after_dot: bool,
    is_after_macro: bool,
    /// Whether a bracket would be an index or a call.
    is_after_operand: bool,
    advice: Option<&'static str>,
}

impl Scanner {
    fn level(&mut self) -> &mut Level {
        self.open.last_mut().unwrap_or(&mut self.whole)
    }

    fn take(&mut self, start: usize, token: Token<'_>, source: &str) -> Result<(), RuleError> {
        self.tokens += 1;
        Measure::Tokens.check(self.tokens)?;
        let (is_after_dot, is_after_macro) = (self.is_after_dot, self.is_after_macro);
        (self.is_after_dot, self.is_after_macro) = (token == Token::Dot, false);
        let is_operand = matches!(token, Token::Word(_) | Token::Literal | Token::Close(_));
        let is_after_operand = std::mem::replace(&mut self.is_after_operand, is_operand);
        match token {
            Token::Word(word) => {
                self.is_after_macro = is_after_dot && COMPREHENSIONS.contains(&word);
                self.advice = self.advice.or_else(|| advice_for_word(word));
            }
            Token::Literal => {}
            Token::Dot | Token::Operator => self.level().operators += 1,
            Token::Logical => {
                self.level().end_piece();
                self.level().logicals += 1;
            }
            Token::Question => {
                self.level().end_piece();
                self.level().questions += 1;
            }
            Token::Colon => self.level().end_piece(),
            Token::Comma => self.level().end_part(),
            Token::Open(bracket) => {
                // An index or a call continues a chain, such as `a[0][0]`.
                self.level().operators += usize::from(is_after_operand && !is_after_macro);
                self.open(bracket, is_after_macro && bracket == b'(')?;
            }
            Token::Close(bracket) => {
                let Some(mut level) = self.open.pop().filter(|level| partner(level.bracket) == bracket) else {
                    return Err(syntax(source, start, "has no opening bracket"));
                };
                level.end_part();
                let parent = self.level();
                parent.inner = parent.inner.max(level.part + 1);
            }
        }
        Ok(())
    }

    fn open(&mut self, bracket: u8, is_comprehension: bool) -> Result<(), RuleError> {
        self.open.push(Level { bracket, is_comprehension, ..Level::default() });
        Measure::Brackets.check(self.open.len())?;
        if is_comprehension {
            self.comprehensions += 1;
            Measure::Comprehensions.check(self.comprehensions)?;
            Measure::ComprehensionDepth.check(self.open.iter().filter(|level| level.is_comprehension).count())?;
        }
        Ok(())
    }

    fn finish(&mut self, source: &str) -> Result<(), RuleError> {
        if !self.open.is_empty() {
            return Err(RuleError::Syntax { reason: "a bracket is not closed".to_owned() });
        }
        if self.tokens == 0 {
            return Err(syntax(source, source.len(), "is where an expression is expected"));
        }
        self.whole.end_part();
        Measure::Operators.check(self.whole.part)
    }
}

/// The closing bracket of an opening one.
fn partner(bracket: u8) -> u8 {
    match bracket {
        b'(' => b')',
        b'[' => b']',
        _ => b'}',
    }
}

/// Advice for a word that is not part of CEL but of other languages.
fn advice_for_word(word: &str) -> Option<&'static str> {
    match word {
        "and" | "AND" => Some("write && for and"),
        "or" | "OR" => Some("write || for or"),
        "not" | "NOT" => Some("write ! for not"),
        "if" | "then" | "else" => Some("write CONDITION ? \"reject\" : \"pass\""),
        _ => None,
    }
}

/// A syntax error at a byte offset. The message counts characters from 1.
fn syntax(source: &str, at: usize, problem: &str) -> RuleError {
    let before = source.get(..at).unwrap_or(source);
    let number = before.chars().count() + 1;
    let what = match source.get(at..).and_then(|rest| rest.chars().next()) {
        Some(character) => format!("`{}` at character {number}", character.escape_debug()),
        None => "the end of the expression".to_owned(),
    };
    RuleError::Syntax { reason: format!("{what} {problem}") }
}

/// Splits an expression into the tokens of the lexer of `cel` (`CEL.g4`).
struct Lexer<'a> {
    source: &'a str,
    position: usize,
}

impl<'a> Lexer<'a> {
    fn peek(&self, ahead: usize) -> Option<u8> {
        self.source.as_bytes().get(self.position + ahead).copied()
    }

    fn skip_while(&mut self, accepts: impl Fn(u8) -> bool) {
        while self.peek(0).is_some_and(&accepts) {
            self.position += 1;
        }
    }

    /// The next token with its byte offset.
    fn next_token(&mut self) -> Result<Option<(usize, Token<'a>)>, RuleError> {
        self.skip_space();
        let start = self.position;
        let Some(byte) = self.peek(0) else { return Ok(None) };
        let token = match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'_' => self.word()?,
            b'0'..=b'9' => self.number(),
            b'.' if self.peek(1).is_some_and(|next| next.is_ascii_digit()) => self.number(),
            b'"' | b'\'' => self.text(start, false)?,
            _ => self.sign(byte)?,
        };
        Ok(Some((start, token)))
    }

    fn skip_space(&mut self) {
        loop {
            self.skip_while(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | 0x0C));
            if !(self.peek(0) == Some(b'/') && self.peek(1) == Some(b'/')) {
                return;
            }
            self.skip_while(|byte| byte != b'\n');
        }
    }

    /// An identifier, a keyword, or a text literal with a prefix: `r"..."`, `b"..."` or `br"..."`.
    fn word(&mut self) -> Result<Token<'a>, RuleError> {
        let start = self.position;
        self.skip_while(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let word = self.source.get(start..self.position).unwrap_or_default();
        let is_raw = matches!(word, "r" | "R" | "br" | "bR" | "Br" | "BR");
        if matches!(self.peek(0), Some(b'"' | b'\'')) && (is_raw || matches!(word, "b" | "B")) {
            return self.text(start, is_raw);
        }
        Ok(if word == "in" { Token::Operator } else { Token::Word(word) })
    }

    fn number(&mut self) -> Token<'a> {
        if self.peek(0) == Some(b'0')
            && self.peek(1) == Some(b'x')
            && self.peek(2).is_some_and(|b| b.is_ascii_hexdigit())
        {
            self.position += 2;
            self.skip_while(|byte| byte.is_ascii_hexdigit());
        } else {
            self.skip_while(|byte| byte.is_ascii_digit());
            if self.peek(0) == Some(b'.') && self.peek(1).is_some_and(|byte| byte.is_ascii_digit()) {
                self.position += 1;
                self.skip_while(|byte| byte.is_ascii_digit());
            }
            let sign = usize::from(matches!(self.peek(1), Some(b'+' | b'-')));
            if matches!(self.peek(0), Some(b'e' | b'E'))
                && self.peek(1 + sign).is_some_and(|byte| byte.is_ascii_digit())
            {
                self.position += 1 + sign;
                self.skip_while(|byte| byte.is_ascii_digit());
            }
        }
        if matches!(self.peek(0), Some(b'u' | b'U')) {
            self.position += 1;
        }
        Token::Literal
    }

    /// A text literal. The position is that of its first quote.
    fn text(&mut self, start: usize, is_raw: bool) -> Result<Token<'a>, RuleError> {
        let not_closed = || syntax(self.source, start, "begins a text that is not closed");
        let Some(quote) = self.peek(0) else { return Err(not_closed()) };
        let quotes = if self.peek(1) == Some(quote) && self.peek(2) == Some(quote) { 3 } else { 1 };
        let mut at = self.position + quotes;
        let bytes = self.source.as_bytes();
        loop {
            let Some(rest) = bytes.get(at..) else { return Err(not_closed()) };
            let end = rest.len().min(quotes);
            match rest.first() {
                None => return Err(not_closed()),
                Some(b'\n' | b'\r') if quotes == 1 => return Err(not_closed()),
                Some(_) if end == quotes && rest.iter().take(quotes).all(|byte| *byte == quote) => break,
                Some(b'\\') if !is_raw => match escape_length(rest) {
                    Some(length) => at += length,
                    None => {
                        return Err(syntax(self.source, at, "is not an escape sequence; write \\\\ for a backslash"));
                    }
                },
                Some(_) => at += 1,
            }
        }
        self.position = at + quotes;
        Ok(Token::Literal)
    }

    /// An operator or a bracket.
    fn sign(&mut self, byte: u8) -> Result<Token<'a>, RuleError> {
        let next = self.peek(1);
        let (length, token) = match (byte, next) {
            (b'=' | b'!' | b'<' | b'>', Some(b'=')) => (2, Token::Operator),
            (b'&', Some(b'&')) | (b'|', Some(b'|')) => (2, Token::Logical),
            (b'<' | b'>' | b'!' | b'-' | b'+' | b'*' | b'/' | b'%', _) => (1, Token::Operator),
            (b'(' | b'[' | b'{', _) => (1, Token::Open(byte)),
            (b')' | b']' | b'}', _) => (1, Token::Close(byte)),
            (b'.', _) => (1, Token::Dot),
            (b',', _) => (1, Token::Comma),
            (b'?', _) => (1, Token::Question),
            (b':', _) => (1, Token::Colon),
            _ => return Err(self.no_token(byte)),
        };
        self.position += length;
        Ok(token)
    }

    fn no_token(&self, byte: u8) -> RuleError {
        let rest = self.source.get(self.position..).unwrap_or_default();
        let problem = match byte {
            b'=' => "is not an operator; write == to compare",
            b'&' => "is not an operator; write && for and",
            b'|' => "is not an operator; write || for or",
            _ if rest.starts_with(['\u{201C}', '\u{201D}', '\u{201E}', '\u{2018}', '\u{2019}']) => {
                "is a typographic quote; write \" or '"
            }
            _ => "is not part of the language",
        };
        syntax(self.source, self.position, problem)
    }
}

/// The length in bytes of the escape sequence at the beginning of `rest`, if it is one.
fn escape_length(rest: &[u8]) -> Option<usize> {
    let are = |accepts: fn(&u8) -> bool, from: usize, to: usize| {
        rest.get(from..to).is_some_and(|all| all.iter().all(accepts))
    };
    let hexadecimal = |digits: usize| are(u8::is_ascii_hexdigit, 2, 2 + digits).then_some(2 + digits);
    match rest.get(1)? {
        b'a' | b'b' | b'f' | b'n' | b'r' | b't' | b'v' | b'"' | b'\'' | b'\\' | b'?' | b'`' => Some(2),
        b'x' | b'X' => hexadecimal(2),
        b'u' => hexadecimal(4),
        b'U' => hexadecimal(8),
        b'0'..=b'3' => are(|byte| (b'0'..=b'7').contains(byte), 2, 4).then_some(4),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RuleErrorKind;

    fn kind(source: &str) -> RuleErrorKind {
        scan(source).unwrap_err().kind()
    }

    fn exceeded(source: &str) -> (Measure, usize) {
        match scan(source).unwrap_err() {
            RuleError::TooComplex { measure, value } => (measure, value),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn each_bound_accepts_its_limit_and_refuses_one_more() {
        assert!(scan(&format!("\"{}\"", "a".repeat(BYTES_MAX - 2))).is_ok());
        assert_eq!(kind(&format!("\"{}\"", "a".repeat(BYTES_MAX - 1))), RuleErrorKind::TooLong);

        let list = |items: usize| format!("[{}]", vec!["1"; items].join(","));
        assert!(scan(&list((TOKENS_MAX - 1) / 2)).is_ok());
        assert_eq!(exceeded(&list(TOKENS_MAX / 2 + 1)).0, Measure::Tokens);

        let brackets = |depth: usize| format!("{}1{}", "(".repeat(depth), ")".repeat(depth));
        assert!(scan(&brackets(BRACKETS_MAX)).is_ok());
        assert_eq!(exceeded(&brackets(BRACKETS_MAX + 1)), (Measure::Brackets, BRACKETS_MAX + 1));

        for link in ["+1", "<1", ".a", " in a", "*1", "?1:1", "-1"] {
            let chain = |links: usize| format!("a{}", link.repeat(links));
            assert!(scan(&chain(OPERATORS_MAX)).is_ok(), "{link}");
            assert_eq!(exceeded(&chain(OPERATORS_MAX + 1)), (Measure::Operators, OPERATORS_MAX + 1), "{link}");
        }
        let indices = |count: usize| format!("a{}", "[0]".repeat(count));
        assert!(scan(&indices(OPERATORS_MAX - 1)).is_ok());
        assert_eq!(exceeded(&indices(OPERATORS_MAX)), (Measure::Operators, OPERATORS_MAX + 1), "a bracket counts too");
        let prefix = |count: usize| format!("{}a", "!".repeat(count));
        assert!(scan(&prefix(OPERATORS_MAX)).is_ok());
        assert_eq!(exceeded(&prefix(OPERATORS_MAX + 1)).0, Measure::Operators);

        let comprehensions = |count: usize| vec!["a.all(x, x)"; count].join(" && ");
        assert!(scan(&comprehensions(COMPREHENSIONS_MAX)).is_ok());
        assert_eq!(exceeded(&comprehensions(COMPREHENSIONS_MAX + 1)).0, Measure::Comprehensions);
        assert!(scan("a.all(x, b.exists(y, x == y))").is_ok());
        assert_eq!(exceeded("a.all(x, b . exists (y, c.map(z, z) == []))"), (Measure::ComprehensionDepth, 3));
        assert!(scan("all(all(all(a)))").is_ok(), "these are calls of a function and no macros");
    }

    #[test]
    fn operators_add_up_along_brackets_but_not_beside_each_other() {
        let term = "d.label == \"scratch\" && d.score > 0.5 && d.box[0] < 10.0";
        let beside = vec![term; 20].join(" || ");
        assert!(scan(&beside).is_ok(), "a long chain of conditions is not deep");
        let calls = format!("[{}]", vec!["f(1 + 2)"; 100].join(", "));
        assert!(scan(&calls).is_ok());
        let sum = "1+".repeat(30);
        let along = format!("{sum}({sum}({sum}({sum}1)))");
        assert_eq!(exceeded(&along), (Measure::Operators, 123));
        let left = format!("((({sum}1){}){}){}", "+1".repeat(30), "+1".repeat(30), "+1".repeat(30));
        assert_eq!(exceeded(&left).0, Measure::Operators);
    }

    #[test]
    fn text_and_comments_are_no_tokens() {
        let many = "(".repeat(100);
        for source in [
            format!("\"{many}\""),
            format!("'{many}'"),
            format!("\"\"\"{many}\n\"\" \"\"\""),
            format!("r'{many}\\'"),
            format!("b\"{many}\""),
            format!("bR'''{many}\\'''"),
            format!("1 // {many}"),
            format!("// {many}\n1"),
            format!("\"\\\"{many}\\x41\\u00e9\\U0001F600\\101\""),
            format!("\"\u{1F600} {many}\""),
        ] {
            assert!(scan(&source).is_ok(), "{source}");
        }
        assert_eq!(kind(&format!("rb'\\' + {many}")), RuleErrorKind::Syntax, "rb is not a prefix");
    }

    #[test]
    fn what_the_lexer_would_skip_is_refused() {
        for source in [
            "\"\\q\"",
            "\"\\x4\"",
            "\"\\u123\"",
            "\"\\400\"",
            "\"a\nb\"",
            "\"open",
            "'''open''",
            "r'open",
            "a # b",
            "a @ b",
            "`a`",
            "\u{201C}pass\u{201D}",
            "a = b",
            "a & b",
            "a | b",
            "a ~ b",
            "$a",
            "a; b",
            "(]",
            ")",
            "(",
            "[(])",
            "",
            " // nothing",
            "\u{e9}",
        ] {
            assert_eq!(kind(source), RuleErrorKind::Syntax, "{source}");
        }
    }

    #[test]
    fn likely_mistakes_are_named() {
        let message = |source: &str| scan(source).unwrap_err().to_string();
        assert_eq!(message("score = 1.0"), "`=` at character 7 is not an operator; write == to compare");
        assert!(message("a & b").contains("write &&"));
        assert!(message("\u{201C}pass\u{201D}").contains("typographic quote"));
        assert_eq!(scan("a and b").unwrap().advice, Some("write && for and"));
        assert_eq!(scan("a && b").unwrap().advice, None);
        let sum = format!("1{}", "+1".repeat(1360));
        assert_eq!(
            message(&sum),
            "the expression has more than 1024 words and signs; it must be simpler to be evaluated for every frame"
        );
    }

    #[test]
    fn the_scan_is_total() {
        let mut random = 7_u64;
        let alphabet: Vec<char> = "()[]{}\"'\\.,?:&|=!<>+-*/%#`r b0x1euin\n\u{e9}\u{1F600}".chars().collect();
        for _ in 0..20_000 {
            let mut source = String::new();
            for _ in 0..40 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                source.push(alphabet[(random >> 33) as usize % alphabet.len()]);
            }
            scan(&source).ok();
        }
    }
}
