//! The checksum of a column: a sum over `hashtextextended(value, 0)`, which PostgreSQL computes on its side.
//!
//! What always holds: the sum does not depend on the order of rows, and never overflows (128 bits for 64-bit hashes).

/// As `pg_catalog.hashtextextended(text, 0)` of a little-endian server (PostgreSQL's `hash_bytes_extended`, Bob Jenkins'
/// lookup3 with other constants).
#[must_use]
pub fn hash(text: &[u8]) -> i64 {
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    let start = 0x9e37_79b9_u32.wrapping_add(length).wrapping_add(3_923_095);
    let [mut a, mut b, mut c] = [start; 3];
    let mut blocks = text.chunks_exact(12);
    for block in &mut blocks {
        a = a.wrapping_add(word(block, 0));
        b = b.wrapping_add(word(block, 4));
        c = c.wrapping_add(word(block, 8));
        mix(&mut a, &mut b, &mut c);
    }
    let rest = blocks.remainder();
    a = a.wrapping_add(word(rest, 0));
    b = b.wrapping_add(word(rest, 4));
    // The lowest byte of c is the length's.
    c = c.wrapping_add(word(rest, 8) << 8);
    finish(&mut a, &mut b, &mut c);
    i64::from_ne_bytes((u64::from(b) << 32 | u64::from(c)).to_ne_bytes())
}

/// Four bytes, as many as there are.
fn word(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    for (to, from) in four.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u32::from_le_bytes(four)
}

fn mix(a: &mut u32, b: &mut u32, c: &mut u32) {
    for (first, second) in [(4, 6), (16, 19)] {
        *a = a.wrapping_sub(*c) ^ c.rotate_left(first);
        *c = c.wrapping_add(*b);
        *b = b.wrapping_sub(*a) ^ a.rotate_left(second);
        *a = a.wrapping_add(*c);
        *c = c.wrapping_sub(*b) ^ b.rotate_left(if first == 4 { 8 } else { 4 });
        *b = b.wrapping_add(*a);
    }
}

fn finish(a: &mut u32, b: &mut u32, c: &mut u32) {
    *c = (*c ^ *b).wrapping_sub(b.rotate_left(14));
    *a = (*a ^ *c).wrapping_sub(c.rotate_left(11));
    *b = (*b ^ *a).wrapping_sub(a.rotate_left(25));
    *c = (*c ^ *b).wrapping_sub(b.rotate_left(16));
    *a = (*a ^ *c).wrapping_sub(c.rotate_left(4));
    *b = (*b ^ *a).wrapping_sub(a.rotate_left(14));
    *c = (*c ^ *b).wrapping_sub(b.rotate_left(24));
}
