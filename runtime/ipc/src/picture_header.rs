//! What the header of an encoded picture states: its format, its sides, and the memory that decoding takes.
//! [`crate::picture`] reads it.

/// The format of an encoded picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PictureFormat {
    /// JPEG (ITU-T T.81).
    Jpeg,
    /// PNG (ISO/IEC 15948).
    Png,
}

/// The header of an encoded picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureHeader {
    /// The format.
    pub format: PictureFormat,
    /// Width in pixels, at least 1.
    pub width: u32,
    /// Height in pixels, at least 1.
    pub height: u32,
    pub(crate) decode_bytes: u64,
}

/// Why a header cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The bytes are neither a JPEG nor a PNG, or their header is not valid.
    #[error("the bytes are not a picture: neither JPEG nor PNG")]
    NotAPicture,
    /// The bytes begin as a JPEG or PNG and end before the pixels.
    #[error("the picture is cut off before its pixels")]
    Truncated,
}

impl PictureHeader {
    /// Pixels of the picture.
    pub fn pixels(&self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }

    /// Upper bound of the memory in bytes that is allocated to decode the picture into 8-bit RGB: the pixels as the format
    /// has them, the copy as RGB, and the coefficients of a progressive JPEG, which the decoder holds for the whole picture.
    pub fn decode_bytes(&self) -> u64 {
        self.decode_bytes
    }
}
