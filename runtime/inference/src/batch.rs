//! Stacking tensors along the batch dimension, and taking them apart again.

use lineside_api::tensor::{Data, Tensor};

use crate::{Error, ErrorKind, Result};

macro_rules! for_each_type {
    ($($variant:ident)*) => {
        /// Appends the elements of `more`, which must be of the same type.
        fn append(data: &mut Data, more: &Data) -> bool {
            match (data, more) {
                $((Data::$variant(data), Data::$variant(more)) => {
                    data.extend_from_slice(more);
                    true
                })*
                _ => false,
            }
        }

        /// A part of the elements.
        fn slice(data: &Data, range: std::ops::Range<usize>) -> Data {
            match data {
                $(Data::$variant(data) => Data::$variant(data[range].to_vec()),)*
            }
        }
    };
}

for_each_type!(Bool U8 U16 U32 U64 I8 I16 I32 I64 F16 F32 F64);

/// Stacks tensors of shape `[1, ...]` to one of shape `[size, ...]`. A batch of fewer tensors is filled up with copies of the
/// last one.
///
/// # Errors
/// [`ErrorKind::Inference`] when there is none, or they differ in shape or type.
pub(crate) fn stack(inputs: &[Tensor], size: usize) -> Result<Tensor> {
    let (Some(first), Some(last)) = (inputs.first(), inputs.last()) else { return Err(mismatch()) };
    let mut data = slice(first.data(), 0..first.data().len());
    let rest = inputs.iter().skip(1).chain(std::iter::repeat_n(last, size.saturating_sub(inputs.len())));
    for input in rest {
        if input.shape() != first.shape() || !append(&mut data, input.data()) {
            return Err(mismatch());
        }
    }
    let mut shape = first.shape().to_vec();
    *shape.first_mut().ok_or_else(mismatch)? = size;
    Ok(Tensor::new(shape, data)?)
}

/// Takes the outputs of a batch of `size` apart: for each of the first `count` items its outputs, of shape `[1, ...]`.
///
/// # Errors
/// [`ErrorKind::BadOutput`] when an output's first dimension is not the batch.
pub(crate) fn split(outputs: &[Tensor], size: usize, count: usize) -> Result<Vec<Vec<Tensor>>> {
    let mut items = vec![Vec::with_capacity(outputs.len()); count];
    for output in outputs {
        if output.shape().first() != Some(&size) {
            return Err(Error::new(
                ErrorKind::BadOutput,
                format!("an output of shape {:?} has no batch dimension of {size}", output.shape()),
            ));
        }
        let mut shape = output.shape().to_vec();
        shape[0] = 1;
        let length = output.data().len() / size;
        for (index, item) in items.iter_mut().enumerate() {
            item.push(Tensor::new(shape.clone(), slice(output.data(), index * length..(index + 1) * length))?);
        }
    }
    Ok(items)
}

fn mismatch() -> Error {
    Error::new(ErrorKind::Inference, "the inputs of a batch differ in shape or type")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], values: &[u8]) -> Tensor {
        Tensor::new(shape.to_vec(), Data::U8(values.to_vec())).unwrap()
    }

    #[test]
    fn a_short_batch_is_filled_up_and_taken_apart_in_order() {
        let inputs = [tensor(&[1, 2], &[1, 2]), tensor(&[1, 2], &[3, 4])];
        let batch = stack(&inputs, 3).unwrap();
        assert_eq!(batch, tensor(&[3, 2], &[1, 2, 3, 4, 3, 4]));
        let items = split(&[batch, tensor(&[3, 1], &[7, 8, 9])], 3, 2).unwrap();
        assert_eq!(items[0], [tensor(&[1, 2], &[1, 2]), tensor(&[1, 1], &[7])]);
        assert_eq!(items[1], [tensor(&[1, 2], &[3, 4]), tensor(&[1, 1], &[8])]);
    }

    #[test]
    fn tensors_that_do_not_belong_together_are_refused() {
        assert!(stack(&[], 1).is_err());
        assert!(stack(&[tensor(&[1, 2], &[1, 2]), tensor(&[1, 1], &[1])], 2).is_err());
        let float = Tensor::new(vec![1, 1], Data::F32(vec![1.0])).unwrap();
        assert!(stack(&[tensor(&[1, 1], &[1]), float], 2).is_err());
        assert_eq!(split(&[tensor(&[4], &[1, 2, 3, 4])], 2, 2).unwrap_err().kind(), ErrorKind::BadOutput);
    }
}
