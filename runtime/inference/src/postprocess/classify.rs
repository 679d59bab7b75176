//! Class scores to the best few classes.

use crate::Result;
use crate::graph::Activation;
use crate::settings::{ClassifySettings, Labels};
use lineside_api::prediction::Class;
use lineside_api::tensor::Tensor;

use super::{changed_shape, numbers};

/// The classes at or above the threshold, best first, at most `top_k`. Softmax is applied only where the graph ends
/// without an activation of its own.
pub(super) fn run(settings: &ClassifySettings, labels: &Labels, outputs: &[Tensor]) -> Result<Vec<Class>> {
    let values = numbers(outputs, 0)?;
    if values.len() != labels.len() {
        return Err(changed_shape(outputs[0].shape()));
    }
    let mut scores = values.into_owned();
    match settings.activation {
        // One score alone is a yes or no, and a softmax of it would always say yes.
        Activation::None if scores.len() == 1 => scores[0] = 1.0 / (1.0 + (-scores[0]).exp()),
        Activation::None => softmax(&mut scores),
        Activation::LogSoftmax => scores.iter_mut().for_each(|score| *score = score.exp()),
        Activation::Softmax | Activation::Sigmoid => {}
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|left, right| scores[*right].total_cmp(&scores[*left]));
    Ok(order
        .into_iter()
        .take_while(|class| scores[*class] >= settings.threshold)
        .take(settings.top_k)
        .map(|class| labels.class(class, scores[class]))
        .collect())
}

/// Softmax in place, shifted by the largest value so that no exponent overflows.
fn softmax(values: &mut [f32]) {
    let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !largest.is_finite() {
        // All minus infinity, or one plus infinity: the certain ones share the whole.
        let certain = values.iter().filter(|value| **value == largest).count() as f32;
        values.iter_mut().for_each(|value| *value = if *value == largest { 1.0 / certain } else { 0.0 });
        return;
    }
    let mut sum = 0.0;
    for value in values.iter_mut() {
        *value = (*value - largest).exp();
        sum += *value;
    }
    values.iter_mut().for_each(|value| *value /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use lineside_api::tensor::Data;

    fn classes(activation: Activation, values: &[f32], threshold: f32, top_k: usize) -> Result<Vec<(u32, f32)>> {
        let settings = ClassifySettings { activation, threshold, top_k };
        let output = Tensor::new(vec![1, values.len()], Data::F32(values.to_vec())).unwrap();
        run(&settings, &Labels::numbered(values.len()), &[output])
            .map(|classes| classes.into_iter().map(|class| (class.class, class.score)).collect())
    }

    #[test]
    fn softmax_is_applied_only_where_the_graph_has_none() {
        let logits = [1000.0, 1001.0];
        let found = classes(Activation::None, &logits, 0.0, 5).unwrap();
        assert_eq!(found[0].0, 1);
        assert!((found[0].1 - 0.731_058_6).abs() < 1e-6 && (found[1].1 - 0.268_941_4).abs() < 1e-6, "{found:?}");
        assert_eq!(classes(Activation::None, &[0.0], 0.0, 5).unwrap(), [(0, 0.5)], "one logit is a yes or no");
        assert_eq!(classes(Activation::Softmax, &[0.25, 0.75], 0.0, 5).unwrap(), [(1, 0.75), (0, 0.25)]);
        assert_eq!(classes(Activation::Sigmoid, &[0.9, 0.8], 0.0, 5).unwrap(), [(0, 0.9), (1, 0.8)]);
        let logs = classes(Activation::LogSoftmax, &[0.5f32.ln(), 0.5f32.ln()], 0.0, 5).unwrap();
        assert!(logs.iter().all(|(_, score)| (score - 0.5).abs() < 1e-6));
    }

    #[test]
    fn threshold_and_top_k_cut_the_tail() {
        let values = [0.1, 0.6, 0.3];
        assert_eq!(classes(Activation::Softmax, &values, 0.3, 5).unwrap(), [(1, 0.6), (2, 0.3)]);
        assert_eq!(classes(Activation::Softmax, &values, 0.0, 1).unwrap(), [(1, 0.6)]);
    }

    #[test]
    fn infinities_stay_probabilities_and_nan_is_refused() {
        assert_eq!(classes(Activation::None, &[f32::INFINITY, 3.0], 0.0, 5).unwrap(), [(0, 1.0), (1, 0.0)]);
        assert_eq!(classes(Activation::None, &[f32::NEG_INFINITY; 2], 0.0, 5).unwrap(), [(0, 0.5), (1, 0.5)]);
        assert_eq!(classes(Activation::None, &[f32::NAN, 1.0], 0.0, 5).unwrap_err().kind(), ErrorKind::BadOutput);
    }
}
