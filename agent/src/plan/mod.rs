//! Decisions. Everything in here is a pure function of what it is given: no async, no I/O, and time is an argument.

pub mod desired;
pub mod diff;

/// Where a model version stands on this node. The states between are what later versions of the agent pass through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelState {
    /// Wanted, and waiting for its turn.
    Pending,
    /// Being read, loaded and run once.
    Warming,
    /// Serving.
    Ready,
    /// Could not be loaded; it is tried again.
    Failed,
}

impl ModelState {
    /// As it stands in status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Warming => "Warming",
            Self::Ready => "Ready",
            Self::Failed => "Failed",
        }
    }
}
