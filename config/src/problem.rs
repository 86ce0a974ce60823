//! What is wrong with the settings, told all at once.
//!
//! What always holds: a problem says where (file and line, environment variable or flag), which key, what is wrong and
//! what to do; and none shows the value of a secret.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `tenantry.toml:12`, `TENANTRY__POOL__POOL_SIZE`, `--set pool.pool_size`; only the file when no line is to blame.
    pub place: String,
    /// `pool.query_wait_timeout`; empty when no key is to blame (a file that is not TOML).
    pub key: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.key.is_empty() {
            write!(f, "{}: {}", self.place, self.message)
        } else {
            write!(f, "{}: {}: {}", self.place, self.key, self.message)
        }
    }
}

/// All that is wrong, the file's first and by line; never empty. `Display` prints one problem per line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// The problems, at least one.
    #[must_use]
    pub fn as_slice(&self) -> &[Problem] {
        &self.0
    }
}

impl IntoIterator for Problems {
    type Item = Problem;
    type IntoIter = std::vec::IntoIter<Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// Collects problems while settings are read and checked.
#[derive(Debug)]
pub(crate) struct Report {
    /// Where each key was last set.
    places: BTreeMap<String, String>,
    /// Keys whose value could not be read: a check on them would only repeat or confuse.
    failed: BTreeSet<String>,
    /// The file, for problems that no line is to blame for.
    fallback: String,
    problems: Vec<Problem>,
}

impl Report {
    pub(crate) fn new(fallback: String) -> Self {
        Self { places: BTreeMap::new(), failed: BTreeSet::new(), fallback, problems: Vec::new() }
    }

    /// Notes where a value was set; a later layer wins, as it does in the settings.
    pub(crate) fn note_value(&mut self, key: String, place: &str) {
        self.places.insert(key, place.to_owned());
    }

    /// Notes where a section was first opened.
    pub(crate) fn note_section(&mut self, key: String, place: &str) {
        self.places.entry(key).or_insert_with(|| place.to_owned());
    }

    pub(crate) fn is_set(&self, key: &str) -> bool {
        self.places.contains_key(key)
    }

    /// A value that could not be read.
    pub(crate) fn unreadable(&mut self, key: &str, message: impl Into<String>) {
        self.problem(&[key], message);
        self.failed.insert(key.to_owned());
    }

    /// A problem at the first of `keys` that was set, or at the section around the first; silent if one of them could
    /// not be read.
    pub(crate) fn problem(&mut self, keys: &[&str], message: impl Into<String>) {
        if keys.iter().any(|key| self.failed.contains(*key)) {
            return;
        }
        let key = keys.iter().find(|key| self.is_set(key)).or(keys.first()).copied().unwrap_or_default();
        let place = self.place(key);
        self.at(place, key, message);
    }

    /// A problem whose place is known to the caller.
    pub(crate) fn at(&mut self, place: impl Into<String>, key: &str, message: impl Into<String>) {
        let problem = Problem { place: place.into(), key: key.to_owned(), message: message.into() };
        // A key of `[pool]` is checked once for each tenant that takes it over, but is wrong only once.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    fn place(&self, key: &str) -> String {
        let mut around = key;
        loop {
            if let Some(place) = self.places.get(around) {
                return place.clone();
            }
            match around.rfind(['.', '[']) {
                Some(end) => around = &around[..end],
                None => return self.fallback.clone(),
            }
        }
    }

    /// `value` if nothing is wrong.
    pub(crate) fn finish<T>(mut self, value: T) -> Result<T, Problems> {
        if self.problems.is_empty() {
            return Ok(value);
        }
        // The file first, by line; then the flags and the variables. A problem of the whole file has no line.
        let file = self.fallback;
        self.problems.sort_by_cached_key(|problem| match problem.place.strip_prefix(&file) {
            Some(rest) => (false, rest.trim_start_matches(':').parse::<u64>().unwrap_or_default(), String::new()),
            None => (true, 0, problem.place.clone()),
        });
        Err(Problems(self.problems))
    }
}

/// The known word nearest to `wrong`, if one is near enough to be a slip.
pub(crate) fn nearest<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|word| (strsim::normalized_damerau_levenshtein(&wrong.to_lowercase(), word), word))
        .filter(|(likeness, _)| *likeness >= 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, word)| word)
}

/// "did you mean" with the nearest word, or all words.
pub(crate) fn suggest<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> String {
    match nearest(wrong, known.clone()) {
        Some(word) => format!("did you mean \"{word}\"?"),
        None => format!("known here: {}", known.into_iter().collect::<Vec<_>>().join(", ")),
    }
}
