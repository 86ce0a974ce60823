//! What a database is besides what pg_dump holds: how its text is encoded and sorted, settings, rights, a comment.
//!
//! What always holds: it is noted before anything is fenced, told to PostgreSQL again where an archive is loaded, and
//! compared when the archive is proved; what cannot be told again is a reason to archive nothing.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Site, StepError, hand::Hand};
use crate::{
    catalog::model::Entry,
    sql::{self, Locale},
};

/// Of one database; also in the archive's row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// The role that had it: another one may have its place later.
    pub owner: String,
    pub locale: Locale,
    pub comment: Option<String>,
    pub settings: Vec<Setting>,
    pub rights: Vec<Right>,
    /// How many tables, functions, constraints... there were.
    pub things: Map<String, Value>,
}

/// ALTER DATABASE SET; with a role, ALTER ROLE IN DATABASE SET.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Setting {
    pub role: Option<String>,
    pub name: String,
    pub value: String,
}

/// A privilege on the database; to PUBLIC without a role.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Right {
    pub role: Option<String>,
    pub privilege: String,
    pub is_grantable: bool,
}

/// As they are now.
pub async fn note(site: &mut Site, server: &str, database: &str) -> Result<Facts, StepError> {
    let own = control_role(site, server)?;
    let client = site.control(server).await?;
    let row = client.query_opt(sql::DATABASE_FACTS, &[&database]).await?;
    let row = row.ok_or_else(|| StepError::Refused(format!("there is no database {database}")))?;
    if row.try_get::<_, bool>(4)? {
        return Err(StepError::Refused(format!("{database} has a security label, which an archive cannot keep")));
    }
    let mut settings = Vec::new();
    for row in client.query(sql::DATABASE_SETTINGS, &[&database]).await? {
        settings.push(setting(row.try_get(0)?, &row.try_get::<_, String>(1)?));
    }
    let mut rights = Vec::new();
    for row in client.query(sql::DATABASE_RIGHTS, &[&database]).await? {
        rights.push(Right { role: row.try_get(0)?, privilege: row.try_get(1)?, is_grantable: row.try_get(2)? });
    }
    rights.retain(|right| right.role.as_deref() != Some(&own));
    Ok(Facts {
        owner: row.try_get(2)?,
        locale: locale(&row.try_get(0)?, row.try_get(1)?),
        comment: row.try_get(3)?,
        settings,
        rights,
        things: Map::new(),
    })
}

fn control_role(site: &Site, server: &str) -> Result<String, StepError> {
    let settings = site.plane.file();
    Ok(site.plane.server_of(&settings, server)?.1.role.clone())
}

/// Of a row of pg_database, whose columns are not the same in all versions.
fn locale(row: &Value, encoding: String) -> Locale {
    let text = |name: &str| row[name].as_str().map(str::to_owned);
    Locale {
        encoding,
        collate: text("datcollate").unwrap_or_default(),
        ctype: text("datctype").unwrap_or_default(),
        provider: text("datlocprovider"),
        locale: text("datlocale").or_else(|| text("daticulocale")),
        icu_rules: text("daticurules"),
    }
}

/// `name=value`, as pg_db_role_setting has it.
fn setting(role: Option<String>, text: &str) -> Setting {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    Setting { role, name: name.to_owned(), value: value.to_owned() }
}

/// Whether a dump keeps everything that is in the database: looked at by a hand, before anybody is kept waiting.
pub async fn refuse_what_is_lost(site: &Site, hand: &Hand, database: &str) -> Result<(), StepError> {
    let client = hand.connect(site, database).await?;
    let Some(row) = client.query_opt(sql::OF_OTHERS, &[&hand.owner]).await? else { return Ok(()) };
    let (first, count): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
    Err(StepError::Refused(format!(
        "an archive keeps no owners but {}: {first} (of {count} such); hand it over with REASSIGN OWNED first",
        hand.owner
    )))
}

/// Statements that make a database so. Roles are called as then, but the owner as now.
fn statements(facts: &Facts, database: &str, owner: &str) -> Result<Vec<String>, StepError> {
    let now =
        |role: &Option<String>| role.clone().map(|role| if role == facts.owner { owner.to_owned() } else { role });
    let mut statements = Vec::new();
    for one in &facts.settings {
        statements.push(match now(&one.role) {
            Some(role) => sql::set_role_default(&role, Some(database), &one.name, &one.value),
            None => sql::set_database_default(database, &one.name, Some(&one.value)),
        });
    }
    if let Some(comment) = &facts.comment {
        statements.push(sql::comment_on_database(database, comment));
    }
    for right in &facts.rights {
        let role = now(&right.role);
        // The owner has them all.
        if role.as_deref() == Some(owner) {
            continue;
        }
        let privilege = privilege(&right.privilege)?;
        statements.push(sql::grant_on_database(database, privilege, role.as_deref(), right.is_grantable));
    }
    Ok(statements)
}

fn privilege(word: &str) -> Result<&'static str, StepError> {
    let known = ["CREATE", "CONNECT", "TEMPORARY"].into_iter().find(|known| *known == word);
    known.ok_or_else(|| StepError::Refused(format!("the privilege {word} on a database is not known here")))
}

/// Tells PostgreSQL; whole or not at all.
pub async fn apply(site: &mut Site, facts: &Facts, entry: &Entry, database: &str) -> Result<(), StepError> {
    let statements = statements(facts, database, &entry.owner_role)?;
    if statements.is_empty() {
        return Ok(());
    }
    site.execute(&entry.server, &statements.join("; ")).await.map_err(|error| match error {
        StepError::Refused(why) => {
            StepError::Refused(format!("a setting, right or comment of the database cannot be kept: {why}"))
        }
        away => away,
    })
}

/// What is different in a database that was made like another: nothing, if it has at least what was noted.
pub fn missing(wanted: &Facts, found: &Facts) -> Vec<String> {
    let mut missing = Vec::new();
    if wanted.locale != found.locale {
        missing.push("encoding or locale".to_owned());
    }
    if wanted.comment != found.comment {
        missing.push("comment".to_owned());
    }
    let settings = wanted.settings.iter().filter(|setting| !found.settings.contains(setting));
    missing.extend(settings.map(|setting| format!("setting {}", setting.name)));
    let is_kept = |right: &&Right| right.role.as_ref() == Some(&found.owner) || found.rights.contains(right);
    let rights = wanted.rights.iter().filter(|right| !is_kept(right));
    missing.extend(rights.map(|right| format!("{} of {}", right.privilege, right.role.as_deref().unwrap_or("PUBLIC"))));
    missing
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn facts() -> Facts {
        Facts {
            owner: "old".to_owned(),
            comment: Some("it's".to_owned()),
            settings: vec![setting(None, "search_path=app, public"), setting(Some("old".to_owned()), "work_mem=8MB")],
            rights: vec![
                Right { role: None, privilege: "CONNECT".to_owned(), is_grantable: false },
                Right { role: Some("old".to_owned()), privilege: "CREATE".to_owned(), is_grantable: false },
                Right { role: Some("reader".to_owned()), privilege: "CONNECT".to_owned(), is_grantable: true },
            ],
            ..Facts::default()
        }
    }

    #[test]
    fn what_was_noted_is_told_again_with_the_owner_of_now() {
        let told = statements(&facts(), "d", "new").unwrap();
        assert_eq!(
            told,
            [
                "ALTER DATABASE \"d\" SET \"search_path\" = 'app', 'public'",
                "ALTER ROLE \"new\" IN DATABASE \"d\" SET \"work_mem\" = '8MB'",
                "COMMENT ON DATABASE \"d\" IS 'it''s'",
                "GRANT CONNECT ON DATABASE \"d\" TO PUBLIC",
                "GRANT CONNECT ON DATABASE \"d\" TO \"reader\" WITH GRANT OPTION",
            ]
        );
        let odd = Right { role: None, privilege: "ALL; DROP".to_owned(), is_grantable: false };
        assert!(statements(&Facts { rights: vec![odd], ..Facts::default() }, "d", "new").is_err());
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing(&facts(), &facts()), Vec::<String>::new());
        let bare = Facts { owner: "old".to_owned(), ..Facts::default() };
        let wrong = ["comment", "setting search_path", "setting work_mem", "CONNECT of PUBLIC", "CONNECT of reader"];
        assert_eq!(missing(&facts(), &bare), wrong);
    }

    #[test]
    fn the_locale_is_read_from_rows_of_all_versions() {
        let row = json!({ "datcollate": "C", "datctype": "C.UTF-8", "datlocprovider": "i", "daticulocale": "de" });
        let of_16 = locale(&row, "UTF8".to_owned());
        let row = json!({ "datcollate": "C", "datctype": "C.UTF-8", "datlocprovider": "i", "datlocale": "de" });
        assert_eq!(locale(&row, "UTF8".to_owned()), of_16);
        assert_eq!(of_16.locale.as_deref(), Some("de"));
        assert_eq!(locale(&json!({ "datcollate": "C" }), "UTF8".to_owned()).provider, None);
    }
}
