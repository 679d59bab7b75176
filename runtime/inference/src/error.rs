//! What can go wrong in the data plane, sorted by what a caller should do about it.

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of thing went wrong. Branch on this; show the message to people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The bytes are no complete JPEG or PNG. Count the frame as failed and go on with the next.
    BadFrame,
    /// The picture is larger than the limits allow. Count it as failed; raise the limit or make the camera send less.
    FrameTooLarge,
    /// The bytes are no ONNX model. Fetch or export it again; trying once more will not help.
    BadModel,
    /// The model is sound but this engine cannot run it. Try another engine, or export it another way.
    Unsupported,
    /// The manifest and the model do not fit each other. The message names the field to change.
    BadSpec,
    /// The engine failed on this input. Count the frame as failed; a model that keeps failing should be replaced.
    Inference,
    /// The output of the model has no meaning, such as NaN. Treat it as a fault of the model.
    BadOutput,
}

/// An error with a kind to branch on and a message that says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

impl Error {
    /// An error of the given kind. The message is for people: what, which, why, what to do.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// What a caller should branch on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl From<lineside_api::tensor::ShapeError> for Error {
    fn from(error: lineside_api::tensor::ShapeError) -> Self {
        Self::new(ErrorKind::BadSpec, error.to_string())
    }
}
