//! Dates and times: what SQLite keeps as text, as PostgreSQL prints it in the ISO style, in UTC.

use time::{Date, Duration, Month, PrimitiveDateTime, Time};

/// A moment, as far as the text tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    pub date: Date,
    pub time: Time,
    /// Seconds east of UTC.
    pub offset: Option<i32>,
}

/// Reads one piece after the other.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn digits(&mut self, count: usize) -> Option<u32> {
        let digits = self.0.get(..count)?;
        let number = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()))?;
        self.0 = self.0.get(count..)?;
        number.parse().ok()
    }

    /// One of these characters.
    fn one(&mut self, of: &[u8]) -> Option<u8> {
        let first = self.0.first().copied().filter(|first| of.contains(first))?;
        self.0 = self.0.get(1..)?;
        Some(first)
    }

    fn small(&mut self) -> Option<u8> {
        u8::try_from(self.digits(2)?).ok()
    }

    fn date(&mut self) -> Option<Date> {
        let year = i32::try_from(self.digits(4)?).ok().filter(|year| *year > 0)?;
        self.one(b"-")?;
        let month = Month::try_from(self.small()?).ok()?;
        self.one(b"-")?;
        Date::from_calendar_date(year, month, self.small()?).ok()
    }

    /// Microseconds at most: what follows must be zeros.
    fn time(&mut self) -> Option<Time> {
        let hour = self.small()?;
        self.one(b":")?;
        let minute = self.small()?;
        if self.one(b":").is_none() {
            return Time::from_hms(hour, minute, 0).ok();
        }
        let second = self.small()?;
        let mut micros = 0;
        if self.one(b".").is_some() {
            let count = self.0.iter().take_while(|b| b.is_ascii_digit()).count();
            let (part, rest) = self.0.split_at_checked(count)?;
            let places = part.iter().copied().chain(std::iter::repeat(b'0')).take(6);
            if part.is_empty() || part.iter().skip(6).any(|digit| *digit != b'0') {
                return None;
            }
            micros = places.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
            self.0 = rest;
        }
        Time::from_hms_micro(hour, minute, second, micros).ok()
    }

    /// `Z`, `+02`, `+0200`, `+02:00`, `+02:00:30`.
    fn offset(&mut self) -> Option<i32> {
        if self.one(b"Zz").is_some() {
            return Some(0);
        }
        let sign = if self.one(b"+-")? == b'-' { -1 } else { 1 };
        let (hours, mut minutes, mut seconds) = (i32::from(self.small()?), 0, 0);
        let has_colon = self.one(b":").is_some();
        if has_colon || !self.0.is_empty() {
            minutes = i32::from(self.small()?);
        }
        if has_colon && self.one(b":").is_some() {
            seconds = i32::from(self.small()?);
        }
        (hours < 16 && minutes < 60 && seconds < 60).then_some(sign * (hours * 3600 + minutes * 60 + seconds))
    }
}

/// `YYYY-MM-DD`, and midnight behind it if need be.
pub fn date(text: &str) -> Option<Date> {
    let whole = moment(text)?;
    (whole.time == Time::MIDNIGHT && whole.offset.is_none()).then_some(whole.date)
}

/// `HH:MM[:SS[.ffffff]]`.
pub fn time_of_day(text: &str) -> Option<Time> {
    let mut reader = Reader(text.as_bytes());
    let time = reader.time()?;
    reader.0.is_empty().then_some(time)
}

/// `YYYY-MM-DD[ HH:MM[:SS[.ffffff]][OFFSET]]`, with a space or a `T`.
pub fn moment(text: &str) -> Option<Moment> {
    let mut reader = Reader(text.as_bytes());
    let date = reader.date()?;
    if reader.0.is_empty() {
        return Some(Moment { date, time: Time::MIDNIGHT, offset: None });
    }
    reader.one(b" Tt")?;
    let time = reader.time()?;
    let offset = if reader.0.is_empty() { None } else { Some(reader.offset()?) };
    reader.0.is_empty().then_some(Moment { date, time, offset })
}

impl Moment {
    /// In UTC; without an offset it is UTC already, as Django stores it. `None`: before the year 1, or after 9999.
    pub fn in_utc(self) -> Option<(Date, Time)> {
        let there = PrimitiveDateTime::new(self.date, self.time);
        let there = there.checked_sub(Duration::seconds(i64::from(self.offset.unwrap_or(0))))?;
        (there.year() > 0).then_some((there.date(), there.time()))
    }
}

/// Digits behind the second that are not zero at the end.
pub fn places(time: Time) -> u8 {
    let (mut micros, mut places) = (time.microsecond(), 6);
    while places > 0 && micros.is_multiple_of(10) {
        (micros, places) = (micros / 10, places - 1);
    }
    places
}

pub fn write_date(date: Date, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("{:04}-{:02}-{:02}", date.year(), u8::from(date.month()), date.day()).as_bytes());
}

pub fn write_time(time: Time, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("{:02}:{:02}:{:02}", time.hour(), time.minute(), time.second()).as_bytes());
    let places = usize::from(places(time));
    if places > 0 {
        let micros = format!("{:06}", time.microsecond());
        out.push(b'.');
        out.extend_from_slice(micros.as_bytes().get(..places).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn utc(text: &str) -> Option<String> {
        let (date, time) = moment(text)?.in_utc()?;
        let mut out = Vec::new();
        write_date(date, &mut out);
        out.push(b' ');
        write_time(time, &mut out);
        String::from_utf8(out).ok()
    }

    #[test]
    fn moments_are_read_and_told_in_utc() {
        for (text, wanted) in [
            ("2026-11-27", "2026-11-27 00:00:00"),
            ("2026-11-27 08:09", "2026-11-27 08:09:00"),
            ("2026-11-27 08:09:10", "2026-11-27 08:09:10"),
            ("2026-11-27 08:09:10.120300", "2026-11-27 08:09:10.1203"),
            ("2026-11-27T08:09:10.5Z", "2026-11-27 08:09:10.5"),
            ("2026-11-27 08:09:10+02:00", "2026-11-27 06:09:10"),
            ("2026-11-27 08:09:10-0330", "2026-11-27 11:39:10"),
            ("2026-01-01 00:30:00+01", "2025-12-31 23:30:00"),
            ("2026-11-27 08:09:10.123456000", "2026-11-27 08:09:10.123456"),
            ("2024-02-29 00:00:00", "2024-02-29 00:00:00"),
            ("0001-01-01 00:00:00", "0001-01-01 00:00:00"),
        ] {
            assert_eq!(utc(text).as_deref(), Some(wanted), "{text}");
        }
        for text in [
            "",
            "2026",
            "2026-13-01",
            "2025-02-29",
            "2026-11-27 24:00:00",
            "2026-11-27 08:60:00",
            "2026-11-27 08:09:60",
            "2026-11-27 08:09:10.",
            "2026-11-27 08:09:10.1234567",
            "2026-11-27 08:09:10 +02:00",
            "2026-11-27x08:09",
            "0000-01-01",
            "26-11-27",
            "2026-11-27 08:09:10+99:00",
            "2026-11-27 08:09:10Zulu",
            "1764230400",
            "now",
            "0001-01-01 00:00:00+01:00",
            "٢٠٢٦-11-27",
        ] {
            assert_eq!(utc(text), None, "{text}");
        }
    }

    #[test]
    fn a_date_has_no_time_and_a_time_no_date() {
        assert!(date("2026-11-27").is_some() && date("2026-11-27 00:00:00").is_some());
        assert!(date("2026-11-27 00:00:01").is_none() && date("2026-11-27 00:00:00+01:00").is_none());
        assert!(time_of_day("08:09").is_some() && time_of_day("08:09:10.000001").is_some());
        assert!(time_of_day("08:09:10+01:00").is_none() && time_of_day("2026-11-27").is_none());
    }
}
