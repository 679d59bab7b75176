//! Properties of the numbers in manifests: every number of the schemas has bounds, the agent accepts exactly the numbers that the
//! custom resource definitions accept, and no number makes the agent panic.

use std::path::Path;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use super::manifest::{ManifestErrors, Object, RawModelSpec, RawStreamSpec, read, read_object};
use super::{document, yaml};

/// A number of a schema with its bounds.
struct NumericField {
    kind: &'static str,
    /// JSON pointer in the spec; the items of a list are represented by the first one.
    pointer: String,
    min: f64,
    max: f64,
    is_integer: bool,
}

/// The numeric fields of a kind.
fn fields_of<T: JsonSchema>(kind: &'static str) -> Vec<NumericField> {
    let generator = SchemaSettings::default().with(|settings| settings.inline_subschemas = true).into_generator();
    let mut fields = Vec::new();
    collect(kind, "", &generator.into_root_schema_for::<T>().to_value(), &mut fields);
    fields
}

fn collect(kind: &'static str, pointer: &str, schema: &Value, fields: &mut Vec<NumericField>) {
    let has_type = |name: &str| match &schema["type"] {
        Value::String(one) => one == name,
        Value::Array(several) => several.iter().any(|one| one == name),
        _ => false,
    };
    let (is_integer, is_number) = (has_type("integer"), has_type("number"));
    if is_integer || is_number {
        let bound = |name: &str| {
            let value = schema[name].as_f64();
            value.unwrap_or_else(|| panic!("{kind} spec{pointer} has no {name}: {schema}"))
        };
        let (min, max) = (bound("minimum"), bound("maximum"));
        fields.push(NumericField { kind, pointer: pointer.to_owned(), min, max, is_integer });
    }
    for option in schema["anyOf"].as_array().into_iter().flatten() {
        collect(kind, pointer, option, fields);
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        collect(kind, &format!("{pointer}/{name}"), property, fields);
    }
    // A list of planned fields, which this version rejects, has no meaning yet.
    if schema["items"].is_object() && !pointer.starts_with("/roi") && !pointer.starts_with("/pipeline") {
        collect(kind, &format!("{pointer}/0"), &schema["items"], fields);
    }
}

fn all_fields() -> Vec<NumericField> {
    let fields: Vec<NumericField> =
        fields_of::<RawModelSpec>("EdgeModel").into_iter().chain(fields_of::<RawStreamSpec>("CameraStream")).collect();
    assert!(fields.len() >= 18, "{} fields", fields.len());
    fields
}

/// A valid spec of the kind.
fn valid_spec(kind: &str) -> Value {
    if kind == "EdgeModel" {
        json!({
            "version": 1, "source": {"uri": "file:///m.onnx"}, "input": {"mean": [1], "std": [1]}, "output": {}, "runtime": {},
            "golden": [{"input": "a", "output": "b"}],
        })
    } else {
        json!({"source": {"uri": "dir:///f"}, "model": "m", "report": {"byException": true}})
    }
}

impl NumericField {
    fn spec(&self, number: Value) -> Value {
        let mut spec = valid_spec(self.kind);
        let (parent, name) = self.pointer.rsplit_once('/').unwrap();
        let parent = spec.pointer_mut(parent).unwrap_or_else(|| panic!("{} is missing in valid_spec", self.pointer));
        match parent {
            Value::Array(items) => items[0] = number,
            parent => parent[name] = number,
        }
        spec
    }

    fn read(&self, number: Value) -> Result<Object, ManifestErrors> {
        let read = read_object(document(self.kind, "x", &self.spec(number)), &|_| Ok(()));
        if let Err(errors) = &read {
            assert!(!errors.to_string().contains("panicked"), "{errors}");
        }
        read
    }

    /// Whether the schema accepts a number: its type, its bounds, and the validation rule of `fps`.
    fn is_accepted(&self, number: f64) -> bool {
        let is_low_fps = self.pointer == "/fps" && number != 0.0 && number < 0.000_011_5;
        (self.min..=self.max).contains(&number) && (!self.is_integer || number.fract() == 0.0) && !is_low_fps
    }
}

#[test]
fn the_agent_accepts_the_numbers_that_the_schema_accepts() {
    for field in all_fields() {
        let step = if field.is_integer { 1.0 } else { (field.max - field.min) / 1e3 };
        for number in [field.min, field.max, field.min - step, field.max + step, field.min + step] {
            let value = if !field.is_integer {
                json!(number)
            } else if number < 0.0 {
                json!(number as i64)
            } else {
                json!(number as u64)
            };
            let read = field.read(value.clone());
            let pointer = &field.pointer;
            assert_eq!(read.is_ok(), field.is_accepted(number), "{} spec{pointer} = {value}: {read:?}", field.kind);
        }
    }
}

#[test]
fn no_number_makes_the_agent_panic() {
    let mut random = fastrand::Rng::with_seed(13);
    let special =
        [0.0, -0.0, 1e-300, 5e-324, 5.4e-20, 1e-20, f64::MIN_POSITIVE, 1e300, f64::MAX, f64::MIN, 0.1, 1.5, -1.0];
    for field in all_fields() {
        for number in special.into_iter().chain((0..2000).map(|_| f64::from_bits(random.u64(..)))) {
            // JSON has no NaN and no infinity, and the YAML parser rejects them.
            let read = field.read(json!(number));
            // A number of 32 bits is rounded, so that one just outside of the bounds can be accepted.
            let is_near = |bound: f64| (number - bound).abs() <= bound.abs() * 1e-6 + 1e-40;
            if number.is_finite() && !field.is_integer && !is_near(field.min) && !is_near(field.max) {
                assert_eq!(read.is_ok(), field.is_accepted(number), "spec{} = {number:?}: {read:?}", field.pointer);
            }
        }
        let integers = [0, 1, u64::MAX, u64::MAX - 1, i64::MAX as u64, 1 << 53, (1 << 53) + 1, u64::from(u32::MAX) + 1];
        for number in integers.into_iter().chain((0..500).map(|_| random.u64(..))) {
            assert_eq!(
                field.read(json!(number)).is_ok(),
                field.is_accepted(number as f64),
                "{} = {number}",
                field.pointer
            );
        }
        for number in [-1, i64::MIN, i64::MIN + 1] {
            assert_eq!(
                field.read(json!(number)).is_ok(),
                field.is_accepted(number as f64),
                "{} = {number}",
                field.pointer
            );
        }
    }
}

#[test]
fn notations_of_numbers_in_yaml_are_read_or_rejected() {
    let notations = [
        ".nan",
        ".NaN",
        "nan",
        ".inf",
        "-.inf",
        "+.inf",
        "inf",
        "1e400",
        "-1e400",
        "1e-400",
        "0x7fffffffffffffff",
        "0o777",
        "1_000",
        "+1",
        "1.",
        ".5",
        "!!float 3",
        "!!int 3",
        "!!str 3",
        "99999999999999999999999999",
        "-9223372036854775809",
        "1e18446744073709551616",
        "[]",
        "{}",
        "'3'",
    ];
    for field in all_fields() {
        for notation in notations {
            let spec = field.spec(json!("@")).to_string().replace("\"@\"", notation);
            let text = format!(
                "apiVersion: lineside.dev/v1alpha1\nkind: {}\nmetadata: {{name: x}}\nspec: {spec}\n",
                field.kind
            );
            let read = read(&text, Path::new("/"), &|_| Ok(()));
            let shown = format!("spec{} = {notation}: {read:?}", field.pointer);
            assert!(!shown.contains("panicked"), "{shown}");
            if notation.to_lowercase().contains("nan") || notation.contains("inf") || notation.contains("e400") {
                assert!(read.is_err(), "{shown}");
            }
        }
    }
}

#[test]
fn random_documents_do_not_make_the_agent_panic() {
    let mut random = fastrand::Rng::with_seed(13);
    let seeds: Vec<Value> = ["EdgeModel", "CameraStream"].map(|kind| document(kind, "x", &valid_spec(kind))).into();
    for _ in 0..1500 {
        let mut changed = seeds[random.usize(..seeds.len())].clone();
        for _ in 0..random.usize(1..4) {
            mutate(&mut changed, &mut random);
        }
        let text = changed.to_string();
        for text in [text.clone(), text.chars().take(random.usize(..=text.len())).collect()] {
            let read = read(&text, Path::new("/"), &|_| Ok(()));
            let errors = read.err().map(|errors| errors.to_string()).unwrap_or_default();
            assert!(!errors.contains("panicked"), "{text}: {errors}");
            drop(yaml::documents(&text));
        }
    }
}

/// Replaces one random value of a document by another one.
fn mutate(value: &mut Value, random: &mut fastrand::Rng) {
    match value {
        Value::Object(entries) if !entries.is_empty() && random.u8(..) < 230 => {
            let index = random.usize(..entries.len());
            if let Some(inner) = entries.values_mut().nth(index) {
                mutate(inner, random);
            }
        }
        Value::Array(items) if !items.is_empty() && random.u8(..) < 230 => {
            let index = random.usize(..items.len());
            mutate(&mut items[index], random);
        }
        value => {
            *value = match random.u8(..12) {
                0 => Value::Null,
                1 => json!(random.bool()),
                2 => json!(random.i64(..)),
                3 => json!(random.u64(..)),
                4 => json!(f64::from_bits(random.u64(..))),
                5 => json!([]),
                6 => json!({}),
                7 => json!("x".repeat(random.usize(..5000))),
                8 => json!([[[1]]]),
                9 => json!({"?": {"": {"\0": 1}}}),
                10 => json!(["\u{feff}", "é\u{301}", "::", "a:\0", "//", "file:///\u{202e}"][random.usize(..6)]),
                _ => json!((0..random.usize(..40)).map(|_| random.char(..)).collect::<String>()),
            }
        }
    }
}
