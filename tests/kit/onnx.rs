//! Writes small ONNX models without any library of the product, so that the product's engine is not checked against
//! itself.
//!
//! Only the fields that the tests need are written. Format: `onnx.proto3` of the ONNX project; the numbers in the code
//! are its field numbers.

/// `TensorProto.DataType.FLOAT`.
pub const FLOAT: u64 = 1;
/// `TensorProto.DataType.UINT8`.
pub const UINT8: u64 = 2;
/// `TensorProto.DataType.INT64`.
pub const INT64: u64 = 7;
/// `TensorProto.DataType.FLOAT16`.
pub const FLOAT16: u64 = 10;

/// A dimension of a declared tensor.
#[derive(Clone, Copy)]
pub enum Dim {
    /// A fixed size.
    Size(u64),
    /// A symbolic size with this name.
    Named(&'static str),
}

/// A model under construction.
#[derive(Default, Clone)]
pub struct Model {
    graph: Vec<u8>,
    metadata: Vec<u8>,
}

impl Model {
    /// An empty model.
    pub fn new() -> Self {
        Self::default()
    }

    /// Declares an input.
    pub fn input(mut self, name: &str, element_type: u64, shape: &[Dim]) -> Self {
        bytes(&mut self.graph, 11, &value_info(name, element_type, shape));
        self
    }

    /// Declares an output.
    pub fn output(mut self, name: &str, element_type: u64, shape: &[Dim]) -> Self {
        bytes(&mut self.graph, 12, &value_info(name, element_type, shape));
        self
    }

    /// Adds an operator.
    pub fn node(mut self, operator: &str, inputs: &[&str], outputs: &[&str], attributes: &[Attribute]) -> Self {
        let mut node = Vec::new();
        inputs.iter().for_each(|name| bytes(&mut node, 1, name.as_bytes()));
        outputs.iter().for_each(|name| bytes(&mut node, 2, name.as_bytes()));
        bytes(&mut node, 4, operator.as_bytes());
        attributes.iter().for_each(|attribute| bytes(&mut node, 5, &attribute.encoded()));
        bytes(&mut self.graph, 1, &node);
        self
    }

    /// Adds an initializer of type `FLOAT`.
    pub fn floats(mut self, name: &str, shape: &[u64], values: &[f32]) -> Self {
        let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        bytes(&mut self.graph, 5, &tensor(name, FLOAT, shape, &raw));
        self
    }

    /// Adds an initializer of type `INT64`.
    pub fn integers(mut self, name: &str, shape: &[u64], values: &[i64]) -> Self {
        let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        bytes(&mut self.graph, 5, &tensor(name, INT64, shape, &raw));
        self
    }

    /// Adds an initializer whose data is stored in another file, which the product rejects.
    pub fn external(mut self, name: &str, shape: &[u64], file: &str) -> Self {
        let mut tensor = tensor(name, FLOAT, shape, &[]);
        bytes(&mut tensor, 13, &entry("location", file));
        integer(&mut tensor, 14, 1);
        bytes(&mut self.graph, 5, &tensor);
        self
    }

    /// Adds a metadata entry.
    pub fn metadata(mut self, key: &str, value: &str) -> Self {
        bytes(&mut self.metadata, 14, &entry(key, value));
        self
    }

    /// The encoded model file.
    pub fn build(&self) -> Vec<u8> {
        let mut model = Vec::new();
        integer(&mut model, 1, 8);
        bytes(&mut model, 2, b"lineside-tests");
        let mut graph = self.graph.clone();
        bytes(&mut graph, 2, b"graph");
        bytes(&mut model, 7, &graph);
        let mut opset = Vec::new();
        integer(&mut opset, 2, 17);
        bytes(&mut model, 8, &opset);
        model.extend_from_slice(&self.metadata);
        model
    }
}

/// An attribute of an operator.
pub enum Attribute {
    /// An integer.
    Int(&'static str, i64),
    /// A list of integers.
    Ints(&'static str, Vec<i64>),
}

impl Attribute {
    fn encoded(&self) -> Vec<u8> {
        let mut attribute = Vec::new();
        match self {
            Self::Int(name, value) => {
                bytes(&mut attribute, 1, name.as_bytes());
                integer(&mut attribute, 3, *value as u64);
                integer(&mut attribute, 20, 2);
            }
            Self::Ints(name, values) => {
                bytes(&mut attribute, 1, name.as_bytes());
                values.iter().for_each(|value| integer(&mut attribute, 8, *value as u64));
                integer(&mut attribute, 20, 7);
            }
        }
        attribute
    }
}

/// A classifier from `[batch, 3, height, width]` to `[batch, classes]` whose logits are the means of red, green and
/// blue, followed by zeros. Its result for an image can be computed by hand.
pub fn mean_colour_classifier(height: u64, width: u64, classes: u64) -> Model {
    let weights: Vec<f32> =
        (0..3).flat_map(|channel| (0..classes).map(move |class| if class == channel { 10.0 } else { 0.0 })).collect();
    Model::new()
        .input("image", FLOAT, &[Dim::Named("batch"), Dim::Size(3), Dim::Size(height), Dim::Size(width)])
        .node("GlobalAveragePool", &["image"], &["pooled"], &[])
        .node("Flatten", &["pooled"], &["means"], &[Attribute::Int("axis", 1)])
        .floats("weights", &[3, classes], &weights)
        .node("MatMul", &["means", "weights"], &["logits"], &[])
        .output("logits", FLOAT, &[Dim::Named("batch"), Dim::Size(classes)])
}

fn value_info(name: &str, element_type: u64, shape: &[Dim]) -> Vec<u8> {
    let mut dimensions = Vec::new();
    for dim in shape {
        let mut dimension = Vec::new();
        match dim {
            Dim::Size(size) => integer(&mut dimension, 1, *size),
            Dim::Named(name) => bytes(&mut dimension, 2, name.as_bytes()),
        }
        bytes(&mut dimensions, 1, &dimension);
    }
    let mut tensor = Vec::new();
    integer(&mut tensor, 1, element_type);
    bytes(&mut tensor, 2, &dimensions);
    let mut kind = Vec::new();
    bytes(&mut kind, 1, &tensor);
    let mut info = Vec::new();
    bytes(&mut info, 1, name.as_bytes());
    bytes(&mut info, 2, &kind);
    info
}

fn tensor(name: &str, element_type: u64, shape: &[u64], raw: &[u8]) -> Vec<u8> {
    let mut tensor = Vec::new();
    shape.iter().for_each(|size| integer(&mut tensor, 1, *size));
    integer(&mut tensor, 2, element_type);
    bytes(&mut tensor, 8, name.as_bytes());
    if !raw.is_empty() {
        bytes(&mut tensor, 9, raw);
    }
    tensor
}

fn entry(key: &str, value: &str) -> Vec<u8> {
    let mut entry = Vec::new();
    bytes(&mut entry, 1, key.as_bytes());
    bytes(&mut entry, 2, value.as_bytes());
    entry
}

fn integer(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
