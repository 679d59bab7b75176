//! One accepted connection, from the first word to the last.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::broker_selector::{BrokerSelector, probe};
use super::commands::Commands;
use super::encoder::Encoder;
use super::send_window::{SendWindow, WINDOW};
use super::{LOOK_EVERY, Publisher, SessionEnd, Token};
use crate::connection::{ConnectionLoss, Event, Receiver, Seen, Sender};
use crate::credentials::fingerprint;
use lineside_api::state::StreamStates;
use lineside_common::digest::Digest;
use lineside_spool::RecordKind;

/// How long the end may wait for the broker to take what is left.
const FAREWELL: Duration = Duration::from_secs(3);
/// A server closes what it has said goodbye to; if not, we do, after this.
const PARTING: Duration = Duration::from_secs(1);

/// The state of a connection.
pub(super) struct Session<'a> {
    publisher: &'a Publisher,
    selector: &'a BrokerSelector,
    index: usize,
    sender: Sender<Token>,
    encoder: Encoder,
    flow: SendWindow,
    /// Records are being sent.
    is_heard: bool,
    began: Instant,
    last_progress: Instant,
    probed: Option<Instant>,
    print: Option<Digest>,
    look_at: Instant,
    /// When to probe at better brokers, and the probe that is under way.
    return_at: Option<Instant>,
    knocking: Option<JoinHandle<bool>>,
    leaving: Option<Leaving>,
}

/// The end of a connection that is ended in order.
struct Leaving {
    is_farewell: bool,
    deadline: Instant,
    has_said: bool,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        publisher: &'a Publisher,
        sender: Sender<Token>,
        encoder: Encoder,
        selector: &'a BrokerSelector,
        index: usize,
    ) -> Self {
        let now = Instant::now();
        Self {
            publisher,
            selector,
            index,
            sender,
            encoder,
            flow: SendWindow::new(publisher.mqtt.drain_per_second, Duration::ZERO),
            is_heard: false,
            began: now,
            last_progress: now,
            probed: None,
            print: fingerprint(publisher.mqtt.secret.as_deref()),
            look_at: now + LOOK_EVERY,
            return_at: selector.has_preferred(index).then(|| now + selector.failback_delay(index)),
            knocking: None,
            leaving: None,
        }
    }

    /// Talks until it ends, one way or another.
    pub(super) async fn run(
        mut self,
        mut receiver: Receiver,
        commands: &mut Commands,
        registry: &mut watch::Receiver<StreamStates>,
        stop: &CancellationToken,
    ) -> SessionEnd {
        let publisher = self.publisher;
        let streams = registry.borrow_and_update().clone();
        if !self.encoder.begin(publisher, &mut self.sender, &streams) {
            return no_room();
        }
        loop {
            self.fill();
            // The future is kept until it is done: dropping it half way could lose a packet.
            let next = receiver.next();
            tokio::pin!(next);
            let seen = loop {
                let wake = self.wake();
                let may_fill = self.leaving.is_none() && self.flow.unacknowledged() < WINDOW;
                tokio::select! {
                    seen = &mut next => break seen,
                    () = publisher.spool.changed().notified(), if may_fill => self.fill(),
                    Ok(()) = registry.changed() => {
                        let streams = registry.borrow_and_update().clone();
                        if self.leaving.is_none() && !self.encoder.follow(publisher, &mut self.sender, &streams) {
                            return no_room();
                        }
                    }
                    answer = commands.answered() => {
                        if self.leaving.is_none() && !self.sender.publish(answer, Token::Own) {
                            return no_room();
                        }
                    }
                    opened = knocked(&mut self.knocking) => self.on_knocked(opened),
                    () = stop.cancelled(), if !self.is_farewell() => self.leave(true),
                    () = tokio::time::sleep_until(wake) => {
                        if let Some(ended) = self.on_time() {
                            return ended;
                        }
                    }
                }
            };
            if let Some(ended) = self.on_seen(seen, commands, registry) {
                return ended;
            }
        }
    }

    fn is_farewell(&self) -> bool {
        self.leaving.as_ref().is_some_and(|leaving| leaving.is_farewell)
    }

    /// Time since the connection was made.
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Hands over what may be sent now.
    fn fill(&mut self) {
        // On an idle connection the clock for a lack of progress starts with the first message.
        if self.sender.unacknowledged() == 0 {
            self.last_progress = Instant::now();
        }
        // One who only moves leaves what has not been sent for the next connection.
        let goes_on = self.leaving.as_ref().is_none_or(|leaving| leaving.is_farewell && !leaving.has_said);
        if !self.is_heard && self.encoder.is_heard() {
            self.is_heard = true;
            self.publisher.spool.connected();
        }
        while goes_on && self.is_heard && Encoder::has_room(&self.sender) {
            let now = self.now();
            let Some((record, historical)) = self.flow.next(&self.publisher.spool, now) else { break };
            let place = record.id;
            if !self.encoder.say(record, historical, &mut self.sender) {
                self.flow.requeue(place);
                self.publisher.spool.requeue(place);
                break;
            }
        }
        self.encoder.pause(&mut self.sender);
        self.say_goodbye();
    }

    fn has_said_goodbye(&self) -> bool {
        self.leaving.as_ref().is_some_and(|leaving| leaving.has_said)
    }

    /// Begins to end the connection in order: what is there is sent, and then goodbye is said.
    fn leave(&mut self, is_farewell: bool) {
        let now = Instant::now();
        let has_said = self.has_said_goodbye();
        self.leaving = Some(Leaving { is_farewell, deadline: now + FAREWELL, has_said });
        self.fill();
    }

    /// Says goodbye when nothing is on the way any more.
    fn say_goodbye(&mut self) {
        let Some(leaving) = &mut self.leaving else { return };
        if leaving.has_said || self.sender.unacknowledged() > 0 {
            return;
        }
        leaving.has_said = self.encoder.leave(self.publisher, &mut self.sender) && self.sender.disconnect();
        leaving.deadline = leaving.deadline.min(Instant::now() + PARTING);
    }

    /// When something is to be done though nothing happens.
    fn wake(&self) -> Instant {
        if let Some(leaving) = &self.leaving {
            return leaving.deadline;
        }
        let wedged = (self.sender.unacknowledged() > 0).then(|| self.last_progress + self.wedged_after());
        let silent = self.probed.map(|probed| probed + self.unreachable_after());
        let rate = self.flow.wait().map(|wait| Instant::now() + wait);
        let times = [Some(self.look_at), wedged, silent, rate, self.return_at];
        times.into_iter().flatten().min().unwrap_or(self.look_at)
    }

    /// A connection that does not move for this long while messages are on the way is given up.
    fn wedged_after(&self) -> Duration {
        self.publisher.mqtt.keep_alive * 2
    }

    /// A broker that does not answer a probe within this is gone.
    fn unreachable_after(&self) -> Duration {
        self.publisher.mqtt.keep_alive / 2
    }

    fn on_time(&mut self) -> Option<SessionEnd> {
        let now = Instant::now();
        if let Some(leaving) = self.leaving.as_ref().filter(|leaving| leaving.deadline <= now) {
            return Some(self.end(leaving.is_farewell));
        }
        if self.sender.unacknowledged() > 0 && self.last_progress + self.wedged_after() <= now {
            let seconds = self.wedged_after().as_secs();
            return Some(lost(format!("nothing was acknowledged for {seconds} s")));
        }
        if self.probed.is_some_and(|probed| probed + self.unreachable_after() <= now) {
            return Some(lost("the broker has fallen silent".to_owned()));
        }
        if self.look_at <= now {
            self.look_at = now + LOOK_EVERY;
            let print = fingerprint(self.publisher.mqtt.secret.as_deref());
            // A folder that has vanished is no reason to give up a connection that works.
            if print.is_some() && print != self.print && self.leaving.is_none() {
                tracing::info!(
                    event = "broker_credentials_changed",
                    "credentials for the broker have changed, connecting anew with them"
                );
                self.leave(false);
            }
        }
        if self.return_at.is_some_and(|at| at <= now) {
            self.return_at = None;
            self.knocking = Some(tokio::spawn(probe(self.selector.better(self.index, now))));
        }
        self.fill();
        None
    }

    fn on_knocked(&mut self, opened: bool) {
        if opened && self.leaving.is_none() {
            tracing::info!("a better broker is there again, going back to it");
            self.leave(false);
        } else {
            self.return_at = Some(Instant::now() + self.selector.failback_delay(self.index));
        }
    }

    fn on_seen(
        &mut self,
        seen: Seen,
        commands: &mut Commands,
        registry: &watch::Receiver<StreamStates>,
    ) -> Option<SessionEnd> {
        match self.sender.understand(seen) {
            Event::Acknowledged(token) => {
                self.probed = None;
                self.last_progress = Instant::now();
                self.on_acknowledged(token);
            }
            Event::Alive => self.probed = None,
            Event::Probing => self.probed = self.probed.or(Some(Instant::now())),
            Event::Received(message) => {
                self.probed = None;
                commands.take(&message);
                let streams = registry.borrow().clone();
                if self.leaving.is_none() && !self.encoder.hear(&message, &mut self.sender, &streams) {
                    tracing::warn!("the primary host is offline, results wait");
                    self.leave(false);
                }
            }
            Event::Lost(_) if self.has_said_goodbye() => return Some(self.end(self.is_farewell())),
            Event::Lost(loss) if self.is_farewell() => {
                tracing::debug!(reason = loss.reason(), "the connection broke at the end");
                return Some(self.end(true));
            }
            Event::Lost(loss) => return Some(SessionEnd::Lost(loss)),
            Event::Connected | Event::Other => {}
        }
        None
    }

    fn on_acknowledged(&mut self, token: Token) {
        let places = match token {
            Token::Own => Vec::new(),
            Token::Record(place) => vec![place],
            Token::Records(places) => places,
        };
        let metrics = &self.publisher.metrics;
        metrics.mqtt_published.inc_by(places.len().max(1) as u64);
        metrics.mqtt_results.inc_by(places.iter().filter(|place| place.kind == RecordKind::Result).count() as u64);
        let now = self.now();
        for place in places {
            self.flow.acknowledged(place, now);
            self.publisher.spool.acknowledge(place);
        }
    }

    fn end(&self, is_farewell: bool) -> SessionEnd {
        match is_farewell {
            true => {
                self.publisher.tell_what_is_left();
                SessionEnd::Farewell
            }
            false => SessionEnd::Moved,
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if let Some(knocking) = &self.knocking {
            knocking.abort();
        }
    }
}

fn lost(reason: String) -> SessionEnd {
    SessionEnd::Lost(ConnectionLoss::Unreachable(reason))
}

fn no_room() -> SessionEnd {
    lost("what is said of the node itself found no room".to_owned())
}

/// What came of a probe that is under way; never, where none is.
async fn knocked(knocking: &mut Option<JoinHandle<bool>>) -> bool {
    match knocking {
        Some(probe) => {
            let opened = probe.await.unwrap_or(false);
            *knocking = None;
            opened
        }
        None => std::future::pending().await,
    }
}
