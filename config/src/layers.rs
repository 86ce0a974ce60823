//! The layers over the defaults: file, environment, flags; merged by the `config` crate.
//!
//! What always holds: each value carries its origin (file and line, variable, flag) as the `config` crate's origin, and
//! keys are taken literally (no path is parsed out of a key of the file).

use std::{collections::BTreeMap, ffi::OsString, fmt, fs, path::Path};

use config::{Config, ConfigError, Map, Source, Value, ValueKind};
use toml::de::{DeTable, DeValue};

use crate::problem::Report;

const ENVIRONMENT_PREFIX: &str = "TENANTRY__";

/// All layers hang under this key, because the `config` crate parses paths out of the keys of the root, and of no others.
const ROOT: &str = "settings";

/// What overrides the file: the environment, then the flags.
///
/// Passed in rather than read, so that nothing here depends on global state; [`Overrides::from_env`] takes the real
/// environment. `Debug` shows names only, because values may be secrets.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    environment: BTreeMap<String, OsString>,
    flags: Vec<(String, String)>,
}

impl Overrides {
    /// The environment of this process and no flags.
    #[must_use]
    pub fn from_env() -> Self {
        // A name that is not UTF-8 can be no key of ours.
        let named = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        Self::default().environment(named)
    }

    /// Adds environment variables: settings (`TENANTRY__POOL__POOL_SIZE`) and those that `password_env` may name.
    #[must_use]
    pub fn environment<N: Into<String>, V: Into<OsString>>(mut self, vars: impl IntoIterator<Item = (N, V)>) -> Self {
        self.environment.extend(vars.into_iter().map(|(name, value)| (name.into(), value.into())));
        self
    }

    /// Adds a flag, e.g. `("pool.pool_size", "5")`; of two for one key the later wins.
    #[must_use]
    pub fn flag(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.flags.push((key.into(), value.into()));
        self
    }

    /// The variable that a `password_env` names.
    pub(crate) fn variable(&self, name: &str) -> Option<&OsString> {
        self.environment.get(name)
    }
}

impl fmt::Debug for Overrides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overrides")
            .field("environment", &self.environment.keys())
            .field("flags", &self.flags.iter().map(|(key, _)| key).collect::<Vec<_>>())
            .finish()
    }
}

/// All layers merged, with the place of each key noted in `report`.
///
/// `None` if the file is no TOML: what could be salvaged of it would only give problems that are not there.
pub(crate) fn merge(file: Option<&Path>, overrides: &Overrides, report: &mut Report) -> Option<Map<String, Value>> {
    let layers = [
        file.map_or_else(|| Some(Map::new()), |path| read_file(path, report))?,
        environment(overrides, report),
        flags(overrides, report),
    ];
    let mut builder = Config::builder();
    for layer in layers {
        note_places("", &layer, report);
        builder = builder.add_source(Layer(layer));
    }
    match builder.build().map(|merged| merged.cache.kind) {
        Ok(ValueKind::Table(mut root)) => Some(root.remove(ROOT).map(into_table).unwrap_or_default()),
        Ok(_) => Some(Map::new()),
        Err(error) => {
            report.problem(&[""], format!("cannot merge the settings: {error}"));
            None
        }
    }
}

fn into_table(value: Value) -> Map<String, Value> {
    match value.kind {
        ValueKind::Table(table) => table,
        _ => Map::new(),
    }
}

/// `outer.key`, the key quoted if TOML needs it to be.
pub(crate) fn join(outer: &str, key: &str) -> String {
    let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    let key = if bare { key.to_owned() } else { format!("{key:?}") };
    if outer.is_empty() { key } else { format!("{outer}.{key}") }
}

fn note_places(outer: &str, table: &Map<String, Value>, report: &mut Report) {
    for (key, value) in table {
        note_place(join(outer, key), value, report);
    }
}

fn note_place(key: String, value: &Value, report: &mut Report) {
    let place = value.origin().unwrap_or_default();
    match &value.kind {
        ValueKind::Table(table) => {
            report.note_section(key.clone(), place);
            note_places(&key, table, report);
        }
        ValueKind::Array(values) => {
            report.note_value(key.clone(), place);
            for (i, value) in values.iter().enumerate() {
                note_place(format!("{key}[{i}]"), value, report);
            }
        }
        _ => report.note_value(key, place),
    }
}

#[derive(Clone)]
struct Layer(Map<String, Value>);

// The trait wants `Debug`; the values may be secrets.
impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Layer")
    }
}

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(Map::from([(ROOT.to_owned(), Value::new(None, ValueKind::Table(self.0.clone())))]))
    }
}

fn read_file(path: &Path, report: &mut Report) -> Option<Map<String, Value>> {
    let name = path.display().to_string();
    match fs::read_to_string(path) {
        Ok(text) => parse_file(&name, &text, report),
        Err(error) => {
            report.at(name, "", format!("cannot be read: {error}"));
            None
        }
    }
}

fn parse_file(name: &str, text: &str, report: &mut Report) -> Option<Map<String, Value>> {
    let file = File { name, newlines: text.match_indices('\n').map(|(offset, _)| offset).collect() };
    let (document, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        let place = error.span().map_or_else(|| name.to_owned(), |span| file.place(span.start));
        // Only the message: the error's own Display quotes the line, which may hold a secret.
        report.at(place, "", format!("is not TOML: {}", error.message().replace('\n', " ")));
    }
    errors.is_empty().then(|| file.table(document.get_ref()))
}

struct File<'a> {
    name: &'a str,
    /// Offsets, rising: with thousands of tenants, counting lines anew for each key would take seconds.
    newlines: Vec<usize>,
}

impl File<'_> {
    fn place(&self, offset: usize) -> String {
        let line = self.newlines.partition_point(|newline| *newline < offset) + 1;
        format!("{}:{line}", self.name)
    }

    fn table(&self, table: &DeTable<'_>) -> Map<String, Value> {
        let pair = |(key, value): (&toml::Spanned<toml::de::DeString<'_>>, &toml::Spanned<DeValue<'_>>)| {
            (key.get_ref().to_string(), self.value(key.span().start, value.get_ref()))
        };
        table.iter().map(pair).collect()
    }

    fn value(&self, offset: usize, value: &DeValue<'_>) -> Value {
        let kind = match value {
            DeValue::String(text) => ValueKind::String(text.to_string()),
            DeValue::Integer(number) => {
                // Nil is no type that any key takes, so a number too large is refused like a wrong type.
                i64::from_str_radix(number.as_str(), number.radix()).map_or(ValueKind::Nil, ValueKind::I64)
            }
            DeValue::Float(number) => number.as_str().parse().map_or(ValueKind::Nil, ValueKind::Float),
            DeValue::Boolean(on) => ValueKind::Boolean(*on),
            DeValue::Datetime(_) => ValueKind::Nil,
            DeValue::Array(values) => {
                ValueKind::Array(values.iter().map(|value| self.value(value.span().start, value.get_ref())).collect())
            }
            DeValue::Table(table) => ValueKind::Table(self.table(table)),
        };
        Value::new(Some(&self.place(offset)), kind)
    }
}

fn environment(overrides: &Overrides, report: &mut Report) -> Map<String, Value> {
    let mut layer = Map::new();
    for (name, value) in &overrides.environment {
        let is_ours = name.get(..ENVIRONMENT_PREFIX.len()).is_some_and(|p| p.eq_ignore_ascii_case(ENVIRONMENT_PREFIX));
        if !is_ours {
            continue;
        }
        let path = name[ENVIRONMENT_PREFIX.len()..].to_ascii_lowercase();
        let Some(value) = value.to_str() else {
            report.at(name, &path.replace("__", "."), "is not UTF-8; write UTF-8");
            continue;
        };
        let keys: Vec<&str> = path.split("__").collect();
        if insert(&mut layer, &keys, Value::new(Some(name), value)).is_some() {
            let message = "another variable sets the same key or a part of it; unset one of them";
            report.at(name, &keys.join("."), message);
        }
    }
    layer
}

fn flags(overrides: &Overrides, report: &mut Report) -> Map<String, Value> {
    let mut layer = Map::new();
    for (path, value) in &overrides.flags {
        let origin = format!("--set {path}");
        // No key has a dot in it, so quotes ("tenants.\"*\".server") are decoration.
        let keys: Vec<&str> = path.split('.').map(|key| key.trim().trim_matches('"')).collect();
        let replaced = insert(&mut layer, &keys, Value::new(Some(&origin), value.as_str()));
        if replaced.is_some_and(|old| !matches!(old.kind, ValueKind::String(_))) {
            report.at(origin, path, "is a section, and another flag sets a key in it; name one key");
        }
    }
    layer
}

/// Puts `value` at the end of `keys`; returns what it could not stand beside.
fn insert(table: &mut Map<String, Value>, keys: &[&str], value: Value) -> Option<Value> {
    let (key, rest) = keys.split_first()?;
    if rest.is_empty() {
        return table.insert((*key).to_owned(), value);
    }
    let section = Value::new(value.origin().map(str::to_owned).as_ref(), ValueKind::Table(Map::new()));
    match &mut table.entry((*key).to_owned()).or_insert(section).kind {
        ValueKind::Table(inner) => insert(inner, rest, value),
        _ => Some(value),
    }
}
