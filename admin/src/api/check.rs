//! Whether what was asked for can be: names, budgets, extensions, settings. Pure.

use std::collections::BTreeMap;

use tenantry_config::{Floors, Settings, TenantId};

use super::problem::{Answer, Problem};
use crate::catalog::model::{Entry, Known, Spec};

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

/// A spec on a server; `of`: the tenant that has it now; `slots`: the connections that PostgreSQL has there for roles that
/// are not privileged, if it was asked.
pub fn spec(
    spec: &Spec,
    server: &str,
    file: &Settings,
    known: &Known,
    of: Option<i64>,
    slots: Option<u32>,
) -> Answer<()> {
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
    let now = known.tenants.iter().find(|entry| Some(entry.number) == of);
    floors(spec, server, file, known, now, slots)?;
    pools(spec, file, now)?;
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

/// What is promised must fit what the server may hold, besides the others' floors. What was promised before, and is not
/// raised, stands: it must be possible to lower a floor that has come not to fit, and to change something else.
pub fn floors(
    spec: &Spec,
    server: &str,
    file: &Settings,
    known: &Known,
    now: Option<&Entry>,
    slots: Option<u32>,
) -> Answer<()> {
    let is_kept = |now: &Entry| now.server == server && spec.floor <= now.spec.floor;
    if spec.floor == 0 || now.is_some_and(is_kept) {
        return Ok(());
    }
    let (mut others, _) = known.merge(file);
    if let Some(now) = now {
        others.tenants.retain(|_, tenant| tenant.standing.number != Some(now.number));
    }
    let others = Floors::of(&others, server, slots);
    match others.cap {
        Some(cap) if others.sum + u64::from(spec.floor) > u64::from(cap) => Err(Problem::invalid(format!(
            "floor: {} and the floors of the other tenants, {}, are more than the server's cap of {cap}; lower one of them",
            spec.floor, others.sum
        ))),
        _ => Ok(()),
    }
}

/// A floor that the pools of the tenant's roles can never use is none.
fn pools(spec: &Spec, file: &Settings, now: Option<&Entry>) -> Answer<()> {
    if now.is_some_and(|now| (now.spec.floor, now.spec.pool_size) == (spec.floor, spec.pool_size)) {
        return Ok(());
    }
    let size = spec.pool_size.unwrap_or(file.pool.pool_size);
    let own = now.map_or(1, |now| u32::try_from(now.roles.len()).unwrap_or(u32::MAX).max(1));
    let shared = file.roles.iter().map(|role| role.pool_size.unwrap_or(size));
    let most = shared.fold(size.saturating_mul(own), u32::saturating_add);
    if spec.floor > most {
        return Err(Problem::invalid(format!(
            "floor: {} is more than the {most} connections that the pools of its roles can have; lower it or raise pool_size",
            spec.floor
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
    use tenantry_config::OrAuto;

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

    fn file(cap: OrAuto<std::num::NonZeroU32>) -> Settings {
        let mut file = Settings::default();
        file.servers.insert("main".into(), tenantry_config::Server { cap, ..Default::default() });
        file
    }

    fn entry(number: i64, floor: u32) -> Entry {
        Entry {
            number,
            name: format!("t{number}"),
            state: tenantry_config::TenantState::Active,
            held: false,
            server: "main".into(),
            database: format!("t{number}"),
            owner_role: "app".into(),
            aliases: Vec::new(),
            version: 1,
            spec: Spec { floor, ..Spec::default() },
            roles: Vec::new(),
            plans: 0,
            kept: None,
            created_at: time::OffsetDateTime::UNIX_EPOCH,
            updated_at: time::OffsetDateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn an_auto_cap_counts_as_soon_as_it_is_known() {
        let file = file(OrAuto::Auto);
        let known = Known { tenants: vec![entry(1, 8), entry(2, 4)], ..Known::default() };
        let wanted = |floor, of, slots| spec(&Spec { floor, ..Spec::default() }, "main", &file, &known, of, slots);
        assert!(wanted(15, None, None).is_ok(), "nobody knows");
        // 25 without the reserve of 10.
        assert!(wanted(3, None, Some(25)).is_ok());
        let refused = wanted(4, None, Some(25)).unwrap_err().detail;
        assert!(refused.contains("4 and the floors of the other tenants, 12, are more than"), "{refused}");
        assert!(wanted(7, Some(2), Some(25)).is_ok(), "its own does not count twice");
        assert!(wanted(8, Some(2), Some(25)).is_err());
        // The server has become smaller.
        assert!(wanted(3, Some(2), Some(15)).is_ok(), "less than before is never refused");
        assert!(wanted(4, Some(2), Some(15)).is_ok(), "nor is what stays");
        assert!(wanted(5, Some(2), Some(15)).is_err());
    }

    #[test]
    fn a_floor_that_no_pool_can_use_is_refused() {
        let file = file(OrAuto::Auto);
        let of = |floor, pool_size| Spec { floor, pool_size, ..Spec::default() };
        let known = Known { tenants: vec![Entry { spec: of(9, Some(5)), ..entry(1, 0) }], ..Known::default() };
        let check = |wanted, of| spec(&wanted, "main", &file, &known, of, None);
        assert!(check(of(20, None), None).is_ok());
        assert!(check(of(21, None), None).unwrap_err().detail.contains("more than the 20 connections"));
        assert!(check(of(6, Some(5)), None).is_err());
        assert!(check(of(9, Some(5)), Some(1)).is_ok(), "it was taken before");
        assert!(check(of(8, Some(5)), Some(1)).is_err());
    }

    #[test]
    fn impossible_budgets_are_refused_with_the_sums() {
        let mut file = file(OrAuto::Is(std::num::NonZeroU32::new(10).unwrap()));
        let tenant = tenantry_config::Tenant { server: "main".into(), floor: 7, ..Default::default() };
        file.tenants.insert(TenantId::parse("a").unwrap(), tenant);
        let known = Known::default();
        let wanted = |floor| spec(&Spec { floor, ..Spec::default() }, "main", &file, &known, None, None);
        assert!(wanted(3).is_ok());
        assert!(wanted(4).unwrap_err().detail.contains("4 and the floors of the other tenants, 7, are more than"));
    }
}
