//! PNG pictures of one colour, without an encoder: the pixels stand in stored blocks (RFC 1951, 3.2.4).

/// Most bytes of a stored block.
const BLOCK_BYTES: usize = 65_535;

/// A picture of one colour with 8 bits per channel.
pub fn flat(width: u32, height: u32, pixel: [u8; 3]) -> Vec<u8> {
    let row: Vec<u8> = std::iter::once(0).chain(pixel.repeat(width as usize)).collect();
    let rows = row.repeat(height as usize);
    let mut stream = vec![0x78, 0x01];
    let blocks = rows.chunks(BLOCK_BYTES).count();
    for (index, block) in rows.chunks(BLOCK_BYTES).enumerate() {
        let length = block.len() as u16;
        stream.push(u8::from(index + 1 == blocks));
        stream.extend(length.to_le_bytes());
        stream.extend((!length).to_le_bytes());
        stream.extend(block);
    }
    stream.extend(adler32(&rows).to_be_bytes());
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    for (name, data) in [(b"IHDR", header), (b"IDAT", stream), (b"IEND", Vec::new())] {
        file.extend((data.len() as u32).to_be_bytes());
        let chunk = [&name[..], &data].concat();
        file.extend(&chunk);
        file.extend(crc32(&chunk).to_be_bytes());
    }
    file
}

fn adler32(bytes: &[u8]) -> u32 {
    let (mut a, mut b) = (1u32, 0u32);
    for byte in bytes {
        a = (a + u32::from(*byte)) % 65_521;
        b = (b + a) % 65_521;
    }
    b << 16 | a
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}
