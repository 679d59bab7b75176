//! The flags of a command line that stand for fields of an `EdgeModel`: `spec.task`, `spec.input`, `spec.output`.

use clap::Args;
use lineside_api::spec::{BoxFormat, BoxUnit, Color, Decoder, ModelSpec, Resize, ResizeFilter, Task};
use serde::de::DeserializeOwned;

/// The flags. Each one overrides the field of the manifest.
#[derive(Args, Default)]
#[command(next_help_heading = "Fields of the manifest")]
pub(super) struct SpecArguments {
    /// Task: classify, detect, anomaly or tensor [default: the task in the model's metadata].
    #[arg(long, value_parser = named::<Task>)]
    task: Option<Task>,
    /// Width of the input in pixels, for a model that leaves it open.
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=16_384))]
    width: Option<u32>,
    /// Height of the input in pixels, for a model that leaves it open.
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=16_384))]
    height: Option<u32>,
    /// Color channels: rgb, bgr or gray.
    #[arg(long, value_parser = named::<Color>)]
    color: Option<Color>,
    /// Fit of a picture to the input: stretch, letterbox or crop.
    #[arg(long, value_parser = named::<Resize>)]
    resize: Option<Resize>,
    /// Computation of resized pixels: area, bilinear or antialias.
    #[arg(long, value_parser = named::<ResizeFilter>)]
    filter: Option<ResizeFilter>,
    /// Whether a picture is turned as its Exif metadata states.
    #[arg(long, value_name = "BOOL")]
    auto_rotate: Option<bool>,
    /// Mean of each channel in pixel values, such as 123.7,116.3,103.5.
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    mean: Option<Vec<f32>>,
    /// Standard deviation of each channel in pixel values.
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    std: Option<Vec<f32>>,
    /// Output layout of a detector: yolov8, yolov11, yolov5, yolox, end2end or detr.
    #[arg(long, value_parser = named::<Decoder>)]
    decoder: Option<Decoder>,
    /// Meaning of the numbers of a box: xyxy, cxcywh or yxyx.
    #[arg(long, value_parser = named::<BoxFormat>)]
    box_format: Option<BoxFormat>,
    /// Unit of the numbers of a box: pixel or relative.
    #[arg(long, value_parser = named::<BoxUnit>)]
    box_unit: Option<BoxUnit>,
    /// Number of the first class, for a detector that gives class numbers.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1000))]
    first_class: Option<u32>,
    /// Names of the classes, such as good,scratch,dent.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    labels: Option<Vec<String>>,
    /// Lowest score that is reported, 0 to 1.
    #[arg(long, value_name = "SCORE")]
    threshold: Option<f32>,
    /// Overlap above which two boxes are one object, 0 to 1.
    #[arg(long)]
    iou: Option<f32>,
    /// Largest number of classes or boxes.
    #[arg(long, value_name = "N")]
    top_k: Option<u32>,
    /// Whether an anomaly model reports its map.
    #[arg(long, value_name = "BOOL")]
    map: Option<bool>,
}

/// Parses a value by its name in manifests.
fn named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

impl SpecArguments {
    /// The fields of a manifest, with those that the flags override.
    pub(super) fn apply(self, mut spec: ModelSpec) -> ModelSpec {
        let (input, output) = (&mut spec.input, &mut spec.output);
        set(&mut spec.task, self.task);
        set(&mut input.width, self.width);
        set(&mut input.height, self.height);
        set(&mut input.color, self.color);
        set(&mut input.resize, self.resize);
        set(&mut input.filter, self.filter);
        set(&mut input.auto_rotate, self.auto_rotate);
        set(&mut input.mean, self.mean);
        set(&mut input.std, self.std);
        set(&mut output.decoder, self.decoder);
        set(&mut output.box_format, self.box_format);
        set(&mut output.box_unit, self.box_unit);
        set(&mut output.first_class, self.first_class);
        set(&mut output.labels, self.labels);
        set(&mut output.threshold, self.threshold);
        set(&mut output.iou, self.iou);
        set(&mut output.top_k, self.top_k);
        set(&mut output.map, self.map);
        spec
    }
}

fn set<T>(field: &mut Option<T>, flag: Option<T>) {
    if flag.is_some() {
        *field = flag;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A new field of the manifest needs a flag here.
    #[test]
    fn every_field_of_input_and_output_has_a_flag() {
        let all = SpecArguments {
            task: Some(Task::Detect),
            width: Some(1),
            height: Some(1),
            color: Some(Color::Bgr),
            resize: Some(Resize::Crop),
            filter: Some(ResizeFilter::Area),
            auto_rotate: Some(false),
            mean: Some(vec![1.0]),
            std: Some(vec![1.0]),
            decoder: Some(Decoder::Detr),
            box_format: Some(BoxFormat::Yxyx),
            box_unit: Some(BoxUnit::Relative),
            first_class: Some(1),
            labels: Some(vec!["a".to_owned()]),
            threshold: Some(0.5),
            iou: Some(0.5),
            top_k: Some(1),
            map: Some(true),
        };
        let spec = serde_json::to_value(all.apply(ModelSpec::default())).unwrap();
        for part in ["input", "output"] {
            for (field, value) in spec[part].as_object().unwrap() {
                assert!(!value.is_null(), "spec.{part}.{field} has no flag");
            }
        }
        let before = ModelSpec { task: Some(Task::Tensor), ..ModelSpec::default() };
        assert_eq!(SpecArguments::default().apply(before.clone()), before);
    }
}
