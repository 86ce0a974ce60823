//! JSON as `jsonb` prints it: keys by length and bytes, the last of equal ones, numbers as `numeric`.

use std::borrow::Cow;

use super::decimal::Decimal;

pub type Why = Cow<'static, str>;

/// What a value may become when it is written out: `1e1000` is a thousand digits in jsonb.
pub const MOST_WRITTEN: usize = 64 << 20;
/// Lists and objects in each other.
const DEEPEST: usize = 500;
const NOT_JSON: Why = Cow::Borrowed("is not JSON");

/// Whether it is JSON: the `json` type keeps the text as it is.
pub fn check(text: &str) -> Result<(), Why> {
    serde_json::from_str::<serde::de::IgnoredAny>(text).map(drop).map_err(|_| NOT_JSON)
}

/// As `jsonb` prints it.
pub fn write_jsonb(text: &str, out: &mut Vec<u8>) -> Result<(), Why> {
    let mut parser = Parser { text: text.as_bytes(), at: 0, depth: 0 };
    parser.value(out)?;
    parser.end()
}

/// One part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
}

/// A list of such parts; `None`: it is something else.
pub fn list(text: &str) -> Option<Vec<Part>> {
    let mut parser = Parser { text: text.as_bytes(), at: 0, depth: 0 };
    let mut parts = Vec::new();
    parser.blank();
    parser.byte(b'[').ok()?;
    parser.blank();
    if parser.byte(b']').is_err() {
        loop {
            parser.blank();
            parts.push(parser.part().ok()?);
            parser.blank();
            if parser.byte(b',').is_err() {
                parser.byte(b']').ok()?;
                break;
            }
        }
    }
    parser.end().ok()?;
    Some(parts)
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn blank(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn byte(&mut self, wanted: u8) -> Result<(), Why> {
        if self.peek() != Some(wanted) {
            return Err(NOT_JSON);
        }
        self.at += 1;
        Ok(())
    }

    fn word(&mut self, word: &str) -> Result<(), Why> {
        let rest = self.text.get(self.at..).unwrap_or_default();
        if !rest.starts_with(word.as_bytes()) {
            return Err(NOT_JSON);
        }
        self.at += word.len();
        Ok(())
    }

    fn end(&mut self) -> Result<(), Why> {
        self.blank();
        if self.at == self.text.len() { Ok(()) } else { Err(NOT_JSON) }
    }

    fn part(&mut self) -> Result<Part, Why> {
        match self.peek() {
            Some(b'"') => self.string().map(Part::Text),
            Some(b't') => self.word("true").map(|()| Part::Bool(true)),
            Some(b'f') => self.word("false").map(|()| Part::Bool(false)),
            Some(b'n') => self.word("null").map(|()| Part::Null),
            _ => Ok(Part::Number(String::from_utf8_lossy(self.number()?).into_owned())),
        }
    }

    fn value(&mut self, out: &mut Vec<u8>) -> Result<(), Why> {
        self.blank();
        match self.peek() {
            Some(b'{') => self.deeper(|parser| parser.object(out)),
            Some(b'[') => self.deeper(|parser| parser.list(out)),
            _ => {
                match self.part()? {
                    Part::Null => out.extend_from_slice(b"null"),
                    Part::Bool(yes) => out.extend_from_slice(if yes { b"true" } else { b"false" }),
                    Part::Text(text) => write_string(&text, out),
                    Part::Number(text) => {
                        if out.len() > MOST_WRITTEN {
                            return Err(Cow::Borrowed(
                                "has numbers that are longer, as jsonb writes them, than a value may be",
                            ));
                        }
                        let number = Decimal::parse(&text);
                        number.ok_or(Cow::Borrowed("has a number with more digits than numeric takes"))?.write(out);
                    }
                }
                Ok(())
            }
        }
    }

    fn deeper(&mut self, inside: impl FnOnce(&mut Self) -> Result<(), Why>) -> Result<(), Why> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(Cow::Owned(format!("is nested more than {DEEPEST} deep")));
        }
        inside(self)?;
        self.depth -= 1;
        Ok(())
    }

    fn list(&mut self, out: &mut Vec<u8>) -> Result<(), Why> {
        self.byte(b'[')?;
        out.push(b'[');
        self.blank();
        if self.byte(b']').is_ok() {
            out.push(b']');
            return Ok(());
        }
        loop {
            self.value(out)?;
            self.blank();
            if self.byte(b',').is_err() {
                break;
            }
            out.extend_from_slice(b", ");
        }
        out.push(b']');
        self.byte(b']')
    }

    fn object(&mut self, out: &mut Vec<u8>) -> Result<(), Why> {
        self.byte(b'{')?;
        let mut members: Vec<(String, Vec<u8>)> = Vec::new();
        self.blank();
        if self.byte(b'}').is_err() {
            loop {
                self.blank();
                let key = self.string()?;
                self.blank();
                self.byte(b':')?;
                let mut value = Vec::new();
                self.value(&mut value)?;
                members.push((key, value));
                self.blank();
                if self.byte(b',').is_err() {
                    break;
                }
            }
            self.byte(b'}')?;
        }
        // Of equal keys the last one counts: first it is the first, then the others go.
        members.reverse();
        members.sort_by(|(one, _), (other, _)| (one.len(), one).cmp(&(other.len(), other)));
        members.dedup_by(|(one, _), (other, _)| one == other);
        out.push(b'{');
        for (at, (key, value)) in members.iter().enumerate() {
            if at > 0 {
                out.extend_from_slice(b", ");
            }
            write_string(key, out);
            out.extend_from_slice(b": ");
            out.extend_from_slice(value);
        }
        out.push(b'}');
        Ok(())
    }

    fn number(&mut self) -> Result<&[u8], Why> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1
        } else {
            self.digits()?
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(self.text.get(start..self.at).unwrap_or_default())
    }

    fn digits(&mut self) -> Result<(), Why> {
        let start = self.at;
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at > start { Ok(()) } else { Err(NOT_JSON) }
    }

    fn string(&mut self) -> Result<String, Why> {
        self.byte(b'"')?;
        let mut bytes = Vec::new();
        loop {
            let byte = self.peek().ok_or(NOT_JSON)?;
            self.at += 1;
            match byte {
                b'"' => return String::from_utf8(bytes).map_err(|_| NOT_JSON),
                b'\\' => {
                    let mut room = [0; 4];
                    bytes.extend_from_slice(self.escape()?.encode_utf8(&mut room).as_bytes());
                }
                0..0x20 => return Err(NOT_JSON),
                byte => bytes.push(byte),
            }
        }
    }

    fn escape(&mut self) -> Result<char, Why> {
        let kind = self.peek().ok_or(NOT_JSON)?;
        self.at += 1;
        Ok(match kind {
            b'"' | b'\\' | b'/' => char::from(kind),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let first = self.hex()?;
                let units = if (0xd800..0xdc00).contains(&first) && self.word("\\u").is_ok() {
                    vec![first, self.hex()?]
                } else {
                    vec![first]
                };
                let one = char::decode_utf16(units).next().and_then(Result::ok);
                match one.ok_or(Cow::Borrowed("has half a character (an unpaired surrogate in \\u)"))? {
                    '\0' => return Err(Cow::Borrowed("has a NUL (\\u0000), which jsonb cannot hold")),
                    one => one,
                }
            }
            _ => return Err(NOT_JSON),
        })
    }

    fn hex(&mut self) -> Result<u16, Why> {
        let digits = self.text.get(self.at..self.at + 4).ok_or(NOT_JSON)?;
        let digits = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()));
        let unit = u16::from_str_radix(digits.ok_or(NOT_JSON)?, 16).map_err(|_| NOT_JSON)?;
        self.at += 4;
        Ok(unit)
    }
}

fn write_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    for byte in text.bytes() {
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x0c => out.extend_from_slice(b"\\f"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0..0x20 => out.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
            byte => out.push(byte),
        }
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jsonb(text: &str) -> Result<String, Why> {
        let mut out = Vec::new();
        write_jsonb(text, &mut out).map(|()| String::from_utf8(out).unwrap())
    }

    #[test]
    fn jsonb_is_printed_as_postgresql_prints_it() {
        for (text, wanted) in [
            ("null", "null"),
            (" [ ] ", "[]"),
            ("{}", "{}"),
            (r#"{"bb":1,"a":2,"ab":[true,false,null]}"#, r#"{"a": 2, "ab": [true, false, null], "bb": 1}"#),
            (r#"{"a":1,"a":{"x":2}}"#, r#"{"a": {"x": 2}}"#),
            ("[1.50,1e2,-0,-0.0,12E-1]", "[1.50, 100, 0, 0.0, 1.2]"),
            (r#""\u00e4\n\/\u0001\ud83d\ude00""#, "\"ä\\n/\\u0001😀\""),
            (r#""ünï""#, r#""ünï""#),
        ] {
            assert_eq!(jsonb(text).as_deref(), Ok(wanted), "{text}");
        }
    }

    #[test]
    fn what_is_not_json_or_has_no_place_in_jsonb_is_named() {
        for text in [
            "",
            "{",
            "[1,]",
            "{\"a\"}",
            "NaN",
            "[Infinity]",
            "01",
            "1.",
            "'a'",
            "\"a",
            "\"\n\"",
            "[] []",
            "{1:2}",
            "\"\\x\"",
            "tru",
        ] {
            assert_eq!(jsonb(text), Err(NOT_JSON), "{text}");
            assert_eq!(check(text), Err(NOT_JSON), "{text}");
        }
        assert!(jsonb(r#""\u0000""#).unwrap_err().contains("NUL") && check(r#""\u0000""#).is_ok());
        assert!(jsonb(r#""\ud83d""#).unwrap_err().contains("surrogate"));
        assert!(jsonb(r#""\ud83dx""#).unwrap_err().contains("surrogate"));
        assert!(jsonb(&"[".repeat(501)).unwrap_err().contains("nested"));
        assert!(jsonb(&format!("{}{}", "[".repeat(500), "]".repeat(500))).is_ok());
        assert!(jsonb("1e200000").unwrap_err().contains("digits"));
    }

    #[test]
    fn a_list_is_taken_apart() {
        assert_eq!(list(" [] "), Some(vec![]));
        let parts = vec![Part::Text("a,\"".into()), Part::Number("1.5".into()), Part::Null, Part::Bool(true)];
        assert_eq!(list(r#"["a,\"", 1.5, null, true]"#), Some(parts));
        for text in ["", "{}", "[[1]]", "[1", "a,b", "{a,b}", "[1] 2"] {
            assert_eq!(list(text), None, "{text}");
        }
    }
}
