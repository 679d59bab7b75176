//! A worker on threads of this process.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Instant;

use lineside_api::prediction::Inspection;
use lineside_inference::ErrorKind;
use lineside_inference::pipeline::{InferStage, Pipeline, PrepareStage, Prepared};

use crate::{BatchId, BatchReply, ReplySink, WorkError, WorkErrorKind, WorkItem, Worker};

/// Batches between the two stages of an instance. With one being prepared and one being inferred, both stages are busy.
const HANDOVER_MAX: usize = 1;
/// Batches that an instance can hold: one in each stage, and one between them.
const BATCHES_PER_INSTANCE: usize = 2;

/// Serves a version on two threads for each instance. Dropping it ends the threads after the batches they hold; it does not
/// wait for them.
pub struct InProcessWorker {
    batches: Sender<(BatchId, Vec<WorkItem>)>,
    instances: usize,
}

/// What waits for the engine: the frames that could be prepared, and the errors of those that could not.
struct PreparedBatch {
    batch: BatchId,
    items: Vec<Result<(Prepared, Option<Instant>), WorkError>>,
}

impl InProcessWorker {
    /// Starts the threads, two for each pipeline. `name` becomes the beginning of the threads' names.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(name: &str, pipelines: Vec<Pipeline>, reply: ReplySink) -> io::Result<Self> {
        let instances = pipelines.len();
        let (batches, queue) = channel();
        let queue = Arc::new(parking_lot::Mutex::new(queue));
        let reply = Arc::new(reply);
        for (index, pipeline) in pipelines.into_iter().enumerate() {
            let (mut prepare, mut infer) = pipeline.into_stages();
            let (handover, prepared) = sync_channel::<PreparedBatch>(HANDOVER_MAX);
            let queue = queue.clone();
            std::thread::Builder::new()
                .name(format!("d{index}-{name}"))
                .spawn(move || prepare_loop(&queue, &mut prepare, &handover))?;
            let reply = reply.clone();
            std::thread::Builder::new()
                .name(format!("i{index}-{name}"))
                .spawn(move || infer_loop(&prepared, &mut infer, &reply))?;
        }
        Ok(Self { batches, instances })
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
}

fn prepare_loop(
    queue: &parking_lot::Mutex<Receiver<(BatchId, Vec<WorkItem>)>>,
    stage: &mut PrepareStage,
    handover: &SyncSender<PreparedBatch>,
) {
    loop {
        // One idle instance waits for the next batch while it holds the lock; the others wait for the lock.
        let next = queue.lock().recv();
        let Ok((batch, items)) = next else { return };
        let items = items.into_iter().map(|item| prepare(stage, &item).map(|ready| (ready, item.deadline))).collect();
        if handover.send(PreparedBatch { batch, items }).is_err() {
            return;
        }
    }
}

fn prepare(stage: &mut PrepareStage, item: &WorkItem) -> Result<Prepared, WorkError> {
    check_deadline(item.deadline)?;
    // Decoders are other people's code on bytes of a camera: a panic costs the frame and not the thread.
    catch_unwind(AssertUnwindSafe(|| stage.run(&item.frame)))
        .map_err(|_| panicked("decoding the frame"))?
        .map_err(|error| WorkError::new(kind_of(error.kind()), error.to_string()))
}

fn infer_loop(prepared: &Receiver<PreparedBatch>, stage: &mut InferStage, reply: &ReplySink) {
    while let Ok(PreparedBatch { batch, items }) = prepared.recv() {
        let results = infer(stage, items);
        reply(BatchReply { batch, results });
    }
}

/// Runs the engine on the items that are still wanted. The results have the order of the items.
fn infer(
    stage: &mut InferStage,
    items: Vec<Result<(Prepared, Option<Instant>), WorkError>>,
) -> Vec<Result<Inspection, WorkError>> {
    let mut ready = Vec::new();
    let mut results: Vec<Option<Result<Inspection, WorkError>>> = Vec::with_capacity(items.len());
    for item in items {
        match item.and_then(|(prepared, deadline)| check_deadline(deadline).map(|()| prepared)) {
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
        WorkItem { frame: frame(pixel), deadline: None }
    }

    fn worker(instances: usize, max_batch_size: u32) -> (InProcessWorker, Receiver<BatchReply>) {
        let runtime = RuntimeSpec { max_batch_size: Some(max_batch_size), ..RuntimeSpec::default() };
        let spec = ModelSpec { runtime, ..ModelSpec::default() };
        let first = Pipeline::load(&Tract, &mean_colour_classifier(8, 8, 3).build(), &spec).unwrap();
        let mut pipelines: Vec<Pipeline> = (1..instances).map(|_| first.fork().unwrap()).collect();
        pipelines.push(first);
        let (send, replies) = channel();
        let reply: ReplySink = Box::new(move |reply| drop(send.send(reply)));
        (InProcessWorker::start("m", pipelines, reply).unwrap(), replies)
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
        let bad = WorkItem { frame: Frame::encoded(Bytes::from_static(b"GIF89a"), None, false), deadline: None };
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
}
