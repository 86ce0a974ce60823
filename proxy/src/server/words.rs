//! Finds words of a fixed list wherever they stand in a text, in any case, with every run of blanks taken for one.
//!
//! What always holds: a text in pieces gives the same as the whole. The scan of statements goes over every byte of every
//! text with this, so it is one table: the automaton of `aho-corasick` is only asked to build it. (Stepping through that
//! automaton, with blanks looked at beside it, took more than twice the instructions.) Pure.

use std::collections::HashMap;

use aho_corasick::{
    Anchored,
    automaton::{Automaton, StateID},
    dfa::DFA,
};

/// Rows of the table are so far apart: more than there are kinds of bytes in any list of words of ASCII.
const STRIDE: usize = 64;
/// The kind of bytes that no word has.
const OTHER: u8 = 0;
/// And of blanks.
const BLANK: u8 = 1;

/// Where in the automaton a text is: the beginning of a row.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct At(u32);

/// A list of words, ready to be found.
#[derive(Debug)]
pub struct Words {
    /// What kind of byte each is.
    kinds: [u8; 256],
    /// Row by row, by kind: where that leads.
    rows: Vec<At>,
    /// From this row on, a word ends.
    first_end: At,
    /// Which words, from that row on.
    ends: Vec<Vec<usize>>,
}

/// A state of the automaton, and whether the last byte was a blank.
type State = (StateID, bool);

impl Words {
    /// Words of ASCII, with at most one blank between others and in any case. `None`: there are too many.
    #[must_use]
    pub fn new(words: &[&str]) -> Option<Self> {
        let dfa = DFA::builder().ascii_case_insensitive(true).build(words).ok()?;
        let (kinds, bytes) = kinds(words)?;
        let (states, leads) = walk(&dfa, &bytes)?;
        // Those in which a word ends come last.
        let is_end = |state: &State| dfa.is_match(state.0);
        let mut order: Vec<usize> = (0..states.len()).collect();
        order.sort_by_key(|n| states.get(*n).is_some_and(is_end));
        let mut place = vec![At::default(); states.len()];
        let mut next_row = 0;
        for n in &order {
            *place.get_mut(*n)? = At(next_row);
            next_row += u32::try_from(STRIDE).ok()?;
        }
        let first_end = order.iter().position(|n| states.get(*n).is_some_and(is_end)).unwrap_or(states.len());
        let mut rows = Vec::with_capacity(states.len() * STRIDE);
        for n in &order {
            let leads = leads.get(*n)?;
            rows.extend(
                (0..STRIDE).map(|kind| leads.get(kind).and_then(|to| place.get(*to)).copied().unwrap_or_default()),
            );
        }
        let words_of = |n: &usize| {
            let (state, _) = states.get(*n)?;
            Some((0..dfa.match_len(*state)).map(|at| dfa.match_pattern(*state, at).as_usize()).collect())
        };
        let ends = order.get(first_end..)?.iter().map(words_of).collect::<Option<_>>()?;
        Some(Self { kinds, rows, first_end: At(u32::try_from(first_end * STRIDE).ok()?), ends })
    }

    #[inline]
    fn kind(&self, byte: u8) -> u8 {
        self.kinds.get(usize::from(byte)).copied().unwrap_or(OTHER)
    }

    #[inline]
    fn next(&self, at: At, kind: u8) -> At {
        self.rows.get(at.0 as usize + usize::from(kind)).copied().unwrap_or_default()
    }

    /// One byte further; `None`: it is one blank more after a blank, which counts for nothing.
    #[inline]
    #[must_use]
    pub fn step(&self, at: At, byte: u8) -> Option<At> {
        let kind = self.kind(byte);
        let next = self.next(at, kind);
        // Only a blank after a blank leads a state that a blank led to back to itself.
        (kind != BLANK || next != at).then_some(next)
    }

    /// The words that end here.
    #[inline]
    #[must_use]
    pub fn ending(&self, at: At) -> &[usize] {
        if at.0 < self.first_end.0 {
            return &[];
        }
        self.ends.get((at.0 - self.first_end.0) as usize / STRIDE).map_or(&[], Vec::as_slice)
    }

    /// Runs on up to a byte with which a word ends, or up to `stop`: that byte is the first of what is left.
    #[inline]
    #[must_use]
    pub fn skim<'a>(&self, mut at: At, text: &'a [u8], stop: u8) -> (At, &'a [u8]) {
        for (n, byte) in text.iter().enumerate() {
            let next = self.next(at, self.kind(*byte));
            if next.0 >= self.first_end.0 || *byte == stop {
                return (at, text.get(n..).unwrap_or_default());
            }
            at = next;
        }
        (at, &[])
    }
}

/// The kind of each byte, and of each kind one byte.
fn kinds(words: &[&str]) -> Option<([u8; 256], Vec<u8>)> {
    let mut kinds = [OTHER; 256];
    // No word has it.
    let mut bytes = vec![0, b' '];
    for byte in (0..=u8::MAX).filter(|byte| is_blank(*byte)) {
        *kinds.get_mut(usize::from(byte))? = BLANK;
    }
    for byte in words.iter().flat_map(|word| word.bytes()).map(|byte| byte.to_ascii_lowercase()) {
        if *kinds.get(usize::from(byte))? != OTHER {
            continue;
        }
        let kind = u8::try_from(bytes.len()).ok().filter(|kind| usize::from(*kind) < STRIDE)?;
        *kinds.get_mut(usize::from(byte))? = kind;
        *kinds.get_mut(usize::from(byte.to_ascii_uppercase()))? = kind;
        bytes.push(byte);
    }
    Some((kinds, bytes))
}

/// Every state that a text can lead to, the first one first, and where each kind of byte leads from there.
fn walk(dfa: &DFA, bytes: &[u8]) -> Option<(Vec<State>, Vec<Vec<usize>>)> {
    let mut states = vec![(dfa.start_state(Anchored::No).ok()?, false)];
    let mut known: HashMap<State, usize> = states.iter().copied().zip(0..).collect();
    let mut leads = Vec::new();
    while let Some((state, was_blank)) = states.get(leads.len()).copied() {
        let mut row = Vec::with_capacity(bytes.len());
        for byte in bytes {
            let is_blank = *byte == b' ';
            let next = if is_blank && was_blank { state } else { dfa.next_state(Anchored::No, state, *byte) };
            let to = (next, is_blank);
            row.push(*known.entry(to).or_insert_with(|| {
                states.push(to);
                states.len() - 1
            }));
        }
        leads.push(row);
    }
    Some((states, leads))
}

/// As PostgreSQL's lexer takes it.
#[must_use]
pub fn is_blank(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == 0x0B
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: [&str; 6] = ["ab", "b a", "abba", " b", "a (", "--"];

    /// The words found, each with the place behind it.
    fn found(text: &[u8], words: &Words) -> Vec<(usize, usize)> {
        let (mut at, mut found) = (At::default(), Vec::new());
        for (n, byte) in text.iter().enumerate() {
            if let Some(next) = words.step(at, *byte) {
                at = next;
                found.extend(words.ending(at).iter().map(|word| (n, *word)));
            }
        }
        found.sort_unstable();
        found
    }

    /// The same, by looking for each.
    fn looked_for(text: &[u8]) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        // The text with every run of blanks as one, and where each byte of it was.
        let (mut plain, mut places) = (Vec::new(), Vec::new());
        for (n, byte) in text.iter().enumerate() {
            if !is_blank(*byte) {
                plain.push(byte.to_ascii_lowercase());
                places.push(n);
            } else if plain.last() != Some(&b' ') {
                plain.push(b' ');
                places.push(n);
            }
        }
        for (word, name) in LIST.iter().enumerate() {
            let ends = (0..plain.len()).filter(|n| plain[..=*n].ends_with(name.as_bytes()));
            found.extend(ends.map(|n| (places[n], word)));
        }
        found.sort_unstable();
        found
    }

    #[test]
    fn every_word_is_found_where_it_ends_and_nothing_else() {
        let words = Words::new(&LIST).unwrap();
        let letters = b"aAbB \t\n(-;x";
        let mut number: u64 = 1;
        for _ in 0..20_000 {
            let text: Vec<u8> = (0..12)
                .map(|_| {
                    number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    letters[(number >> 33) as usize % letters.len()]
                })
                .collect();
            assert_eq!(found(&text, &words), looked_for(&text), "{:?}", String::from_utf8_lossy(&text));
        }
    }

    #[test]
    fn skimming_stops_before_the_end_of_a_word_and_before_the_stop() {
        let words = Words::new(&LIST).unwrap();
        for (text, left) in [("xx AB yy", "B yy"), ("x;y", ";y"), ("xa  (", "("), ("nothing", ""), ("", "")] {
            let (at, rest) = words.skim(At::default(), text.as_bytes(), b';');
            assert_eq!(rest, left.as_bytes(), "{text}");
            let next = rest.first().and_then(|byte| words.step(at, *byte));
            assert_eq!(next.is_some_and(|at| !words.ending(at).is_empty()), !left.is_empty() && !left.starts_with(';'));
        }
    }

    #[test]
    fn a_list_with_more_kinds_of_bytes_than_a_row_has_places_is_refused() {
        let all: String = (33u8..127).map(char::from).collect();
        assert!(Words::new(&[&all]).is_none());
    }
}
