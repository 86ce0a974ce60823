//! What is in the tenant's database: tables, columns with what they hold, unique indexes, foreign keys.

use std::collections::BTreeMap;

use tokio_postgres::{Client, Row};

use super::super::StepError;
use crate::{
    import::{
        Kind, hash,
        plan::{ForeignKey, Target, TargetColumn, TargetTable},
    },
    sql::import as sql,
};

/// Long enough for every part of the hash.
const PROBE: &str = "Tenantry: über 12 bytes, and some more";
/// Domains over domains.
const DEEPEST: usize = 32;
/// What `typmod` of character types and of numeric is more than it says.
const HEADER: i32 = 4;

/// # Errors
/// It keeps text in another encoding, or its checksums are not ours.
pub async fn suits(client: &Client) -> Result<(), StepError> {
    let row = client.query_one(sql::SERVER, &[&PROBE]).await?;
    let (encoding, of_server): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
    if encoding != "UTF8" {
        return Err(StepError::Refused(format!(
            "the database keeps text as {encoding}, and SQLite's is UTF-8: only a database in UTF8 can be filled"
        )));
    }
    if of_server != hash(PROBE.as_bytes()) {
        return Err(StepError::Refused(
            "the server's checksums are not those of a little-endian machine, so that nothing could be verified"
                .to_owned(),
        ));
    }
    Ok(())
}

/// A type as the catalog has it.
struct Type {
    name: String,
    kind: String,
    base: u32,
    modifier: i32,
    is_required: bool,
    element: u32,
    labels: Vec<String>,
}

pub async fn read(client: &Client) -> Result<Target, StepError> {
    let mut target = Target::default();
    for row in client.query(sql::TABLES, &[]).await? {
        let (oid, schema, name) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        target.tables.push(TargetTable { oid, schema, name, has_triggers: row.try_get(3)?, ..TargetTable::default() });
    }
    let oids: Vec<u32> = target.tables.iter().map(|table| table.oid).collect();
    let types = types(client).await?;
    for row in client.query(sql::COLUMNS, &[&oids]).await? {
        let (oid, column) = column(&row, &types)?;
        if let Some(table) = target.tables.iter_mut().find(|table| table.oid == oid) {
            table.columns.push(column);
        }
    }
    for row in client.query(sql::UNIQUES, &[&oids]).await? {
        let oid: u32 = row.try_get(0)?;
        if let Some(table) = target.tables.iter_mut().find(|table| table.oid == oid) {
            table.uniques.push(row.try_get(1)?);
        }
    }
    for row in client.query(sql::FOREIGN_KEYS, &[&oids]).await? {
        target.keys.push(ForeignKey {
            name: row.try_get(0)?,
            child: row.try_get(1)?,
            parent: row.try_get(2)?,
            columns: row.try_get(3)?,
            parent_columns: row.try_get(4)?,
            is_deferrable: row.try_get(5)?,
        });
    }
    Ok(target)
}

async fn types(client: &Client) -> Result<BTreeMap<u32, Type>, StepError> {
    let one = |row: &Row| {
        let of = Type {
            name: row.try_get(1)?,
            kind: row.try_get(2)?,
            base: row.try_get(3)?,
            modifier: row.try_get(4)?,
            is_required: row.try_get(5)?,
            element: row.try_get(6)?,
            labels: row.try_get(7)?,
        };
        Ok((row.try_get(0)?, of))
    };
    client.query(sql::TYPES, &[]).await?.iter().map(one).collect()
}

fn column(row: &Row, types: &BTreeMap<u32, Type>) -> Result<(u32, TargetColumn), StepError> {
    let (oid, name, kind, modifier): (u32, String, u32, i32) =
        (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
    let of_domain = types.get(&kind).is_some_and(|of| of.kind == "d" && of.is_required);
    let column = TargetColumn {
        name,
        kind: kind_of(types, kind, modifier, 0),
        is_required: row.try_get::<_, bool>(4)? || of_domain,
        has_default: row.try_get(5)?,
        is_generated: row.try_get(6)?,
    };
    Ok((oid, column))
}

/// By the numbers that PostgreSQL's own types have for ever; what an extension brings, by its name.
fn kind_of(types: &BTreeMap<u32, Type>, oid: u32, modifier: i32, depth: usize) -> Kind {
    let limit = usize::try_from(modifier - HEADER).ok();
    let places = u8::try_from(modifier).unwrap_or(6);
    let other = || Kind::Other(types.get(&oid).map_or_else(|| oid.to_string(), |of| of.name.clone()));
    match oid {
        16 => Kind::Bool,
        17 => Kind::Bytea,
        20 => Kind::Int8,
        21 => Kind::Int2,
        23 => Kind::Int4,
        25 => Kind::Text,
        114 => Kind::Json,
        650 => Kind::Cidr,
        700 => Kind::Float4,
        701 => Kind::Float8,
        869 => Kind::Inet,
        1042 => limit.map_or(Kind::Text, Kind::Char),
        1043 => limit.map_or(Kind::Text, Kind::Varchar),
        1082 => Kind::Date,
        1083 => Kind::Time(places),
        1114 => Kind::Timestamp(places),
        1184 => Kind::TimestampTz(places),
        1186 if modifier == -1 => Kind::Interval,
        1700 if modifier < HEADER => Kind::Numeric(None),
        1700 => match numeric(modifier - HEADER) {
            Some(limits) => Kind::Numeric(Some(limits)),
            None => other(),
        },
        2950 => Kind::Uuid,
        3802 => Kind::Jsonb,
        _ => match types.get(&oid) {
            Some(of) if of.kind == "d" && depth < DEEPEST => {
                let modifier = if of.modifier == -1 { modifier } else { of.modifier };
                kind_of(types, of.base, modifier, depth + 1)
            }
            Some(of) if of.kind == "e" => Kind::Enum(of.labels.clone()),
            Some(of) if of.element != 0 => {
                let element = kind_of(types, of.element, modifier, depth + 1);
                if element.may_be_in_array() { Kind::Array(Box::new(element)) } else { other() }
            }
            Some(of) if of.name.rsplit('.').next() == Some("citext") => Kind::Text,
            _ => other(),
        },
    }
}

/// Precision and scale; a scale below none (PostgreSQL 15) is not imported into.
fn numeric(modifier: i32) -> Option<(u32, u32)> {
    let precision = u32::try_from(modifier >> 16 & 0xffff).ok()?;
    let scale = (modifier & 0x7ff ^ 0x400) - 0x400;
    Some((precision, u32::try_from(scale).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: &str, base: u32, modifier: i32, element: u32) -> Type {
        let labels = if kind == "e" { vec!["new".to_owned()] } else { vec![] };
        Type { name: format!("{kind}{base}"), kind: kind.into(), base, modifier, is_required: false, element, labels }
    }

    #[test]
    fn types_are_known_by_their_numbers_and_domains_by_what_is_under_them() {
        let mut types = BTreeMap::from([
            (90_001, of("d", 1043, 24, 0)),
            (90_002, of("d", 90_001, -1, 0)),
            (90_003, of("e", 0, -1, 0)),
            (90_004, of("b", 0, -1, 90_003)),
            (90_005, of("b", 0, -1, 3802)),
            (90_006, of("b", 0, -1, 0)),
            (90_007, of("d", 90_007, -1, 0)),
        ]);
        types.get_mut(&90_006).unwrap().name = "public.citext".into();
        let kind = |oid, modifier| kind_of(&types, oid, modifier, 0);
        assert_eq!((kind(1043, 14), kind(1043, -1), kind(1042, 5)), (Kind::Varchar(10), Kind::Text, Kind::Char(1)));
        assert_eq!((kind(90_001, -1), kind(90_002, -1)), (Kind::Varchar(20), Kind::Varchar(20)));
        assert_eq!(kind(90_004, -1), Kind::Array(Box::new(Kind::Enum(vec!["new".into()]))));
        assert_eq!(kind(90_005, -1), Kind::Other("b0".into()), "an array of jsonb is printed in more than one way");
        assert_eq!(kind(90_006, -1), Kind::Text);
        assert!(matches!(kind(90_007, -1), Kind::Other(_)), "a domain over itself ends");
        assert_eq!(
            (kind(1184, -1), kind(1184, 3), kind(1114, 0)),
            (Kind::TimestampTz(6), Kind::TimestampTz(3), Kind::Timestamp(0))
        );
        assert!(matches!(kind(1186, 0x7fff_0003), Kind::Other(_)));
    }

    #[test]
    fn limits_of_numeric() {
        assert_eq!(numeric(12 << 16 | 2), Some((12, 2)));
        assert_eq!(numeric(1000 << 16 | 1000), Some((1000, 1000)));
        assert_eq!(numeric(3 << 16 | 0x7fe), None, "numeric(3,-2)");
        let kind = |modifier| kind_of(&BTreeMap::new(), 1700, modifier, 0);
        assert_eq!((kind(-1), kind(4 + (5 << 16))), (Kind::Numeric(None), Kind::Numeric(Some((5, 0)))));
    }
}
