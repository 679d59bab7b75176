//! The only door to the `image` crate: JPEG or PNG bytes to a [`Frame`], within limits.
//!
//! The header is read first. Nothing is allocated for a picture before its sides, its pixel count and the bytes it would
//! take are known to be within [`DecodeLimits`], so a bomb costs its header and no more. A JPEG that has lost its end is
//! refused: decoders fill what is missing with grey, and a verdict on grey is worse than none.

use std::io::Cursor;

use image::{ImageDecoder, ImageFormat, ImageReader};

use crate::jpeg;
use crate::jpeg::Extent;
use crate::{Error, ErrorKind, Result};
use lineside_ipc::frame::Frame;

/// What a frame may cost at most. The defaults fit a 24-megapixel line camera.
#[derive(Debug, Clone, Copy)]
pub struct DecodeLimits {
    /// Encoded bytes.
    pub encoded_bytes_max: usize,
    /// Pixels on one side.
    pub side_pixels_max: u32,
    /// Pixels in all.
    pub total_pixels_max: u64,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self { encoded_bytes_max: 16 << 20, side_pixels_max: 16_384, total_pixels_max: 40_000_000 }
    }
}

/// Decodes one JPEG or PNG into RGB. Grey, palette and 16-bit pictures are converted; an alpha channel is dropped.
///
/// # Errors
/// [`ErrorKind::BadFrame`] for bytes that are no complete JPEG or PNG, [`ErrorKind::FrameTooLarge`] beyond `limits`.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<Frame> {
    if bytes.len() > limits.encoded_bytes_max {
        return Err(too_large(format!(
            "the frame has {} bytes, more than the limit of {}",
            bytes.len(),
            limits.encoded_bytes_max
        )));
    }
    let format = format_of(bytes)?;
    let decoder = ImageReader::with_format(Cursor::new(bytes), format).into_decoder().map_err(bad_frame)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    // A 16-bit RGBA source takes eight bytes a pixel while it is decoded.
    let bytes_max = limits.total_pixels_max.saturating_mul(8);
    if width.max(height) > limits.side_pixels_max
        || pixels > limits.total_pixels_max
        || decoder.total_bytes() > bytes_max
    {
        return Err(too_large(format!(
            "the frame is {width}x{height}, more than the limit of {} pixels on a side and {} in all",
            limits.side_pixels_max, limits.total_pixels_max
        )));
    }
    let picture = image::DynamicImage::from_decoder(decoder).map_err(bad_frame)?;
    Ok(Frame::from_rgb(width, height, picture.into_rgb8().into_raw())?)
}

/// JPEG or PNG, told by the first bytes, and complete where that can be told.
fn format_of(bytes: &[u8]) -> Result<ImageFormat> {
    if bytes.is_empty() {
        return Err(Error::new(ErrorKind::BadFrame, "the frame is empty"));
    }
    if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        return Ok(ImageFormat::Png);
    }
    match jpeg::extent(bytes) {
        Extent::Complete(_) => Ok(ImageFormat::Jpeg),
        Extent::Truncated => Err(Error::new(
            ErrorKind::BadFrame,
            format!("the JPEG is cut off: {} bytes came and its end marker is missing", bytes.len()),
        )),
        Extent::NotJpeg => Err(Error::new(ErrorKind::BadFrame, "the frame is neither JPEG nor PNG")),
    }
}

fn bad_frame(error: image::ImageError) -> Error {
    Error::new(ErrorKind::BadFrame, format!("the frame cannot be decoded: {error}"))
}

fn too_large(message: String) -> Error {
    Error::new(ErrorKind::FrameTooLarge, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(format: ImageFormat, width: u32, height: u32) -> Vec<u8> {
        let picture = image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, 77]));
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn png_is_decoded_to_the_pixel_and_jpeg_to_its_size() {
        let frame = decode(&encoded(ImageFormat::Png, 31, 17), &DecodeLimits::default()).unwrap();
        assert_eq!((frame.width(), frame.height()), (31, 17));
        assert_eq!(&frame.pixels()[(5 * 31 + 9) * 3..][..3], [9, 5, 77]);
        let frame = decode(&encoded(ImageFormat::Jpeg, 40, 24), &DecodeLimits::default()).unwrap();
        assert_eq!((frame.width(), frame.height()), (40, 24));
    }

    #[test]
    fn every_truncation_is_refused() {
        for format in [ImageFormat::Png, ImageFormat::Jpeg] {
            let whole = encoded(format, 64, 48);
            for cut in 0..whole.len() - 1 {
                // A PNG may lose its empty end chunk and still hold every pixel.
                if format == ImageFormat::Png && cut >= whole.len() - 12 {
                    continue;
                }
                let error = decode(&whole[..cut], &DecodeLimits::default()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::BadFrame, "{format:?} cut at {cut}: {error}");
            }
        }
    }

    #[test]
    fn a_header_that_promises_too_much_costs_nothing() {
        let mut bomb = encoded(ImageFormat::Png, 8, 8);
        // Width and height stand in the IHDR chunk, whose CRC is mended behind them.
        bomb[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
        let crc = crc32(&bomb[12..29]);
        bomb[29..33].copy_from_slice(&crc.to_be_bytes());
        let error = decode(&bomb, &DecodeLimits::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FrameTooLarge);
        assert!(error.to_string().contains("60000x60000"), "{error}");
    }

    #[test]
    fn limits_hold_at_the_edge() {
        let bytes = encoded(ImageFormat::Png, 10, 10);
        let exact = DecodeLimits { side_pixels_max: 10, total_pixels_max: 100, encoded_bytes_max: bytes.len() };
        assert!(decode(&bytes, &exact).is_ok());
        for tight in [
            DecodeLimits { side_pixels_max: 9, ..exact },
            DecodeLimits { total_pixels_max: 99, ..exact },
            DecodeLimits { encoded_bytes_max: bytes.len() - 1, ..exact },
        ] {
            assert_eq!(decode(&bytes, &tight).unwrap_err().kind(), ErrorKind::FrameTooLarge);
        }
    }

    #[test]
    fn other_bytes_are_named_for_what_they_are_not() {
        for bytes in [&b"GIF89a..."[..], b"<html>", b"\0\0\0\x01h264"] {
            let error = decode(bytes, &DecodeLimits::default()).unwrap_err();
            assert!(error.to_string().contains("neither JPEG nor PNG"), "{error}");
        }
        assert!(decode(b"", &DecodeLimits::default()).unwrap_err().to_string().contains("empty"));
    }

    /// The CRC of PNG chunks (ISO 3309), bit by bit.
    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
        })
    }
}
