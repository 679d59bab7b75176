//! A score of strangeness, and where in the picture it comes from.

use crate::Result;
use crate::settings::AnomalySettings;
use lineside_api::prediction::{AnomalyMap, Prediction};
use lineside_api::tensor::Tensor;

use super::{changed_shape, numbers};

/// The score is the model's own where it gives one, else the map's largest value.
pub(super) fn run(settings: &AnomalySettings, outputs: &[Tensor]) -> Result<Prediction> {
    let map = match settings.map_output {
        Some(index) if settings.with_map || settings.score_output.is_none() => {
            let values = numbers(outputs, index)?;
            let [.., height, width] = outputs[index].shape()[..] else {
                return Err(changed_shape(outputs[index].shape()));
            };
            if height * width != values.len() || values.is_empty() {
                return Err(changed_shape(outputs[index].shape()));
            }
            Some(AnomalyMap { width, height, values: values.into_owned() })
        }
        _ => None,
    };
    let score = match (settings.score_output, &map) {
        (Some(index), _) => {
            let values = numbers(outputs, index)?;
            *values.first().ok_or_else(|| changed_shape(outputs[index].shape()))?
        }
        (None, Some(map)) => map.values.iter().copied().fold(f32::NEG_INFINITY, f32::max),
        (None, None) => return Err(changed_shape(&[])),
    };
    Ok(Prediction::Anomaly { score, map: map.filter(|_| settings.with_map) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lineside_api::tensor::Data;

    fn outputs() -> Vec<Tensor> {
        vec![
            Tensor::new(vec![1], Data::F32(vec![0.7])).unwrap(),
            Tensor::new(vec![1, 1, 2, 3], Data::F32(vec![0.0, 0.1, 0.2, 0.3, 0.9, 0.5])).unwrap(),
        ]
    }

    #[test]
    fn the_models_own_score_comes_first_and_the_map_only_when_asked() {
        let settings = AnomalySettings { score_output: Some(0), map_output: Some(1), with_map: false };
        assert_eq!(run(&settings, &outputs()).unwrap(), Prediction::Anomaly { score: 0.7, map: None });
        let Prediction::Anomaly { score, map: Some(map) } =
            run(&AnomalySettings { with_map: true, ..settings }, &outputs()).unwrap()
        else {
            panic!("the prediction has no map")
        };
        assert_eq!((score, map.width, map.height, map.values[4]), (0.7, 3, 2, 0.9));
    }

    #[test]
    fn without_a_score_the_maps_largest_value_is_it() {
        let settings = AnomalySettings { score_output: None, map_output: Some(1), with_map: false };
        assert_eq!(run(&settings, &outputs()).unwrap(), Prediction::Anomaly { score: 0.9, map: None });
    }
}
