//! One decoded picture.

/// The error for pixels that do not fit their picture's sides.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a {width}x{height} RGB picture takes {expected} bytes, not {found}")]
pub struct FrameError {
    width: u32,
    height: u32,
    expected: u64,
    found: usize,
}

/// A decoded picture: 8-bit RGB, rows top to bottom, no padding between rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl Frame {
    /// A frame of `width` x `height` pixels from interleaved RGB bytes.
    ///
    /// # Errors
    /// When a side is zero or the bytes are not `width * height * 3`.
    pub fn from_rgb(width: u32, height: u32, pixels: Vec<u8>) -> Result<Self, FrameError> {
        let expected = u64::from(width) * u64::from(height) * 3;
        if width == 0 || height == 0 || pixels.len() as u64 != expected {
            return Err(FrameError { width, height, expected, found: pixels.len() });
        }
        Ok(Self { width, height, pixels })
    }

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The pixels, three bytes each: red, green, blue.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }
}
