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
    /// The class names of the metadata, under `names` (Ultralytics), `id2label` (Hugging Face), `labels`, `classes` or `class_names`:
    /// a dictionary as Python or JSON writes it, a list, or names on lines or between commas.
    pub fn class_names(&self) -> Option<ClassNames> {
        const KEYS: [&str; 5] = ["names", "id2label", "labels", "classes", "class_names"];
        let known = KEYS.iter().filter_map(|key| self.metadata.get(*key)).map(|text| ClassNames::parse(text));
        known.into_iter().find(|names| !names.by_number.is_empty())
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

/// Largest number of a class.
const CLASS_NUMBER_MAX: usize = 100_000;

/// Names of classes, as a file states them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClassNames {
    /// The names by number; by their order where the file states no numbers.
    pub by_number: BTreeMap<usize, String>,
    /// Whether the numbers are those of the file.
    pub has_numbers: bool,
}

impl ClassNames {
    fn parse(text: &str) -> Self {
        let entries = quoted_entries(text);
        if entries.is_empty() {
            return Self::of_list(plain_entries(text));
        }
        let is_number = |number: &usize| *number <= CLASS_NUMBER_MAX;
        let numbers: Option<BTreeMap<usize, String>> =
            entries.iter().map(|(number, name)| Some((number.filter(is_number)?, name.clone()))).collect();
        match numbers.filter(|numbers| numbers.len() == entries.len()) {
            Some(by_number) => Self { by_number, has_numbers: true },
            None => Self::of_list(entries.into_iter().map(|(_, name)| name)),
        }
    }

    fn of_list(names: impl IntoIterator<Item = String>) -> Self {
        Self { by_number: names.into_iter().enumerate().collect(), has_numbers: false }
    }
}

/// Names without quotes, on lines or between commas.
fn plain_entries(text: &str) -> Vec<String> {
    let text = text.trim().trim_matches(['[', ']', '{', '}']);
    let separator = if text.contains('\n') { '\n' } else { ',' };
    text.split(separator).map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The quoted strings of a dictionary or list, in order, each with the number before it (`2: 'dent'`, `"2": "dent"`).
fn quoted_entries(text: &str) -> Vec<(Option<usize>, String)> {
    let mut found = Vec::new();
    let mut characters = text.chars().peekable();
    let mut digits = String::new();
    let mut number = None;
    while let Some(character) = characters.next() {
        match character {
            '0'..='9' => digits.push(character),
            ':' => number = digits.parse().ok(),
            '\'' | '"' => {
                let value = quoted(character, &mut characters);
                while characters.next_if(|character| character.is_whitespace()).is_some() {}
                if characters.peek() == Some(&':') {
                    // The key of a JSON object.
                    digits = value;
                } else {
                    found.push((number.take(), value));
                    digits.clear();
                }
            }
            ',' => digits.clear(),
            _ => {}
        }
    }
    found
}

/// The rest of a quoted string; as far as it goes, where it has no end.
fn quoted(quote: char, characters: &mut impl Iterator<Item = char>) -> String {
    let mut value = String::new();
    while let Some(character) = characters.next() {
        match character {
            '\\' => value.extend(characters.next()),
            _ if character == quote => break,
            _ => value.push(character),
        }
    }
    value
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

    fn names(key: &str, text: &str) -> (Vec<(usize, String)>, bool) {
        let names = with(key, text).class_names().unwrap_or_default();
        (names.by_number.into_iter().collect(), names.has_numbers)
    }

    #[test]
    fn class_names_are_read_as_python_and_as_json_write_them() {
        let expected: Vec<_> =
            ["good", "operator's mark", "a, b: c 9"].into_iter().map(str::to_owned).enumerate().collect();
        for (text, has_numbers) in [
            (r#"{0: 'good', 1: "operator's mark", 2: 'a, b: c 9'}"#, true),
            (r#"{"0": "good", "1": "operator's mark", "2": "a, b: c 9"}"#, true),
            (r#"{2: 'a, b: c 9', 0: 'good', 1: 'operator\'s mark'}"#, true),
            (r#"['good', 'operator\'s mark', 'a, b: c 9']"#, false),
        ] {
            assert_eq!(names("names", text), (expected.clone(), has_numbers), "{text}");
        }
        assert_eq!(
            names("id2label", r#"{"1": "LABEL_1", "4": "x"}"#),
            (vec![(1, "LABEL_1".into()), (4, "x".into())], true)
        );
        for text in ["scratch, dent", "scratch\ndent\n", "[scratch, dent]"] {
            assert_eq!(names("classes", text), (vec![(0, "scratch".into()), (1, "dent".into())], false), "{text}");
        }
        // Names of two kinds, and one number twice.
        assert!(!names("names", "{0: 'a', 0: 'b'}").1);
        assert_eq!(with("names", "{}").class_names(), None);
        assert_eq!(with("other", "x").class_names(), None);
        // An unfinished string is taken as far as it goes; it must not panic.
        assert_eq!(names("names", "{0: 'good"), (vec![(0, "good".into())], true));
    }

    #[test]
    fn the_image_size_is_height_then_width() {
        assert_eq!(with("imgsz", "[256, 320]").image_size(), Some((256, 320)));
        assert_eq!(with("imgsz", "640").image_size(), Some((640, 640)));
        assert_eq!(with("imgsz", "[1, 2, 3]").image_size(), None);
        assert_eq!(with("imgsz", "[99999999999, 2]").image_size(), Some((2, 2)));
    }
}
