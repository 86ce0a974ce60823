//! Decimal numbers, exactly, and as PostgreSQL's `numeric` prints them.

/// Digits that `numeric` can have before and after the point.
const MOST_BEFORE: i64 = 131_072;
const MOST_AFTER: i64 = 16_383;
/// What Django keeps of a REAL in a column of decimals (`Context(prec=15)`), since SQLite keeps no more of what was a decimal.
const SIGNIFICANT_OF_REAL: usize = 15;

/// Sign, digits, and how many of them are behind the point (fewer than none: zeros are missing at the end).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decimal {
    negative: bool,
    digits: Vec<u8>,
    scale: i64,
}

/// What became of digits that had no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// There were none but zeros.
    Nothing,
    Rounded,
}

impl Decimal {
    /// `-12.50e3`, without spaces; `None`: it is none, or has more digits than `numeric` takes.
    pub fn parse(text: &str) -> Option<Self> {
        let (negative, rest) = match text.as_bytes().first()? {
            b'-' => (true, text.get(1..)?),
            b'+' => (false, text.get(1..)?),
            _ => (false, text),
        };
        let (mantissa, exponent) = match rest.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, exponent_of(exponent)?),
            None => (rest, 0),
        };
        let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let are_digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() && part.is_empty() || !are_digits(whole) || !are_digits(part) {
            return None;
        }
        let digits: Vec<u8> = whole.bytes().chain(part.bytes()).skip_while(|digit| *digit == b'0').collect();
        let scale = i64::try_from(part.len()).ok()? - exponent;
        let number = Self { negative: negative && !digits.is_empty(), digits, scale };
        (scale <= MOST_AFTER && number.before() <= MOST_BEFORE).then_some(number)
    }

    /// A REAL as Django takes it for a decimal. It must be finite.
    pub fn of_real(number: f64) -> Option<Self> {
        Self::parse(&format!("{number:.*e}", SIGNIFICANT_OF_REAL - 1))
    }

    /// Digits before the point.
    fn before(&self) -> i64 {
        if self.digits.is_empty() { 0 } else { i64::try_from(self.digits.len()).unwrap_or(i64::MAX) - self.scale }
    }

    /// With exactly so many digits behind the point, the last one rounded half to even, as Django quantizes.
    pub fn at_scale(mut self, scale: i64) -> (Self, Cut) {
        let mut cut = Cut::Nothing;
        if self.scale > scale {
            let over = usize::try_from(self.scale - scale).unwrap_or(usize::MAX);
            let kept = self.digits.len().saturating_sub(over);
            let gone = self.digits.split_off(kept);
            // Digits that were cut may begin with zeros that are not written.
            let has_gap = over > gone.len();
            if gone.iter().any(|digit| *digit != b'0') {
                cut = Cut::Rounded;
                if !has_gap && rounds_up(&gone, self.digits.last().copied()) {
                    self.increase();
                }
            }
        } else if !self.digits.is_empty() {
            let missing = usize::try_from(scale - self.scale).unwrap_or(0);
            self.digits.extend(std::iter::repeat_n(b'0', missing));
        }
        self.scale = scale;
        self.negative &= !self.digits.is_empty();
        (self, cut)
    }

    fn increase(&mut self) {
        for digit in self.digits.iter_mut().rev() {
            if *digit < b'9' {
                *digit += 1;
                return;
            }
            *digit = b'0';
        }
        self.digits.insert(0, b'1');
    }

    /// Whether it fits `numeric(precision, scale)`; it is of that scale.
    pub fn fits(&self, precision: u32) -> bool {
        self.before() <= i64::from(precision) - self.scale
    }

    /// As `numeric` prints it.
    pub fn write(&self, out: &mut Vec<u8>) {
        if self.negative {
            out.push(b'-');
        }
        let before = usize::try_from(self.before()).unwrap_or(0);
        let whole = self.digits.get(..before).unwrap_or(&self.digits);
        out.extend_from_slice(whole);
        out.extend(std::iter::repeat_n(b'0', before.saturating_sub(self.digits.len())));
        if before == 0 {
            out.push(b'0');
        }
        let Ok(scale @ 1..) = usize::try_from(self.scale) else { return };
        out.push(b'.');
        let part = self.digits.get(before..).unwrap_or_default();
        out.extend(std::iter::repeat_n(b'0', scale.saturating_sub(part.len())));
        out.extend_from_slice(part);
    }
}

/// Past any that a number with digits could have, it is only clear that there are too many.
fn exponent_of(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse::<i32>().ok().map(i64::from)
}

/// Half goes to the even neighbour.
fn rounds_up(gone: &[u8], last: Option<u8>) -> bool {
    let Some((first, rest)) = gone.split_first() else { return false };
    match first {
        b'5' if rest.iter().all(|digit| *digit == b'0') => last.is_some_and(|last| (last - b'0') % 2 == 1),
        first => *first >= b'5',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(number: &Decimal) -> String {
        let mut out = Vec::new();
        number.write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn what_is_read_is_printed_as_numeric_prints_it() {
        for (text, wanted) in [
            ("0", "0"),
            ("-0", "0"),
            ("-0.00", "0.00"),
            ("007", "7"),
            ("1.50", "1.50"),
            ("+1.5", "1.5"),
            (".5", "0.5"),
            ("5.", "5"),
            ("1e3", "1000"),
            ("1.50e1", "15.0"),
            ("12.5E-3", "0.0125"),
            ("-12345678901234567890.123456789", "-12345678901234567890.123456789"),
            ("0e5", "0"),
            ("0.000e1", "0.00"),
            ("1e22", "10000000000000000000000"),
        ] {
            assert_eq!(printed(&Decimal::parse(text).unwrap()), wanted, "{text}");
        }
        for text in [
            "",
            "-",
            ".",
            "e5",
            "1e",
            "1e+",
            "1.2.3",
            " 1",
            "1 ",
            "0x10",
            "NaN",
            "1_000",
            "1e131073",
            "1e-16384",
            "1e99999999999",
            "٣",
        ] {
            assert_eq!(Decimal::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_scale_is_reached_by_zeros_or_by_rounding_half_to_even() {
        for (text, scale, wanted, cut) in [
            ("1.5", 2, "1.50", Cut::Nothing),
            ("1.500", 2, "1.50", Cut::Nothing),
            ("1.505", 2, "1.50", Cut::Rounded),
            ("1.515", 2, "1.52", Cut::Rounded),
            ("1.5051", 2, "1.51", Cut::Rounded),
            ("9.999", 2, "10.00", Cut::Rounded),
            ("-0.004", 2, "0.00", Cut::Rounded),
            ("0.0004", 2, "0.00", Cut::Rounded),
            ("0.9", 0, "1", Cut::Rounded),
            ("0.5", 0, "0", Cut::Rounded),
            ("1e3", 2, "1000.00", Cut::Nothing),
            ("0", 4, "0.0000", Cut::Nothing),
        ] {
            let (number, was) = Decimal::parse(text).unwrap().at_scale(scale);
            assert_eq!((printed(&number).as_str(), was), (wanted, cut), "{text} at {scale}");
        }
    }

    #[test]
    fn a_real_is_what_django_makes_of_it() {
        let of = |number: f64, scale| {
            let (number, cut) = Decimal::of_real(number).unwrap().at_scale(scale);
            (printed(&number), cut)
        };
        assert_eq!(of(19.99, 2), ("19.99".into(), Cut::Nothing));
        assert_eq!(of(0.1 + 0.2, 2), ("0.30".into(), Cut::Nothing), "its noise is behind the fifteenth digit");
        assert_eq!(of(1.234_56, 2), ("1.23".into(), Cut::Rounded));
        assert_eq!(of(-9_999_999_999.99, 2), ("-9999999999.99".into(), Cut::Nothing));
        assert_eq!(of(1e-300, 2), ("0.00".into(), Cut::Rounded));
    }

    #[test]
    fn precision_counts_digits_before_the_point() {
        let fits = |text, precision, scale| Decimal::parse(text).unwrap().at_scale(scale).0.fits(precision);
        assert!(fits("99.99", 4, 2) && !fits("100", 4, 2) && !fits("99.995", 4, 2));
        assert!(fits("0.5", 2, 2) && fits("0", 1, 1) && !fits("1", 2, 2));
        assert!(fits("-12", 2, 0) && !fits("123", 2, 0));
    }
}
