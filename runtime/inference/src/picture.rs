//! A decoded picture: the common form of all frames inside the data plane.

use crate::{Error, ErrorKind, Result};

/// A decoded picture: 8-bit RGB, rows top to bottom, no padding between rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl Picture {
    /// A picture of `width` x `height` pixels from interleaved RGB bytes.
    ///
    /// # Errors
    /// [`ErrorKind::BadFrame`] when a side is zero or the bytes are not `width * height * 3`.
    pub fn from_rgb(width: u32, height: u32, pixels: Vec<u8>) -> Result<Self> {
        let expected = u64::from(width) * u64::from(height) * 3;
        if width == 0 || height == 0 || pixels.len() as u64 != expected {
            return Err(Error::new(
                ErrorKind::BadFrame,
                format!("a {width}x{height} RGB picture takes {expected} bytes, not {}", pixels.len()),
            ));
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
