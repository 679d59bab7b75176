//! The hand-over from a camera source to the stream's client: room for one frame.
//!
//! A live source overwrites the frame that waits: the older frame is the one that is no longer of interest, and it is counted
//! as skipped. A source that must lose no frame waits until the room is empty. So memory is bounded by one waiting frame per
//! stream.

use std::sync::Arc;

use lineside_ipc::frame::Frame;
use parking_lot::Mutex;
use prometheus::IntCounter;
use tokio::sync::{Notify, oneshot};

/// Creates the two ends. `skipped` counts frames that were overwritten.
pub fn mailbox(skipped: IntCounter) -> (Mailbox, MailboxReceiver) {
    let shared = Arc::new(Shared { state: Mutex::default(), filled: Notify::new(), emptied: Notify::new(), skipped });
    (Mailbox(shared.clone()), MailboxReceiver(shared))
}

struct Shared {
    state: Mutex<State>,
    filled: Notify,
    emptied: Notify,
    skipped: IntCounter,
}

#[derive(Default)]
struct State {
    frame: Option<Frame>,
    /// Frames that were taken and not yet dropped by the receiver.
    in_progress: usize,
    tap: Option<oneshot::Sender<Frame>>,
}

/// The source's end.
#[derive(Clone)]
pub struct Mailbox(Arc<Shared>);

impl Mailbox {
    /// Leaves a frame. One that still waits is dropped and counted.
    pub fn offer(&self, frame: Frame) {
        let mut state = self.0.state.lock();
        if let Some(tap) = state.tap.take() {
            // The receiver of the copy may have given up.
            drop(tap.send(frame.clone()));
        }
        if state.frame.replace(frame).is_some() {
            self.0.skipped.inc();
        }
        drop(state);
        self.0.filled.notify_one();
    }

    /// Waits until no frame waits, then leaves one.
    pub async fn put(&self, frame: Frame) {
        self.until(|state| state.frame.is_none()).await;
        self.offer(frame);
    }

    /// Waits until no frame waits and none is in progress.
    pub async fn drained(&self) {
        self.until(|state| state.frame.is_none() && state.in_progress == 0).await;
    }

    /// A copy of the next frame that is left here. Only the last caller gets it.
    pub fn next_frame(&self) -> oneshot::Receiver<Frame> {
        let (tap, frame) = oneshot::channel();
        self.0.state.lock().tap = Some(tap);
        frame
    }

    async fn until(&self, reached: impl Fn(&State) -> bool) {
        loop {
            let changed = self.0.emptied.notified();
            if reached(&self.0.state.lock()) {
                return;
            }
            changed.await;
        }
    }
}

/// The client's end.
pub struct MailboxReceiver(Arc<Shared>);

impl MailboxReceiver {
    /// Waits for a frame and takes it.
    pub async fn take(&self) -> TakenFrame {
        loop {
            let filled = self.0.filled.notified();
            if let Some(taken) = self.try_take() {
                return taken;
            }
            filled.await;
        }
    }

    fn try_take(&self) -> Option<TakenFrame> {
        let mut state = self.0.state.lock();
        let frame = state.frame.take()?;
        state.in_progress += 1;
        drop(state);
        self.0.emptied.notify_one();
        Some(TakenFrame { frame, shared: self.0.clone() })
    }

    /// Counts a taken frame as skipped.
    pub fn skip(&self, taken: TakenFrame) {
        self.0.skipped.inc();
        drop(taken);
    }
}

/// A frame that was taken. It is in progress until this is dropped.
pub struct TakenFrame {
    /// The frame.
    pub frame: Frame,
    shared: Arc<Shared>,
}

impl Drop for TakenFrame {
    fn drop(&mut self) {
        self.shared.state.lock().in_progress -= 1;
        self.shared.emptied.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::FutureExt as _;

    use super::*;

    fn frame(name: &str) -> Frame {
        Frame::encoded(Bytes::new(), Some(name.to_owned()), false)
    }

    fn ends() -> (Mailbox, MailboxReceiver, IntCounter) {
        let skipped = IntCounter::new("skipped", "skipped").unwrap();
        let (mailbox, receiver) = mailbox(skipped.clone());
        (mailbox, receiver, skipped)
    }

    fn name(taken: &TakenFrame) -> &str {
        taken.frame.name.as_deref().unwrap()
    }

    #[tokio::test]
    async fn the_latest_frame_replaces_the_one_that_waits() {
        let (mailbox, receiver, skipped) = ends();
        ["1", "2", "3"].into_iter().for_each(|name| mailbox.offer(frame(name)));
        assert_eq!(name(&receiver.take().await), "3");
        assert_eq!(skipped.get(), 2);
        assert!(receiver.take().now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_source_that_must_lose_nothing_waits_for_room() {
        let (mailbox, receiver, skipped) = ends();
        let source = tokio::spawn(async move {
            for number in 0..50 {
                mailbox.put(frame(&number.to_string())).await;
            }
            mailbox.drained().await;
        });
        for number in 0..50 {
            assert_eq!(name(&receiver.take().await), number.to_string());
        }
        source.await.unwrap();
        assert_eq!(skipped.get(), 0);
    }

    #[tokio::test]
    async fn a_mailbox_is_drained_when_no_frame_is_in_progress() {
        let (mailbox, receiver, _) = ends();
        mailbox.offer(frame("1"));
        assert!(mailbox.drained().now_or_never().is_none(), "it waits");
        let taken = receiver.take().await;
        assert!(mailbox.drained().now_or_never().is_none(), "it is in progress");
        drop(taken);
        mailbox.drained().await;
    }

    #[tokio::test]
    async fn the_next_frame_is_copied_for_a_snapshot() {
        let (mailbox, receiver, _) = ends();
        let snapshot = mailbox.next_frame();
        mailbox.offer(frame("1"));
        mailbox.offer(frame("2"));
        assert_eq!(snapshot.await.unwrap().name.as_deref(), Some("1"));
        assert_eq!(name(&receiver.take().await), "2");
    }
}
