//! What a server said, and what a test may ask of it.

use std::fmt::Write as _;

use bytes::Bytes;

/// One message as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub tag: u8,
    pub body: Bytes,
}

/// An ErrorResponse or NoticeResponse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub severity: String,
    pub code: String,
    pub message: String,
    pub detail: String,
    pub hint: String,
}

/// Messages up to where one stopped reading.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub messages: Vec<Message>,
    /// The connection ended.
    pub closed: bool,
}

impl Message {
    /// NUL-terminated words of the body from `start`.
    pub fn words(&self, start: usize) -> Vec<String> {
        let rest = self.body.get(start..).unwrap_or_default();
        let rest = rest.strip_suffix(&[0]).unwrap_or(rest);
        rest.split(|b| *b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
    }

    pub fn fault(&self) -> Fault {
        let field = |code: u8| {
            let mut fields = self.body.split(|b| *b == 0);
            let found = fields.find(|f| f.first() == Some(&code));
            String::from_utf8_lossy(found.unwrap_or_default().get(1..).unwrap_or_default()).into_owned()
        };
        Fault { severity: field(b'S'), code: field(b'C'), message: field(b'M'), detail: field(b'D'), hint: field(b'H') }
    }

    /// Values of a DataRow as text.
    pub fn row(&self) -> Vec<Option<String>> {
        let mut rest = &self.body[2..];
        let mut values = Vec::new();
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            match usize::try_from(i32::from_be_bytes(*length)) {
                Ok(length) => {
                    values.push(Some(String::from_utf8_lossy(&after[..length]).into_owned()));
                    rest = &after[length..];
                }
                Err(_) => {
                    values.push(None);
                    rest = after;
                }
            }
        }
        values
    }

    /// One line that is the same for every server that behaves the same: no process ids, keys or file positions.
    pub fn line(&self) -> String {
        let tag = char::from(self.tag);
        match self.tag {
            b'E' | b'N' => {
                let fault = self.fault();
                format!("{tag} {} {} {}", fault.severity, fault.code, fault.message)
            }
            b'Z' | b'd' => format!("{tag} {}", String::from_utf8_lossy(&self.body)),
            b'C' | b'S' => format!("{tag} {}", self.words(0).join("=")),
            b'A' => format!("{tag} {}", self.words(4).join("|")),
            b'D' => {
                let values = self.row().into_iter().map(|v| v.unwrap_or_else(|| "NULL".to_owned()));
                format!("{tag} {}", values.collect::<Vec<_>>().join("|"))
            }
            b'T' => format!("{tag} {}", self.columns().join("|")),
            b'K' => format!("{tag} {} bytes", self.body.len()),
            _ => {
                let hex = self.body.iter().take(64).fold(String::new(), |mut out, b| {
                    let _ = write!(out, "{b:02x}");
                    out
                });
                format!("{tag} {hex}").trim_end().to_owned()
            }
        }
    }

    /// Name, type and format of each column of a RowDescription.
    fn columns(&self) -> Vec<String> {
        let mut rest = &self.body[2..];
        let mut columns = Vec::new();
        while let Some(end) = rest.iter().position(|b| *b == 0) {
            let (name, after) = rest.split_at(end);
            let kind = u32::from_be_bytes(after[7..11].try_into().expect("4 bytes"));
            columns.push(format!("{}:{kind}:{}", String::from_utf8_lossy(name), after[18]));
            rest = &after[19..];
        }
        columns
    }
}

impl Answer {
    pub fn tags(&self) -> String {
        self.messages.iter().map(|m| char::from(m.tag)).collect()
    }

    pub fn trace(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.messages.iter().map(Message::line).collect();
        if self.closed {
            lines.push("closed".to_owned());
        }
        lines
    }

    pub fn of(&self, tag: u8) -> impl Iterator<Item = &Message> {
        self.messages.iter().filter(move |m| m.tag == tag)
    }

    pub fn rows(&self) -> Vec<Vec<Option<String>>> {
        self.of(b'D').map(Message::row).collect()
    }

    /// The single value of the single row.
    #[track_caller]
    pub fn value(&self) -> String {
        match self.rows().as_slice() {
            [row] if row.len() == 1 => row[0].clone().unwrap_or_else(|| "NULL".to_owned()),
            _ => panic!("not one value: {:#?}", self.trace()),
        }
    }

    pub fn faults(&self) -> Vec<Fault> {
        self.of(b'E').map(Message::fault).collect()
    }

    /// The transaction status of the last ReadyForQuery.
    pub fn status(&self) -> Option<char> {
        self.of(b'Z').last().and_then(|m| m.body.first()).map(|b| char::from(*b))
    }

    /// No error, not closed.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.faults().is_empty() && !self.closed, "unexpected: {:#?}", self.trace());
        self
    }

    /// Exactly one error, an ERROR with this SQLSTATE, and the session goes on.
    #[track_caller]
    pub fn error(&self, code: &str) -> Fault {
        let fault = self.only_fault(code);
        assert_eq!(fault.severity, "ERROR", "{:#?}", self.trace());
        assert!(!self.closed && self.status().is_some(), "the session ended: {:#?}", self.trace());
        fault
    }

    /// Exactly one error, a FATAL with one of these SQLSTATEs (`a|b`), nothing after it, and the connection is closed.
    #[track_caller]
    pub fn fatal(&self, codes: &str) -> Fault {
        let fault = self.only_fault(codes);
        assert_eq!(fault.severity, "FATAL", "{:#?}", self.trace());
        assert!(self.closed, "still open: {:#?}", self.trace());
        assert_eq!(self.messages.last().map(|m| m.tag), Some(b'E'), "something came after FATAL: {:#?}", self.trace());
        fault
    }

    #[track_caller]
    fn only_fault(&self, codes: &str) -> Fault {
        match self.faults().as_slice() {
            [fault] if codes.split('|').any(|code| code == fault.code) => fault.clone(),
            _ => panic!("not exactly one error {codes}: {:#?}", self.trace()),
        }
    }
}
