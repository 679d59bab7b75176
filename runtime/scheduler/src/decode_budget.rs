//! The node-wide budget of memory for decoding frames.
//!
//! A picture of 310 kB can declare 40 megapixels, which take 120 to 440 MB while they are decoded. Each frame alone is within
//! the limits; the frames of four cameras together exceed the memory of the node. Therefore the agent asks for a permit for
//! every frame before it hands the frame to a worker, and keeps the permit until the job has ended. A frame that does not fit
//! next to those that are being decoded waits; permits are granted in the order of the requests, so that a large frame is not
//! overtaken for ever. A frame that would never fit, or that exceeds the `maxPixels` of its stream, is refused.
//!
//! Only the header of the frame is read ([`PictureHeader`]); the bytes that it states are an upper bound.

use std::sync::Arc;

use lineside_ipc::frame::{Frame, FrameFormat};
use lineside_ipc::picture_header::{HeaderError, PictureHeader};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The unit of permits in bytes. The semaphore counts permits in 32 bits.
const UNIT_BYTES: u64 = 1 << 10;
/// Bytes per pixel of a frame that arrives uncompressed: it is copied into 8-bit RGB.
const RGB_BYTES: u64 = 3;

/// A budget of memory that all streams share. Clones share the budget.
#[derive(Debug, Clone)]
pub struct DecodeBudget {
    units: Arc<Semaphore>,
    units_total: u32,
}

/// The part of the budget that one frame uses. Dropping it returns the part.
#[derive(Debug)]
pub struct DecodePermit(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// Why a frame is not decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameRefusal {
    /// The header is not that of a picture.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The picture has more pixels than the stream allows.
    #[error("the frame has {pixels} pixels, more than maxPixels: {max}")]
    TooManyPixels {
        /// Pixels of the frame.
        pixels: u64,
        /// The limit of the stream.
        max: u64,
    },
    /// Decoding the picture would take more memory than all frames together may take.
    #[error("decoding the frame takes {} MiB, more than --decode-mib: {}", bytes >> 20, max >> 20)]
    TooMuchMemory {
        /// Bytes that decoding takes.
        bytes: u64,
        /// The whole budget in bytes.
        max: u64,
    },
}

/// What a caller branches on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameRefusalKind {
    /// The bytes are not a picture.
    BadFrame,
    /// The picture exceeds a limit.
    FrameTooLarge,
}

impl FrameRefusal {
    /// What a caller branches on.
    pub fn kind(&self) -> FrameRefusalKind {
        match self {
            Self::Header(_) => FrameRefusalKind::BadFrame,
            Self::TooManyPixels { .. } | Self::TooMuchMemory { .. } => FrameRefusalKind::FrameTooLarge,
        }
    }
}

/// What decoding a frame takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DecodeCost {
    pixels: u64,
    bytes: u64,
}

impl DecodeCost {
    fn of(frame: &Frame) -> Result<Self, HeaderError> {
        match frame.format {
            FrameFormat::Encoded => PictureHeader::read(&frame.data)
                .map(|header| Self { pixels: header.pixels(), bytes: header.decode_bytes() }),
            FrameFormat::Pixels { width, height, .. } => {
                let pixels = u64::from(width) * u64::from(height);
                Ok(Self { pixels, bytes: pixels.saturating_mul(RGB_BYTES) })
            }
        }
    }
}

impl DecodeBudget {
    /// A budget of this many bytes, rounded down to whole KiB; at most 4 TiB.
    pub fn new(bytes: u64) -> Self {
        let units_total = u32::try_from(bytes / UNIT_BYTES).unwrap_or(u32::MAX);
        // The semaphore of a 32-bit machine counts fewer permits than this machine can address.
        let permits = usize::try_from(units_total).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { units: Arc::new(Semaphore::new(permits)), units_total: u32::try_from(permits).unwrap_or(units_total) }
    }

    /// Bytes of the whole budget.
    pub fn total_bytes(&self) -> u64 {
        u64::from(self.units_total) * UNIT_BYTES
    }

    /// Waits until the frame fits into the budget. Dropping the future gives up the place in the queue. The permit has to be
    /// kept until the worker has decoded the frame, in practice until its job has ended.
    ///
    /// # Errors
    /// At once, when the frame is not a picture, exceeds `pixels_max`, or would not fit into an unused budget.
    pub async fn acquire(&self, frame: &Frame, pixels_max: u64) -> Result<DecodePermit, FrameRefusal> {
        let units = self.units_of(frame, pixels_max)?;
        match self.units.clone().acquire_many_owned(units).await {
            Ok(permit) => Ok(DecodePermit(permit)),
            // The semaphore is never closed.
            Err(_) => std::future::pending().await,
        }
    }

    fn units_of(&self, frame: &Frame, pixels_max: u64) -> Result<u32, FrameRefusal> {
        let DecodeCost { pixels, bytes } = DecodeCost::of(frame)?;
        if pixels > pixels_max {
            return Err(FrameRefusal::TooManyPixels { pixels, max: pixels_max });
        }
        match u32::try_from(bytes.div_ceil(UNIT_BYTES)) {
            Ok(units) if units <= self.units_total => Ok(units),
            _ => Err(FrameRefusal::TooMuchMemory { bytes, max: self.total_bytes() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ANY: u64 = u64::MAX;
    const MIB: u64 = 1 << 20;

    impl DecodeBudget {
        /// Bytes that no frame uses.
        fn available_bytes(&self) -> u64 {
            self.units.available_permits() as u64 * UNIT_BYTES
        }

        /// As [`DecodeBudget::acquire`], without waiting: `None` when the frame does not fit now.
        fn try_acquire(&self, frame: &Frame, pixels_max: u64) -> Result<Option<DecodePermit>, FrameRefusal> {
            let units = self.units_of(frame, pixels_max)?;
            Ok(self.units.clone().try_acquire_many_owned(units).ok().map(DecodePermit))
        }
    }

    /// The header of a PNG, and the beginning of its pixels.
    fn png(width: u32, height: u32, depth: u8, color: u8) -> Frame {
        let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
        bytes.extend([width.to_be_bytes(), height.to_be_bytes()].concat());
        bytes.extend([depth, color, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(b"\0\0\0\0IDAT....");
        Frame::encoded(bytes.into(), None, false)
    }

    #[test]
    fn frames_that_never_fit_are_refused_with_numbers() {
        let budget = DecodeBudget::new(256 * MIB);
        let error = budget.try_acquire(&png(8000, 5000, 16, 6), ANY).unwrap_err();
        assert_eq!(error, FrameRefusal::TooMuchMemory { bytes: 440_000_000, max: 256 * MIB });
        assert_eq!(error.to_string(), "decoding the frame takes 419 MiB, more than --decode-mib: 256");
        let error = budget.try_acquire(&png(1000, 1000, 8, 2), 999_999).unwrap_err();
        assert_eq!(error, FrameRefusal::TooManyPixels { pixels: 1_000_000, max: 999_999 });
        assert_eq!(error.kind(), FrameRefusalKind::FrameTooLarge);
        let text = Frame::encoded("root:x:0:0:root:/root:/bin/sh\n".into(), None, false);
        assert_eq!(budget.try_acquire(&text, ANY).unwrap_err().kind(), FrameRefusalKind::BadFrame);
        let largest = png(u32::MAX, u32::MAX, 16, 6);
        assert!(matches!(budget.try_acquire(&largest, ANY), Err(FrameRefusal::TooMuchMemory { bytes: u64::MAX, .. })));
        assert_eq!(budget.available_bytes(), 256 * MIB);
    }

    /// The attack: four cameras whose small PNGs declare 40 megapixels. Two of them fit at a time.
    #[tokio::test(start_paused = true)]
    async fn four_frames_of_40_megapixels_are_never_decoded_at_the_same_time() {
        let budget = DecodeBudget::new(256 * MIB);
        let decoding = Arc::new(std::sync::atomic::AtomicI64::new(0));
        let cameras = (0..4).map(|_| {
            let (budget, decoding) = (budget.clone(), decoding.clone());
            tokio::spawn(async move {
                for _ in 0..25 {
                    let permit = budget.acquire(&png(8000, 5000, 8, 2), 40_000_000).await.unwrap();
                    let now = decoding.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
                    assert!(now <= 2, "{now} frames of 120 MB are decoded at the same time");
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    decoding.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    drop(permit);
                }
            })
        });
        for camera in cameras.collect::<Vec<_>>() {
            camera.await.unwrap();
        }
        assert_eq!(budget.available_bytes(), budget.total_bytes());
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_frame_is_not_overtaken_for_ever_and_a_client_that_gives_up_blocks_nobody() {
        let budget = DecodeBudget::new(10 * MIB);
        let small = png(1024, 1024, 8, 2);
        let large = png(1024, 3000, 8, 2);
        let held = budget.try_acquire(&small, ANY).unwrap().unwrap();
        let waiting = tokio::spawn({
            let (budget, large) = (budget.clone(), large.clone());
            async move { budget.acquire(&large, ANY).await.unwrap() }
        });
        tokio::task::yield_now().await;
        // Room for a small frame exists, but the large one was first.
        assert!(tokio::time::timeout(Duration::from_secs(1), budget.acquire(&small, ANY)).await.is_err());
        drop(held);
        let permit = waiting.await.unwrap();
        assert!(budget.try_acquire(&small, ANY).unwrap().is_none());
        drop(permit);
        assert!(budget.try_acquire(&small, ANY).unwrap().is_some());
    }

    #[test]
    fn uncompressed_frames_count_as_well() {
        let budget = DecodeBudget::new(MIB);
        let layout = lineside_ipc::frame::PixelLayout::Gray8;
        let format = FrameFormat::Pixels { layout, width: 512, height: 512, stride: 512 };
        let frame = Frame { format, ..Frame::encoded(vec![0; 4].into(), None, false) };
        let permit = budget.try_acquire(&frame, ANY).unwrap().unwrap();
        assert_eq!(budget.available_bytes(), MIB - 512 * 512 * 3);
        assert!(budget.try_acquire(&frame, ANY).unwrap().is_none());
        drop(permit);
    }
}
