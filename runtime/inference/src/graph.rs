//! What an ONNX file says of itself before any engine has touched it: tensors, metadata, how its outputs are finished.

use std::collections::BTreeMap;

use lineside_api::tensor::DataType;

/// One dimension of a declared tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dimension {
    /// Written into the file.
    Fixed(usize),
    /// Left open, under this name (empty where the file gives none).
    Open(String),
}

impl Dimension {
    /// The size, where it is fixed.
    pub fn fixed(&self) -> Option<usize> {
        match self {
            Self::Fixed(size) => Some(*size),
            Self::Open(_) => None,
        }
    }
}

/// A declared input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMetadata {
    /// Its name in the graph.
    pub name: String,
    /// Its element type; `None` for a type that no engine here carries, such as strings.
    pub data_type: Option<DataType>,
    /// Its dimensions, outermost first; `None` where the file declares no shape.
    pub shape: Option<Vec<Dimension>>,
}

impl TensorMetadata {
    /// The shape for people and for the protocols: fixed sizes, and -1 for what is open.
    pub fn protocol_shape(&self) -> Vec<i64> {
        let size = |dimension: &Dimension| dimension.fixed().and_then(|size| i64::try_from(size).ok()).unwrap_or(-1);
        self.shape.iter().flatten().map(size).collect()
    }
}

/// The function that the graph itself ends an output with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// None that we know: the values are logits or anything else.
    None,
    /// Probabilities over classes.
    Softmax,
    /// Logarithms of probabilities.
    LogSoftmax,
    /// An independent probability each.
    Sigmoid,
}

/// The facts of a model file.
#[derive(Debug, Clone, PartialEq)]
pub struct GraphInfo {
    /// Inputs that a caller has to give (initialisers are left out).
    pub inputs: Vec<TensorMetadata>,
    /// Outputs, in the graph's order.
    pub outputs: Vec<TensorMetadata>,
    /// How each output is finished, in the order of `outputs`.
    pub activations: Vec<Activation>,
    /// `metadata_props`, in which exporters leave labels, task and input size.
    pub metadata: BTreeMap<String, String>,
    /// Who wrote the file, such as `pytorch 2.9.0`.
    pub producer: String,
    /// Version of the default operator set.
    pub opset: i64,
    /// Number of operators.
    pub nodes: usize,
}

impl GraphInfo {
    /// The class names that Ultralytics' exporters and their kin leave under `names`:
    /// `{0: 'good', 1: 'scratch'}` as Python prints it, the same as JSON, or a plain list.
    pub fn labels(&self) -> Option<Vec<String>> {
        let names = self.metadata.get("names").or_else(|| self.metadata.get("labels"))?;
        let labels = quoted_strings(names);
        (!labels.is_empty()).then_some(labels)
    }

    /// The input size under `imgsz`, as (height, width) in pixels: `[320, 640]`, or one number for a square.
    pub fn image_size(&self) -> Option<(u32, u32)> {
        let sizes: Vec<u32> = self
            .metadata
            .get("imgsz")?
            .split(|character: char| !character.is_ascii_digit())
            .filter_map(|digits| digits.parse().ok())
            .collect();
        match sizes[..] {
            [side] => Some((side, side)),
            [height, width] => Some((height, width)),
            _ => None,
        }
    }
}

/// The values of a dict or list of strings, in order. Keys of JSON objects (a quoted string before a colon) are left out.
fn quoted_strings(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut characters = text.chars().peekable();
    while let Some(quote) = characters.next() {
        if quote != '\'' && quote != '"' {
            continue;
        }
        let mut value = String::new();
        while let Some(character) = characters.next() {
            match character {
                '\\' => value.extend(characters.next()),
                _ if character == quote => break,
                _ => value.push(character),
            }
        }
        while characters.next_if(|character| character.is_whitespace()).is_some() {}
        if characters.peek() != Some(&':') {
            found.push(value);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(key: &str, value: &str) -> GraphInfo {
        GraphInfo {
            inputs: vec![],
            outputs: vec![],
            activations: vec![],
            metadata: BTreeMap::from([(key.to_owned(), value.to_owned())]),
            producer: String::new(),
            opset: 17,
            nodes: 0,
        }
    }

    #[test]
    fn labels_are_read_as_python_and_as_json_write_them() {
        let expected = vec!["good".to_owned(), "operator's mark".to_owned(), "a, b: c".to_owned()];
        for text in [
            r#"{0: 'good', 1: "operator's mark", 2: 'a, b: c'}"#,
            r#"{"0": "good", "1": "operator's mark", "2": "a, b: c"}"#,
            r#"['good', 'operator\'s mark', 'a, b: c']"#,
        ] {
            assert_eq!(with("names", text).labels(), Some(expected.clone()), "{text}");
        }
        assert_eq!(with("names", "{}").labels(), None);
        assert_eq!(with("other", "x").labels(), None);
        // An unfinished string is taken as far as it goes; it must not panic.
        assert_eq!(with("names", "{0: 'good").labels(), Some(vec!["good".to_owned()]));
    }

    #[test]
    fn the_image_size_is_height_then_width() {
        assert_eq!(with("imgsz", "[256, 320]").image_size(), Some((256, 320)));
        assert_eq!(with("imgsz", "640").image_size(), Some((640, 640)));
        assert_eq!(with("imgsz", "[1, 2, 3]").image_size(), None);
        assert_eq!(with("imgsz", "[99999999999, 2]").image_size(), Some((2, 2)));
    }
}
