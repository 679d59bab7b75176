//! Checks verdict rules through the rules child: starts it on demand, bounds the time of an answer, and keeps answers.
//!
//! A rule that ends the child, or for which it does not answer in time, is checked once more by a new child, with more time,
//! because a node may be overloaded. A rule that fails twice is refused with what happened; other rules are checked by the
//! next child. When no child can be started at all, a rule that the scan accepts is accepted: its evaluation is bounded in
//! the worker too, and a node that restarts without memory for a child must not lose its streams.

use std::collections::{HashMap, VecDeque};
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::process::{ChildStdin, Command};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use lineside_common::child_process::{ChildExit, ChildPriority, ProcessLimits, own_command};
use lineside_common::error_chain;
use lineside_common::supervised_child::{ChildError, ChildOptions, SupervisedChild};
use lineside_rules::{RuleError, bounds};
use parking_lot::Mutex;

use super::{HANDSHAKE, LINE_BYTES_MAX, Reply, Request, SUBCOMMAND};

/// Address space of the child in bytes. An unoptimized program takes 84 MiB of it.
const MEMORY_BYTES: u64 = 256 << 20;
/// Processor time of the child in seconds, over all rules of one pass.
const CPU_SECONDS: u64 = 60;
/// Time from the start of the child to its handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Time for an answer, for the first and the second attempt.
const REPLY_DEADLINES: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(10)];
/// Time from SIGTERM to SIGKILL.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// Rules whose answer is kept.
const ANSWERS_MAX: usize = 256;

/// Why a rule is refused. Every message is a single line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleCheckError {
    /// The token scan refuses the rule.
    #[error(transparent)]
    Scan(#[from] RuleError),
    /// The rules child refuses the rule.
    #[error("{reason}")]
    Refused {
        /// Message of the check.
        reason: String,
    },
    /// The rule ended the rules child.
    #[error("the check of the rule ended its process with {exit}")]
    Ended {
        /// How the process ended.
        exit: ChildExit,
    },
    /// The rules child did not answer in time.
    #[error("the check of the rule did not end within {deadline:?}")]
    Timeout {
        /// The time for the answer.
        deadline: Duration,
    },
}

/// The kind of a [`RuleCheckError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleCheckErrorKind {
    /// The token scan refuses the rule.
    Scan,
    /// The rules child refuses the rule.
    Refused,
    /// The rule ended the rules child.
    Ended,
    /// The rules child did not answer in time.
    Timeout,
}

impl RuleCheckError {
    /// The kind, to branch on.
    pub fn kind(&self) -> RuleCheckErrorKind {
        match self {
            Self::Scan(_) => RuleCheckErrorKind::Scan,
            Self::Refused { .. } => RuleCheckErrorKind::Refused,
            Self::Ended { .. } => RuleCheckErrorKind::Ended,
            Self::Timeout { .. } => RuleCheckErrorKind::Timeout,
        }
    }
}

/// Checks verdict rules. The calls block.
pub struct RuleChecker {
    /// The command that starts the child.
    command: Box<dyn Fn() -> io::Result<Command> + Send + Sync>,
    deadlines: [Duration; 2],
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    child: Option<RulesChild>,
    answers: HashMap<String, Result<(), RuleCheckError>>,
    /// The rules of `answers`, oldest first.
    order: VecDeque<String>,
}

/// Why one attempt has no answer.
enum Attempt {
    /// The child cannot be started.
    Unavailable(String),
    Failed(RuleCheckError),
}

impl RuleChecker {
    /// A checker that starts the child with `command`, which is called for each start.
    pub fn new(command: impl Fn() -> io::Result<Command> + Send + Sync + 'static) -> Self {
        Self { command: Box::new(command), deadlines: REPLY_DEADLINES, state: Mutex::default() }
    }

    /// A checker whose child is this program.
    pub fn of_this_program() -> Self {
        Self::new(|| Ok(own_command(SUBCOMMAND)))
    }

    /// Checks a rule.
    ///
    /// # Errors
    /// [`RuleCheckError`] when the rule is refused.
    pub fn check(&self, rule: &str) -> Result<(), RuleCheckError> {
        bounds::scan(rule)?;
        let mut state = self.state.lock();
        if let Some(answer) = state.answers.get(rule) {
            return answer.clone();
        }
        let mut answer = Ok(());
        for deadline in self.deadlines {
            answer = match self.attempt(&mut state, rule, deadline) {
                Ok(Reply::Accepted) => Ok(()),
                Ok(Reply::Refused(reason)) => Err(RuleCheckError::Refused { reason }),
                Err(Attempt::Failed(error)) => {
                    tracing::warn!(event = "rules_child_failed", %error, "The rules child is replaced");
                    answer = Err(error);
                    continue;
                }
                Err(Attempt::Unavailable(reason)) => {
                    tracing::warn!(
                        event = "rule_check_unavailable",
                        reason,
                        "The rules child cannot be started; a rule is accepted without its check"
                    );
                    return answer;
                }
            };
            break;
        }
        state.keep(rule, &answer);
        answer
    }

    /// [`RuleChecker::check`] as a function for reading manifests.
    ///
    /// # Errors
    /// [`RuleCheckError`] when the rule is refused.
    pub fn check_rule(&self, rule: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.check(rule)?)
    }

    /// Ends the child until the next check. Called when a pass over the manifests is over.
    pub fn release(&self) {
        let child = self.state.lock().child.take();
        if let Some(child) = child {
            child.stop();
        }
    }

    /// Sends a rule to the child, which is started if there is none. A child that fails is gone afterwards.
    fn attempt(&self, state: &mut State, rule: &str, deadline: Duration) -> Result<Reply, Attempt> {
        let unavailable = |error: &dyn std::error::Error| Attempt::Unavailable(error_chain(error));
        let mut child = match state.child.take() {
            Some(child) => child,
            None => {
                let command = (self.command)().map_err(|error| unavailable(&error))?;
                RulesChild::start(command).map_err(|error| unavailable(&error))?
            }
        };
        let reply = child.ask(rule, deadline).map_err(Attempt::Failed)?;
        state.child = Some(child);
        Ok(reply)
    }
}

impl State {
    fn keep(&mut self, rule: &str, answer: &Result<(), RuleCheckError>) {
        if self.order.len() >= ANSWERS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.answers.remove(&oldest);
        }
        self.order.push_back(rule.to_owned());
        self.answers.insert(rule.to_owned(), answer.clone());
    }
}

/// A running child with its pipes.
struct RulesChild {
    process: SupervisedChild,
    requests: ChildStdin,
    /// Ends when the child has closed its standard output or has written something other than a reply.
    replies: mpsc::Receiver<Reply>,
}

impl RulesChild {
    fn start(command: Command) -> Result<Self, ChildError> {
        let options = ChildOptions {
            name: "rules child".to_owned(),
            limits: ProcessLimits {
                memory_bytes: MEMORY_BYTES,
                cpu_seconds: Some(CPU_SECONDS),
                priority: ChildPriority::Normal,
            },
            handshake: HANDSHAKE,
            handshake_deadline: HANDSHAKE_DEADLINE,
            stop_grace: STOP_GRACE,
        };
        let mut process = SupervisedChild::start(command, &options)?;
        let no_pipe = || io::Error::other("no pipe");
        let start_error = |source| ChildError::Start { name: options.name.clone(), source };
        let requests = process.take_stdin().ok_or_else(no_pipe).map_err(start_error)?;
        let mut stdout = process.take_stdout().ok_or_else(no_pipe).map_err(start_error)?;
        let (sender, replies) = mpsc::channel();
        // A pipe has no read timeout. The thread ends with the child.
        let read = move || {
            let mut line = Vec::new();
            while stdout.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
                let Ok(reply) = serde_json::from_slice(&line) else { return };
                if sender.send(reply).is_err() {
                    return;
                }
                line.clear();
            }
        };
        thread::Builder::new().name("rules-child".to_owned()).spawn(read).map_err(start_error)?;
        Ok(Self { process, requests, replies })
    }

    /// Sends a rule and waits for the reply.
    fn ask(&mut self, rule: &str, deadline: Duration) -> Result<Reply, RuleCheckError> {
        // The pipe is empty, because each request is answered before the next one; so a write that fails finds the child
        // ended, and no write blocks: a request is smaller than a pipe.
        let sent =
            serde_json::to_vec(&Request { rule: rule.to_owned() }).map_err(io::Error::from).and_then(|mut line| {
                line.push(b'\n');
                self.requests.write_all(&line)
            });
        let timeout = || RuleCheckError::Timeout { deadline };
        if sent.is_ok() {
            match self.replies.recv_timeout(deadline) {
                Ok(reply) => return Ok(reply),
                Err(mpsc::RecvTimeoutError::Timeout) => return Err(timeout()),
                Err(mpsc::RecvTimeoutError::Disconnected) => {}
            }
        }
        match self.process.wait(deadline) {
            Ok(Some(exit)) => Err(RuleCheckError::Ended { exit }),
            Ok(None) | Err(_) => Err(timeout()),
        }
    }

    /// Ends the child in order.
    fn stop(self) {
        let Self { mut process, requests, .. } = self;
        drop(requests);
        if let Err(error) = process.stop() {
            // Dropping the process kills it.
            tracing::warn!(event = "rules_child_stop_failed", %error, "The rules child cannot be stopped in order");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    const RULE: &str = "score > 1.0 ? \"reject\" : \"pass\"";

    /// A checker whose child is a shell script. The script appends a line to the file `starts`.
    fn checker(folder: &Path, script: &str) -> RuleChecker {
        let script = format!("echo start >> {}/starts; echo 'lineside-rules 1'; {script}", folder.display());
        let mut checker = RuleChecker::new(move || {
            let mut command = Command::new("sh");
            command.args(["-c", &script]);
            Ok(command)
        });
        checker.deadlines = [Duration::from_millis(300), Duration::from_secs(30)];
        checker
    }

    fn starts(folder: &Path) -> usize {
        fs::read_to_string(folder.join("starts")).unwrap_or_default().lines().count()
    }

    #[test]
    fn one_child_checks_all_rules_of_a_pass_and_answers_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let answers = r#"while read line; do case "$line" in *bad*) echo '{"refused":"it is bad"}';; *) echo '"accepted"';; esac; done"#;
        let checker = checker(folder.path(), answers);
        for _ in 0..3 {
            assert_eq!(checker.check(RULE), Ok(()));
            let refused = checker.check("\"bad\"").unwrap_err();
            assert_eq!((refused.kind(), refused.to_string().as_str()), (RuleCheckErrorKind::Refused, "it is bad"));
        }
        assert_eq!(starts(folder.path()), 1);
        checker.release();
        checker.release();
        assert!(checker.state.lock().child.is_none());
        assert_eq!(checker.check(RULE), Ok(()));
        assert_eq!(starts(folder.path()), 1, "a known rule needs no child");
        assert_eq!(checker.check("\"none\""), Ok(()));
        assert_eq!(starts(folder.path()), 2);
    }

    #[test]
    fn the_scan_refuses_a_rule_before_a_child_sees_it() {
        let folder = tempfile::tempdir().unwrap();
        let checker = checker(folder.path(), "exec cat");
        assert_eq!(checker.check(&"(".repeat(1000)).unwrap_err().kind(), RuleCheckErrorKind::Scan);
        assert_eq!(starts(folder.path()), 0);
    }

    #[test]
    fn a_rule_that_ends_the_child_is_refused_and_others_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let script = r#"while read line; do case "$line" in *kill*) kill -9 $$;; *) echo '"accepted"';; esac; done"#;
        let checker = checker(folder.path(), script);
        for _ in 0..2 {
            assert_eq!(checker.check("\"kill\""), Err(RuleCheckError::Ended { exit: ChildExit::Signal(9) }));
            assert_eq!(checker.check(RULE), Ok(()));
        }
        assert_eq!(starts(folder.path()), 3, "two attempts, and a child for the other rule; the answers are kept");
    }

    #[test]
    fn a_child_that_does_not_answer_is_replaced_and_the_rule_is_checked_once_more() {
        let folder = tempfile::tempdir().unwrap();
        let first = format!("mkdir {}/first 2>/dev/null && exec sleep 1000; ", folder.path().display());
        let checker = checker(folder.path(), &(first + r#"while read line; do echo '"accepted"'; done"#));
        assert_eq!(checker.check(RULE), Ok(()), "the second child answers");
        assert_eq!(starts(folder.path()), 2);

        let silent = tempfile::tempdir().unwrap();
        let mut checker = self::checker(silent.path(), "exec sleep 1000");
        checker.deadlines = [Duration::from_millis(10), Duration::from_millis(20)];
        let expected = RuleCheckError::Timeout { deadline: Duration::from_millis(20) };
        assert_eq!(checker.check(RULE), Err(expected.clone()));
        assert_eq!(checker.check(RULE), Err(expected));
        assert_eq!(starts(silent.path()), 2);
    }

    #[test]
    fn without_a_child_the_scan_alone_decides() {
        let checker = RuleChecker::new(|| Err(io::Error::other("no memory")));
        assert_eq!(checker.check(RULE), Ok(()));
        assert_eq!(checker.check("a = b").unwrap_err().kind(), RuleCheckErrorKind::Scan);
        let absent = RuleChecker::new(|| Ok(Command::new("/no/such/program")));
        assert_eq!(absent.check(RULE), Ok(()));
    }

    #[test]
    fn a_reply_that_is_none_ends_the_child() {
        let folder = tempfile::tempdir().unwrap();
        let checker = checker(folder.path(), "read line; echo nonsense; exit 3");
        assert_eq!(checker.check(RULE), Err(RuleCheckError::Ended { exit: ChildExit::Code(3) }));
    }

    #[test]
    fn the_kept_answers_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let checker = checker(folder.path(), r#"while read line; do echo '"accepted"'; done"#);
        for number in 0..ANSWERS_MAX + 10 {
            checker.check(&format!("{number}")).unwrap();
        }
        let state = checker.state.lock();
        assert_eq!((state.answers.len(), state.order.len()), (ANSWERS_MAX, ANSWERS_MAX));
    }
}
