//! Hostile ONNX files. Each declares a small image input and an output, so that only an inspection of the graph or its
//! execution reveals it.

use crate::onnx::{Attribute, Dim, FLOAT, Model};

/// A dimension with which a tensor exceeds the memory of any node.
const HUGE: i64 = 1_000_000_000;
/// Two dimensions of this size multiply to 2^64, which overflows to 0.
const WRAPS: u64 = 1 << 32;
/// The number of operators in the long chain.
const CHAIN: usize = 50_000;
/// The nesting depth of graphs.
const DEPTH: usize = 1_000;
/// The matrix products of a model that takes minutes; each takes some 2 GFLOP.
const PRODUCTS: usize = 6_000;
/// `AttributeProto.AttributeType.GRAPH`.
const GRAPH: u8 = 5;
/// `TensorProto.DataType.BOOL`.
const BOOL: i64 = 9;

/// The hostile models with their names.
pub fn hostile_models() -> Vec<(&'static str, Vec<u8>)> {
    let add = |model: Model, other: &str| model.node("Add", &["x", other], &["y"], &[]).build();
    let shape = [HUGE, 3, 8, 8];
    let conv = |attributes: &[Attribute]| {
        image().floats("w", &[1, 3, 3, 3], &[1.0; 27]).node("Conv", &["x", "w"], &["y"], attributes).build()
    };
    vec![
        (
            "constant-of-shape",
            add(image().integers("shape", &[4], &shape).node("ConstantOfShape", &["shape"], &["big"], &[]), "big"),
        ),
        ("expand", image().integers("shape", &[4], &shape).node("Expand", &["x", "shape"], &["y"], &[]).build()),
        ("tile", image().integers("times", &[4], &[HUGE, 1, 1, 1]).node("Tile", &["x", "times"], &["y"], &[]).build()),
        (
            "range",
            image()
                .integers("start", &[], &[0])
                .integers("limit", &[], &[1000 * HUGE])
                .integers("step", &[], &[1])
                .node("Range", &["start", "limit", "step"], &["numbers"], &[])
                .node("Cast", &["numbers"], &["floats"], &[Attribute::Int("to", FLOAT as i64)])
                .node("ReduceMean", &["x"], &["mean"], &[Attribute::Int("keepdims", 0)])
                .node("Add", &["floats", "mean"], &["y"], &[])
                .build(),
        ),
        ("wrapping-dims", add(image().floats("w", &[WRAPS, WRAPS, 3, 8, 8], &[]), "w")),
        ("short-initializer", add(image().floats("w", &[1_000_000, 3, 8, 8], &[1.0; 12]), "w")),
        ("cycle", add(image().node("Relu", &["y"], &["z"], &[]), "z")),
        ("chain", chain()),
        (
            "gather",
            image()
                .integers("indices", &[2], &[1000, -1000])
                .node("Gather", &["x", "indices"], &["y"], &[Attribute::Int("axis", 1)])
                .build(),
        ),
        ("conv-pads", conv(&[Attribute::Ints("pads", vec![(1 << 31) - 3; 4])])),
        ("conv-strides", conv(&[Attribute::Ints("strides", vec![0, -1]), Attribute::Ints("dilations", vec![HUGE; 2])])),
        ("nested-ifs", nested_ifs()),
        ("nan", image().floats("w", &[1, 3, 8, 8], &[f32::NAN; 192]).node("Mul", &["x", "w"], &["y"], &[]).build()),
    ]
}

/// What a model does to its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outburst {
    /// It asks for 8 GiB.
    Memory,
    /// It multiplies matrices for minutes.
    Time,
}

/// A model that returns its input, except for a green frame: then it misbehaves. No synthetic frame of the admission is green.
pub fn hostile_on_green(outburst: Outburst) -> Vec<u8> {
    let mut then = Vec::new();
    let expanded = |shape: &str| node_with("Expand", &["mean", shape], "n0", &[]);
    let sum = |last: &str| {
        let keep = [0x0A, 8].into_iter().chain(*b"keepdims").chain([0x18, 0, 0xA0, 0x01, 2]).collect();
        [node_with("ReduceMean", &[last], "s", &[keep]), node_with("Add", &["x", "s"], "y", &[])]
    };
    match outburst {
        Outburst::Memory => {
            then.push(expanded("huge"));
            then.extend(sum("n0"));
        }
        Outburst::Time => {
            then.push(expanded("square"));
            for index in 0..PRODUCTS {
                let (from, to) = (format!("n{index}"), format!("n{}", index + 1));
                then.push(node_with("MatMul", &[&from, &from], &to, &[]));
            }
            then.extend(sum(&format!("n{PRODUCTS}")));
        }
    }
    let then: Vec<u8> = then.iter().flat_map(|node| field(1, node)).collect();
    let then = [then, field(2, b"then"), field(12, &field(1, b"y"))].concat();
    let branches = [attribute("then_branch", &then), attribute("else_branch", &branch(&node("Identity", "x", &[])))];
    let head = image()
        .floats("green", &[1, 3, 1, 1], &[-1.0, 1.0, -1.0])
        .floats("threshold", &[], &[0.9])
        .integers("huge", &[2], &[1 << 16, 1 << 15])
        .integers("square", &[2], &[1 << 10, 1 << 10])
        .node("Conv", &["x", "green"], &["difference"], &[])
        .node("ReduceMean", &["difference"], &["mean"], &[Attribute::Int("keepdims", 0)])
        .node("Greater", &["mean", "threshold"], &["is_green"], &[]);
    [head.build(), field(7, &field(1, &node("If", "is_green", &branches)))].concat()
}

/// Mutated copies of a file: changed bytes, flipped bits, inserted bytes, rotated content or a truncated end. The same
/// seed gives the same copies.
pub fn mutations(bytes: &[u8], count: usize, seed: u64) -> Vec<Vec<u8>> {
    let mut random = Random::new(seed);
    (0..count)
        .map(|_| {
            let mut copy = bytes.to_vec();
            for _ in 0..=random.below(8) {
                let at = random.below(copy.len());
                match random.below(5) {
                    0 => copy[at] = random.next() as u8,
                    1 => copy[at] ^= 1 << random.below(8),
                    2 => copy.insert(at, random.next() as u8),
                    3 => copy.rotate_left(at % 16),
                    _ if random.below(4) == 0 => copy.truncate(at.max(1)),
                    _ => copy[at] = 0xFF,
                }
            }
            copy
        })
        .collect()
}

/// A pseudo-random number generator (xorshift64) that gives the same sequence for the same seed.
pub struct Random(u64);

impl Random {
    /// A generator with this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "the sequence is infinite, so it is not an iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number less than `end`, which must not be 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// The input `x` and the output `y` that every hostile model declares.
fn image() -> Model {
    let shape = [1, 3, 8, 8].map(Dim::Size);
    Model::new().input("x", FLOAT, &shape).output("y", FLOAT, &shape)
}

fn chain() -> Vec<u8> {
    let mut model = image();
    let mut before = "x".to_owned();
    for index in 1..CHAIN {
        let next = format!("n{index}");
        model = model.node("Exp", &[&before], &[&next], &[]);
        before = next;
    }
    model.node("Tanh", &[&before], &["y"], &[]).build()
}

/// `If` operators nested in the branches of `If` operators. A protobuf parser merges the second `graph` field of a file
/// into the first.
fn nested_ifs() -> Vec<u8> {
    let head = image().integers("one", &[], &[1]).node("Cast", &["one"], &["yes"], &[Attribute::Int("to", BOOL)]);
    let leaf = branch(&node("Identity", "x", &[]));
    let mut innermost = node("Identity", "x", &[]);
    for _ in 0..DEPTH {
        let branches = [attribute("then_branch", &branch(&innermost)), attribute("else_branch", &leaf)];
        innermost = node("If", "yes", &branches);
    }
    [head.build(), field(7, &field(1, &innermost))].concat()
}

/// A `NodeProto` with these inputs and one output.
fn node_with(operator: &str, inputs: &[&str], output: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    let inputs = inputs.iter().flat_map(|input| field(1, input.as_bytes()));
    let attributes = attributes.iter().flat_map(|attribute| field(5, attribute));
    let output = field(2, output.as_bytes()).into_iter().chain(field(4, operator.as_bytes()));
    inputs.chain(output).chain(attributes).collect()
}

/// A `NodeProto` with one input and the output `y`.
fn node(operator: &str, input: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    let attributes = attributes.iter().flat_map(|attribute| field(5, attribute));
    [field(1, input.as_bytes()), field(2, b"y"), field(4, operator.as_bytes())]
        .concat()
        .into_iter()
        .chain(attributes)
        .collect()
}

/// A `GraphProto` with one node.
fn branch(node: &[u8]) -> Vec<u8> {
    [field(1, node), field(2, b"branch"), field(12, &field(1, b"y"))].concat()
}

/// An `AttributeProto` with a graph. Field 20, its type, is encoded as `A0 01`.
fn attribute(name: &str, graph: &[u8]) -> Vec<u8> {
    [field(1, name.as_bytes()), field(6, graph), vec![0xA0, 0x01, GRAPH]].concat()
}

/// A length-delimited field with a field number below 16.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(bytes);
    out
}
