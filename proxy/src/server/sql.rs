//! Quoting for the SQL texts that the data plane writes. Pure.

use std::fmt::Write as _;

/// A string literal, whatever `standard_conforming_strings` says.
#[must_use]
pub fn literal(text: &str) -> String {
    let mut quoted = String::from("E'");
    for c in text.chars() {
        match c {
            '\\' => quoted.push_str("\\\\"),
            '\'' => quoted.push_str("''"),
            c if c.is_ascii() => quoted.push(c),
            // By number: the connection's client_encoding may be any.
            c => {
                let _ = write!(quoted, "\\U{:08X}", u32::from(c));
            }
        }
    }
    quoted.push('\'');
    quoted
}
