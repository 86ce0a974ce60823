//! Parts of long lists. Pure.

use super::problem::{Answer, Problem};

const MOST_ON_A_PAGE: u32 = 500;
/// `next` is never longer.
const MAX_AFTER: usize = 64;

/// How many are wanted.
pub fn size(limit: Option<u32>) -> Answer<usize> {
    size_to(MOST_ON_A_PAGE, limit)
}

/// The same, of a list with pages of another size.
pub fn size_to(most: u32, limit: Option<u32>) -> Answer<usize> {
    let limit = limit.unwrap_or(100);
    let is_fit = (1..=most).contains(&limit);
    let limit = is_fit.then(|| usize::try_from(limit).ok()).flatten();
    limit.ok_or_else(|| Problem::invalid(format!("limit: must be 1 to {most}")))
}

/// The same, and one: whether there are more.
pub fn and_one(limit: usize) -> i64 {
    i64::try_from(limit.saturating_add(1)).unwrap_or(i64::MAX)
}

/// `after` of a list that is ordered by a word.
pub fn word(after: Option<String>) -> Answer<Option<String>> {
    match after {
        Some(after) if after.len() > MAX_AFTER => Err(wrong()),
        after => Ok(after),
    }
}

/// `after` of a list that is ordered by number, newest first.
pub fn number(after: Option<String>) -> Answer<i64> {
    let number = word(after)?.map(|after| after.parse().map_err(|_| wrong()));
    Ok(number.transpose()?.unwrap_or(i64::MAX))
}

/// `after` of a list that is ordered by number, oldest first; 0: from the beginning.
pub fn number_before(after: Option<String>) -> Answer<u64> {
    let number = word(after)?.map(|after| after.parse().map_err(|_| wrong()));
    Ok(number.transpose()?.unwrap_or(0))
}

fn wrong() -> Problem {
    Problem::invalid("after: must be `next` of the page before")
}

/// The page itself, and where the next one begins.
pub fn cut<T>(mut items: Vec<T>, limit: usize, name: impl Fn(&T) -> String) -> (Vec<T>, Option<String>) {
    let is_more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| is_more).map(name);
    (items, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_next_page_only_if_something_is_on_it() {
        let cut = |items: &[u32], limit| cut(items.to_vec(), limit, ToString::to_string);
        assert_eq!(cut(&[1, 2, 3], 2), (vec![1, 2], Some("2".to_owned())));
        assert_eq!(cut(&[1, 2], 2), (vec![1, 2], None));
        assert_eq!(cut(&[], 2), (vec![], None));
        assert!(size(Some(0)).is_err() && size(Some(501)).is_err() && number(Some("x".into())).is_err());
        assert!(size_to(501, Some(501)).is_ok() && size_to(501, Some(502)).is_err() && size_to(501, Some(0)).is_err());
        assert_eq!((number_before(None).ok(), number_before(Some("7".into())).ok()), (Some(0), Some(7)));
        assert!(number_before(Some("-1".into())).is_err());
    }
}
