//! A camera frame on its way from a source to a model.
//!
//! A frame is one image in *some* layout: the bytes of a JPEG or PNG file, or pixels in a stated layout. It carries the
//! time it was captured and, where the source gives one, a name. Frames are cheap to clone: the bytes are shared.

use std::time::{Instant, SystemTime};

use bytes::Bytes;

/// How the pixels of an undecoded frame are laid out in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PixelLayout {
    /// 3 bytes per pixel: red, green, blue.
    Rgb8,
    /// 3 bytes per pixel: blue, green, red.
    Bgr8,
    /// 1 byte per pixel: luminance.
    Gray8,
}

impl PixelLayout {
    /// Bytes per pixel.
    pub fn bytes_per_pixel(self) -> usize {
        match self {
            Self::Rgb8 | Self::Bgr8 => 3,
            Self::Gray8 => 1,
        }
    }
}

/// What the bytes of a frame are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameFormat {
    /// The bytes of a JPEG or PNG file, not yet checked.
    Encoded,
    /// Uncompressed pixels, rows top to bottom.
    Pixels {
        /// The pixel layout.
        layout: PixelLayout,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Bytes from the start of one row to the start of the next; at least `width * bytes_per_pixel`.
        stride: usize,
    },
}

/// One image of a stream.
#[derive(Debug, Clone)]
pub struct Frame {
    /// The image, in the layout that `format` states.
    pub data: Bytes,
    /// What `data` holds.
    pub format: FrameFormat,
    /// The file name, where the source is a file.
    pub name: Option<String>,
    /// Wall-clock time at which the agent received the frame.
    pub captured_at: SystemTime,
    /// The same moment on the monotonic clock, for latency and age.
    pub arrived: Instant,
    /// `true` for a source that must lose no frame: the frame does not expire, however old it is.
    pub must_keep: bool,
}

impl Frame {
    /// A JPEG or PNG that was received now.
    pub fn encoded(data: Bytes, name: Option<String>, must_keep: bool) -> Self {
        Self {
            data,
            format: FrameFormat::Encoded,
            name,
            captured_at: SystemTime::now(),
            arrived: Instant::now(),
            must_keep,
        }
    }
}
