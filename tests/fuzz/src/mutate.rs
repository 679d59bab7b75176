//! Mutations of inputs: flipped bits, numbers at the ends of their ranges, copied, removed, repeated and spliced pieces.

use fastrand::Rng;

/// Longest mutated input in bytes.
const BYTES_MAX: usize = 64 << 10;
/// Texts that parsers treat in a special way.
const TEXTS: [&str; 28] = [
    "\0",
    "\n",
    "\r\n",
    "\u{feff}",
    "\u{202e}",
    "é",
    "\"",
    "'",
    "\\",
    "{",
    "[",
    "(",
    "}",
    "]",
    ")",
    "- ",
    ": ",
    "null",
    "true",
    "-1",
    "1e308",
    "1e-308",
    "NaN",
    ".inf",
    "18446744073709551616",
    "9223372036854775807",
    "../",
    "%00",
];
/// Bytes of numbers at the ends of their ranges, in both byte orders.
const NUMBERS: [&[u8]; 14] = [
    &[0],
    &[0x7F],
    &[0x80],
    &[0xFF],
    &[0, 0],
    &[0xFF, 0xFF],
    &[0x7F, 0xFF],
    &[0xFF, 0x7F],
    &[0, 0, 0, 0],
    &[0xFF, 0xFF, 0xFF, 0xFF],
    &[0x7F, 0xFF, 0xFF, 0xFF],
    &[0xFF, 0xFF, 0xFF, 0x7F],
    &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF],
    &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F],
];

/// A mutation of an input of the corpus, at most 64 KiB long. An empty corpus is treated as one empty input.
pub fn mutate(random: &mut Rng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = random.choice(corpus).cloned().unwrap_or_default();
    // Mostly a few changes, so that the rest of the input stays valid.
    let changes = if random.u8(0..8) == 0 { random.usize(1..24) } else { random.usize(1..4) };
    for _ in 0..changes {
        change(random, &mut bytes, corpus);
        bytes.truncate(BYTES_MAX);
    }
    bytes
}

fn change(random: &mut Rng, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
    let at = random.usize(0..=bytes.len());
    let end = (at + random.usize(0..=16)).min(bytes.len());
    match random.u8(0..12) {
        0 | 1 if at < bytes.len() => bytes[at] ^= 1 << random.u8(0..8),
        2 if at < bytes.len() => bytes[at] = random.u8(..),
        3 | 4 => {
            let text = TEXTS[random.usize(0..TEXTS.len())];
            bytes.splice(at..if random.bool() { at } else { end }, text.bytes());
        }
        5 | 6 => {
            let number = NUMBERS[random.usize(0..NUMBERS.len())];
            let end = if random.bool() { at } else { (at + number.len()).min(bytes.len()) };
            bytes.splice(at..end, number.iter().copied());
        }
        7 => drop(bytes.drain(at..end)),
        8 => bytes.truncate(at),
        9 => {
            let piece = bytes[at..end].repeat(1 << random.u32(0..8));
            bytes.splice(at..at, piece);
        }
        10 => {
            // A piece of another input, or of this one.
            let other = random.choice(corpus).cloned().unwrap_or_default();
            let from = random.usize(0..=other.len());
            let to = random.usize(from..=other.len());
            bytes.splice(at..if random.bool() { at } else { end }, other[from..to].iter().copied());
        }
        _ => replace_number(random, bytes, at),
    }
}

/// Replaces the next decimal number of a text.
fn replace_number(random: &mut Rng, bytes: &mut Vec<u8>, from: usize) {
    const VALUES: [&str; 12] = [
        "0",
        "-0",
        "1",
        "-1",
        "255",
        "65536",
        "4294967295",
        "4294967296",
        "9007199254740993",
        "18446744073709551615",
        "1e40",
        "1e-9",
    ];
    let Some(start) = bytes[from..].iter().position(u8::is_ascii_digit).map(|distance| from + distance) else { return };
    let length = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    bytes.splice(start..start + length, VALUES[random.usize(0..VALUES.len())].bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutations_repeat_with_their_seed_and_differ_otherwise() {
        let corpus = [b"fps: 5".to_vec(), b"[1, 2]".to_vec()];
        let run = |seed| {
            let mut random = Rng::with_seed(seed);
            (0..200).map(|_| mutate(&mut random, &corpus)).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        let changed = run(1).iter().filter(|bytes| !corpus.contains(bytes)).count();
        assert!(changed > 150, "{changed} of 200 differ from the corpus");
        assert_ne!(run(1), run(2));
        let mut random = Rng::with_seed(3);
        let long = vec![vec![7; BYTES_MAX]];
        assert!((0..100).all(|_| mutate(&mut random, &long).len() <= BYTES_MAX));
    }
}
