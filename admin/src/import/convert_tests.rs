//! Every type with what fits it, what does not, and why.

use super::*;

const T: fn(&'static str) -> ValueRef<'static> = |text| ValueRef::Text(text.as_bytes());
const I: fn(i64) -> ValueRef<'static> = ValueRef::Integer;
const R: fn(f64) -> ValueRef<'static> = ValueRef::Real;
const B: fn(&'static [u8]) -> ValueRef<'static> = ValueRef::Blob;

/// Text and, where the checksum is over another one, that form.
fn write(kind: &Kind, value: ValueRef<'_>) -> Result<(String, String), String> {
    let (mut text, mut form) = (Vec::new(), Vec::new());
    let written = kind.write(value, &mut text, &mut form).map_err(Cow::into_owned)?;
    assert_eq!(written.has_form, !form.is_empty());
    Ok((String::from_utf8(text).unwrap(), String::from_utf8(form).unwrap()))
}

fn text(kind: &Kind, value: ValueRef<'_>) -> String {
    write(kind, value).unwrap_or_else(|why| panic!("{kind:?} {value:?}: {why}")).0
}

fn refused(kind: &Kind, value: ValueRef<'_>) -> String {
    write(kind, value).expect_err(&format!("{kind:?} {value:?}"))
}

#[test]
fn booleans() {
    for value in [I(1), T("1"), T("t"), T("True"), T("yes"), T("on"), T("Y")] {
        assert_eq!(text(&Kind::Bool, value), "t");
    }
    for value in [I(0), T("0"), T("f"), T("FALSE"), T("no"), T("off"), T("n")] {
        assert_eq!(text(&Kind::Bool, value), "f");
    }
    for value in [I(2), I(-1), R(1.0), T(""), T("2"), T("maybe"), B(b"1"), ValueRef::Null] {
        assert!(refused(&Kind::Bool, value).contains("no boolean"));
    }
}

#[test]
fn whole_numbers() {
    for (kind, least, most) in
        [(Kind::Int2, -32_768, 32_767), (Kind::Int4, -2_147_483_648, 2_147_483_647), (Kind::Int8, i64::MIN, i64::MAX)]
    {
        assert_eq!((text(&kind, I(least)), text(&kind, I(most))), (least.to_string(), most.to_string()));
        if kind != Kind::Int8 {
            assert!(refused(&kind, I(most + 1)).contains("out of range"));
            assert!(refused(&kind, I(least - 1)).contains("out of range"));
        }
        assert_eq!(text(&kind, T("-12")), "-12");
        assert_eq!(text(&kind, T("+007")), "7");
        assert_eq!((text(&kind, R(7.0)), text(&kind, R(-0.0))), ("7".into(), "0".into()));
        for value in
            [R(7.5), R(f64::INFINITY), T("7.0"), T(""), T("-"), T(" 7"), T("seven"), T("0x10"), B(b"7"), B(b"")]
        {
            assert!(refused(&kind, value).contains("no whole number"), "{value:?}");
        }
        assert!(refused(&kind, T("9223372036854775808")).contains("out of range"));
        assert!(refused(&kind, R(1e300)).contains("2^53"));
    }
}

#[test]
fn floating_point_numbers() {
    let eight = |value| write(&Kind::Float8, value).unwrap();
    assert_eq!(eight(R(1.5)), ("1.5e0".into(), "3ff8000000000000".into()));
    assert_eq!(eight(R(-0.0)), ("-0e0".into(), "8000000000000000".into()));
    assert_eq!(eight(R(5e-324)), ("5e-324".into(), "0000000000000001".into()));
    assert_eq!(eight(R(f64::INFINITY)).0, "Infinity");
    assert_eq!(eight(T("-inf")).0, "-Infinity");
    assert_eq!(eight(T("NaN")), ("NaN".into(), "7ff8000000000000".into()));
    assert_eq!(eight(I(3)), ("3e0".into(), "4008000000000000".into()));
    assert_eq!(write(&Kind::Float4, R(0.1)).unwrap(), ("1e-1".into(), "3dcccccd".into()));
    assert!(refused(&Kind::Float4, R(1e39)).contains("out of range of real"));
    assert!(refused(&Kind::Float4, R(1e-60)).contains("out of range of real"));
    assert!(refused(&Kind::Float8, I(i64::MAX)).contains("2^53"));
    assert!(refused(&Kind::Float8, T("1.5")).contains("text where a number"));
    assert!(refused(&Kind::Float8, B(b"1")).contains("no number"));
}

#[test]
fn decimals() {
    let money = Kind::Numeric(Some((6, 2)));
    for (value, wanted) in [
        (I(12), "12.00"),
        (R(19.99), "19.99"),
        (R(0.1 + 0.2), "0.30"),
        (T("-1.5"), "-1.50"),
        (T("9999.990"), "9999.99"),
        (T("NaN"), "NaN"),
        (R(-0.0), "0.00"),
    ] {
        assert_eq!(text(&money, value), wanted, "{value:?}");
    }
    assert!(refused(&money, T("1.234")).contains("more than 2 digits"));
    assert!(refused(&money, I(10_000)).contains("does not fit numeric(6,2)"));
    assert!(refused(&money, R(9_999.996)).contains("does not fit numeric(6,2)"));
    for value in [T("x"), T(""), T("Infinity"), T("1,5"), B(b"1")] {
        assert!(refused(&money, value).contains("no decimal"), "{value:?}");
    }
    assert!(refused(&money, R(f64::NEG_INFINITY)).contains("infinite"));
    let any = Kind::Numeric(None);
    assert_eq!(text(&any, R(0.1)), "0.1");
    assert_eq!(text(&any, R(1e22)), "10000000000000000000000");
    assert_eq!(text(&any, T("123456789012345678901234567890.10")), "123456789012345678901234567890.10");
}

#[test]
fn a_number_that_is_another_one_afterwards_is_told() {
    let lost = |kind: &Kind, value| kind.write(value, &mut Vec::new(), &mut Vec::new()).unwrap().rounded;
    let money = Kind::Numeric(Some((6, 2)));
    for value in [R(1.234), R(0.1 + 0.2), R(1e-300)] {
        assert!(lost(&money, value), "{value:?}");
    }
    for value in [R(1.23), R(-0.0), R(5.0), T("1.2"), T("NaN"), I(7)] {
        assert!(!lost(&money, value), "{value:?}");
    }
    let large = Kind::Numeric(Some((20, 2)));
    assert!(lost(&large, R(12_345_678_901_234_568.0)), "fifteen digits are kept, and it has more");
    assert!(!lost(&large, R(123_456_789_012_345.0)) && !lost(&large, I(i64::MAX / 100)));
    let (any, double) = (Kind::Numeric(None), Kind::Float8);
    for value in [R(0.1 + 0.2), R(5e-324), R(1e22), R(1.0 / 3.0)] {
        assert!(!lost(&any, value) && !lost(&double, value), "{value:?}");
    }
    for value in [R(0.1), R(1e30), I(16_777_217)] {
        assert!(lost(&Kind::Float4, value), "{value:?}");
    }
    for value in [R(0.5), R(-0.0), R(f64::INFINITY), T("nan"), I(16_777_216)] {
        assert!(!lost(&Kind::Float4, value), "{value:?}");
    }
    // Whole numbers are exact, or refused.
    assert!(!lost(&Kind::Int8, R(9_007_199_254_740_992.0)));
    assert_eq!(
        (Kind::Float4.held(b"1e-1"), money.held(b"1.23")),
        ("0.10000000149011612".to_owned(), "1.23".to_owned())
    );
}

#[test]
fn characters_are_counted_and_bytes_are_not() {
    assert_eq!(text(&Kind::Varchar(3), T("äöü")), "äöü");
    assert!(refused(&Kind::Varchar(3), T("äöü ")).contains("longer than 3"));
    assert_eq!(text(&Kind::Varchar(3), I(-12)), "-12");
    assert!(refused(&Kind::Varchar(2), I(-12)).contains("longer than 2"));
    assert_eq!(write(&Kind::Char(4), T("ä")).unwrap(), ("ä".into(), "ä   ".into()));
    assert!(refused(&Kind::Char(1), T("ab")).contains("longer than 1"));
    assert_eq!(text(&Kind::Text, T("")), "");
    for kind in [Kind::Text, Kind::Varchar(9), Kind::Char(9), Kind::Json, Kind::Jsonb, Kind::Inet, Kind::Enum(vec![])] {
        assert!(refused(&kind, T("a\0b")).contains("NUL"), "{kind:?}");
        assert!(refused(&kind, ValueRef::Text(b"caf\xe9")).contains("UTF-8"), "{kind:?}");
        assert!(refused(&kind, B(b"abc")).contains("BLOB"), "{kind:?}");
        assert!(refused(&kind, R(1.5)).contains("number"), "{kind:?}");
    }
}

#[test]
fn bytes() {
    assert_eq!(text(&Kind::Bytea, B(b"\x00\xff\x7f")), "\\x00ff7f");
    assert_eq!(text(&Kind::Bytea, B(b"")), "\\x");
    assert!(refused(&Kind::Bytea, T("abc")).contains("no BLOB"));
}

#[test]
fn dates_and_times() {
    assert_eq!(text(&Kind::Date, T("2026-11-27")), "2026-11-27");
    assert_eq!(text(&Kind::Time(6), T("08:09:10.5")), "08:09:10.5");
    assert_eq!(text(&Kind::Timestamp(6), T("2026-11-27T08:09:10.120Z")), "2026-11-27 08:09:10.12");
    assert_eq!(text(&Kind::TimestampTz(6), T("2026-11-27 08:09:10")), "2026-11-27 08:09:10+00");
    assert_eq!(text(&Kind::TimestampTz(6), T("2026-11-27 08:09:10+02:00")), "2026-11-27 06:09:10+00");
    assert!(refused(&Kind::Timestamp(6), T("2026-11-27 08:09:10+02:00")).contains("no time zone"));
    assert!(refused(&Kind::Timestamp(0), T("2026-11-27 08:09:10.5")).contains("more than 0 digits"));
    assert!(refused(&Kind::TimestampTz(6), T("0001-01-01 00:00:00+01:00")).contains("before the year 1"));
    for kind in [Kind::Date, Kind::Time(6), Kind::Timestamp(6), Kind::TimestampTz(6)] {
        for value in [I(1_764_230_400), R(2_461_007.5)] {
            assert!(refused(&kind, value).contains("is a number where"), "{kind:?}");
        }
        for value in [T("soon"), T(""), B(b"2026-11-27")] {
            assert!(refused(&kind, value).contains("is no "), "{kind:?}");
        }
    }
}

#[test]
fn durations_are_microseconds_as_django_stores_them() {
    let of = |micros| write(&Kind::Interval, I(micros)).unwrap();
    assert_eq!(of(0), ("0 days 0.000000 seconds".into(), "0".repeat(32)));
    assert_eq!(of(90_000_500_000).0, "1 days 3600.500000 seconds");
    assert_eq!(of(-3_600_000_000).0, "-1 days 82800.000000 seconds");
    assert_eq!(of(-3_600_000_000).1, "000000134743bc00ffffffff00000000");
    assert!(refused(&Kind::Interval, T("01:00:00")).contains("microseconds"));
}

#[test]
fn uuids() {
    let wanted = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11";
    for value in [
        T("a0eebc999c0b4ef8bb6d6bb9bd380a11"),
        T("A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"),
        B(&[0xa0, 0xee, 0xbc, 0x99, 0x9c, 0x0b, 0x4e, 0xf8, 0xbb, 0x6d, 0x6b, 0xb9, 0xbd, 0x38, 0x0a, 0x11]),
    ] {
        assert_eq!(text(&Kind::Uuid, value), wanted);
    }
    for value in
        [T(""), T("a0eebc999c0b4ef8bb6d6bb9bd380a1g"), T("a0eebc99-9c0b4-ef8-bb6d-6bb9bd380a11"), B(b"abc"), I(1)]
    {
        assert!(refused(&Kind::Uuid, value).contains("no UUID"), "{value:?}");
    }
}

#[test]
fn json() {
    assert_eq!(text(&Kind::Json, T(r#"{"b":1, "a":2}"#)), r#"{"b":1, "a":2}"#);
    assert_eq!(text(&Kind::Jsonb, T(r#"{"b":1, "a":2}"#)), r#"{"a": 2, "b": 1}"#);
    assert!(refused(&Kind::Json, T("{'a': 1}")).contains("not JSON"));
    assert!(refused(&Kind::Jsonb, T(r#""\u0000""#)).contains("NUL"));
}

#[test]
fn addresses() {
    assert_eq!(write(&Kind::Inet, T("192.0.2.7")).unwrap(), ("192.0.2.7/32".into(), "02200004c0000207".into()));
    let six = write(&Kind::Inet, T("2001:DB8::1/64")).unwrap();
    assert_eq!(six, ("2001:db8::1/64".into(), "0340001020010db8000000000000000000000001".into()));
    assert_eq!(text(&Kind::Cidr, T("10.0.0.0/8")), "10.0.0.0/8");
    assert!(refused(&Kind::Cidr, T("10.0.0.1/8")).contains("right of its mask"));
    for value in [
        T(""),
        T("10.0.0"),
        T("10.0.0.1/33"),
        T("10.0.0.1/"),
        T("10.0.0.1/x"),
        T("10.0.0.1/+8"),
        T("::1/129"),
        T("localhost"),
    ] {
        assert!(refused(&Kind::Inet, value).contains("no IP address"), "{value:?}");
    }
}

#[test]
fn labels() {
    let kind = Kind::Enum(vec!["new".into(), "done".into()]);
    assert_eq!(text(&kind, T("done")), "done");
    assert!(refused(&kind, T("Done")).contains("labels"));
}

#[test]
fn arrays_are_json_lists() {
    let of = |kind, list| write(&Kind::Array(Box::new(kind)), T(list)).map(|(text, _)| text);
    assert_eq!(
        of(Kind::Text, r#"["a", "", "null", "b c", "q\"\\", null, "x,y"]"#).unwrap(),
        r#"{a,"","null","b c","q\"\\",NULL,"x,y"}"#
    );
    assert_eq!(of(Kind::Int4, "[1, -2]").unwrap(), "{1,-2}");
    assert_eq!(of(Kind::Bool, "[true, false]").unwrap(), "{t,f}");
    assert_eq!(of(Kind::Numeric(Some((5, 2))), r#"[1.5, "2.25"]"#).unwrap(), "{1.50,2.25}");
    assert_eq!(of(Kind::Timestamp(6), r#"["2026-11-27"]"#).unwrap(), r#"{"2026-11-27 00:00:00"}"#);
    assert_eq!(of(Kind::Text, "[]").unwrap(), "{}");
    assert!(of(Kind::Text, "[1]").unwrap_err().contains("another type"));
    assert!(of(Kind::Int4, "[true]").unwrap_err().contains("another type"));
    assert!(of(Kind::Int2, "[40000]").unwrap_err().contains("out of range"));
    assert!(of(Kind::Text, "{a,b}").unwrap_err().contains("JSON list"));
    assert!(of(Kind::Text, r#"["a\u0000"]"#).unwrap_err().contains("JSON list"));
}

#[test]
fn other_types_are_named() {
    let told = refused(&Kind::Other("tsvector".into()), T("x"));
    assert!(told.starts_with("values of type tsvector are not imported"), "{told}");
}

#[test]
fn a_line_of_copy_is_one_line() {
    let mut line = Vec::new();
    escape(b"a\tb\\n\nc\r\\", &mut line);
    assert_eq!(line, b"a\\tb\\\\n\\nc\\r\\\\");
}
