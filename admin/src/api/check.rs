//! Whether what was asked for can be: names, budgets, extensions, settings. Pure.

use std::collections::BTreeMap;

use tenantry_config::{OrAuto, Settings, TenantId};

use super::problem::{Answer, Problem};
use crate::catalog::model::{Known, Spec};

/// Leaves room for what PostgreSQL appends to names, under its 63 bytes.
const MAX_NAME: usize = 48;
const MAX_TEXT: usize = 200;

/// What a new database gets unless the request says otherwise.
pub const DEFAULTS: [(&str, &str); 3] =
    [("statement_timeout", "60s"), ("idle_in_transaction_session_timeout", "60s"), ("lock_timeout", "10s")];

/// Settings of a database that a tenant's maker may choose; none of them opens a door or costs others.
const SETTINGS: [&str; 12] = [
    "statement_timeout",
    "idle_in_transaction_session_timeout",
    "lock_timeout",
    "timezone",
    "datestyle",
    "intervalstyle",
    "default_text_search_config",
    "search_path",
    "work_mem",
    "lc_messages",
    "jit",
    "random_page_cost",
];

/// What a role that is made may be called.
pub fn role_name(name: &str) -> Answer<()> {
    let is_shaped = name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_'));
    if is_shaped && !name.starts_with("pg_") && !name.starts_with("rds") {
        return Ok(());
    }
    Err(Problem::invalid(format!(
        "role: must be 1 to {MAX_NAME} of a-z, 0-9 and _, start with a letter, and not with pg_ or rds"
    )))
}

/// A name that a new tenant, or a renamed one, may have; `of`: the tenant that is renamed.
pub fn new_name(name: &str, file: &Settings, known: &Known, of: Option<i64>) -> Answer<()> {
    let is_shaped = name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_'));
    if !is_shaped {
        return Err(Problem::invalid(format!(
            "name: must be 1 to {MAX_NAME} of a-z, 0-9 and _, and start with a letter"
        )));
    }
    TenantId::parse(name).map_err(|error| Problem::invalid(format!("name: {error}")))?;
    if name.starts_with("pg_") || name.starts_with("rds") {
        return Err(Problem::invalid("name: pg_ and rds are PostgreSQL's and Amazon's; choose another"));
    }
    let in_file =
        file.tenants.iter().any(|(id, t)| id.as_str() == name || t.aliases.iter().any(|a| a.as_str() == name));
    let others = || known.tenants.iter().filter(|entry| Some(entry.number) != of);
    if in_file || others().any(|entry| entry.name == name) {
        return Err(Problem::exists(format!("there is a tenant {name} already")));
    }
    if let Some(entry) = others().find(|entry| entry.aliases.iter().any(|alias| alias == name)) {
        return Err(Problem::exists(format!("{name} was the name of {}, and still leads there", entry.name)));
    }
    Ok(())
}

/// The server that is meant.
pub fn server(wanted: Option<&str>, file: &Settings) -> Answer<String> {
    let able: Vec<_> =
        file.servers.iter().filter(|(_, server)| server.control.is_some()).map(|(name, _)| name).collect();
    match (wanted, &able[..]) {
        (Some(name), _) if able.iter().any(|able| *able == name) => Ok(name.to_owned()),
        (Some(_), _) => Err(Problem::invalid("server: none of that name, with a control login, is in the settings")),
        (None, [only]) => Ok((*only).clone()),
        (None, _) => Err(Problem::invalid("server: there are several; name one")),
    }
}

/// A spec on a server; `of`: the tenant that has it now.
pub fn spec(spec: &Spec, server: &str, file: &Settings, known: &Known, of: Option<i64>) -> Answer<()> {
    for (key, text) in [("application", &spec.application), ("owner", &spec.owner), ("stage", &spec.stage)] {
        if text.as_ref().is_some_and(|text| text.len() > MAX_TEXT || text.contains(char::is_control)) {
            return Err(Problem::invalid(format!("{key}: at most {MAX_TEXT} bytes, and no control characters")));
        }
    }
    let format = time::macros::format_description!("[year]-[month]-[day]");
    if let Some(date) = &spec.deployed
        && (date.len() != 10 || time::Date::parse(date, format).is_err())
    {
        return Err(Problem::invalid("deployed: must be a date, YYYY-MM-DD"));
    }
    for (key, number) in
        [("ceiling", spec.ceiling), ("pool_size", spec.pool_size), ("max_client_conn", spec.max_client_conn)]
    {
        if number == Some(0) {
            return Err(Problem::invalid(format!("{key}: must be at least 1, or null")));
        }
    }
    if spec.weight.is_some_and(|weight| !(1..=1000).contains(&weight)) {
        return Err(Problem::invalid("weight: must be 1 to 1000"));
    }
    if spec.ceiling.is_some_and(|ceiling| ceiling < spec.floor) {
        return Err(Problem::invalid("ceiling: must be at least the floor"));
    }
    floors(spec.floor, server, file, known, of)?;
    let allowed: Vec<_> = file.admin.extensions.split(',').map(str::trim).collect();
    if let Some(wrong) = spec.extensions.iter().find(|wanted| !allowed.contains(&wanted.as_str())) {
        let wrong: String = wrong.chars().filter(|c| !c.is_control()).take(63).collect();
        return Err(Problem::invalid(format!(
            "extensions: {wrong:?} is not in admin.extensions ({})",
            allowed.join(", ")
        )));
    }
    settings(&spec.settings)
}

/// The floors of a server's tenants must fit its cap; with `auto` only the server knows, and scales them.
fn floors(floor: u32, server: &str, file: &Settings, known: &Known, of: Option<i64>) -> Answer<()> {
    let Some(OrAuto::Is(cap)) = file.servers.get(server).map(|server| server.cap) else { return Ok(()) };
    let in_file = file.tenants.values().filter(|tenant| tenant.server == server).map(|tenant| u64::from(tenant.floor));
    let in_catalog = known.tenants.iter().filter(|entry| entry.server == server && Some(entry.number) != of);
    let others: u64 = in_file.chain(in_catalog.map(|entry| u64::from(entry.spec.floor))).sum();
    if others + u64::from(floor) > u64::from(cap.get()) {
        return Err(Problem::invalid(format!(
            "floor: {floor} and the floors of the other tenants, {others}, are more than the server's cap of {cap}; lower one of them"
        )));
    }
    Ok(())
}

fn settings(settings: &BTreeMap<String, String>) -> Answer<()> {
    for (name, value) in settings {
        if !SETTINGS.contains(&name.as_str()) {
            return Err(Problem::invalid(format!(
                "settings: one that may not be set here; these may: {}",
                SETTINGS.join(", ")
            )));
        }
        if value.len() > MAX_TEXT || value.contains(char::is_control) {
            return Err(Problem::invalid(format!(
                "settings: {name}: at most {MAX_TEXT} bytes, and no control characters"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_refused_as_invalid() {
        let (file, known) = (Settings::default(), Known::default());
        let long = "a".repeat(49);
        for name in [
            "",
            "A",
            "a-b",
            "_a",
            "1a",
            "a b",
            "a\"b",
            "a'b",
            "a;drop",
            "a\0",
            "..",
            "a/b",
            "../../etc/passwd",
            &long,
            "\u{430}cme",
            "acme\u{200b}",
            "postgres",
            "template1",
            "rdsadmin",
            "rdsx",
            "pg_x",
            "pgbouncer",
            "tenantry",
        ] {
            let problem = new_name(name, &file, &known, None).unwrap_err();
            assert_eq!(problem.status.as_u16(), 422, "{name:?}");
        }
        assert!(new_name(&"a".repeat(48), &file, &known, None).is_ok());
    }

    #[test]
    fn impossible_budgets_are_refused_with_the_sums() {
        let mut file = Settings::default();
        let cap = OrAuto::Is(std::num::NonZeroU32::new(10).unwrap());
        file.servers.insert("main".into(), tenantry_config::Server { cap, ..Default::default() });
        let tenant = tenantry_config::Tenant { server: "main".into(), floor: 7, ..Default::default() };
        file.tenants.insert(TenantId::parse("a").unwrap(), tenant);
        let known = Known::default();
        let wanted = |floor| spec(&Spec { floor, ..Spec::default() }, "main", &file, &known, None);
        assert!(wanted(3).is_ok());
        assert!(wanted(4).unwrap_err().detail.contains("4 and the floors of the other tenants, 7, are more than"));
    }
}
