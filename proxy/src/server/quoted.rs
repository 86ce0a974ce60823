//! What PostgreSQL's lexer takes for a string, a quoted name, a dollar-quoted text or a comment.
//!
//! With `standard_conforming_strings = off` a string may seem to end too early: who cannot bear that must see to it that there
//! is no backslash. Pure.

use super::words::is_blank;

/// The text with nothing in its strings, but for the name that `set_config` is given; `None` if nobody can say for certain
/// where they end.
#[must_use]
pub fn without_strings(text: &[u8]) -> Option<Vec<u8>> {
    if text.contains(&b'\\') {
        return None;
    }
    let (mut outside, mut at) = (Vec::with_capacity(text.len()), 0);
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        let quoted = quoted_length(rest, text.get(..at).unwrap_or_default()).and_then(|length| rest.get(..length));
        let taken = match quoted {
            Some([b'\'', inside @ .., b'\'']) if !is_for_set_config(&outside) => {
                outside.extend_from_slice(b"\'\'");
                inside.len().saturating_add(2)
            }
            Some(whole) => {
                outside.extend_from_slice(whole);
                whole.len()
            }
            None => {
                outside.extend(rest.first());
                1
            }
        };
        at = at.saturating_add(taken);
    }
    Some(outside)
}

/// What comes next is its first argument.
fn is_for_set_config(before: &[u8]) -> bool {
    let Some(before) = trim(before).strip_suffix(b"(") else { return false };
    let before = trim(before);
    let before = before.strip_suffix(b"\"").unwrap_or(before);
    before.last_chunk::<10>().is_some_and(|word| word.eq_ignore_ascii_case(b"set_config"))
}

fn trim(text: &[u8]) -> &[u8] {
    text.get(..text.iter().rposition(|b| !is_blank(*b)).map_or(0, |last| last.saturating_add(1))).unwrap_or_default()
}

/// How long the quoted thing or the comment is that may begin here; `before`: what stands before it.
pub fn quoted_length(text: &[u8], before: &[u8]) -> Option<usize> {
    let find = |needle: &[u8], from: usize| {
        let rest = text.get(from..)?;
        let at = rest.windows(needle.len()).position(|window| window == needle);
        // What has no end goes on to the end of the text.
        Some(at.map_or(text.len(), |at| from.saturating_add(at).saturating_add(needle.len())))
    };
    match text {
        [b'\'', ..] if matches!(before, [.., b'e' | b'E']) && !matches!(before, [.., b, _] if is_of_word(*b)) => {
            let mut at = 1_usize;
            loop {
                at = match text.get(at..) {
                    Some([b'\\', _, ..] | [b'\'', b'\'', ..]) => at.saturating_add(2),
                    Some([b'\'', ..]) => return Some(at.saturating_add(1)),
                    Some([_, ..]) => at.saturating_add(1),
                    _ => return Some(text.len()),
                };
            }
        }
        [quote @ (b'\'' | b'"'), ..] => find(&[*quote], 1),
        [b'-', b'-', ..] => {
            let end = text.iter().position(|b| matches!(b, b'\n' | b'\r'));
            Some(end.map_or(text.len(), |end| end.saturating_add(1)))
        }
        [b'/', b'*', ..] => {
            let (mut depth, mut at) = (1_u32, 2_usize);
            while depth > 0 {
                match text.get(at..at.saturating_add(2)) {
                    Some(b"/*") => (depth, at) = (depth.saturating_add(1), at.saturating_add(2)),
                    Some(b"*/") => (depth, at) = (depth.saturating_sub(1), at.saturating_add(2)),
                    Some(_) => at = at.saturating_add(1),
                    None => return Some(text.len()),
                }
            }
            Some(at)
        }
        [b'$', rest @ ..] if !before.last().copied().is_some_and(is_of_word) => {
            let tag = rest.iter().position(|b| *b == b'$')?;
            let is_tag = rest.get(..tag)?.iter().all(|b| is_of_word(*b)) && !rest.first()?.is_ascii_digit();
            if is_tag { find(text.get(..tag.saturating_add(2))?, tag.saturating_add(2)) } else { None }
        }
        _ => None,
    }
}

/// A byte of a word or a name.
#[must_use]
pub fn is_of_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | 0x80..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_emptied_and_nothing_else() {
        for (text, outside) in [
            ("SELECT 'a''b', 1, E'c'", "SELECT '''', 1, E''"),
            ("SELECT 1 -- don't\n, 'x'", "SELECT 1 -- don't\n, ''"),
            ("SELECT /* ' */ \"it's\", $$it's$$, 'x'", "SELECT /* ' */ \"it's\", $$it's$$, ''"),
            ("select Set_Config ( 'app.x', 'y', true)", "select Set_Config ( 'app.x', '', true)"),
            (
                "SELECT pg_catalog.\"set_config\"('app.x', 'y', true)",
                "SELECT pg_catalog.\"set_config\"('app.x', '', true)",
            ),
            ("SELECT 'without an end", "SELECT 'without an end"),
            ("'", "'"),
            ("", ""),
        ] {
            let found = without_strings(text.as_bytes()).unwrap();
            assert_eq!(String::from_utf8_lossy(&found), outside, "{text}");
        }
        assert_eq!(without_strings(b"SELECT '\\', setseed(1), '"), None);
    }
}
