//! Dense tensors: a shape and a flat, row-major vector of one element type, independent of any engine.
//!
//! Element types have the names of the Open Inference Protocol v2 (`FP32`, `UINT8` and so on), in results and on the serving
//! interfaces.

use half::f16;
use serde::{Deserialize, Serialize};

macro_rules! element_types {
    ($($(#[$attribute:meta])* $variant:ident $rust:ty, $name:literal;)*) => {
        /// Element types of tensors, with the names of the Open Inference Protocol v2.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
        pub enum DataType { $(#[serde(rename = $name)] #[doc = $name] $variant,)* }

        impl DataType {
            /// Whether the elements are floating-point numbers.
            pub fn is_float(self) -> bool {
                matches!(self, Self::F16 | Self::F32 | Self::F64)
            }

            /// The name in the Open Inference Protocol.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }

        /// The elements of a tensor, in row-major order.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        pub enum Data { $(#[doc = $name] $(#[$attribute])* $variant(Vec<$rust>),)* }

        impl Data {
            /// Number of elements.
            pub fn len(&self) -> usize {
                match self { $(Self::$variant(values) => values.len(),)* }
            }

            /// Whether there are no elements.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// The element type.
            pub fn data_type(&self) -> DataType {
                match self { $(Self::$variant(_) => DataType::$variant,)* }
            }
        }
    };
}

element_types! {
    Bool bool, "BOOL";
    U8 u8, "UINT8";
    U16 u16, "UINT16";
    U32 u32, "UINT32";
    U64 u64, "UINT64";
    I8 i8, "INT8";
    I16 i16, "INT16";
    I32 i32, "INT32";
    I64 i64, "INT64";
    #[serde(with = "half_bits")] F16 f16, "FP16";
    F32 f32, "FP32";
    F64 f64, "FP64";
}

/// The product of a shape is not the number of elements.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a tensor of shape {shape:?} cannot have {elements} elements")]
pub struct ShapeError {
    shape: Vec<usize>,
    elements: usize,
}

/// Serializes half-precision numbers as their bits.
mod half_bits {
    use half::f16;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(values: &[f16], serializer: S) -> Result<S::Ok, S::Error> {
        values.iter().map(|value| value.to_bits()).collect::<Vec<u16>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f16>, D::Error> {
        Ok(Vec::<u16>::deserialize(deserializer)?.into_iter().map(f16::from_bits).collect())
    }
}

/// The serialized form of a [`Tensor`], before its shape is checked.
#[derive(Deserialize)]
struct UncheckedTensor {
    shape: Vec<usize>,
    data: Data,
}

impl TryFrom<UncheckedTensor> for Tensor {
    type Error = ShapeError;

    fn try_from(tensor: UncheckedTensor) -> Result<Self, ShapeError> {
        Self::new(tensor.shape, tensor.data)
    }
}

/// A dense tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "UncheckedTensor")]
pub struct Tensor {
    shape: Vec<usize>,
    data: Data,
}

impl Tensor {
    /// A tensor of this shape.
    ///
    /// # Errors
    /// [`ShapeError`] when the product of the shape overflows or is not the number of elements.
    pub fn new(shape: Vec<usize>, data: Data) -> Result<Self, ShapeError> {
        let elements = shape.iter().try_fold(1usize, |product, side| product.checked_mul(*side));
        if elements != Some(data.len()) {
            return Err(ShapeError { shape, elements: data.len() });
        }
        Ok(Self { shape, data })
    }

    /// The shape, outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// Splits the tensor into shape and elements.
    pub fn into_parts(self) -> (Vec<usize>, Data) {
        (self.shape, self.data)
    }

    /// The elements as `f32`; other types are converted.
    pub fn to_f32(&self) -> std::borrow::Cow<'_, [f32]> {
        use std::borrow::Cow;
        match &self.data {
            Data::F32(values) => Cow::Borrowed(values),
            Data::F16(values) => Cow::Owned(values.iter().map(|value| value.to_f32()).collect()),
            Data::F64(values) => Cow::Owned(values.iter().map(|value| *value as f32).collect()),
            Data::Bool(values) => Cow::Owned(values.iter().map(|value| f32::from(u8::from(*value))).collect()),
            Data::U8(values) => Cow::Owned(values.iter().map(|value| f32::from(*value)).collect()),
            Data::U16(values) => Cow::Owned(values.iter().map(|value| f32::from(*value)).collect()),
            Data::U32(values) => Cow::Owned(values.iter().map(|value| *value as f32).collect()),
            Data::U64(values) => Cow::Owned(values.iter().map(|value| *value as f32).collect()),
            Data::I8(values) => Cow::Owned(values.iter().map(|value| f32::from(*value)).collect()),
            Data::I16(values) => Cow::Owned(values.iter().map(|value| f32::from(*value)).collect()),
            Data::I32(values) => Cow::Owned(values.iter().map(|value| *value as f32).collect()),
            Data::I64(values) => Cow::Owned(values.iter().map(|value| *value as f32).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_must_match_the_number_of_elements() {
        assert!(Tensor::new(vec![2, 3], Data::U8(vec![0; 6])).is_ok());
        assert!(Tensor::new(vec![2, 3], Data::U8(vec![0; 5])).is_err());
        assert!(Tensor::new(vec![usize::MAX, 2], Data::U8(vec![])).is_err());
    }

    #[test]
    fn every_numeric_type_converts_to_f32() {
        let half = Tensor::new(vec![1], Data::F16(vec![f16::from_f32(0.5)])).unwrap();
        assert_eq!(half.to_f32()[0], 0.5);
        let integer = Tensor::new(vec![2], Data::I64(vec![-3, 7])).unwrap();
        assert_eq!(&integer.to_f32()[..], [-3.0, 7.0]);
        assert_eq!(integer.data().data_type().name(), "INT64");
    }
}
