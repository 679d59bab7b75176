//! Stage times of one 1080p JPEG: decode, preprocess, and the whole pipeline with the bundled classifier.
//!
//! `LINESIDE_BENCH_MODEL=/path/to/model.onnx cargo bench --workspace --bench stages` takes another model as well.

#![allow(missing_docs, clippy::expect_used, reason = "a benchmark that cannot run should say so and end")]

use std::hint::black_box;
use std::io::Cursor;

use criterion::{Criterion, criterion_group, criterion_main};
use lineside_api::spec::{ModelSpec, Resize, Task};
use lineside_inference::decode::{DecodeOptions, decode};
use lineside_inference::engine::Tract;
use lineside_inference::pipeline::Pipeline;
use lineside_inference::preprocess::Preprocessor;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/surface-defects/");

/// A picture with real texture at 1920x1080, as a camera would compress it.
fn full_hd() -> Vec<u8> {
    let frame = std::fs::read(format!("{EXAMPLE}frames/part-012-scratch.jpg")).expect("the example is committed");
    let picture = image::load_from_memory(&frame).expect("a JPEG").to_rgb8();
    let large = image::imageops::resize(&picture, 1920, 1080, image::imageops::FilterType::Triangle);
    let mut out = Cursor::new(Vec::new());
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, 90).encode_image(&large).expect("it is encoded");
    out.into_inner()
}

fn stages(criterion: &mut Criterion) {
    let jpeg = full_hd();
    let limits = DecodeOptions::default();
    criterion.bench_function("decode/1080p jpeg", |bencher| {
        bencher.iter(|| decode(black_box(&jpeg), &limits).expect("it decodes"));
    });
    let frame = decode(&jpeg, &limits).expect("it decodes");
    let mut models = vec![("bundled".to_owned(), format!("{EXAMPLE}surface-defects.onnx"))];
    models.extend(std::env::var("LINESIDE_BENCH_MODEL").ok().map(|path| ("other".to_owned(), path)));
    for (name, path) in models {
        let bytes = std::fs::read(&path).expect("the model can be read");
        let spec = ModelSpec { task: Some(Task::Classify), ..ModelSpec::default() };
        let mut pipeline = Pipeline::load(&Tract, &bytes, &spec).expect("the model loads");
        for resize in [Resize::Stretch, Resize::Letterbox, Resize::Crop] {
            let settings = lineside_inference::settings::InputSettings { resize, ..pipeline.input().clone() };
            let mut preprocessor = Preprocessor::new(&settings);
            criterion.bench_function(&format!("preprocess/{name}/{resize:?}"), |bencher| {
                bencher.iter(|| preprocessor.run(black_box(&frame)).expect("it resizes"));
            });
        }
        criterion.bench_function(&format!("preprocess, infer, postprocess/{name}"), |bencher| {
            bencher.iter(|| pipeline.run_picture(black_box(&frame)).expect("it runs"));
        });
        criterion.bench_function(&format!("whole frame/{name}"), |bencher| {
            bencher.iter(|| pipeline.run(black_box(&jpeg)).expect("it runs"));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30);
    targets = stages
}
criterion_main!(benches);
