//! One value of SQLite for one PostgreSQL type: the text that COPY takes, and the form over which both sides make a checksum.
//!
//! What always holds: pure; a value that the type would not hold exactly is refused with the reason, which never holds the
//! value itself. A REAL for a decimal column is read as Django reads it, and a `real` keeps 24 bits: that a number is not the
//! same afterwards is told.

use std::{borrow::Cow, net::IpAddr};

use rusqlite::types::ValueRef;
use time::Time;

use super::{
    decimal::{Cut, Decimal},
    json::{self, Part},
    moment,
};

pub use super::json::Why;

/// A day, in microseconds.
const DAY: i64 = 86_400_000_000;
/// Whole numbers that a REAL holds exactly.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// What a column holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Bool,
    Int2,
    Int4,
    Int8,
    Float4,
    Float8,
    /// Precision and scale.
    Numeric(Option<(u32, u32)>),
    Text,
    /// Characters.
    Varchar(usize),
    Char(usize),
    Bytea,
    Date,
    /// Digits behind the second.
    Time(u8),
    Timestamp(u8),
    TimestampTz(u8),
    Interval,
    Uuid,
    Json,
    Jsonb,
    Inet,
    Cidr,
    Enum(Vec<String>),
    Array(Box<Kind>),
    /// A type that nothing is imported into.
    Other(String),
}

/// In which form PostgreSQL hands the value to the checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Text, as it is.
    Text,
    /// As its output function prints it.
    Printed,
    /// The bytes that this function sends, in hex: where the printed form has more than one way.
    Sent(&'static str),
}

/// What was written of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// The checksum is over `form`, not over the text.
    pub has_form: bool,
    /// Whoever reads it gets another number.
    pub rounded: bool,
}

const SAME: Written = Written { has_form: false, rounded: false };
const APART: Written = Written { has_form: true, rounded: false };

type Done = Result<Written, Why>;

fn why<T>(text: &'static str) -> Result<T, Why> {
    Err(Cow::Borrowed(text))
}

impl Kind {
    #[must_use]
    pub fn form(&self) -> Form {
        match self {
            Self::Text | Self::Varchar(_) => Form::Text,
            Self::Float4 => Form::Sent("float4send"),
            Self::Float8 => Form::Sent("float8send"),
            Self::Interval => Form::Sent("interval_send"),
            Self::Inet => Form::Sent("inet_send"),
            Self::Cidr => Form::Sent("cidr_send"),
            _ => Form::Printed,
        }
    }

    /// Writes the text of a value that is not NULL, and, where `has_form` says so, the form of its checksum.
    pub fn write(&self, value: ValueRef<'_>, text: &mut Vec<u8>, form: &mut Vec<u8>) -> Done {
        match self {
            Self::Bool => self::bool(value, text),
            Self::Int2 => integer(value, (i16::MIN.into(), i16::MAX.into()), "is out of range of smallint", text),
            Self::Int4 => integer(value, (i32::MIN.into(), i32::MAX.into()), "is out of range of integer", text),
            Self::Int8 => integer(value, (i64::MIN, i64::MAX), "is out of range of bigint", text),
            Self::Float4 => float(value, true, text, form),
            Self::Float8 => float(value, false, text, form),
            Self::Numeric(limits) => numeric(value, *limits, text),
            Self::Text => characters(value, None, text),
            Self::Varchar(limit) => characters(value, Some(*limit), text),
            Self::Char(limit) => padded(value, *limit, text, form),
            Self::Bytea => bytes(value, text),
            Self::Date => date(value, text),
            Self::Time(places) => time_of_day(value, *places, text),
            Self::Timestamp(places) => moment(value, *places, false, text),
            Self::TimestampTz(places) => moment(value, *places, true, text),
            Self::Interval => interval(value, text, form),
            Self::Uuid => uuid(value, text),
            Self::Json => {
                let json = string(value)?;
                json::check(json)?;
                text.extend_from_slice(json.as_bytes());
                Ok(SAME)
            }
            Self::Jsonb => json::write_jsonb(string(value)?, text).map(|()| SAME),
            Self::Inet => address(value, false, text, form),
            Self::Cidr => address(value, true, text, form),
            Self::Enum(labels) => label(value, labels, text),
            Self::Array(of) => array(value, of, text),
            Self::Other(name) => Err(Cow::Owned(format!(
                "values of type {name} are not imported: make the column of another type for the import, or empty it in the file"
            ))),
        }
    }

    /// What a column holds of a number whose text was written.
    #[must_use]
    pub fn held(&self, text: &[u8]) -> String {
        let text = String::from_utf8_lossy(text);
        match (self, text.parse::<f32>()) {
            // The shortest text that means it looks like more.
            (Self::Float4, Ok(short)) => f64::from(short).to_string(),
            _ => text.into_owned(),
        }
    }

    /// Whether an array of it has one form only.
    #[must_use]
    pub fn may_be_in_array(&self) -> bool {
        use Kind as K;
        matches!(
            self,
            K::Bool
                | K::Int2
                | K::Int4
                | K::Int8
                | K::Numeric(_)
                | K::Text
                | K::Varchar(_)
                | K::Date
                | K::Timestamp(_)
                | K::TimestampTz(_)
                | K::Uuid
                | K::Enum(_)
        )
    }
}

/// Text that PostgreSQL can hold.
fn string(value: ValueRef<'_>) -> Result<&str, Why> {
    match value {
        ValueRef::Text(bytes) if bytes.contains(&0) => why("has a NUL character, which PostgreSQL's text cannot hold"),
        ValueRef::Text(bytes) => std::str::from_utf8(bytes).or_else(|_| why("is not valid UTF-8")),
        ValueRef::Blob(_) => why("is a BLOB where text is wanted"),
        ValueRef::Integer(_) | ValueRef::Real(_) => why("is a number where text is wanted"),
        ValueRef::Null => why("is NULL"),
    }
}

fn bool(value: ValueRef<'_>, text: &mut Vec<u8>) -> Done {
    let word = match value {
        ValueRef::Integer(1) => Some(true),
        ValueRef::Integer(0) => Some(false),
        ValueRef::Text(bytes) => match bytes.to_ascii_lowercase().as_slice() {
            b"1" | b"t" | b"true" | b"y" | b"yes" | b"on" => Some(true),
            b"0" | b"f" | b"false" | b"n" | b"no" | b"off" => Some(false),
            _ => None,
        },
        _ => None,
    };
    match word {
        Some(yes) => {
            text.push(if yes { b't' } else { b'f' });
            Ok(SAME)
        }
        None => why("is no boolean (0, 1, true or false)"),
    }
}

fn integer(value: ValueRef<'_>, (least, most): (i64, i64), over: &'static str, text: &mut Vec<u8>) -> Done {
    const NONE: &str = "is no whole number";
    let number = match value {
        ValueRef::Integer(number) => number,
        ValueRef::Real(number) => whole(number)?,
        ValueRef::Text(bytes) => {
            let digits = std::str::from_utf8(bytes).ok().filter(|text| is_whole(text));
            match digits.map(str::parse) {
                Some(Ok(number)) => number,
                Some(Err(_)) => return why(over),
                None => return why(NONE),
            }
        }
        ValueRef::Blob(_) | ValueRef::Null => return why(NONE),
    };
    if number < least || number > most {
        return why(over);
    }
    text.extend_from_slice(number.to_string().as_bytes());
    Ok(SAME)
}

fn is_whole(text: &str) -> bool {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

/// A REAL without a fraction, while that is exact.
fn whole(number: f64) -> Result<i64, Why> {
    if number.fract() != 0.0 || !number.is_finite() {
        return why("is no whole number");
    }
    if number.abs() > EXACT {
        return why("is a REAL beyond 2^53, where whole numbers are not exact any more");
    }
    format!("{number:.0}").parse().or_else(|_| why("is no whole number"))
}

fn float(value: ValueRef<'_>, is_short: bool, text: &mut Vec<u8>, form: &mut Vec<u8>) -> Done {
    let number = match value {
        ValueRef::Real(number) => number,
        ValueRef::Integer(number) => match format!("{number}").parse::<f64>() {
            Ok(real) if real.abs() <= EXACT => real,
            _ => return why("is a whole number beyond 2^53, which a floating-point column does not hold exactly"),
        },
        ValueRef::Text(bytes) => match bytes.to_ascii_lowercase().as_slice() {
            b"nan" => f64::NAN,
            b"inf" | b"infinity" => f64::INFINITY,
            b"-inf" | b"-infinity" => f64::NEG_INFINITY,
            _ => return why("is text where a number is wanted"),
        },
        ValueRef::Blob(_) | ValueRef::Null => return why("is no number"),
    };
    let hex = crate::catalog::disk::hex;
    let mut rounded = false;
    let printed = if is_short {
        #[expect(clippy::cast_possible_truncation, reason = "what is too large becomes infinite, and is refused")]
        let short = number as f32;
        if number.is_finite() && (!short.is_finite() || short == 0.0 && number != 0.0) {
            return why("is out of range of real");
        }
        rounded = number.is_finite() && !is_same(f64::from(short), number);
        form.extend_from_slice(hex(&if short.is_nan() { f32::NAN } else { short }.to_be_bytes()).as_bytes());
        format!("{short:e}")
    } else {
        form.extend_from_slice(hex(&if number.is_nan() { f64::NAN } else { number }.to_be_bytes()).as_bytes());
        format!("{number:e}")
    };
    text.extend_from_slice(match printed.as_str() {
        "inf" => b"Infinity",
        "-inf" => b"-Infinity",
        printed => printed.as_bytes(),
    });
    Ok(Written { rounded, ..APART })
}

/// To the last bit, but for the sign of zero.
fn is_same(one: f64, other: f64) -> bool {
    one.total_cmp(&other).is_eq() || one.abs().total_cmp(&0.0).is_eq() && other.abs().total_cmp(&0.0).is_eq()
}

fn numeric(value: ValueRef<'_>, limits: Option<(u32, u32)>, text: &mut Vec<u8>) -> Done {
    const NONE: Why = Cow::Borrowed("is no decimal number");
    let is_real = matches!(value, ValueRef::Real(_));
    let number = match value {
        ValueRef::Integer(number) => Decimal::parse(&number.to_string()),
        ValueRef::Real(number) if !number.is_finite() => return why("is infinite, which a decimal column cannot hold"),
        ValueRef::Real(number) if limits.is_some() => Decimal::of_real(number),
        ValueRef::Real(number) => Decimal::parse(&format!("{number:e}")),
        ValueRef::Text(bytes) if bytes.eq_ignore_ascii_case(b"nan") => {
            text.extend_from_slice(b"NaN");
            return Ok(SAME);
        }
        ValueRef::Text(bytes) => std::str::from_utf8(bytes).ok().and_then(Decimal::parse),
        ValueRef::Blob(_) | ValueRef::Null => None,
    };
    let mut number = number.ok_or(NONE)?;
    if let Some((precision, scale)) = limits {
        let cut;
        (number, cut) = number.at_scale(scale.into());
        if cut == Cut::Rounded && !is_real {
            return Err(Cow::Owned(format!("has more than {scale} digits after the point")));
        }
        if !number.fits(precision) {
            return Err(Cow::Owned(format!("does not fit numeric({precision},{scale})")));
        }
    }
    let start = text.len();
    number.write(text);
    // Also what is lost behind the fifteenth digit.
    let rounded = match (value, text.get(start..).and_then(|digits| std::str::from_utf8(digits).ok()).map(str::parse)) {
        (ValueRef::Real(real), Some(Ok(held))) => !is_same(held, real),
        _ => false,
    };
    Ok(Written { rounded, ..SAME })
}

fn characters(value: ValueRef<'_>, limit: Option<usize>, text: &mut Vec<u8>) -> Done {
    if let ValueRef::Integer(number) = value {
        let digits = number.to_string();
        return characters(ValueRef::Text(digits.as_bytes()), limit, text);
    }
    let string = string(value)?;
    // No text has more characters than bytes.
    if let Some(limit) = limit.filter(|limit| string.len() > *limit)
        && string.chars().count() > limit
    {
        return Err(Cow::Owned(format!("is longer than {limit} characters")));
    }
    text.extend_from_slice(string.as_bytes());
    Ok(SAME)
}

fn padded(value: ValueRef<'_>, limit: usize, text: &mut Vec<u8>, form: &mut Vec<u8>) -> Done {
    let start = text.len();
    characters(value, Some(limit), text)?;
    let written = text.get(start..).unwrap_or_default();
    let characters = String::from_utf8_lossy(written).chars().count();
    form.extend_from_slice(written);
    form.extend(std::iter::repeat_n(b' ', limit.saturating_sub(characters)));
    Ok(APART)
}

fn bytes(value: ValueRef<'_>, text: &mut Vec<u8>) -> Done {
    match value {
        ValueRef::Blob(bytes) => {
            text.reserve(bytes.len() * 2 + 2);
            text.extend_from_slice(b"\\x");
            text.extend(bytes.iter().flat_map(|byte| [hex_digit(byte >> 4), hex_digit(byte & 15)]));
            Ok(SAME)
        }
        _ => why("is no BLOB"),
    }
}

fn hex_digit(half: u8) -> u8 {
    if half < 10 { b'0' + half } else { b'a' + half - 10 }
}

/// Why a number or a BLOB is no moment.
fn told_as_text<'a>(value: ValueRef<'a>, none: &'static str) -> Result<&'a str, Why> {
    match value {
        ValueRef::Integer(_) | ValueRef::Real(_) => {
            why("is a number where a date or a time is wanted: store it as text, YYYY-MM-DD HH:MM:SS in UTC")
        }
        ValueRef::Blob(_) => why(none),
        _ => string(value),
    }
}

fn date(value: ValueRef<'_>, text: &mut Vec<u8>) -> Done {
    const NONE: &str = "is no date (YYYY-MM-DD)";
    let date = moment::date(told_as_text(value, NONE)?).ok_or(Cow::Borrowed(NONE))?;
    moment::write_date(date, text);
    Ok(SAME)
}

fn has_room(time: Time, places: u8) -> Result<(), Why> {
    if moment::places(time) > places {
        return Err(Cow::Owned(format!("has more than {places} digits after the second")));
    }
    Ok(())
}

fn time_of_day(value: ValueRef<'_>, places: u8, text: &mut Vec<u8>) -> Done {
    const NONE: &str = "is no time (HH:MM:SS)";
    let time = moment::time_of_day(told_as_text(value, NONE)?).ok_or(Cow::Borrowed(NONE))?;
    has_room(time, places)?;
    moment::write_time(time, text);
    Ok(SAME)
}

fn moment(value: ValueRef<'_>, places: u8, has_zone: bool, text: &mut Vec<u8>) -> Done {
    const NONE: &str = "is no date with a time (YYYY-MM-DD HH:MM:SS)";
    let moment = moment::moment(told_as_text(value, NONE)?).ok_or(Cow::Borrowed(NONE))?;
    if !has_zone && moment.offset.is_some_and(|offset| offset != 0) {
        return why("has an offset from UTC where the column has no time zone");
    }
    let (date, time) = moment.in_utc().ok_or(Cow::Borrowed("is before the year 1 or after 9999 in UTC"))?;
    has_room(time, places)?;
    moment::write_date(date, text);
    text.push(b' ');
    moment::write_time(time, text);
    if has_zone {
        text.extend_from_slice(b"+00");
    }
    Ok(SAME)
}

/// Microseconds, as Django stores a duration; days and the rest, as it would write it here.
fn interval(value: ValueRef<'_>, text: &mut Vec<u8>, form: &mut Vec<u8>) -> Done {
    let ValueRef::Integer(micros) = value else { return why("is no duration: those are whole microseconds in SQLite") };
    let (days, rest) = (micros.div_euclid(DAY), micros.rem_euclid(DAY));
    text.extend_from_slice(format!("{days} days {}.{:06} seconds", rest / 1_000_000, rest % 1_000_000).as_bytes());
    let days = i32::try_from(days).or_else(|_| why("is longer than an interval"))?;
    let hex = crate::catalog::disk::hex;
    form.extend_from_slice(hex(&rest.to_be_bytes()).as_bytes());
    form.extend_from_slice(hex(&days.to_be_bytes()).as_bytes());
    form.extend_from_slice(hex(&[0; 4]).as_bytes());
    Ok(APART)
}

fn uuid(value: ValueRef<'_>, text: &mut Vec<u8>) -> Done {
    const NONE: &str = "is no UUID (32 hexadecimal digits)";
    let digits: Vec<u8> = match value {
        ValueRef::Blob(bytes) if bytes.len() == 16 => {
            bytes.iter().flat_map(|byte| [hex_digit(byte >> 4), hex_digit(byte & 15)]).collect()
        }
        ValueRef::Text(bytes) if bytes.len() == 32 => bytes.to_ascii_lowercase(),
        ValueRef::Text(bytes)
            if bytes.len() == 36 && [8, 13, 18, 23].iter().all(|at| bytes.get(*at) == Some(&b'-')) =>
        {
            bytes.iter().filter(|byte| **byte != b'-').map(u8::to_ascii_lowercase).collect()
        }
        _ => return why(NONE),
    };
    if digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return why(NONE);
    }
    for (at, digit) in digits.iter().enumerate() {
        if matches!(at, 8 | 12 | 16 | 20) {
            text.push(b'-');
        }
        text.push(*digit);
    }
    Ok(SAME)
}

fn address(value: ValueRef<'_>, is_network: bool, text: &mut Vec<u8>, form: &mut Vec<u8>) -> Done {
    const NONE: Why = Cow::Borrowed("is no IP address");
    let string = string(value)?;
    let (host, bits) = match string.split_once('/') {
        Some((host, bits)) if bits.bytes().all(|b| b.is_ascii_digit()) => (host, bits.parse::<u8>().ok()),
        Some(_) => return Err(NONE),
        None => (string, None),
    };
    let host: IpAddr = host.parse().map_err(|_| NONE)?;
    let (family, bytes) = match host {
        IpAddr::V4(host) => (2, host.octets().to_vec()),
        IpAddr::V6(host) => (3, host.octets().to_vec()),
    };
    let most = u8::try_from(bytes.len() * 8).map_err(|_| NONE)?;
    let bits = if string.contains('/') { bits.filter(|bits| *bits <= most).ok_or(NONE)? } else { most };
    let is_inside = |at: usize| at < usize::from(bits);
    let has_host = (0..usize::from(most)).any(|at| {
        let bit = bytes.get(at / 8).is_some_and(|byte| byte >> (7 - at % 8) & 1 == 1);
        bit && !is_inside(at)
    });
    if is_network && has_host {
        return why("has bits set to the right of its mask");
    }
    text.extend_from_slice(format!("{host}/{bits}").as_bytes());
    let length = u8::try_from(bytes.len()).map_err(|_| NONE)?;
    let head = [family, bits, u8::from(is_network), length];
    form.extend_from_slice(crate::catalog::disk::hex(&[&head[..], &bytes].concat()).as_bytes());
    Ok(APART)
}

fn label(value: ValueRef<'_>, labels: &[String], text: &mut Vec<u8>) -> Done {
    let string = string(value)?;
    if !labels.iter().any(|label| label == string) {
        return why("is none of the type's labels");
    }
    text.extend_from_slice(string.as_bytes());
    Ok(SAME)
}

/// A JSON list, as applications keep one in SQLite; one dimension.
fn array(value: ValueRef<'_>, of: &Kind, text: &mut Vec<u8>) -> Done {
    const NONE: &str = "is no JSON list of values, which is how an array is kept in SQLite, e.g. [\"a\", \"b\"]";
    let ValueRef::Text(_) = value else { return why(NONE) };
    let parts = json::list(string(value)?).ok_or(Cow::Borrowed(NONE))?;
    text.push(b'{');
    let (mut one, mut form) = (Vec::new(), Vec::new());
    for (at, part) in parts.iter().enumerate() {
        if text.len() > json::MOST_WRITTEN {
            return why("is longer, as PostgreSQL writes its numbers, than a value may be");
        }
        if at > 0 {
            text.push(b',');
        }
        one.clear();
        let wants_text = matches!(of, Kind::Text | Kind::Varchar(_) | Kind::Enum(_));
        match part {
            Part::Null => {
                text.extend_from_slice(b"NULL");
                continue;
            }
            Part::Text(part) => of.write(ValueRef::Text(part.as_bytes()), &mut one, &mut form)?,
            Part::Bool(yes) if *of == Kind::Bool => of.write(ValueRef::Integer((*yes).into()), &mut one, &mut form)?,
            Part::Number(number) if !wants_text && *of != Kind::Bool => {
                of.write(ValueRef::Text(number.as_bytes()), &mut one, &mut form)?
            }
            Part::Bool(_) | Part::Number(_) => return why("has a value of another type in its list"),
        };
        element(&one, text);
    }
    text.push(b'}');
    Ok(SAME)
}

/// As PostgreSQL prints it inside an array.
fn element(one: &[u8], text: &mut Vec<u8>) {
    let is_special =
        |byte: &u8| matches!(byte, b'"' | b'\\' | b'{' | b'}' | b',' | b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c);
    if !one.is_empty() && !one.eq_ignore_ascii_case(b"null") && !one.iter().any(is_special) {
        text.extend_from_slice(one);
        return;
    }
    text.push(b'"');
    for byte in one {
        if matches!(byte, b'"' | b'\\') {
            text.push(b'\\');
        }
        text.push(*byte);
    }
    text.push(b'"');
}

/// A text as COPY's text format takes it.
pub fn escape(text: &[u8], line: &mut Vec<u8>) {
    let mut rest = text;
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\\' | b'\n' | b'\r' | b'\t')) {
        let (before, from) = rest.split_at(at);
        line.extend_from_slice(before);
        line.push(b'\\');
        line.push(match from.first() {
            Some(b'\n') => b'n',
            Some(b'\r') => b'r',
            Some(b'\t') => b't',
            _ => b'\\',
        });
        rest = from.get(1..).unwrap_or_default();
    }
    line.extend_from_slice(rest);
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
