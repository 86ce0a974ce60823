//! A walk over bytes at hand that forwards most of them as they stand. Pure.
//!
//! What always holds: what was dealt with is `..at`; of it, `start..at` was not yet put anywhere.

use bytes::BytesMut;

/// Room for what most messages are when they are written anew.
const SMALL: usize = 256;

/// The bytes at hand and the part of them that is to be forwarded as it stands.
#[derive(Debug)]
pub(super) struct Run<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) start: usize,
    pub(super) at: usize,
}

impl<'a> Run<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, start: 0, at: 0 }
    }

    pub(super) fn pending(&self) -> &'a [u8] {
        self.bytes.get(self.start..self.at).unwrap_or_default()
    }

    /// Puts the pending bytes into `out` and begins anew after `next` bytes of what follows.
    pub(super) fn cut(&mut self, out: &mut BytesMut, next: usize) {
        if out.capacity() == 0 {
            // What is written in small pieces takes its memory once.
            out.reserve(self.bytes.len().min(SMALL).saturating_add(SMALL));
        }
        out.extend_from_slice(self.pending());
        self.at = self.at.saturating_add(next);
        self.start = self.at;
    }
}
