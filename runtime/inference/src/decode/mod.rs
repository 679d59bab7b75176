//! JPEG or PNG bytes to a [`Picture`], within limits; the only door to the `image` crate.
//!
//! The header is read first. Nothing is allocated for a picture before its sides, its pixel count and the bytes it would
//! take are known to be within [`DecodeOptions`], so a bomb costs its header and no more. A JPEG that has lost its end is
//! refused: decoders fill what is missing with grey, and a verdict on grey is worse than none.
//!
//! A picture whose Exif metadata states an orientation is turned, as OpenCV and browsers turn it, unless the model's manifest says
//! `autoRotate: false`.

mod jpeg;

use std::io::Cursor;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::{Error, ErrorKind, Result};
use lineside_ipc::frame::{Frame, FrameFormat, PixelLayout};
use lineside_ipc::jpeg::{Extent, extent};
use lineside_ipc::picture_header::PictureHeader;

use crate::picture::Picture;

/// Memory in bytes that the decoder may take beside the pixels: for a row, and for metadata such as a color profile, which is
/// compressed as well.
const DECODER_BYTES: u64 = 4 << 20;

/// How frames are decoded, and what one may cost at most. The defaults fit a 24-megapixel line camera.
#[derive(Debug, Clone, Copy)]
pub struct DecodeOptions {
    /// Encoded bytes.
    pub encoded_bytes_max: usize,
    /// Pixels on one side.
    pub side_pixels_max: u32,
    /// Pixels in all.
    pub total_pixels_max: u64,
    /// Whether a picture is turned as its metadata states.
    pub auto_rotate: bool,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self { encoded_bytes_max: 16 << 20, side_pixels_max: 16_384, total_pixels_max: 40_000_000, auto_rotate: true }
    }
}

/// Decodes one JPEG or PNG into RGB. Grey, palette and 16-bit pictures are converted; an alpha channel is dropped.
///
/// # Errors
/// [`ErrorKind::BadFrame`] for bytes that are no complete JPEG or PNG, [`ErrorKind::FrameTooLarge`] beyond `options`.
pub fn decode(bytes: &[u8], options: &DecodeOptions) -> Result<Picture> {
    if bytes.len() > options.encoded_bytes_max {
        return Err(too_large(format!(
            "the frame has {} bytes, more than the limit of {}",
            bytes.len(),
            options.encoded_bytes_max
        )));
    }
    let format = format_of(bytes)?;
    let header = PictureHeader::read(bytes).map_err(|error| bad_frame(&error.to_string()))?;
    check_sides(header.width, header.height, options)?;
    let bytes_max = header.decode_bytes().saturating_add(DECODER_BYTES);
    let (mut picture, orientation) = match format {
        ImageFormat::Jpeg => jpeg::decode(bytes, bytes_max)?,
        _ => with_image_crate(bytes, format, (header.width, header.height), bytes_max)?,
    };
    if options.auto_rotate {
        picture.apply_orientation(orientation);
    }
    Picture::from_rgb(picture.width(), picture.height(), picture.into_rgb8().into_raw())
}

/// Decodes within a number of bytes. Returns the picture as it is stored, and how it is to be turned.
fn with_image_crate(
    bytes: &[u8],
    format: ImageFormat,
    sides: (u32, u32),
    bytes_max: u64,
) -> Result<(DynamicImage, Orientation)> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut decoder_limits = Limits::default();
    decoder_limits.max_alloc = Some(bytes_max);
    reader.limits(decoder_limits);
    let mut decoder = reader.into_decoder().map_err(|error| bad_frame(&error.to_string()))?;
    // The agent grants memory for what the header states, so the decoder must have read the same.
    if decoder.dimensions() != sides {
        return Err(Error::new(ErrorKind::BadFrame, "the header of the frame is ambiguous"));
    }
    if decoder.total_bytes() > bytes_max {
        return Err(too_large(format!("the frame takes {} bytes while it is decoded", decoder.total_bytes())));
    }
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let picture = DynamicImage::from_decoder(decoder).map_err(|error| bad_frame(&error.to_string()))?;
    Ok((picture, orientation))
}

/// Turns a frame of any layout into RGB.
///
/// # Errors
/// As [`decode`] for encoded frames; [`ErrorKind::BadFrame`] for pixels that are fewer than their sides and stride state.
pub fn to_picture(frame: &Frame, options: &DecodeOptions) -> Result<Picture> {
    match frame.format {
        FrameFormat::Encoded => decode(&frame.data, options),
        FrameFormat::Pixels { layout, width, height, stride } => {
            check_sides(width, height, options)?;
            from_pixels(&frame.data, layout, [width as usize, height as usize], stride)
                .and_then(|pixels| Picture::from_rgb(width, height, pixels))
        }
    }
}

/// Copies rows of `stride` bytes into RGB without padding.
fn from_pixels(data: &[u8], layout: PixelLayout, [width, height]: [usize; 2], stride: usize) -> Result<Vec<u8>> {
    let row_bytes = width * layout.bytes_per_pixel();
    let needed = stride.checked_mul(height.saturating_sub(1)).and_then(|rows| rows.checked_add(row_bytes));
    if stride < row_bytes || needed.is_none_or(|needed| needed > data.len()) {
        let message = format!(
            "the frame has {} bytes, too few for {width}x{height} pixels with {stride} bytes per row",
            data.len()
        );
        return Err(Error::new(ErrorKind::BadFrame, message));
    }
    let mut out = Vec::with_capacity(width * height * 3);
    for row in (0..height).map(|row| &data[row * stride..][..row_bytes]) {
        match layout {
            PixelLayout::Rgb8 => out.extend_from_slice(row),
            PixelLayout::Bgr8 => out.extend(row.chunks_exact(3).flat_map(|pixel| [pixel[2], pixel[1], pixel[0]])),
            PixelLayout::Gray8 => out.extend(row.iter().flat_map(|value| [*value; 3])),
        }
    }
    Ok(out)
}

fn check_sides(width: u32, height: u32, options: &DecodeOptions) -> Result<()> {
    let pixels = u64::from(width) * u64::from(height);
    if width.max(height) > options.side_pixels_max || pixels > options.total_pixels_max {
        return Err(too_large(format!(
            "the frame is {width}x{height}, more than the limit of {} pixels on a side and {} in all",
            options.side_pixels_max, options.total_pixels_max
        )));
    }
    Ok(())
}

/// Recognizes JPEG and PNG by their first bytes, and checks that the picture is complete where its format shows that.
fn format_of(bytes: &[u8]) -> Result<ImageFormat> {
    if bytes.is_empty() {
        return Err(Error::new(ErrorKind::BadFrame, "the frame is empty"));
    }
    if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        return Ok(ImageFormat::Png);
    }
    match extent(bytes) {
        Extent::Complete(_) => Ok(ImageFormat::Jpeg),
        Extent::Truncated | Extent::Interrupted(_) => Err(Error::new(
            ErrorKind::BadFrame,
            format!("the JPEG is cut off: {} bytes came and its end marker is missing", bytes.len()),
        )),
        Extent::NotJpeg if bytes.starts_with(&[0xFF, 0xD8, 0xFF]) => {
            Err(Error::new(ErrorKind::BadFrame, "the JPEG is damaged: its segments cannot be followed"))
        }
        Extent::NotJpeg => Err(Error::new(ErrorKind::BadFrame, "the frame is neither JPEG nor PNG")),
    }
}

fn bad_frame(reason: &str) -> Error {
    Error::new(ErrorKind::BadFrame, format!("the frame cannot be decoded: {reason}"))
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
        let frame = decode(&encoded(ImageFormat::Png, 31, 17), &DecodeOptions::default()).unwrap();
        assert_eq!((frame.width(), frame.height()), (31, 17));
        assert_eq!(&frame.pixels()[(5 * 31 + 9) * 3..][..3], [9, 5, 77]);
        let frame = decode(&encoded(ImageFormat::Jpeg, 40, 24), &DecodeOptions::default()).unwrap();
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
                let error = decode(&whole[..cut], &DecodeOptions::default()).unwrap_err();
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
        let error = decode(&bomb, &DecodeOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FrameTooLarge);
        assert!(error.to_string().contains("60000x60000"), "{error}");
    }

    /// The decoder gets as much memory as the header states, and needs no more for any kind of pixel.
    #[test]
    fn pictures_of_every_pixel_type_are_decoded_within_the_memory_of_their_header() {
        use image::DynamicImage;
        let side = 700;
        for picture in [
            DynamicImage::new_luma8(side, side),
            DynamicImage::new_luma_a8(side, side),
            DynamicImage::new_rgb8(side, side),
            DynamicImage::new_rgba8(side, side),
            DynamicImage::new_luma16(side, side),
            DynamicImage::new_luma_a16(side, side),
            DynamicImage::new_rgb16(side, side),
            DynamicImage::new_rgba16(side, side),
        ] {
            let mut bytes = Cursor::new(Vec::new());
            picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
            let bytes = bytes.into_inner();
            let decoded = ImageReader::with_format(Cursor::new(&bytes), ImageFormat::Png).into_decoder().unwrap();
            let header = PictureHeader::read(&bytes).unwrap();
            let copy = if picture.color() == image::ColorType::Rgb8 { 0 } else { u64::from(side * side) * 3 };
            assert_eq!(decoded.total_bytes() + copy, header.decode_bytes(), "{:?}", picture.color());
            assert!(decode(&bytes, &DecodeOptions::default()).is_ok(), "{:?}", picture.color());
        }
    }

    /// A chunk of Exif metadata: one entry, the orientation (tag 0x0112, type SHORT).
    fn exif(orientation: u8) -> Vec<u8> {
        let entry = [1, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0];
        [&b"MM\0\x2A\0\0\0\x08\0\x01"[..], &entry, &[0; 4]].concat()
    }

    #[test]
    fn pictures_are_turned_as_their_metadata_states() {
        // Red at the top left, and wider than high.
        let stored = image::RgbImage::from_fn(32, 16, |x, y| {
            if x < 16 && y < 8 { image::Rgb([255, 0, 0]) } else { image::Rgb([0, 0, 255]) }
        });
        let encoded = |format| {
            let mut bytes = Cursor::new(Vec::new());
            stored.write_to(&mut bytes, format).unwrap();
            bytes.into_inner()
        };
        // Where the red quarter of each orientation is: right, bottom.
        let corners = [
            (false, false),
            (true, false),
            (true, true),
            (false, true),
            (false, false),
            (true, false),
            (true, true),
            (false, true),
        ];
        for (orientation, (is_right, is_bottom)) in (1u8..).zip(corners) {
            let exif = exif(orientation);
            let jpeg = encoded(ImageFormat::Jpeg);
            let length = (exif.len() as u16 + 8).to_be_bytes();
            let jpeg = [&jpeg[..2], &[0xFF, 0xE1], &length, b"Exif\0\0", &exif, &jpeg[2..]].concat();
            let png = encoded(ImageFormat::Png);
            let chunk = [b"eXIf", &exif[..]].concat();
            let length = (exif.len() as u32).to_be_bytes();
            let png = [&png[..33], &length, &chunk, &crc32(&chunk).to_be_bytes(), &png[33..]].concat();
            for bytes in [jpeg, png] {
                let turned = decode(&bytes, &DecodeOptions::default()).unwrap();
                let sides = if orientation < 5 { (32, 16) } else { (16, 32) };
                assert_eq!((turned.width(), turned.height()), sides, "orientation {orientation}");
                let x = if is_right { turned.width() - 3 } else { 2 };
                let y = if is_bottom { turned.height() - 3 } else { 2 };
                let at = (y * turned.width() + x) as usize * 3;
                let [red, _, blue] = turned.pixels()[at..at + 3] else { unreachable!() };
                assert!(red > 200 && blue < 60, "orientation {orientation}");
                let kept = decode(&bytes, &DecodeOptions { auto_rotate: false, ..DecodeOptions::default() }).unwrap();
                assert_eq!((kept.width(), kept.height()), (32, 16));
            }
        }
    }

    #[test]
    fn limits_hold_at_the_edge() {
        let bytes = encoded(ImageFormat::Png, 10, 10);
        let exact = DecodeOptions {
            side_pixels_max: 10,
            total_pixels_max: 100,
            encoded_bytes_max: bytes.len(),
            auto_rotate: true,
        };
        assert!(decode(&bytes, &exact).is_ok());
        for tight in [
            DecodeOptions { side_pixels_max: 9, ..exact },
            DecodeOptions { total_pixels_max: 99, ..exact },
            DecodeOptions { encoded_bytes_max: bytes.len() - 1, ..exact },
        ] {
            assert_eq!(decode(&bytes, &tight).unwrap_err().kind(), ErrorKind::FrameTooLarge);
        }
    }

    #[test]
    fn other_bytes_are_named_for_what_they_are_not() {
        for bytes in [&b"GIF89a..."[..], b"<html>", b"\0\0\0\x01h264"] {
            let error = decode(bytes, &DecodeOptions::default()).unwrap_err();
            assert!(error.to_string().contains("neither JPEG nor PNG"), "{error}");
        }
        assert!(decode(b"", &DecodeOptions::default()).unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn pixels_of_every_layout_become_rgb() {
        let frame = |layout, width, stride, data: &'static [u8]| {
            let format = FrameFormat::Pixels { layout, width, height: 2, stride };
            Frame { format, ..Frame::encoded(data.into(), None, false) }
        };
        let convert = |frame: &Frame| to_picture(frame, &DecodeOptions::default());
        // Two rows of one pixel, each with a byte of padding; the last row's padding may be missing.
        let rgb = convert(&frame(PixelLayout::Rgb8, 1, 4, &[1, 2, 3, 0, 4, 5, 6])).unwrap();
        assert_eq!(rgb.pixels(), [1, 2, 3, 4, 5, 6]);
        let bgr = convert(&frame(PixelLayout::Bgr8, 1, 3, &[1, 2, 3, 4, 5, 6])).unwrap();
        assert_eq!(bgr.pixels(), [3, 2, 1, 6, 5, 4]);
        let gray = convert(&frame(PixelLayout::Gray8, 2, 2, &[1, 2, 3, 4])).unwrap();
        assert_eq!(gray.pixels(), [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]);
        for (layout, width, stride) in [
            (PixelLayout::Gray8, 3, 3),
            (PixelLayout::Gray8, 2, 1),
            (PixelLayout::Gray8, 2, usize::MAX),
            (PixelLayout::Gray8, 0, 2),
        ] {
            let error = convert(&frame(layout, width, stride, &[1, 2, 3, 4])).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadFrame, "{layout:?} {width} {stride}: {error}");
        }
        let huge = convert(&frame(PixelLayout::Gray8, 100_000, 100_000, &[0])).unwrap_err();
        assert_eq!(huge.kind(), ErrorKind::FrameTooLarge);
    }

    /// The CRC of PNG chunks (ISO 3309), bit by bit.
    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
        })
    }
}
