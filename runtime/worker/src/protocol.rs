//! The messages between the agent and a worker process, after the descriptors of the frame slots, of the model and of the
//! activity board, in this order. Both sides are the same program; the handshake states the version.

use lineside_ipc::frame::{FrameFormat, PixelLayout};
use serde::{Deserialize, Serialize};

use crate::{BatchId, BatchReply};

/// The handshake line of the child.
pub(crate) const HANDSHAKE: &str = "lineside-worker 1";

/// Rules that the child knows at once, more than the frames of any batch.
pub(crate) const RULES_MAX: usize = 2048;

/// The first message to the child: what to serve.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Start {
    /// Name of the model, for the names of threads.
    pub(crate) name: String,
    /// The `ModelSpec` as JSON.
    pub(crate) spec: String,
    /// Length of the model file.
    pub(crate) model_bytes: usize,
    /// Number of instances.
    pub(crate) instances: usize,
    /// Number of frame slots.
    pub(crate) slots: usize,
    /// Bytes of each frame slot.
    pub(crate) slot_bytes: usize,
}

/// A message to the child that serves.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Defines the rule of an id, for the batches that follow.
    Rule {
        /// The id.
        id: u32,
        /// The expression.
        text: String,
    },
    /// Forgets all rules.
    ClearRules,
    /// Frames to inspect.
    Batch {
        /// Id of the batch.
        batch: BatchId,
        /// The frames.
        items: Vec<Item>,
    },
}

/// One frame of a batch.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Item {
    /// The slot with the frame.
    pub(crate) slot: usize,
    /// Bytes of the frame.
    pub(crate) length: usize,
    /// What the bytes are.
    pub(crate) format: Format,
    /// Name of the frame.
    pub(crate) name: Option<String>,
    /// Microseconds until the deadline.
    pub(crate) remaining_us: Option<u64>,
    /// Id of the rule.
    pub(crate) rule: Option<u32>,
}

/// A [`FrameFormat`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Format {
    Encoded,
    Rgb8 { width: u32, height: u32, stride: usize },
    Bgr8 { width: u32, height: u32, stride: usize },
    Gray8 { width: u32, height: u32, stride: usize },
}

impl From<FrameFormat> for Format {
    fn from(format: FrameFormat) -> Self {
        match format {
            FrameFormat::Encoded => Self::Encoded,
            FrameFormat::Pixels { layout: PixelLayout::Rgb8, width, height, stride } => {
                Self::Rgb8 { width, height, stride }
            }
            FrameFormat::Pixels { layout: PixelLayout::Bgr8, width, height, stride } => {
                Self::Bgr8 { width, height, stride }
            }
            FrameFormat::Pixels { layout: PixelLayout::Gray8, width, height, stride } => {
                Self::Gray8 { width, height, stride }
            }
        }
    }
}

impl From<Format> for FrameFormat {
    fn from(format: Format) -> Self {
        let (layout, width, height, stride) = match format {
            Format::Encoded => return Self::Encoded,
            Format::Rgb8 { width, height, stride } => (PixelLayout::Rgb8, width, height, stride),
            Format::Bgr8 { width, height, stride } => (PixelLayout::Bgr8, width, height, stride),
            Format::Gray8 { width, height, stride } => (PixelLayout::Gray8, width, height, stride),
        };
        Self::Pixels { layout, width, height, stride }
    }
}

/// A message from the child.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Response {
    /// The model is loaded and warm.
    Ready {
        /// Name of the engine.
        engine: String,
    },
    /// The model cannot be loaded. The child ends.
    Failed {
        /// Whether the manifest is the reason, and not the model.
        is_manifest: bool,
        /// The reason, for people.
        reason: String,
    },
    /// The answer to a batch.
    Reply(BatchReply),
}
