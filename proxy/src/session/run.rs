//! A walk over bytes at hand that forwards most of them as they stand. Pure.
//!
//! What always holds: what was dealt with is `..at`; of it, `start..at` was not yet put anywhere.

use bytes::BytesMut;

/// Most that is taken at once for messages that are written anew: what most batches of a client take.
const ROOM: usize = 1024;

/// By which a message may be longer then: our name for a statement.
const NAMES: usize = 32;

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

    /// The same before something is written to `out`, which takes memory once for that and for what follows it, not bit by bit.
    pub(super) fn cut_to_write(&mut self, out: &mut BytesMut, next: usize) {
        if out.is_empty() {
            let rest = self.bytes.len().saturating_sub(self.start);
            out.reserve(rest.min(ROOM).saturating_add(NAMES));
        }
        self.cut(out, next);
    }

    /// Puts the pending bytes into `out` and begins anew after `next` bytes of what follows.
    pub(super) fn cut(&mut self, out: &mut BytesMut, next: usize) {
        out.extend_from_slice(self.pending());
        self.at = self.at.saturating_add(next);
        self.start = self.at;
    }
}
