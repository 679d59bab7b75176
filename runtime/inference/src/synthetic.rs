//! Synthetic pictures to test a model with: grey, dark, bright, noisy, and one with the statistics of a photo. A model that fails
//! on one of them would fail on a camera that is covered, dazzled, or looks at a part.

/// A natural picture is drawn at this fraction of its size.
const SCALE: u32 = 4;

/// A picture of 3 bytes per pixel.
pub struct Synthetic {
    /// Name for messages.
    pub name: &'static str,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Rows of RGB pixels.
    pub rgb: Vec<u8>,
}

/// All pictures of a size.
pub fn pictures(width: u32, height: u32) -> impl Iterator<Item = Synthetic> {
    let bytes = width as usize * height as usize * 3;
    let noise = move || {
        let mut random = fastrand::Rng::with_seed(7);
        (0..bytes).map(|_| random.u8(..)).collect()
    };
    // One picture at a time is in memory.
    ["grey", "dark", "bright", "noisy", "natural"].into_iter().map(move |name| {
        let rgb = match name {
            "grey" => vec![128; bytes],
            "dark" => vec![0; bytes],
            "bright" => vec![255; bytes],
            "noisy" => noise(),
            _ => natural(width, height),
        };
        Synthetic { name, width, height, rgb }
    })
}

/// A picture like a photo of a part: a background that changes slowly, discs with sharp edges in front of it, and the noise of a
/// sensor. It is drawn at a quarter of the size and enlarged, because a camera's picture has millions of pixels.
pub fn natural(width: u32, height: u32) -> Vec<u8> {
    let (columns, rows) = (width.div_ceil(SCALE), height.div_ceil(SCALE));
    let small = drawing(columns, rows);
    let mut random = fastrand::Rng::with_seed(13);
    let mut rgb = Vec::with_capacity(width as usize * height as usize * 3);
    for y in 0..height {
        let row = (y / SCALE * columns) as usize * 3;
        for x in 0..width {
            let at = row + (x / SCALE) as usize * 3;
            let noise = random.u8(0..12);
            rgb.extend(small[at..at + 3].iter().map(|value| value.saturating_add(noise)));
        }
    }
    rgb
}

/// Background and discs.
fn drawing(width: u32, height: u32) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(11);
    let side = width.min(height).max(1) as f32;
    let discs: Vec<([f32; 2], f32, [f32; 3])> = (0..12)
        .map(|_| {
            let centre = [random.f32() * width as f32, random.f32() * height as f32];
            let colour = [(); 3].map(|()| random.f32() * 200.0 - 100.0);
            (centre, side * (0.03 + 0.2 * random.f32()), colour)
        })
        .collect();
    let mut rgb = Vec::with_capacity(width as usize * height as usize * 3);
    for y in 0..height {
        for x in 0..width {
            let (x, y) = (x as f32, y as f32);
            let disc = discs.iter().find(|([left, top], radius, _)| (x - left).hypot(y - top) < *radius);
            for channel in 0..3 {
                let slow = 122.0 + 50.0 * (x / side * 2.0 + channel as f32).sin() * (y / side * 3.0).cos();
                let front = disc.map_or(0.0, |(_, _, colour)| colour[channel]);
                rgb.push((slow + front).clamp(0.0, 255.0) as u8);
            }
        }
    }
    rgb
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_have_their_size_and_differ() {
        let all: Vec<Synthetic> = pictures(17, 5).collect();
        assert!(
            all.iter().all(|picture| picture.rgb.len() == 17 * 5 * 3 && (picture.width, picture.height) == (17, 5))
        );
        for (index, picture) in all.iter().enumerate() {
            assert!(all[index + 1..].iter().all(|other| other.rgb != picture.rgb), "{}", picture.name);
        }
        assert_eq!(natural(17, 5), natural(17, 5), "an admission can be repeated");
    }
}
