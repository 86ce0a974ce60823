//! Statement text in pieces.

use tenantry_proxy::server::signs::{Scan, Signs};

/// Any text in any pieces gives the same signs as in one, but for what is in its strings.
pub fn signs(data: &[u8]) {
    let Some((&cut, text)) = data.split_first() else { return };
    let whole = Signs::of(text);
    let cut = usize::from(cut);
    let (before, after) = text.split_at(cut.min(text.len()));
    let mut scan = Scan::default();
    for pieces in [text.chunks(1).collect::<Vec<_>>(), text.chunks(cut % 16 + 2).collect(), vec![before, b"", after]] {
        let mut signs = Signs::default();
        pieces.iter().for_each(|piece| scan.feed(piece, &mut signs));
        scan.finish(&mut signs);
        if whole.hints {
            assert!(
                (signs.opaque && !whole.opaque) || (signs.seeds && !whole.seeds),
                "{:?}",
                String::from_utf8_lossy(text)
            );
            (signs.opaque, signs.seeds, signs.hints) = (whole.opaque, whole.seeds, whole.hints);
        }
        // Of a text that is in pieces nobody reads a name.
        signs.named.clone_from(&whole.named);
        assert_eq!(signs, whole, "{:?}", String::from_utf8_lossy(text));
        // The next text must not see anything of this one.
        scan.reset();
    }
    let mut merged = whole.clone();
    merged.merge(&whole);
    assert!(merged.custom.iter().all(|name| name.contains('.')));
    assert!(!whole.opaque || whole.suspect, "opaque without suspicion: {:?}", String::from_utf8_lossy(text));
}
