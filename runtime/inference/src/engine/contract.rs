//! What every engine has to do, whichever it is. A new engine adds one line at the bottom.

use lineside_tests::onnx::{Attribute, Dim, FLOAT, FLOAT16, INT64, Model, UINT8, mean_colour_classifier};

use super::{Engine, inspect};
use crate::ErrorKind;
use lineside_api::tensor::{Data, Tensor};

fn floats(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::new(shape.to_vec(), Data::F32(values.to_vec())).unwrap()
}

/// `y = relu(x W + b)` with an open batch.
fn linear() -> Model {
    Model::new()
        .input("x", FLOAT, &[Dim::Named("batch"), Dim::Size(2)])
        .floats("W", &[2, 2], &[1.0, -1.0, 2.0, 0.5])
        .floats("b", &[2], &[0.5, -3.0])
        .node("MatMul", &["x", "W"], &["product"], &[])
        .node("Add", &["product", "b"], &["sum"], &[])
        .node("Relu", &["sum"], &["y"], &[])
        .output("y", FLOAT, &[Dim::Named("batch"), Dim::Size(2)])
}

fn it_computes(engine: &dyn Engine) {
    let mut session = engine.load(&linear().build(), &[vec![2, 2]]).unwrap();
    for _ in 0..2 {
        let outputs = session.run(vec![floats(&[2, 2], &[1.0, 2.0, -1.0, 8.0])]).unwrap();
        assert_eq!(outputs, [floats(&[2, 2], &[5.5, 0.0, 15.5, 2.0])]);
    }
}

fn outputs_come_in_the_graphs_order_and_types(engine: &dyn Engine) {
    let model = Model::new()
        .input("x", UINT8, &[Dim::Size(1), Dim::Size(3)])
        .node("Cast", &["x"], &["float"], &[Attribute::Int("to", 1)])
        .node("ArgMax", &["float"], &["index"], &[Attribute::Int("axis", 1), Attribute::Int("keepdims", 0)])
        .output("index", INT64, &[Dim::Size(1)])
        .output("float", FLOAT, &[Dim::Size(1), Dim::Size(3)]);
    let mut session = engine.load(&model.build(), &[vec![1, 3]]).unwrap();
    let outputs = session.run(vec![Tensor::new(vec![1, 3], Data::U8(vec![3, 250, 7])).unwrap()]).unwrap();
    assert_eq!(outputs[0].data(), &Data::I64(vec![1]));
    assert_eq!(outputs[1].data(), &Data::F32(vec![3.0, 250.0, 7.0]));
}

fn a_wrong_input_is_refused_and_the_next_one_runs(engine: &dyn Engine) {
    let mut session = engine.load(&linear().build(), &[vec![1, 2]]).unwrap();
    let wrong = [
        vec![],
        vec![floats(&[1, 3], &[0.0; 3])],
        vec![floats(&[2], &[0.0; 2])],
        vec![Tensor::new(vec![1, 2], Data::F64(vec![0.0; 2])).unwrap()],
        vec![floats(&[1, 2], &[0.0; 2]), floats(&[1, 2], &[0.0; 2])],
    ];
    for inputs in wrong {
        assert_eq!(session.run(inputs).unwrap_err().kind(), ErrorKind::Inference);
    }
    assert_eq!(session.run(vec![floats(&[1, 2], &[1.0, 1.0])]).unwrap(), [floats(&[1, 2], &[3.5, 0.0])]);
}

fn a_fork_answers_the_same_on_another_thread(engine: &dyn Engine) {
    let session = engine.load(&linear().build(), &[vec![1, 2]]).unwrap();
    let forks: Vec<_> = (0..3).map(|_| session.fork().unwrap()).collect();
    drop(session);
    let answers: Vec<_> = forks
        .into_iter()
        .map(|mut fork| std::thread::spawn(move || fork.run(vec![floats(&[1, 2], &[1.0, 1.0])]).unwrap()))
        .map(|thread| thread.join().unwrap())
        .collect();
    assert!(answers.iter().all(|answer| *answer == [floats(&[1, 2], &[3.5, 0.0])]));
}

/// A recurrent layer over three steps with two inputs and two units, which gives its last hidden state.
fn recurrent(operator: &str, gates: usize) -> Model {
    let weights = |count: usize| (0..count).map(|index| (index as f32 * 0.7).sin()).collect::<Vec<f32>>();
    let rows = gates * 2;
    Model::new()
        .input("x", FLOAT, &[Dim::Size(3), Dim::Size(1), Dim::Size(2)])
        .floats("W", &[1, rows as u64, 2], &weights(rows * 2))
        .floats("R", &[1, rows as u64, 2], &weights(rows * 2))
        .node(operator, &["x", "W", "R"], &["every", "last"], &[Attribute::Int("hidden_size", 2)])
        .output("last", FLOAT, &[Dim::Size(1), Dim::Size(1), Dim::Size(2)])
}

/// The state of one run must not be the start of the next, on one session or between the streams that share it.
fn every_run_begins_with_the_initial_state(engine: &dyn Engine) {
    for (operator, gates) in [("LSTM", 4), ("GRU", 3), ("RNN", 1)] {
        let mut session = engine.load(&recurrent(operator, gates).build(), &[vec![3, 1, 2]]).unwrap();
        let mut fork = session.fork().unwrap();
        let (bright, dark) = (floats(&[3, 1, 2], &[1.0; 6]), floats(&[3, 1, 2], &[-0.5; 6]));
        let first = session.run(vec![bright.clone()]).unwrap();
        let other = session.run(vec![dark.clone()]).unwrap();
        assert_ne!(first, other, "{operator}");
        for _ in 0..2 {
            assert_eq!(session.run(vec![bright.clone()]).unwrap(), first, "{operator}");
            assert_eq!(fork.run(vec![dark.clone()]).unwrap(), other, "{operator}");
            assert_eq!(fork.run(vec![bright.clone()]).unwrap(), first, "{operator}");
        }
    }
}

/// Eight boxes side by side, of which those with a high score are kept, at most 300 as exporters write it.
fn suppressing(limit_shape: &[u64]) -> Model {
    let boxes: Vec<f32> = (0..8).flat_map(|index| [0.0, index as f32, 1.0, index as f32 + 0.9]).collect();
    Model::new()
        .input("scores", FLOAT, &[Dim::Size(1), Dim::Size(1), Dim::Size(8)])
        .floats("boxes", &[1, 8, 4], &boxes)
        .integers("most", limit_shape, &[300])
        .floats("iou", limit_shape, &[0.5])
        .floats("least", limit_shape, &[0.3])
        .integers("start", &[1], &[0])
        .integers("end", &[1], &[300])
        .integers("axis", &[1], &[0])
        .node("NonMaxSuppression", &["boxes", "scores", "most", "iou", "least"], &["selected"], &[])
        .node("Slice", &["selected", "start", "end", "axis"], &["kept"], &[])
        .node("Cast", &["kept"], &["out"], &[Attribute::Int("to", 1)])
        .output("out", FLOAT, &[Dim::Named("n"), Dim::Size(3)])
}

/// The number of rows is known only at run time, and smaller than the end of the slice; limits may be scalars.
fn a_slice_ends_with_its_tensor(engine: &dyn Engine) {
    for limit_shape in [&[1][..], &[]] {
        let mut session = engine.load(&suppressing(limit_shape).build(), &[vec![1, 1, 8]]).unwrap();
        for count in [3, 0, 8, 1] {
            let scores: Vec<f32> = (0..8).map(|index| if index < count { 0.9 } else { 0.1 }).collect();
            let outputs = session.run(vec![floats(&[1, 1, 8], &scores)]).unwrap();
            assert_eq!(outputs[0].shape(), [count, 3]);
            let mut rows: Vec<f32> = outputs[0].to_f32().chunks_exact(3).map(|row| row[2]).collect();
            rows.sort_by(f32::total_cmp);
            assert_eq!(rows, (0..count).map(|index| index as f32).collect::<Vec<_>>());
        }
    }
}

fn half_floats_go_in_and_come_out(engine: &dyn Engine) {
    let model = Model::new()
        .input("x", FLOAT16, &[Dim::Size(1), Dim::Size(2)])
        .node("Add", &["x", "x"], &["y"], &[])
        .output("y", FLOAT16, &[Dim::Size(1), Dim::Size(2)]);
    let half = |values: [f32; 2]| Tensor::new(vec![1, 2], Data::F16(values.map(half::f16::from_f32).to_vec())).unwrap();
    let mut session = engine.load(&model.build(), &[vec![1, 2]]).unwrap();
    assert_eq!(session.run(vec![half([1.5, -2.0])]).unwrap(), [half([3.0, -4.0])]);
}

fn what_is_no_model_is_refused(engine: &dyn Engine) {
    let whole = linear().build();
    let nothing = Model::new().build();
    for bytes in [&b""[..], b"not a model at all", b"\x89PNG\r\n\x1a\n", &[0xFF; 64], &nothing] {
        let error = engine.load(bytes, &[vec![1, 2]]).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::BadModel, "{error}");
    }
    // The file ends with four bytes that name the operator set. Protobuf cannot tell when those are missing (the digest
    // does, elsewhere); whatever is cut off before them must be noticed.
    for cut in 0..whole.len() - 4 {
        let error = engine.load(&whole[..cut], &[vec![1, 2]]).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::BadModel, "cut at {cut}: {error}");
    }
}

fn an_unknown_operator_is_named(engine: &dyn Engine) {
    let model = Model::new().input("x", FLOAT, &[Dim::Size(1)]).node("PaintItBlack", &["x"], &["y"], &[]).output(
        "y",
        FLOAT,
        &[Dim::Size(1)],
    );
    let error = engine.load(&model.build(), &[vec![1]]).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("PaintItBlack"), "{error}");
}

fn weights_in_other_files_are_refused(engine: &dyn Engine) {
    let model = Model::new()
        .input("x", FLOAT, &[Dim::Size(1)])
        .external("secret", &[1], "/etc/hostname")
        .node("Add", &["x", "secret"], &["y"], &[])
        .output("y", FLOAT, &[Dim::Size(1)]);
    let error = engine.load(&model.build(), &[vec![1]]).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::BadModel);
    assert!(error.to_string().contains("`secret`"), "{error}");
}

fn an_impossible_shape_is_refused(engine: &dyn Engine) {
    for shapes in [vec![], vec![vec![1, 3]], vec![vec![1, 2], vec![1, 2]]] {
        assert!(engine.load(&linear().build(), &shapes).is_err(), "{shapes:?}");
    }
}

fn suite(engine: &dyn Engine) {
    it_computes(engine);
    outputs_come_in_the_graphs_order_and_types(engine);
    a_wrong_input_is_refused_and_the_next_one_runs(engine);
    a_fork_answers_the_same_on_another_thread(engine);
    every_run_begins_with_the_initial_state(engine);
    a_slice_ends_with_its_tensor(engine);
    half_floats_go_in_and_come_out(engine);
    what_is_no_model_is_refused(engine);
    an_unknown_operator_is_named(engine);
    weights_in_other_files_are_refused(engine);
    an_impossible_shape_is_refused(engine);
}

#[test]
fn tract_keeps_the_contract() {
    suite(&super::Tract);
}

#[test]
fn a_file_declares_its_tensors_and_metadata() {
    let model = mean_colour_classifier(8, 6, 4).metadata("names", "{0: 'a'}").build();
    let graph = inspect(&model).unwrap();
    assert_eq!(graph.inputs.len(), 1);
    assert_eq!(graph.inputs[0].protocol_shape(), [-1, 3, 8, 6]);
    assert_eq!(graph.outputs[0].protocol_shape(), [-1, 4]);
    assert_eq!(graph.class_names().unwrap().by_number[&0], "a");
    assert_eq!((graph.nodes, graph.opset), (3, 17));
}
