//! Sending whole frames, as they are.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

/// A socket that sends frames over one interface, and receives nothing (protocol 0; packet(7)). What it sends passes the
/// interface's egress hooks.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Of an interface of the calling thread's network namespace.
    ///
    /// # Errors
    /// The process is not root's, or there is no such interface.
    pub fn open(ifindex: u32) -> io::Result<Self> {
        // SAFETY: no pointers.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, and nobody else knows it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: integers and a byte array: all zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = i32::try_from(ifindex).map_err(io::Error::other)?;
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: `address` is a `sockaddr_ll` of `length` bytes, and outlives the call.
        if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(socket))
    }

    /// Sends these frames in this order, with one system call where the kernel takes them all.
    ///
    /// # Errors
    /// The kernel refuses one: too long for the interface, or its queue is full. Those before it were sent.
    pub fn send_all(&self, frames: &[&[u8]]) -> io::Result<()> {
        let mut buffers: Vec<_> = frames
            .iter()
            .map(|frame| libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() })
            .collect();
        let mut messages: Vec<_> = buffers
            .iter_mut()
            .map(|buffer| {
                // SAFETY: integers and pointers: all zero is a value.
                let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
                message.msg_hdr.msg_iov = buffer;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        let mut rest = messages.as_mut_slice();
        while !rest.is_empty() {
            let count = rest.len() as libc::c_uint;
            // SAFETY: `count` messages, each with one buffer that is a borrowed frame, and only read.
            let sent = unsafe { libc::sendmmsg(self.0.as_raw_fd(), rest.as_mut_ptr(), count, 0) };
            match usize::try_from(sent) {
                Ok(sent) => rest = rest.split_at_mut(sent).1,
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
        Ok(())
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
