//! The task, and how a picture becomes the model's input.

use super::{InputSettings, Layout, bad_spec, described};
use crate::graph::{Dimension, GraphInfo, TensorMetadata};
use crate::{Error, ErrorKind, Result};
use lineside_api::spec::{Color, Decoder, ModelSpec, Resize, ResizeFilter, Task};
use lineside_api::tensor::DataType;

/// Input sides beyond this are refused: such a tensor alone would take gigabytes.
const INPUT_SIDE_PIXELS_MAX: u32 = 8192;

/// Decides the model's task: what the manifest says, else the metadata, else a plain classifier's shape.
///
/// # Errors
/// [`ErrorKind::BadSpec`] when neither defines the task, [`ErrorKind::Unsupported`] for a task that is not built.
pub fn task(spec: &ModelSpec, graph: &GraphInfo) -> Result<Task> {
    let stated = graph.metadata.get("task").map(String::as_str);
    let from_metadata = match stated {
        Some("classify") => Some(Task::Classify),
        Some("detect") => Some(Task::Detect),
        _ => None,
    };
    // The rows of these models have the length of boxes and other contents.
    if let (Some(stated @ ("obb" | "pose" | "segment")), None | Some(Task::Detect)) = (stated, spec.task) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the model's metadata states the task {stated}, which is not built yet; use a model for classify, detect or anomaly, or \
                 spec.task: tensor for the raw outputs"
            ),
        ));
    }
    if let (Some(stated), None, None) = (stated, from_metadata, spec.task) {
        return Err(bad_spec(format!(
            "the model's metadata states the task {stated}, which is unknown; set spec.task to classify, detect, anomaly or tensor"
        )));
    }
    let from_shape = || match graph.outputs.as_slice() {
        [TensorMetadata { shape: Some(shape), .. }] if shape.len() == 2 => Some(Task::Classify),
        _ => None,
    };
    match spec.task.or(from_metadata).or_else(from_shape) {
        Some(task) => Ok(task),
        None => Err(bad_spec(format!(
            "the model does not say what its output {} means; set spec.task to classify, detect, anomaly or tensor",
            described(&graph.outputs)
        ))),
    }
}

/// Decides how a picture becomes the model's input.
///
/// # Errors
/// [`ErrorKind::BadSpec`] when the model takes no single picture, or the manifest contradicts it.
pub fn input(spec: &ModelSpec, graph: &GraphInfo, task: Task) -> Result<InputSettings> {
    let [input] = graph.inputs.as_slice() else {
        return Err(bad_spec(format!(
            "the model takes {} inputs ({}); a camera stream needs a model with one picture as its input",
            graph.inputs.len(),
            described(&graph.inputs)
        )));
    };
    let not_a_picture = || {
        bad_spec(format!(
            "the input {} is no picture; expected [batch, 1 or 3, height, width] or [batch, height, width, 1 or 3]",
            described(std::slice::from_ref(input))
        ))
    };
    let Some([batch, second, third, fourth]) = input.shape.as_deref() else { return Err(not_a_picture()) };
    if let Some(batch @ 2..) = batch.fixed() {
        return Err(bad_spec(format!(
            "the model takes {batch} pictures at a time; export it with a batch of 1 or an open one"
        )));
    }
    let is_channels = |dimension: &Dimension| matches!(dimension.fixed(), Some(1 | 3));
    let is_open = |dimension: &Dimension| dimension.fixed().is_none();
    let is_named = |dimension: &Dimension| matches!(dimension, Dimension::Open(name) if name.eq_ignore_ascii_case("c") || name.to_lowercase().contains("channel"));
    // Exporters of Hugging Face leave every dimension open. Without a name that says otherwise, the channels come first then.
    let (layout, channels, height, width) = if is_channels(second) {
        (Layout::Nchw, second, third, fourth)
    } else if is_channels(fourth) || (is_named(fourth) && !is_named(second)) {
        (Layout::Nhwc, fourth, second, third)
    } else if is_open(second) {
        (Layout::Nchw, second, third, fourth)
    } else {
        return Err(not_a_picture());
    };
    let Some(data_type @ (DataType::F32 | DataType::F16 | DataType::F64 | DataType::U8 | DataType::I8)) =
        input.data_type
    else {
        return Err(bad_spec(format!(
            "the input {} has a type that pictures are not converted to; export it with FP32, FP16, FP64, UINT8 or INT8",
            described(std::slice::from_ref(input))
        )));
    };
    let from_metadata = graph.image_size();
    let height = side("height", height, spec.input.height, from_metadata.map(|size| size.0))?;
    let width = side("width", width, spec.input.width, from_metadata.map(|size| size.1))?;

    // YOLOX is trained on pixels as OpenCV gives them.
    let is_yolox = spec.output.decoder == Some(Decoder::Yolox);
    let is_gray = channels.fixed().map_or(spec.input.color == Some(Color::Gray), |channels| channels == 1);
    let color = match spec.input.color {
        None if is_gray => Color::Gray,
        None if is_yolox => Color::Bgr,
        None => Color::Rgb,
        Some(color) if (color == Color::Gray) == is_gray => color,
        Some(_) if is_gray => return Err(bad_spec("spec.input.color: the model has one channel; use gray".to_owned())),
        Some(_) => return Err(bad_spec("spec.input.color: the model has three channels; use rgb or bgr".to_owned())),
    };
    let is_integer = matches!(data_type, DataType::U8 | DataType::I8);
    let channels = if is_gray { 1 } else { 3 };
    let mean = per_channel("mean", spec.input.mean.as_deref(), channels, 0.0)?;
    let std =
        per_channel("std", spec.input.std.as_deref(), channels, if is_integer || is_yolox { 1.0 } else { 255.0 })?;
    if std.contains(&0.0) {
        return Err(bad_spec("spec.input.std: 0 would divide by zero".to_owned()));
    }
    let resize = spec.input.resize.unwrap_or(match task {
        Task::Classify => Resize::Crop,
        Task::Detect => Resize::Letterbox,
        _ => Resize::Stretch,
    });
    let filter = spec.input.filter.unwrap_or(match task {
        Task::Detect => ResizeFilter::Bilinear,
        _ => ResizeFilter::Antialias,
    });
    let auto_rotate = spec.input.auto_rotate.unwrap_or(true);
    Ok(InputSettings { data_type, layout, width, height, resize, filter, auto_rotate, color, mean, std })
}

/// One side of the input: the graph's where it is fixed, else the manifest's, else the metadata's.
fn side(name: &str, declared: &Dimension, asked: Option<u32>, metadata: Option<u32>) -> Result<u32> {
    let pixels = match (declared.fixed(), asked) {
        (Some(fixed), Some(asked)) if fixed != asked as usize => {
            return Err(bad_spec(format!(
                "spec.input.{name}: {asked} is requested, but the model is fixed at {fixed}"
            )));
        }
        (Some(fixed), _) => u32::try_from(fixed).unwrap_or(u32::MAX),
        (None, Some(asked)) => asked,
        (None, None) => metadata.ok_or_else(|| {
            bad_spec(format!("the model leaves its input {name} open; set spec.input.{name} in pixels"))
        })?,
    };
    if (1..=INPUT_SIDE_PIXELS_MAX).contains(&pixels) {
        Ok(pixels)
    } else {
        Err(bad_spec(format!("the input {name} is {pixels} pixels; it must be 1 to {INPUT_SIDE_PIXELS_MAX}")))
    }
}

fn per_channel(name: &str, asked: Option<&[f32]>, channels: usize, otherwise: f32) -> Result<[f32; 3]> {
    let values = match asked {
        None => [otherwise; 3],
        Some([value]) => [*value; 3],
        Some([first, second, third]) if channels == 3 => [*first, *second, *third],
        Some(values) => {
            return Err(bad_spec(format!(
                "spec.input.{name} has {} values; the model has {channels} channel{}",
                values.len(),
                if channels == 1 { "" } else { "s" }
            )));
        }
    };
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(values),
        false => Err(bad_spec(format!("spec.input.{name} has a value that is not a finite number"))),
    }
}
