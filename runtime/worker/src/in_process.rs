//! A worker on threads of this process.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use lineside_api::prediction::Inspection;
use lineside_inference::ErrorKind;
use lineside_inference::pipeline::{InferStage, Pipeline, PrepareStage, Prepared};
use parking_lot::Mutex;

use crate::activity::{Activity, ActivityBoard, MemoryBoard, Stage};
use crate::rule_cache::RuleCache;
use crate::{BatchId, BatchReply, EventSink, WorkError, WorkErrorKind, WorkItem, Worker, WorkerEvent};

/// Batches between the two stages of an instance. With one being prepared and one being inferred, both stages are busy.
const HANDOVER_MAX: usize = 1;
/// Batches that an instance can hold: one in each stage.
pub(crate) const BATCHES_PER_INSTANCE: usize = 2;
/// Threads of an instance, each with an entry on the activity board.
pub(crate) const THREADS_PER_INSTANCE: usize = 2;

/// Serves a version on two threads for each instance. Dropping it ends the threads after the batches they hold; it does not
/// wait for them.
pub struct InProcessWorker {
    batches: Sender<(BatchId, Vec<WorkItem>)>,
    instances: usize,
    engine: &'static str,
    /// `None` when the board belongs to someone else.
    board: Option<Arc<MemoryBoard>>,
}

/// What waits for the engine: the frames that could be prepared, and the errors of those that could not.
struct PreparedBatch {
    batch: BatchId,
    items: Vec<(WorkItem, Result<Prepared, WorkError>)>,
}

/// A thread's entry on the board.
#[derive(Clone)]
struct Entry {
    board: Arc<dyn ActivityBoard>,
    index: usize,
}

impl Entry {
    fn set(&self, batch: BatchId, item: usize, stage: Stage) {
        self.board.set(self.index, Some(Activity { batch, item, stage }));
    }

    fn clear(&self) {
        self.board.set(self.index, None);
    }
}

impl InProcessWorker {
    /// Starts the threads, two for each pipeline. `name` becomes the end of the threads' names.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(name: &str, pipelines: Vec<Pipeline>, events: EventSink) -> io::Result<Self> {
        let board = Arc::new(MemoryBoard::default());
        let worker = Self::start_with_board(name, pipelines, board.clone(), events)?;
        Ok(Self { board: Some(board), ..worker })
    }

    /// As [`InProcessWorker::start`]; the threads state on `board` what they do, with two entries for each pipeline.
    pub(crate) fn start_with_board(
        name: &str,
        pipelines: Vec<Pipeline>,
        board: Arc<dyn ActivityBoard>,
        events: EventSink,
    ) -> io::Result<Self> {
        let instances = pipelines.len();
        let engine = pipelines.first().map_or("none", Pipeline::engine);
        let (batches, queue) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let events = Arc::new(events);
        for (index, pipeline) in pipelines.into_iter().enumerate() {
            let (mut prepare, mut infer) = pipeline.into_stages();
            let (handover, prepared) = sync_channel::<PreparedBatch>(HANDOVER_MAX);
            let queue = queue.clone();
            let entry = Entry { board: board.clone(), index: index * THREADS_PER_INSTANCE };
            let infer_entry = Entry { index: entry.index + 1, ..entry.clone() };
            std::thread::Builder::new()
                .name(format!("d{index}-{name}"))
                .spawn(move || prepare_loop(&queue, &mut prepare, &handover, &entry))?;
            let events = events.clone();
            std::thread::Builder::new()
                .name(format!("i{index}-{name}"))
                .spawn(move || infer_loop(&prepared, &mut infer, &events, &infer_entry))?;
        }
        Ok(Self { batches, instances, engine, board: None })
    }
}

impl Worker for InProcessWorker {
    fn submit(&self, batch: BatchId, items: Vec<WorkItem>) -> Result<(), WorkError> {
        self.batches
            .send((batch, items))
            .map_err(|_| WorkError::new(WorkErrorKind::Worker, "the worker's threads have ended"))
    }

    fn capacity(&self) -> usize {
        self.instances * BATCHES_PER_INSTANCE
    }

    fn instances(&self) -> usize {
        self.instances
    }

    fn engine(&self) -> &str {
        self.engine
    }

    fn activity(&self) -> Vec<Activity> {
        self.board.as_ref().map(|board| board.read()).unwrap_or_default()
    }

    fn cpu_time(&self) -> Option<Duration> {
        None
    }
}

fn prepare_loop(
    queue: &Mutex<Receiver<(BatchId, Vec<WorkItem>)>>,
    stage: &mut PrepareStage,
    handover: &SyncSender<PreparedBatch>,
    entry: &Entry,
) {
    loop {
        // One idle instance waits for the next batch while it holds the lock; the others wait for the lock.
        let next = queue.lock().recv();
        let Ok((batch, items)) = next else { return };
        let mut prepared = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            entry.set(batch, index, Stage::Decode);
            let outcome = prepare(stage, &item, || entry.set(batch, index, Stage::Preprocess));
            prepared.push((item, outcome));
        }
        entry.clear();
        if handover.send(PreparedBatch { batch, items: prepared }).is_err() {
            return;
        }
    }
}

fn prepare(stage: &mut PrepareStage, item: &WorkItem, on_decoded: impl FnOnce()) -> Result<Prepared, WorkError> {
    check_deadline(item.deadline)?;
    // Decoders are other people's code on bytes of a camera: a panic costs the frame and not the thread.
    catch_unwind(AssertUnwindSafe(|| stage.run(&item.frame, on_decoded)))
        .map_err(|_| panicked("decoding the frame"))?
        .map_err(|error| WorkError::new(kind_of(error.kind()), error.to_string()))
}

fn infer_loop(prepared: &Receiver<PreparedBatch>, stage: &mut InferStage, events: &EventSink, entry: &Entry) {
    let mut rules = RuleCache::default();
    while let Ok(PreparedBatch { batch, items }) = prepared.recv() {
        entry.set(batch, 0, Stage::Infer);
        let (items, inputs): (Vec<WorkItem>, Vec<_>) = items.into_iter().unzip();
        let mut results = infer(stage, &items, inputs);
        for (index, (item, result)) in items.iter().zip(&mut results).enumerate() {
            if let (Some(rule), Ok(inspection)) = (&item.rule, result) {
                entry.set(batch, index, Stage::Rule);
                inspection.rule = Some(rules.evaluate(rule, inspection, item.frame.name.as_deref()));
            }
        }
        // The frames are given up before the reply: their memory may be used again from then on.
        drop(items);
        entry.clear();
        events(WorkerEvent::Reply(BatchReply { batch, results }));
    }
}

/// Runs the engine on the items that are still wanted. The results have the order of the items.
fn infer(
    stage: &mut InferStage,
    items: &[WorkItem],
    inputs: Vec<Result<Prepared, WorkError>>,
) -> Vec<Result<Inspection, WorkError>> {
    let mut ready = Vec::new();
    let mut results: Vec<Option<Result<Inspection, WorkError>>> = Vec::with_capacity(inputs.len());
    for (item, input) in items.iter().zip(inputs) {
        match input.and_then(|prepared| check_deadline(item.deadline).map(|()| prepared)) {
            Ok(prepared) => {
                ready.push((results.len(), prepared));
                results.push(None);
            }
            Err(error) => results.push(Some(Err(error))),
        }
    }
    let (indices, inputs): (Vec<usize>, Vec<Prepared>) = ready.into_iter().unzip();
    if !inputs.is_empty() {
        // The engine is fenced by itself; postprocessing is ours, and must not take the thread with it either.
        match catch_unwind(AssertUnwindSafe(|| stage.run(inputs))) {
            Ok(answers) => {
                for (index, answer) in indices.into_iter().zip(answers) {
                    results[index] =
                        Some(answer.map_err(|error| WorkError::new(kind_of(error.kind()), error.to_string())));
                }
            }
            Err(_) => indices.into_iter().for_each(|index| results[index] = Some(Err(panicked("inference")))),
        }
    }
    let missing = || Err(WorkError::new(WorkErrorKind::Worker, "the worker gave no result for this frame"));
    results.into_iter().map(|result| result.unwrap_or_else(missing)).collect()
}

fn check_deadline(deadline: Option<Instant>) -> Result<(), WorkError> {
    match deadline {
        Some(deadline) if Instant::now() > deadline => {
            Err(WorkError::new(WorkErrorKind::Expired, "the frame's deadline has passed"))
        }
        _ => Ok(()),
    }
}

fn panicked(stage: &str) -> WorkError {
    WorkError::new(WorkErrorKind::Worker, format!("{stage} panicked; the log has the location"))
}

fn kind_of(kind: ErrorKind) -> WorkErrorKind {
    match kind {
        ErrorKind::BadFrame | ErrorKind::FrameTooLarge => WorkErrorKind::Frame,
        _ => WorkErrorKind::Model,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use bytes::Bytes;
    use lineside_api::prediction::Prediction;
    use lineside_api::spec::{ModelSpec, RuntimeSpec};
    use lineside_api::verdict::{RuleOutcome, Verdict};
    use lineside_inference::engine::Tract;
    use lineside_ipc::frame::{Frame, FrameFormat, PixelLayout};
    use lineside_tests::onnx::mean_colour_classifier;

    use super::*;

    /// A frame of one colour, as pixels.
    fn frame(pixel: [u8; 3]) -> Frame {
        let format = FrameFormat::Pixels { layout: PixelLayout::Rgb8, width: 8, height: 8, stride: 24 };
        Frame { format, ..Frame::encoded(Bytes::from(pixel.repeat(64)), None, false) }
    }

    fn item(pixel: [u8; 3]) -> WorkItem {
        WorkItem { frame: frame(pixel), deadline: None, rule: None }
    }

    fn worker(instances: usize, max_batch_size: u32) -> (InProcessWorker, Receiver<BatchReply>) {
        let runtime = RuntimeSpec { max_batch_size: Some(max_batch_size), ..RuntimeSpec::default() };
        let spec = ModelSpec { runtime, ..ModelSpec::default() };
        let first = Pipeline::load(&Tract, &mean_colour_classifier(8, 8, 3).build(), &spec).unwrap();
        let mut pipelines: Vec<Pipeline> = (1..instances).map(|_| first.fork().unwrap()).collect();
        pipelines.push(first);
        let (send, replies) = channel();
        let events: EventSink = Box::new(move |event| match event {
            WorkerEvent::Reply(reply) => drop(send.send(reply)),
            WorkerEvent::Ended { reason, .. } => panic!("{reason}"),
        });
        (InProcessWorker::start("m", pipelines, events).unwrap(), replies)
    }

    fn best_class(result: &Result<Inspection, WorkError>) -> u32 {
        match &result.as_ref().unwrap().prediction {
            Prediction::Classes(classes) => classes[0].class,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_batch_is_answered_once_and_every_frame_by_its_own_content() {
        let (worker, replies) = worker(2, 4);
        let colours = [[200, 9, 9], [9, 200, 9], [9, 9, 200]];
        let batches: u64 = 60;
        for batch in 0..batches {
            let size = (batch % 5) as usize;
            let items = (0..size).map(|index| item(colours[(batch as usize + index) % 3])).collect();
            worker.submit(batch, items).unwrap();
        }
        let mut answered = std::collections::BTreeSet::new();
        for _ in 0..batches {
            let reply = replies.recv_timeout(Duration::from_secs(60)).unwrap();
            assert!(answered.insert(reply.batch), "batch {} was answered twice", reply.batch);
            assert_eq!(reply.results.len(), (reply.batch % 5) as usize);
            for (index, result) in reply.results.iter().enumerate() {
                assert_eq!(best_class(result) as usize, (reply.batch as usize + index) % 3);
            }
        }
    }

    #[test]
    fn bad_and_expired_frames_fail_alone() {
        let (worker, replies) = worker(1, 1);
        let bad = WorkItem { frame: Frame::encoded(Bytes::from_static(b"GIF89a"), None, false), ..item([0; 3]) };
        let expired = WorkItem { deadline: Instant::now().checked_sub(Duration::from_secs(1)), ..item([9, 9, 200]) };
        worker.submit(7, vec![bad, item([9, 200, 9]), expired]).unwrap();
        let results = replies.recv_timeout(Duration::from_secs(60)).unwrap().results;
        assert_eq!(results[0].as_ref().unwrap_err().kind(), WorkErrorKind::Frame);
        assert_eq!(best_class(&results[1]), 1);
        assert_eq!(results[2].as_ref().unwrap_err().kind(), WorkErrorKind::Expired);
    }

    #[test]
    fn a_dropped_worker_answers_what_it_holds() {
        let (worker, replies) = worker(1, 1);
        (0..2).for_each(|batch| worker.submit(batch, vec![item([200, 9, 9])]).unwrap());
        drop(worker);
        assert_eq!(replies.iter().count(), 2, "the channel ends with the threads");
    }

    #[test]
    fn rules_are_evaluated_on_the_answer_to_their_own_frame() {
        let (worker, replies) = worker(1, 1);
        let with_rule = |pixel, rule: &str| WorkItem { rule: Some(rule.into()), ..item(pixel) };
        let rule = "classes[0].class == 1 ? 'reject' : 'pass'";
        let items = vec![
            with_rule([9, 200, 9], rule),
            with_rule([200, 9, 9], rule),
            item([200, 9, 9]),
            with_rule([200, 9, 9], "classes[99].class == 1 ? 'reject' : 'pass'"),
            with_rule([200, 9, 9], "("),
        ];
        worker.submit(1, items).unwrap();
        let results = replies.recv_timeout(Duration::from_secs(60)).unwrap().results;
        let outcomes: Vec<_> = results.into_iter().map(|result| result.unwrap().rule).collect();
        assert_eq!(outcomes[0], Some(RuleOutcome::Verdict(Verdict::Reject)));
        assert_eq!(outcomes[1], Some(RuleOutcome::Verdict(Verdict::Pass)));
        assert_eq!(outcomes[2], None);
        assert!(
            matches!(outcomes[3], Some(RuleOutcome::Failed(_))) && matches!(outcomes[4], Some(RuleOutcome::Failed(_)))
        );
        assert_eq!(worker.activity(), [], "an idle worker does nothing");
    }
}
