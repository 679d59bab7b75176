//! Reads an ONNX protobuf: what the file says of itself, and whether tract should be asked at all.
//!
//! Format: `onnx.proto3` of the ONNX project, IR versions 3 to 10.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;

use tract_onnx::pb::type_proto::Value;
use tract_onnx::pb::{
    GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, tensor_proto, tensor_shape_proto::dimension,
};
use tract_onnx::prelude::Framework as _;

use crate::graph::{Activation, Dimension, GraphInfo, TensorMetadata};
use crate::{Error, ErrorKind, Result};
use lineside_api::tensor::DataType;

/// How far back from an output its activation is looked for, through operators that only reshape.
const ACTIVATION_HOPS_MAX: usize = 8;

/// Operators at most. The largest networks that make sense on a line have a few thousand.
const OPERATORS_MAX: usize = 20_000;

/// Parses the protobuf and refuses what can never be a model of ours.
pub(super) fn parse(bytes: &[u8]) -> Result<ModelProto> {
    let bad = |why: &str| Error::new(ErrorKind::BadModel, format!("this is not an ONNX model: {why}"));
    if bytes.is_empty() {
        return Err(bad("the file is empty"));
    }
    let model = super::fenced("reading the file", || tract_onnx::onnx().proto_model_for_read(&mut Cursor::new(bytes)))
        .map_err(|error| bad(&error))?;
    let graph = model.graph.as_ref().ok_or_else(|| bad("it holds no graph"))?;
    if graph.node.is_empty() {
        return Err(bad("its graph has no operators"));
    }
    if graph.output.is_empty() {
        return Err(bad("its graph has no outputs"));
    }
    if let Some(why) = excess(graph) {
        return Err(bad(&why));
    }
    if let Some(tensor) = external_tensor(graph) {
        return Err(Error::new(
            ErrorKind::BadModel,
            format!(
                "the model keeps the weights of `{tensor}` in another file; save it as one file \
                 (onnx.save(model, path, save_as_external_data=False))"
            ),
        ));
    }
    Ok(model)
}

/// What no sound model has, and what would make an engine take time or memory out of proportion to the file: too many
/// operators, and weights that claim more elements than there are bytes for.
fn excess(graph: &GraphProto) -> Option<String> {
    let mut operators = 0;
    let mut found = None;
    each_graph(graph, &mut |graph| {
        operators += graph.node.len();
        let attributes = graph.node.iter().flat_map(|node| &node.attribute);
        let constants = attributes.flat_map(|attribute| attribute.t.iter().chain(&attribute.tensors));
        for tensor in graph.initializer.iter().chain(constants) {
            let claimed =
                tensor.dims.iter().try_fold(1u64, |product, size| product.checked_mul(u64::try_from(*size).ok()?));
            // Four-bit types hold two elements in a byte.
            let bytes = tensor.raw_data.len()
                + tensor.string_data.len()
                + 8 * (tensor.float_data.len()
                    + tensor.int32_data.len()
                    + tensor.int64_data.len()
                    + tensor.double_data.len()
                    + tensor.uint64_data.len());
            let is_external = tensor.data_location == Some(tensor_proto::DataLocation::External as i32)
                || !tensor.external_data.is_empty();
            if !is_external && claimed.is_none_or(|claimed| claimed > 2 * bytes as u64) && found.is_none() {
                found = Some(format!("the weights of `{}` claim more elements than there are bytes for", tensor.name));
            }
        }
    });
    match operators > OPERATORS_MAX {
        true => Some(format!("its graph has {operators} operators; at most {OPERATORS_MAX} are taken")),
        false => found,
    }
}

/// The limits of a NonMaxSuppression may be scalars in ONNX; tract takes those with one dimension only.
pub(super) fn give_limits_one_dimension(graph: &mut GraphProto) {
    const FIRST_LIMIT: usize = 2;
    let constants: BTreeMap<String, TensorProto> = scalars(graph);
    let mut added: BTreeMap<String, TensorProto> = BTreeMap::new();
    for node in graph.node.iter_mut().filter(|node| node.op_type == "NonMaxSuppression") {
        for limit in node.input.iter_mut().skip(FIRST_LIMIT) {
            if let Some(scalar) = constants.get(limit) {
                let name = format!("{limit}/one_dimension");
                added.insert(name.clone(), TensorProto { name: name.clone(), dims: vec![1], ..scalar.clone() });
                *limit = name;
            }
        }
    }
    graph.initializer.extend(added.into_values());
}

/// In ONNX a slice ends with its tensor. tract refuses one that ends later where the size is known at run time only, behind operators that
/// select: the end becomes the smaller one of both.
pub(super) fn end_slices_with_their_tensor(graph: &mut GraphProto) {
    const SELECTING: [&str; 4] = ["NonMaxSuppression", "NonZero", "Compress", "Unique"];
    let mut selected: BTreeSet<String> = BTreeSet::new();
    let mut nodes = Vec::with_capacity(graph.node.len());
    for mut node in std::mem::take(&mut graph.node) {
        let is_selected = node.input.iter().any(|input| selected.contains(input));
        if is_selected || SELECTING.contains(&node.op_type.as_str()) {
            selected.extend(node.output.iter().filter(|name| !name.is_empty()).cloned());
        }
        if let ("Slice", true, [data, _, end, axes, ..]) =
            (node.op_type.as_str(), is_selected, node.input.as_mut_slice())
        {
            let prefix = format!("{}/{}", node.output.first().map(String::as_str).unwrap_or_default(), node.name);
            let step = |operator: &str, inputs: [&String; 2], suffix: &str| NodeProto {
                op_type: operator.to_owned(),
                name: format!("{prefix}/{suffix}"),
                input: inputs.into_iter().filter(|input| !input.is_empty()).cloned().collect(),
                output: vec![format!("{prefix}/{suffix}")],
                ..NodeProto::default()
            };
            let shape = step("Shape", [data, &String::new()], "shape");
            let sizes = step("Gather", [&shape.output[0], axes], "sizes");
            let least = step("Min", [end, &sizes.output[0]], "end");
            end.clone_from(&least.output[0]);
            nodes.extend([shape, sizes, least]);
        }
        nodes.push(node);
    }
    graph.node = nodes;
}

/// The constants without dimensions, by name.
fn scalars(graph: &GraphProto) -> BTreeMap<String, TensorProto> {
    let initializers = graph.initializer.iter().map(|tensor| (&tensor.name, tensor));
    let nodes = graph.node.iter().filter(|node| node.op_type == "Constant").filter_map(|node| {
        let value = node.attribute.iter().find(|attribute| attribute.name == "value")?.t.as_ref()?;
        Some((node.output.first()?, value))
    });
    let constants = initializers.chain(nodes).filter(|(_, tensor)| tensor.dims.is_empty());
    constants.map(|(name, tensor)| (name.clone(), tensor.clone())).collect()
}

/// The facts of a parsed model.
pub(super) fn info(model: &ModelProto, graph: &GraphProto) -> GraphInfo {
    let initialised = |name: &str| graph.initializer.iter().any(|tensor| tensor.name == name);
    GraphInfo {
        inputs: graph.input.iter().filter(|input| !initialised(&input.name)).map(tensor_info).collect(),
        outputs: graph.output.iter().map(tensor_info).collect(),
        activations: graph.output.iter().map(|output| activation(graph, &output.name)).collect(),
        metadata: model.metadata_props.iter().map(|entry| (entry.key.clone(), entry.value.clone())).collect(),
        producer: format!("{} {}", model.producer_name, model.producer_version).trim().to_owned(),
        opset: model
            .opset_import
            .iter()
            .find(|import| import.domain.is_empty() || import.domain == "ai.onnx")
            .map_or(0, |import| import.version),
        nodes: graph.node.len(),
    }
}

/// The operators of the graph and the graphs within it that tract does not know, each named once.
pub(super) fn unknown_operators(graph: &GraphProto) -> Vec<String> {
    let known = tract_onnx::onnx().op_register.0;
    let mut unknown = Vec::new();
    each_graph(graph, &mut |graph| {
        for node in &graph.node {
            if !known.contains_key(&node.op_type) && !unknown.contains(&node.op_type) {
                unknown.push(node.op_type.clone());
            }
        }
    });
    unknown
}

/// The name of a tensor whose data lies outside the file, in the graph or in any graph or attribute within it.
fn external_tensor(graph: &GraphProto) -> Option<String> {
    let external = |tensor: &&TensorProto| {
        tensor.data_location == Some(tensor_proto::DataLocation::External as i32) || !tensor.external_data.is_empty()
    };
    let mut found = None;
    each_graph(graph, &mut |graph| {
        let attributes = graph.node.iter().flat_map(|node| &node.attribute);
        let constants = attributes.flat_map(|attribute| attribute.t.iter().chain(&attribute.tensors));
        if let Some(tensor) = graph.initializer.iter().chain(constants).find(external) {
            found.get_or_insert_with(|| tensor.name.clone());
        }
    });
    found
}

/// Visits the graph and all graphs in its operators' attributes. Depth is bounded by the protobuf reader's own limit.
fn each_graph<'a>(graph: &'a GraphProto, visit: &mut impl FnMut(&'a GraphProto)) {
    visit(graph);
    for attribute in graph.node.iter().flat_map(|node| &node.attribute) {
        for inner in attribute.g.iter().chain(&attribute.graphs) {
            each_graph(inner, visit);
        }
    }
}

fn tensor_info(declared: &ValueInfoProto) -> TensorMetadata {
    let Some(Value::TensorType(tensor)) = declared.r#type.as_ref().and_then(|kind| kind.value.as_ref()) else {
        return TensorMetadata { name: declared.name.clone(), data_type: None, shape: None };
    };
    let shape = tensor.shape.as_ref().map(|shape| {
        shape
            .dim
            .iter()
            .map(|dimension| match &dimension.value {
                Some(dimension::Value::DimValue(size)) if *size > 0 => {
                    usize::try_from(*size).map_or_else(|_| Dimension::Open(String::new()), Dimension::Fixed)
                }
                Some(dimension::Value::DimParam(name)) => Dimension::Open(name.clone()),
                _ => Dimension::Open(String::new()),
            })
            .collect()
    });
    TensorMetadata { name: declared.name.clone(), data_type: data_type(tensor.elem_type), shape }
}

/// `TensorProto.DataType` as one of our element types.
fn data_type(code: i32) -> Option<DataType> {
    use tensor_proto::DataType as Onnx;
    Some(match Onnx::try_from(code).ok()? {
        Onnx::Bool => DataType::Bool,
        Onnx::Uint8 => DataType::U8,
        Onnx::Uint16 => DataType::U16,
        Onnx::Uint32 => DataType::U32,
        Onnx::Uint64 => DataType::U64,
        Onnx::Int8 => DataType::I8,
        Onnx::Int16 => DataType::I16,
        Onnx::Int32 => DataType::I32,
        Onnx::Int64 => DataType::I64,
        Onnx::Float16 => DataType::F16,
        Onnx::Float => DataType::F32,
        Onnx::Double => DataType::F64,
        _ => return None,
    })
}

/// Walks back from an output, through operators that change no value, to the activation it ends with.
fn activation(graph: &GraphProto, output: &str) -> Activation {
    let mut wanted = output;
    for _ in 0..ACTIVATION_HOPS_MAX {
        let Some(node) = graph.node.iter().find(|node| node.output.iter().any(|name| name == wanted)) else { break };
        match node.op_type.as_str() {
            "Softmax" => return Activation::Softmax,
            "LogSoftmax" => return Activation::LogSoftmax,
            "Sigmoid" => return Activation::Sigmoid,
            "Identity" | "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Cast" | "Transpose"
            | "DequantizeLinear" | "QuantizeLinear" => match node.input.first() {
                Some(input) => wanted = input,
                None => break,
            },
            _ => break,
        }
    }
    Activation::None
}
