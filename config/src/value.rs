//! How one value is written: one `Setting` per type, both ways (read from a layer, rendered for the reference).
//!
//! What always holds: what `render` writes, `read` takes; an error says what to write instead; a secret is never shown.
//! Numbers and booleans may be written as strings, because environment variables and flags can only be strings.

use std::{net::SocketAddr, num::NonZeroU32, path::PathBuf, time::Duration};

use config::{Value, ValueKind};

use crate::{AuthType, ClientTlsMode, Isolation, LogFormat, OrAuto, PoolMode, Secret, ServerTlsMode, TenantId};

/// No timer needs more, and `Instant + Duration` must not overflow.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A type of value that a key may have.
pub(crate) trait Setting: Sized {
    /// The word that means "none" where the key is optional.
    const ABSENT: Option<&'static str> = Some("");

    fn read(value: &Value) -> Result<Self, String>;

    /// As TOML.
    fn render(&self) -> String;
}

fn text<'a>(value: &'a Value, wanted: &str) -> Result<&'a str, String> {
    match &value.kind {
        ValueKind::String(text) if text.contains('\0') => Err("contains a NUL byte; remove it".to_owned()),
        ValueKind::String(text) => Ok(text),
        _ => Err(format!("must be {wanted}")),
    }
}

fn quoted(text: &str) -> String {
    // JSON-like escapes of `Debug` are TOML's too for everything that a default can contain.
    format!("{text:?}")
}

impl<T: Setting> Setting for Option<T> {
    fn read(value: &Value) -> Result<Self, String> {
        match (&value.kind, T::ABSENT) {
            (ValueKind::String(text), Some(absent)) if text == absent => Ok(None),
            _ => T::read(value).map(Some),
        }
    }

    fn render(&self) -> String {
        self.as_ref().map_or_else(|| quoted(T::ABSENT.unwrap_or_default()), T::render)
    }
}

impl<T: Setting> Setting for OrAuto<T> {
    fn read(value: &Value) -> Result<Self, String> {
        match &value.kind {
            ValueKind::String(text) if text == "auto" => Ok(Self::Auto),
            _ => T::read(value).map(Self::Is).map_err(|error| format!("{error}, or \"auto\"")),
        }
    }

    fn render(&self) -> String {
        match self {
            Self::Auto => quoted("auto"),
            Self::Is(value) => value.render(),
        }
    }
}

impl Setting for String {
    fn read(value: &Value) -> Result<Self, String> {
        text(value, "a string in quotes").map(str::to_owned)
    }

    fn render(&self) -> String {
        quoted(self)
    }
}

impl Setting for Secret {
    // "" and "off" could be typing errors of a password; neither may silently mean "no password".
    const ABSENT: Option<&'static str> = None;

    fn read(value: &Value) -> Result<Self, String> {
        match &value.kind {
            ValueKind::String(text) => Ok(text.as_str().into()),
            _ => Err("must be a string in quotes".to_owned()),
        }
    }

    fn render(&self) -> String {
        quoted("***")
    }
}

impl Setting for PathBuf {
    fn read(value: &Value) -> Result<Self, String> {
        match text(value, "a path in quotes")? {
            "" => Err("is empty; write a path".to_owned()),
            path => Ok(path.into()),
        }
    }

    fn render(&self) -> String {
        quoted(&self.to_string_lossy())
    }
}

impl Setting for bool {
    fn read(value: &Value) -> Result<Self, String> {
        match &value.kind {
            ValueKind::Boolean(on) => Some(*on),
            ValueKind::String(text) => text.parse().ok(),
            _ => None,
        }
        .ok_or_else(|| "must be true or false".to_owned())
    }

    fn render(&self) -> String {
        self.to_string()
    }
}

fn whole_number<T: TryFrom<i64>>(value: &Value, range: &str) -> Result<T, String> {
    let number = match &value.kind {
        ValueKind::I64(number) => Some(*number),
        ValueKind::String(text) => text.parse().ok(),
        _ => None,
    };
    number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| format!("must be a whole number from {range}"))
}

impl Setting for u32 {
    const ABSENT: Option<&'static str> = Some("off");

    fn read(value: &Value) -> Result<Self, String> {
        whole_number(value, "0 to 4294967295")
    }

    fn render(&self) -> String {
        self.to_string()
    }
}

impl Setting for NonZeroU32 {
    fn read(value: &Value) -> Result<Self, String> {
        let number: u32 = whole_number(value, "1 to 4294967295")?;
        Self::new(number).ok_or_else(|| "must be at least 1".to_owned())
    }

    fn render(&self) -> String {
        self.to_string()
    }
}

/// A TCP port.
impl Setting for u16 {
    fn read(value: &Value) -> Result<Self, String> {
        match whole_number(value, "1 to 65535")? {
            0 => Err("must be a whole number from 1 to 65535".to_owned()),
            port => Ok(port),
        }
    }

    fn render(&self) -> String {
        self.to_string()
    }
}

/// A size in memory.
impl Setting for usize {
    fn read(value: &Value) -> Result<Self, String> {
        const HELP: &str = "write a size with its unit, e.g. \"16MiB\"";
        let text = text(value, &format!("a size; {HELP}"))?;
        if text.parse::<f64>().is_ok() {
            return Err(format!("{text:?} has no unit; {HELP}"));
        }
        let size: bytesize::ByteSize = text.parse().map_err(|_| format!("{text:?} is not a size; {HELP}"))?;
        match Self::try_from(size.as_u64()) {
            Ok(bytes @ 1..) => Ok(bytes),
            _ => Err(format!("{text:?} is out of range; {HELP}")),
        }
    }

    fn render(&self) -> String {
        // Only exact units: `ByteSize` would round, and the reference must read back as the default.
        let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
        let exact = units.iter().find(|(_, bits)| *self > 0 && self.trailing_zeros() >= *bits);
        exact.map_or_else(|| format!("\"{self}B\""), |(unit, bits)| format!("\"{}{unit}\"", self >> bits))
    }
}

impl Setting for Duration {
    const ABSENT: Option<&'static str> = Some("off");

    fn read(value: &Value) -> Result<Self, String> {
        const HELP: &str = "write a time with its unit, e.g. \"30s\", \"500ms\", \"10m\" or \"1h\"";
        if let ValueKind::I64(number) = value.kind {
            return Err(format!("{number} has no unit; write e.g. \"{number}s\" or \"{number}ms\""));
        }
        let text = text(value, &format!("a time; {HELP}"))?;
        if text == "off" {
            return Err(format!("cannot be off; {HELP}"));
        }
        if text.parse::<f64>().is_ok() {
            return Err(format!("{text:?} has no unit; {HELP}"));
        }
        let time = humantime::parse_duration(text).map_err(|_| format!("{text:?} is not a time; {HELP}"))?;
        if time.is_zero() {
            // PgBouncer reads 0 as "no limit"; taken literally it would fail every query.
            return Err(format!("must be longer than 0; {HELP}, or \"off\" where the key may be off"));
        }
        if time > LONGEST {
            return Err(format!("{text:?} is too long; write at most \"365d\""));
        }
        Ok(time)
    }

    fn render(&self) -> String {
        quoted(&humantime::format_duration(*self).to_string())
    }
}

impl Setting for SocketAddr {
    fn read(value: &Value) -> Result<Self, String> {
        const HELP: &str = "write an IP address and port, e.g. \"127.0.0.1:6432\" or \"[::1]:6432\"";
        let text = text(value, &format!("an address; {HELP}"))?;
        text.trim().parse().map_err(|_| format!("{text:?} is not an address; {HELP}"))
    }

    fn render(&self) -> String {
        quoted(&self.to_string())
    }
}

/// A list, or one string with commas (for the environment and flags).
impl Setting for Vec<SocketAddr> {
    fn read(value: &Value) -> Result<Self, String> {
        match &value.kind {
            ValueKind::Array(values) => values.iter().map(SocketAddr::read).collect(),
            ValueKind::String(text) => text.split(',').map(|one| SocketAddr::read(&Value::new(None, one))).collect(),
            _ => Err("must be a list of addresses, e.g. [\"127.0.0.1:6432\"]".to_owned()),
        }
    }

    fn render(&self) -> String {
        format!("[{}]", self.iter().map(Setting::render).collect::<Vec<_>>().join(", "))
    }
}

/// A list, or one string with commas (for the environment and flags).
impl Setting for Vec<TenantId> {
    fn read(value: &Value) -> Result<Self, String> {
        const HELP: &str = "must be a list of names, e.g. [\"acme\"]";
        let one = |text: &str| TenantId::parse(text.trim()).map_err(|error| error.to_string());
        match &value.kind {
            ValueKind::Array(values) => values.iter().map(|value| one(text(value, HELP)?)).collect(),
            ValueKind::String(text) => text.split(',').filter(|text| !text.trim().is_empty()).map(one).collect(),
            _ => Err(HELP.to_owned()),
        }
    }

    fn render(&self) -> String {
        format!("[{}]", self.iter().map(|name| quoted(name.as_str())).collect::<Vec<_>>().join(", "))
    }
}

/// Permission bits, written in octal as for `chmod`. A string, because
/// TOML would read 0777 as an error and 777 as decimal.
#[derive(Clone, Copy)]
pub(crate) struct Octal(pub(crate) u32);

impl Setting for Octal {
    fn read(value: &Value) -> Result<Self, String> {
        const HELP: &str = "write permission bits in octal and in quotes, e.g. \"0777\"";
        let text = text(value, &format!("a string; {HELP}"))?;
        match u32::from_str_radix(text, 8) {
            Ok(bits) if bits <= 0o777 => Ok(Self(bits)),
            _ => Err(format!("{text:?} is not a file mode; {HELP}")),
        }
    }

    fn render(&self) -> String {
        format!("\"{:04o}\"", self.0)
    }
}

/// One table row per word.
macro_rules! words {
    ($type:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        impl $type {
            /// The word as written in the settings.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl Setting for $type {
            fn read(value: &Value) -> Result<Self, String> {
                const WORDS: &[&str] = &[$($word),+];
                match text(value, &format!("one of {}", WORDS.join(", ")))? {
                    $($word => Ok(Self::$variant),)+
                    other => Err(format!("{other:?} is not a word for this; write one of {}", WORDS.join(", "))),
                }
            }

            fn render(&self) -> String {
                quoted(self.as_str())
            }
        }
    };
}

words!(Isolation { Tracked = "tracked", Strict = "strict" });
words!(PoolMode { Transaction = "transaction", Session = "session", Statement = "statement" });
words!(AuthType { ScramSha256 = "scram-sha-256", Md5 = "md5", Password = "password", Trust = "trust" });
words!(ClientTlsMode { Disable = "disable", Allow = "allow", Require = "require" });
words!(ServerTlsMode {
    Disable = "disable",
    Prefer = "prefer",
    Require = "require",
    VerifyCa = "verify-ca",
    VerifyFull = "verify-full",
});
words!(LogFormat { Text = "text", Json = "json" });
