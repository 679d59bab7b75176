//! From a picture to the model's input tensor, and the way back for coordinates.
//!
//! The resizer is `fast_image_resize` (this file is its only door), with the filter that the manifest names; the mean of covered pixels
//! is computed by [`area`]. Pixels then become `(pixel - mean) / std`, read from a table of 256 values per channel, and are written in the
//! layout the model wants.

mod area;

use fast_image_resize::images::{CroppedImage, Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use half::f16;

use crate::picture::Picture;
use crate::settings::{InputSettings, Layout};
use crate::{Error, ErrorKind, Result};
use lineside_api::spec::{Color, Resize, ResizeFilter};
use lineside_api::tensor::{Data, DataType, Tensor};

/// Grey level of the letterbox's margins, as detectors are trained with.
const MARGIN: u8 = 114;

/// Where the source picture lies in the model's input. Maps input coordinates back to source pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placement {
    /// Input pixels per source pixel, horizontally and vertically.
    scale: [f32; 2],
    /// Input coordinates of the source's top left corner. Negative where the picture was cropped.
    offset: [f32; 2],
    /// Width and height of the source, in pixels.
    source: [f32; 2],
}

impl Placement {
    /// A box in input pixels (left, top, right, bottom) as one in source pixels, clipped to the picture.
    pub fn to_source(&self, bbox: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|index| {
            let axis = index % 2;
            ((bbox[index] - self.offset[axis]) / self.scale[axis]).clamp(0.0, self.source[axis])
        })
    }
}

/// Makes input tensors. It keeps its working memory, so one thread owns it.
pub struct Preprocessor {
    settings: InputSettings,
    /// `(pixel - mean) / std` for each channel of the tensor and each pixel value.
    table: Vec<[f32; 256]>,
    resizer: Resizer,
    resized: Image<'static>,
}

impl Preprocessor {
    /// A preprocessor for a model's input.
    pub fn new(settings: &InputSettings) -> Self {
        let channels = settings.channels();
        let table = (0..channels)
            .map(|channel| std::array::from_fn(|pixel| (pixel as f32 - settings.mean[channel]) / settings.std[channel]))
            .collect();
        Self {
            settings: settings.clone(),
            table,
            resizer: Resizer::new(),
            resized: Image::new(settings.width, settings.height, PixelType::U8x3),
        }
    }

    /// The tensor for a picture: `[1, channels, height, width]` or `[1, height, width, channels]`.
    ///
    /// # Errors
    /// [`ErrorKind::BadFrame`] when the resizer refuses the picture, which it does for none that [`Picture`] lets through.
    pub fn run(&mut self, frame: &Picture) -> Result<(Tensor, Placement)> {
        let plan = Plan::new(&self.settings, frame);
        let [left, top, width, height] = plan.target;
        if (self.resized.width(), self.resized.height()) != (width, height) {
            self.resized = Image::new(width, height, PixelType::U8x3);
        }
        let source = ImageRef::new(frame.width(), frame.height(), frame.pixels(), PixelType::U8x3)
            .map_err(|error| Error::new(ErrorKind::BadFrame, format!("the frame cannot be resized: {error}")))?;
        let [crop_left, crop_top, crop_width, crop_height] = plan.source;
        let algorithm = match self.settings.filter {
            // OpenCV interpolates where it enlarges.
            ResizeFilter::Area if crop_width >= width && crop_height >= height => {
                area::shrink(frame, plan.source, self.resized.buffer_mut(), [width, height]);
                None
            }
            ResizeFilter::Area | ResizeFilter::Bilinear => Some(ResizeAlg::Interpolation(FilterType::Bilinear)),
            ResizeFilter::Antialias => Some(ResizeAlg::Convolution(FilterType::Bilinear)),
        };
        if let Some(algorithm) = algorithm {
            let options = ResizeOptions::new().resize_alg(algorithm);
            let resize =
                |part| self.resizer.resize(&part, &mut self.resized, &options).map_err(|error| error.to_string());
            CroppedImage::new(&source, crop_left, crop_top, crop_width, crop_height)
                .map_err(|error| error.to_string())
                .and_then(resize)
                .map_err(|error| Error::new(ErrorKind::BadFrame, format!("the frame cannot be resized: {error}")))?;
        }
        let data = match self.settings.data_type {
            DataType::F16 => Data::F16(self.fill(left, top, f16::from_f32)),
            DataType::F64 => Data::F64(self.fill(left, top, f64::from)),
            // A float becomes the nearest byte; `as` clamps.
            DataType::U8 => Data::U8(self.fill(left, top, |value| value.round() as u8)),
            DataType::I8 => Data::I8(self.fill(left, top, |value| value.round() as i8)),
            _ => Data::F32(self.fill(left, top, |value| value)),
        };
        let (channels, height, width) =
            (self.settings.channels(), self.settings.height as usize, self.settings.width as usize);
        let shape = match self.settings.layout {
            Layout::Nchw => vec![1, channels, height, width],
            Layout::Nhwc => vec![1, height, width, channels],
        };
        Ok((Tensor::new(shape, data)?, plan.placement))
    }

    /// Writes the resized picture at (`left`, `top`) into a tensor full of margin.
    fn fill<T: Copy>(&self, left: u32, top: u32, convert: impl Fn(f32) -> T) -> Vec<T> {
        let (width, height) = (self.settings.width as usize, self.settings.height as usize);
        let channels = self.settings.channels();
        let (left, top) = (left as usize, top as usize);
        let table: Vec<[T; 256]> =
            self.table.iter().map(|values| std::array::from_fn(|pixel| convert(values[pixel]))).collect();
        let margin: Vec<T> = table.iter().map(|values| values[usize::from(MARGIN)]).collect();
        let row_pixels = self.resized.width() as usize;
        let rows = self.resized.buffer().chunks_exact(row_pixels * 3);

        let whole = row_pixels == width && self.resized.height() as usize == height;
        let mut out: Vec<T> = if whole {
            vec![margin[0]; channels * width * height]
        } else {
            match self.settings.layout {
                Layout::Nchw => margin.iter().flat_map(|value| std::iter::repeat_n(*value, width * height)).collect(),
                Layout::Nhwc => margin.iter().copied().cycle().take(channels * width * height).collect(),
            }
        };
        for (row, pixels) in rows.enumerate() {
            let start = (top + row) * width + left;
            match self.settings.layout {
                Layout::Nchw => {
                    for (channel, values) in table.iter().enumerate() {
                        let plane = &mut out[channel * width * height + start..][..row_pixels];
                        for (value, pixel) in plane.iter_mut().zip(pixels.chunks_exact(3)) {
                            *value = values[usize::from(self.pick(pixel, channel))];
                        }
                    }
                }
                Layout::Nhwc => {
                    let line = &mut out[start * channels..][..row_pixels * channels];
                    for (values, pixel) in line.chunks_exact_mut(channels).zip(pixels.chunks_exact(3)) {
                        for (channel, value) in values.iter_mut().enumerate() {
                            *value = table[channel][usize::from(self.pick(pixel, channel))];
                        }
                    }
                }
            }
        }
        out
    }

    /// The value of one channel of the model's colour order.
    #[inline]
    fn pick(&self, pixel: &[u8], channel: usize) -> u8 {
        match self.settings.color {
            Color::Rgb => pixel[channel],
            Color::Bgr => pixel[2 - channel],
            Color::Gray => {
                let [red, green, blue] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
                ((299 * red + 587 * green + 114 * blue + 500) / 1000) as u8
            }
        }
    }
}

/// What to take of the source, where to put it, and the way back.
struct Plan {
    /// Left, top, width and height of the part of the source that is used.
    source: [u32; 4],
    /// Left, top, width and height within the input.
    target: [u32; 4],
    placement: Placement,
}

impl Plan {
    fn new(settings: &InputSettings, frame: &Picture) -> Self {
        let input = [settings.width, settings.height];
        let source = [frame.width(), frame.height()];
        let ratio = |axis: usize| f64::from(input[axis]) / f64::from(source[axis]);
        // Sides scaled and rounded to whole pixels, at least one and at most the whole.
        let scaled = |sides: [u32; 2], scale: f64, most: [u32; 2]| -> [u32; 2] {
            std::array::from_fn(|axis| ((f64::from(sides[axis]) * scale).round() as u32).clamp(1, most[axis]))
        };
        let centred =
            |part: [u32; 2], whole: [u32; 2]| [(whole[0] - part[0]) / 2, (whole[1] - part[1]) / 2, part[0], part[1]];
        let whole = |sides: [u32; 2]| [0, 0, sides[0], sides[1]];
        let (taken, target) = match settings.resize {
            Resize::Stretch => (whole(source), whole(input)),
            Resize::Letterbox => (whole(source), centred(scaled(source, ratio(0).min(ratio(1)), input), input)),
            Resize::Crop => (centred(scaled(input, 1.0 / ratio(0).max(ratio(1)), source), source), whole(input)),
        };
        // The sides were rounded; the way back uses what was really done.
        let scale: [f32; 2] = std::array::from_fn(|axis| target[axis + 2] as f32 / taken[axis + 2] as f32);
        let placement = Placement {
            scale,
            offset: std::array::from_fn(|axis| target[axis] as f32 - taken[axis] as f32 * scale[axis]),
            source: source.map(|side| side as f32),
        };
        Self { source: taken, target, placement }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(resize: Resize, width: u32, height: u32) -> InputSettings {
        let filter = ResizeFilter::Antialias;
        InputSettings { resize, filter, ..InputSettings::of_pixel_values(width, height) }
    }

    fn flat(width: u32, height: u32, pixel: [u8; 3]) -> Picture {
        Picture::from_rgb(width, height, pixel.repeat((width * height) as usize)).unwrap()
    }

    fn values(settings: &InputSettings, frame: &Picture) -> (Vec<f32>, Placement) {
        let (tensor, placement) = Preprocessor::new(settings).run(frame).unwrap();
        (tensor.to_f32().into_owned(), placement)
    }

    #[test]
    fn colours_go_where_the_layout_wants_them() {
        let frame = flat(2, 2, [10, 20, 30]);
        let nchw = settings(Resize::Stretch, 2, 2);
        assert_eq!(values(&nchw, &frame).0, [[10.0; 4], [20.0; 4], [30.0; 4]].concat());
        let bgr = InputSettings { color: Color::Bgr, layout: Layout::Nhwc, ..nchw };
        assert_eq!(values(&bgr, &frame).0, [30.0, 20.0, 10.0].repeat(4));
        let gray = InputSettings { color: Color::Gray, ..nchw };
        assert_eq!(values(&gray, &frame).0, [18.0; 4], "0.299 * 10 + 0.587 * 20 + 0.114 * 30");
        let normal = InputSettings { mean: [10.0, 0.0, 0.0], std: [2.0, 4.0, 10.0], ..nchw };
        assert_eq!(values(&normal, &frame).0, [[0.0; 4], [5.0; 4], [3.0; 4]].concat());
    }

    #[test]
    fn integer_and_half_inputs_get_their_own_type() {
        let frame = flat(1, 1, [200, 100, 50]);
        let of = |data_type| {
            let settings = InputSettings { data_type, ..settings(Resize::Stretch, 1, 1) };
            Preprocessor::new(&settings).run(&frame).unwrap().0
        };
        assert_eq!(of(DataType::U8).data(), &Data::U8(vec![200, 100, 50]));
        assert_eq!(of(DataType::I8).data(), &Data::I8(vec![127, 100, 50]), "clamped, not wrapped");
        assert_eq!(&of(DataType::F16).to_f32()[..], [200.0, 100.0, 50.0]);
    }

    #[test]
    fn a_letterbox_keeps_proportions_and_fills_with_grey() {
        let (values, placement) = values(&settings(Resize::Letterbox, 8, 8), &flat(40, 20, [255, 255, 255]));
        let plane: Vec<f32> = values[..64].to_vec();
        for (row, line) in plane.chunks_exact(8).enumerate() {
            let expected = if (2..6).contains(&row) { 255.0 } else { 114.0 };
            assert!(line.iter().all(|value| *value == expected), "row {row}: {line:?}");
        }
        assert_eq!(placement.to_source([0.0, 2.0, 8.0, 6.0]), [0.0, 0.0, 40.0, 20.0]);
        assert_eq!(placement.to_source([4.0, 4.0, 100.0, 0.0]), [20.0, 10.0, 40.0, 0.0], "clipped to the picture");
    }

    #[test]
    fn a_crop_takes_the_middle() {
        // Left third black, middle third white, right third black.
        let mut pixels = vec![0u8; 30 * 10 * 3];
        for row in 0..10 {
            pixels[(row * 30 + 10) * 3..(row * 30 + 20) * 3].fill(255);
        }
        let frame = Picture::from_rgb(30, 10, pixels).unwrap();
        let (values, placement) = values(&settings(Resize::Crop, 5, 5), &frame);
        assert!(values.iter().all(|value| *value == 255.0), "{values:?}");
        assert_eq!(placement.to_source([0.0, 0.0, 5.0, 5.0]), [10.0, 0.0, 20.0, 10.0]);
    }

    #[test]
    fn extreme_proportions_survive() {
        for (width, height) in [(1, 4000), (4000, 1), (1, 1), (3, 2)] {
            for resize in [Resize::Stretch, Resize::Letterbox, Resize::Crop] {
                let (values, placement) = values(&settings(resize, 32, 16), &flat(width, height, [9, 9, 9]));
                assert_eq!(values.len(), 3 * 32 * 16);
                let bbox = placement.to_source([0.0, 0.0, 32.0, 16.0]);
                assert!(bbox.iter().all(|side| side.is_finite()), "{resize:?} {width}x{height}: {bbox:?}");
            }
        }
    }
}
