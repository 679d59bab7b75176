//! Where cameras and the instances of one model meet: a place for one frame per stream.
//!
//! A live camera overwrites the frame that still waits; the older one is the one nobody wants any more, and it is
//! counted as skipped. A source that must lose nothing (`dir:` with `fps: 0`) waits for its place to be empty instead.
//! So the memory of this queue is bounded by one frame per stream.
//!
//! ```text
//! camera a --offer--> [ frame ]--\
//! camera b --offer--> [       ]----take--> instance 1     streams take turns, and at most one frame
//! dir    c --put ---> [ frame ]--/    \--> instance 2     of a stream is being looked at at any time
//! ```
//!
//! Because a stream's frames are looked at one after the other, its results keep their order whatever the number of
//! instances. The instances that serve have the queue's current epoch; beginning a new epoch ends all older instances
//! at their next frame, which is how a new version takes over between two frames.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use prometheus::IntCounter;
use tokio::sync::{Notify, oneshot};

/// One frame as a camera gave it.
#[derive(Debug, Clone)]
pub struct CapturedFrame {
    /// JPEG or PNG.
    pub encoded: Bytes,
    /// Its name, where the source gives names.
    pub name: Option<String>,
    /// When it came, by the wall clock.
    pub captured_at: SystemTime,
    /// When it came, for measuring its age.
    pub arrived: Instant,
    /// Whether it may be dropped for its age. Frames of a source that loses nothing may not.
    pub may_be_stale: bool,
}

/// The queue of one model. `S` is what an instance needs to know of a stream.
pub struct FrameQueue<S> {
    state: Mutex<State<S>>,
    filled: Condvar,
}

struct State<S> {
    places: Vec<RecordId<S>>,
    /// Never given twice, so that a frame still being looked at cannot free the place of another stream.
    next_id: u64,
    /// Where to look first, so that streams take turns.
    turn: usize,
    epoch: u64,
}

struct RecordId<S> {
    id: u64,
    stream: Arc<S>,
    frame: Option<CapturedFrame>,
    /// A frame of this stream is being looked at.
    busy: bool,
    emptied: Arc<Notify>,
    skipped: IntCounter,
    /// Somebody wants to see the next frame.
    wish: Option<oneshot::Sender<CapturedFrame>>,
}

impl<S> Default for FrameQueue<S> {
    fn default() -> Self {
        Self { state: Mutex::new(State { places: Vec::new(), next_id: 0, turn: 0, epoch: 0 }), filled: Condvar::new() }
    }
}

impl<S> FrameQueue<S> {
    fn state(&self) -> MutexGuard<'_, State<S>> {
        // Nothing in here panics while it holds the lock, so a poisoned one is as good as any.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a stream its place. It is gone when the mailbox is dropped, and with it a frame that still waits.
    pub fn attach(self: &Arc<Self>, stream: Arc<S>, skipped: IntCounter) -> Mailbox<S> {
        let emptied = Arc::new(Notify::new());
        let mut state = self.state();
        let id = state.next_id;
        state.next_id += 1;
        state.places.push(RecordId {
            id,
            stream,
            frame: None,
            busy: false,
            emptied: emptied.clone(),
            skipped,
            wish: None,
        });
        drop(state);
        Mailbox { queue: self.clone(), id, emptied }
    }

    /// Ends all instances of earlier epochs at their next frame, and returns the new one.
    pub fn begin_epoch(&self) -> u64 {
        let mut state = self.state();
        state.epoch += 1;
        let epoch = state.epoch;
        drop(state);
        self.filled.notify_all();
        epoch
    }

    /// Waits for a frame. `None` when `epoch` is over.
    pub fn take(self: &Arc<Self>, epoch: u64) -> Option<Taken<S>> {
        let mut state = self.state();
        loop {
            if state.epoch != epoch {
                return None;
            }
            let count = state.places.len();
            let first = state.turn;
            for step in 0..count {
                let index = (first + step) % count;
                let place = &mut state.places[index];
                if place.busy {
                    continue;
                }
                let Some(frame) = place.frame.take() else { continue };
                place.busy = true;
                place.emptied.notify_one();
                let (id, stream) = (place.id, place.stream.clone());
                state.turn = index + 1;
                return Some(Taken { queue: self.clone(), id, stream, frame });
            }
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A stream's place in the queue.
pub struct Mailbox<S> {
    queue: Arc<FrameQueue<S>>,
    id: u64,
    emptied: Arc<Notify>,
}

impl<S> Mailbox<S> {
    /// Leaves a frame. One that still waits is dropped and counted.
    pub fn offer(&self, frame: CapturedFrame) {
        let mut state = self.queue.state();
        if let Some(place) = state.places.iter_mut().find(|place| place.id == self.id) {
            if let Some(wish) = place.wish.take() {
                // Whoever wanted it may have given up.
                drop(wish.send(frame.clone()));
            }
            if place.frame.replace(frame).is_some() {
                place.skipped.inc();
            }
        }
        drop(state);
        self.queue.filled.notify_one();
    }

    /// A way to see frames that are left here.
    pub fn onlooker(&self) -> FrameTap<S> {
        FrameTap { queue: self.queue.clone(), id: self.id }
    }

    /// Waits until the place is empty and leaves a frame there.
    pub async fn put(&self, frame: CapturedFrame) {
        self.until(|place| place.frame.is_none()).await;
        self.offer(frame);
    }

    /// Waits until no frame waits and none is being looked at.
    pub async fn drained(&self) {
        self.until(|place| place.frame.is_none() && !place.busy).await;
    }

    async fn until(&self, reached: impl Fn(&RecordId<S>) -> bool) {
        loop {
            let told = self.emptied.notified();
            if self.queue.state().places.iter().find(|place| place.id == self.id).is_none_or(&reached) {
                return;
            }
            told.await;
        }
    }
}

impl<S> Drop for Mailbox<S> {
    fn drop(&mut self) {
        self.queue.state().places.retain(|place| place.id != self.id);
    }
}

/// Sees frames of a stream besides the model.
pub struct FrameTap<S> {
    queue: Arc<FrameQueue<S>>,
    id: u64,
}

impl<S> FrameTap<S> {
    /// The next frame that comes. Only the last one who asked gets it.
    pub fn next_frame(&self) -> oneshot::Receiver<CapturedFrame> {
        let (wish, frame) = oneshot::channel();
        if let Some(place) = self.queue.state().places.iter_mut().find(|place| place.id == self.id) {
            place.wish = Some(wish);
        }
        frame
    }
}

/// A frame being looked at. While it exists, no other frame of its stream is given out.
pub struct Taken<S> {
    queue: Arc<FrameQueue<S>>,
    id: u64,
    /// The stream it came from.
    pub stream: Arc<S>,
    /// The frame.
    pub frame: CapturedFrame,
}

impl<S> Drop for Taken<S> {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        if let Some(place) = state.places.iter_mut().find(|place| place.id == self.id) {
            place.busy = false;
            place.emptied.notify_one();
        }
        drop(state);
        self.queue.filled.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn frame(name: &str) -> CapturedFrame {
        CapturedFrame {
            encoded: Bytes::new(),
            name: Some(name.to_owned()),
            captured_at: SystemTime::now(),
            arrived: Instant::now(),
            may_be_stale: true,
        }
    }

    fn skipped() -> IntCounter {
        IntCounter::new("skipped", "skipped").unwrap()
    }

    fn name(taken: &Taken<&'static str>) -> String {
        format!("{}/{}", taken.stream, taken.frame.name.clone().unwrap_or_default())
    }

    #[test]
    fn the_latest_frame_wins_and_the_older_is_counted() {
        let queue = Arc::new(FrameQueue::default());
        let epoch = queue.begin_epoch();
        let counter = skipped();
        let mailbox = queue.attach(Arc::new("a"), counter.clone());
        ["1", "2", "3"].into_iter().for_each(|name| mailbox.offer(frame(name)));
        assert_eq!(name(&queue.take(epoch).unwrap()), "a/3");
        assert_eq!(counter.get(), 2);
    }

    #[test]
    fn streams_take_turns_and_a_busy_one_waits() {
        let queue = Arc::new(FrameQueue::default());
        let epoch = queue.begin_epoch();
        let boxes = ["a", "b"].map(|stream| queue.attach(Arc::new(stream), skipped()));
        boxes.iter().for_each(|mailbox| mailbox.offer(frame("1")));
        let first = queue.take(epoch).unwrap();
        boxes[0].offer(frame("2"));
        let second = queue.take(epoch).unwrap();
        assert_eq!((name(&first), name(&second)), ("a/1".to_owned(), "b/1".to_owned()));
        boxes[1].offer(frame("2"));
        drop(second);
        assert_eq!(name(&queue.take(epoch).unwrap()), "b/2", "a is still being looked at");
        drop(first);
        assert_eq!(name(&queue.take(epoch).unwrap()), "a/2");
    }

    #[test]
    fn a_frame_of_a_stream_that_is_gone_frees_no_other_streams_place() {
        let queue = Arc::new(FrameQueue::default());
        let epoch = queue.begin_epoch();
        let before = queue.attach(Arc::new("before"), skipped());
        before.offer(frame("1"));
        let old = queue.take(epoch).unwrap();
        drop(before);
        let after = queue.attach(Arc::new("after"), skipped());
        after.offer(frame("1"));
        let new = queue.take(epoch).unwrap();
        drop(old);
        assert!(queue.state().places[0].busy, "{} is still being looked at", name(&new));
    }

    #[test]
    fn a_new_epoch_ends_the_instances_of_the_old_one() {
        let queue: Arc<FrameQueue<&'static str>> = Arc::new(FrameQueue::default());
        let epoch = queue.begin_epoch();
        let waiting = std::thread::spawn({
            let queue = queue.clone();
            move || queue.take(epoch).is_none()
        });
        let next = queue.begin_epoch();
        assert!(waiting.join().unwrap());
        let mailbox = queue.attach(Arc::new("a"), skipped());
        mailbox.offer(frame("1"));
        assert!(queue.take(epoch).is_none());
        assert!(queue.take(next).is_some());
    }

    #[tokio::test]
    async fn a_source_that_loses_nothing_waits_for_its_place() {
        let queue = Arc::new(FrameQueue::default());
        let epoch = queue.begin_epoch();
        let counter = skipped();
        let mailbox = queue.attach(Arc::new("a"), counter.clone());
        let seen = std::thread::spawn({
            let queue = queue.clone();
            move || (0..50).map(|_| name(&queue.take(epoch).unwrap())).collect::<Vec<_>>()
        });
        for number in 0..50 {
            mailbox.put(frame(&number.to_string())).await;
        }
        mailbox.drained().await;
        assert_eq!(seen.join().unwrap(), (0..50).map(|number| format!("a/{number}")).collect::<Vec<_>>());
        assert_eq!(counter.get(), 0);
    }

    #[tokio::test]
    async fn a_place_goes_with_its_mailbox() {
        let queue = Arc::new(FrameQueue::default());
        let epoch = queue.begin_epoch();
        let mailbox = queue.attach(Arc::new("a"), skipped());
        mailbox.offer(frame("1"));
        assert!(mailbox.put(frame("2")).now_or_never().is_none(), "nobody takes the first");
        let taken = queue.take(epoch).unwrap();
        drop(mailbox);
        drop(taken);
        assert!(queue.state().places.is_empty());
    }
}
