//! The mean of the source pixels that a pixel covers, with the covered part of each as its weight: `INTER_AREA` of OpenCV for pictures that
//! shrink. `fast_image_resize` has a box filter, which takes or leaves whole pixels.

use crate::picture::Picture;

/// The source pixels that one target pixel covers along one axis.
struct Span {
    first: usize,
    /// The covered part of each pixel from `first` on; their sum is 1.
    weights: Vec<f32>,
}

/// The spans of `to` pixels over `count` source pixels from `start` on; `to` is at most `count`.
fn spans(start: u32, count: u32, to: u32) -> Vec<Span> {
    let scale = f64::from(count) / f64::from(to);
    let span = |index: u32| {
        let (low, high) = (f64::from(index) * scale, f64::from(index + 1) * scale);
        let first = low.floor();
        let last = (high.ceil() - 1.0).clamp(first, f64::from(count - 1));
        let covered = |pixel: f64| (high.min(pixel + 1.0) - low.max(pixel)).max(0.0) / scale;
        let weights = (0..=(last - first) as u32).map(|step| covered(first + f64::from(step)) as f32).collect();
        Span { first: start as usize + first as usize, weights }
    };
    (0..to).map(span).collect()
}

/// Shrinks a part of a picture (left, top, width, height) to rows of RGB pixels with these sides, which are at most its own.
pub(super) fn shrink(
    picture: &Picture,
    [left, top, width, height]: [u32; 4],
    out: &mut [u8],
    [to_width, to_height]: [u32; 2],
) {
    let columns = spans(left, width, to_width);
    let stride = picture.width() as usize * 3;
    let row_values = to_width as usize * 3;
    let mut sum = vec![0f32; row_values];
    for (rows, target) in spans(top, height, to_height).iter().zip(out.chunks_exact_mut(row_values)) {
        sum.fill(0.0);
        for (row, weight) in (rows.first..).zip(&rows.weights) {
            let source = &picture.pixels()[row * stride..][..stride];
            for (column, sums) in columns.iter().zip(sum.chunks_exact_mut(3)) {
                let pixels = source[column.first * 3..].chunks_exact(3);
                for (pixel, part) in pixels.zip(&column.weights) {
                    for (sum, value) in sums.iter_mut().zip(pixel) {
                        *sum += weight * part * f32::from(*value);
                    }
                }
            }
        }
        for (target, sum) in target.iter_mut().zip(&sum) {
            *target = sum.round() as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covered_parts_are_the_weights() {
        // Three pixels become two: each takes one and a half.
        let picture = Picture::from_rgb(3, 1, vec![30, 0, 0, 60, 0, 90, 90, 0, 0]).unwrap();
        let mut out = [0; 6];
        shrink(&picture, [0, 0, 3, 1], &mut out, [2, 1]);
        assert_eq!(out, [40, 0, 30, 80, 0, 30]);
        let mut same = [0; 9];
        shrink(&picture, [0, 0, 3, 1], &mut same, [3, 1]);
        assert_eq!(same, picture.pixels());
        let mut part = [0; 3];
        shrink(&picture, [1, 0, 2, 1], &mut part, [1, 1]);
        assert_eq!(part, [75, 0, 45]);
    }

    #[test]
    fn weights_sum_to_one_and_stay_within_the_source() {
        for (count, to) in [(1920, 640), (1080, 224), (7, 7), (16_384, 1), (1081, 1080)] {
            let spans = spans(5, count, to);
            assert_eq!(spans.len(), to as usize);
            for span in &spans {
                assert!((span.weights.iter().sum::<f32>() - 1.0).abs() < 1e-4, "{count} to {to}");
                assert!(span.first + span.weights.len() <= (count + 5) as usize, "{count} to {to}");
            }
        }
    }
}
