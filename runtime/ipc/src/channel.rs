//! Messages between the agent and a child process, over a Unix stream socket.
//!
//! A message is the length of its body (`u32`, little endian) and the body, a value in the postcard format
//! (<https://postcard.jamesmunns.com/wire-format>). Descriptors travel beside single zero bytes (`SCM_RIGHTS`), before the first
//! message. Both sides are the same program, so messages have no version of their own: the handshake of the child has one.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest body of a message in bytes.
pub const MESSAGE_BYTES_MAX: usize = 256 << 20;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed, or the other side closed it within a message.
    #[error("the connection to the other process failed")]
    Io(#[from] io::Error),
    /// The body is larger than [`MESSAGE_BYTES_MAX`].
    #[error("a message of {bytes} bytes is too large")]
    TooLarge {
        /// Length of the body.
        bytes: usize,
    },
    /// The body is not a valid message.
    #[error("a message is not valid")]
    Invalid(#[from] postcard::Error),
}

/// The kind of a [`ChannelError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelErrorKind {
    /// The socket failed or was closed.
    Io,
    /// A message is too large.
    TooLarge,
    /// A message is not valid.
    Invalid,
}

impl ChannelError {
    /// The kind, to branch on.
    pub fn kind(&self) -> ChannelErrorKind {
        match self {
            Self::Io(_) => ChannelErrorKind::Io,
            Self::TooLarge { .. } => ChannelErrorKind::TooLarge,
            Self::Invalid(_) => ChannelErrorKind::Invalid,
        }
    }
}

/// Sends a message.
///
/// # Errors
/// [`ChannelErrorKind::TooLarge`] before anything is sent; [`ChannelErrorKind::Io`] when the other side is gone.
pub fn send(mut socket: impl Write, message: &impl Serialize) -> Result<(), ChannelError> {
    // One write for length and body, so that the receiver wakes up once.
    let mut bytes = postcard::to_extend(message, vec![0; 4])?;
    let body = bytes.len() - 4;
    let length = u32::try_from(body).ok().filter(|_| body <= MESSAGE_BYTES_MAX);
    let length = length.ok_or(ChannelError::TooLarge { bytes: body })?;
    if let Some(head) = bytes.first_chunk_mut() {
        *head = length.to_le_bytes();
    }
    Ok(socket.write_all(&bytes)?)
}

/// Receives a message; `None` when the other side has closed the socket between two messages.
///
/// # Errors
/// [`ChannelErrorKind`]; the connection cannot be used afterwards.
pub fn receive<T: DeserializeOwned>(socket: impl Read) -> Result<Option<T>, ChannelError> {
    receive_at_most(socket, MESSAGE_BYTES_MAX)
}

/// As [`receive`], with a smaller limit of the body in bytes.
///
/// # Errors
/// As those of [`receive`].
pub fn receive_at_most<T: DeserializeOwned>(
    mut socket: impl Read,
    bytes_max: usize,
) -> Result<Option<T>, ChannelError> {
    let mut head = [0; 4];
    match socket.read(&mut head)? {
        0 => return Ok(None),
        read => socket.read_exact(head.get_mut(read..).unwrap_or_default())?,
    }
    let bytes = u32::from_le_bytes(head) as usize;
    if bytes > bytes_max.min(MESSAGE_BYTES_MAX) {
        return Err(ChannelError::TooLarge { bytes });
    }
    // Grows with what arrives, not with what the length says.
    let mut body = Vec::new();
    socket.by_ref().take(bytes as u64).read_to_end(&mut body)?;
    if body.len() < bytes {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(Some(postcard::from_bytes(&body)?))
}

/// Sends a descriptor.
///
/// # Errors
/// When the other side is gone.
pub fn send_descriptor(socket: impl AsFd, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for the descriptor"));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a descriptor that [`send_descriptor`] sent. It is closed when the process executes another program.
///
/// # Errors
/// When the other side is gone, or sends something else.
pub fn receive_descriptor(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the message carries no descriptor"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_in_order() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send_descriptor(&here, file.as_fd()).unwrap();
        send(&mut here, &(7u32, "text")).unwrap();
        send(&mut here, &vec![1u8; 100_000]).unwrap();
        drop(here);
        assert!(receive_descriptor(&there).is_ok());
        assert_eq!(receive::<(u32, String)>(&mut there).unwrap(), Some((7, "text".to_owned())));
        assert_eq!(receive::<Vec<u8>>(&mut there).unwrap().unwrap().len(), 100_000);
        assert!(receive::<Vec<u8>>(&mut there).unwrap().is_none());
        assert!(receive_descriptor(&there).is_err());
    }

    #[test]
    fn damaged_messages_are_errors_and_allocate_no_more_than_they_carry() {
        let too_large = u32::MAX.to_le_bytes();
        assert_eq!(receive::<u32>(&too_large[..]).unwrap_err().kind(), ChannelErrorKind::TooLarge);
        let cut = [0, 0, 0, 1, 9, 9];
        assert_eq!(receive::<u32>(&cut[..]).unwrap_err().kind(), ChannelErrorKind::Io);
        assert_eq!(receive::<u32>(&[1, 0][..]).unwrap_err().kind(), ChannelErrorKind::Io);
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..2000 {
            let body: Vec<u8> = (0..random.usize(0..60)).map(|_| random.u8(..)).collect();
            let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
            bytes.extend(body);
            // Whatever comes out, it is a value or an error.
            drop(receive::<(Vec<String>, Option<u64>, Vec<f32>)>(&bytes[..]));
        }
    }
}
