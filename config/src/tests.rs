//! The loader as its callers see it. No sleeps, no global environment: files live in a directory of each test.

use std::{fs, num::NonZeroU32, path::PathBuf, time::Duration};

use super::*;

/// The least that can be served.
const MINIMUM: &str = "[servers.main]\nhost = \"127.0.0.1\"\n[tenants.acme]\n";

struct Fixture {
    dir: tempfile::TempDir,
    file: PathBuf,
}

fn file(text: &str) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tenantry.toml");
    fs::write(&file, text).unwrap();
    Fixture { dir, file }
}

fn try_load(text: &str, overrides: &Overrides) -> Result<Settings, String> {
    let fixture = file(text);
    load(Some(&fixture.file), overrides).map_err(|problems| {
        // Without the directory, whose name differs from run to run.
        problems.to_string().replace(&format!("{}/", fixture.dir.path().display()), "")
    })
}

fn loaded(text: &str) -> Settings {
    try_load(text, &Overrides::default()).unwrap()
}

fn problems(text: &str) -> String {
    try_load(text, &Overrides::default()).unwrap_err()
}

/// `text` must give exactly one problem, which starts with `start` and contains `part`.
#[track_caller]
fn one_problem(text: &str, start: &str, part: &str) {
    let told = problems(text);
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.starts_with(start) && told.contains(part), "{told}");
}

fn cap(n: u32) -> OrAuto<NonZeroU32> {
    OrAuto::Is(NonZeroU32::new(n).unwrap())
}

fn id(name: &str) -> TenantId {
    TenantId::parse(name).unwrap()
}

#[test]
fn the_readme_example_loads() {
    let readme = include_str!("../README.md");
    let example = readme.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let secret = file("hunter2\n");
    let example = example.replace("/run/secrets/acme_app", &secret.file.display().to_string());
    let env = Overrides::default().environment([("GLOBEX_PASSWORD", "hunter3")]);
    let settings = try_load(&example, &env).unwrap();
    assert_eq!(settings.tenants.len(), 3);
    assert!(settings.tenants.values().all(|tenant| tenant.server == "main"));
    let acme = &settings.tenants["acme"];
    assert_eq!((acme.pool.pool_size, acme.pool.query_wait_timeout), (20, Duration::from_secs(30)));
    assert_eq!(acme.roles[0].secret, RoleSecret::Plain("hunter2".into()));
    assert_eq!(settings.tenants["globex"].roles[0].secret, RoleSecret::Plain("hunter3".into()));
    assert_eq!(settings.tenants["initech"].pool.pool_mode, PoolMode::Session);
    assert!(matches!(settings.roles[0].secret, RoleSecret::Scram(_)));
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let text = format!("[pool]\npool_size = 1\nmax_waiters = 1\nmax_pinned = 1\n{MINIMUM}");
    let overrides = Overrides::default()
        .environment([("TENANTRY__POOL__MAX_WAITERS", "2"), ("tenantry__pool__max_pinned", "2"), ("OTHER", "x")])
        .environment([("TENANTRY__SERVERS__MAIN__CAP", "10"), ("TENANTRY__POOL__QUERY_WAIT_TIMEOUT", "5s")])
        .flag("pool.max_pinned", "9")
        .flag("pool.max_pinned", "3");
    let settings = try_load(&text, &overrides).unwrap();
    let pool = &settings.tenants["acme"].pool;
    assert_eq!((pool.pool_size, pool.max_waiters, pool.max_pinned), (1, 2, 3));
    assert_eq!((pool.query_wait_timeout, settings.servers["main"].cap), (Duration::from_secs(5), cap(10)));
    assert_eq!(pool.server_lifetime, Pool::default().server_lifetime);
}

#[test]
fn a_file_is_not_needed() {
    let overrides = Overrides::default()
        .environment([("TENANTRY__SERVERS__MAIN__HOST", "db"), ("TENANTRY__LISTEN__ADDRESSES", "0.0.0.0:1,[::]:1")])
        .flag("tenants.\"*\".server", "main");
    let settings = load(None, &overrides).unwrap();
    assert_eq!(settings.listen.addresses.len(), 2);
    assert_eq!(settings.any_tenant.unwrap().server, "main");
    assert_eq!(load(None, &Overrides::default()).unwrap_err().as_slice().len(), 2);
}

#[test]
fn a_tenants_own_keys_win_over_pool_from_any_layer() {
    let env = Overrides::default().environment([("TENANTRY__POOL__POOL_SIZE", "7")]);
    let settings = try_load(&format!("{MINIMUM}pool_size = 3\n[tenants.globex]\n"), &env).unwrap();
    assert_eq!(settings.tenants[&id("acme")].pool.pool_size, 3);
    assert_eq!(settings.tenants[&id("globex")].pool.pool_size, 7);
}

#[test]
fn human_values_are_read() {
    let settings = loaded(&format!(
        "[listen]\nunix_socket_mode = \"0770\"\nmax_message_size = \"1MiB\"\n[admin]\naddress = \"\"\n\
         [pool]\nquery_timeout = \"1h 30m\"\ntransaction_timeout = \"off\"\nserver_check_delay = \"500ms\"\n{MINIMUM}"
    ));
    assert_eq!((settings.listen.unix_socket_mode, settings.listen.max_message_size), (0o770, 1 << 20));
    assert_eq!(settings.admin.address, None);
    assert_eq!(settings.pool.query_timeout, Some(Duration::from_secs(90 * 60)));
    assert_eq!(settings.pool.transaction_timeout, None);
    assert_eq!(settings.pool.server_check_delay, Duration::from_millis(500));
}

#[test]
fn floors_that_cannot_all_be_kept_are_refused_with_their_sum() {
    let text = "[servers.main]\nhost = \"127.0.0.1\"\ncap = 9\n\
                [tenants.a]\nfloor = 6\n[tenants.b]\nfloor = 4\nceiling = 8\nweight = 3\n[tenants.c]\n";
    one_problem(
        text,
        "tenantry.toml:3: servers.main.cap: 9 is less than the 10 of all floors ",
        "tenants.a: 6, tenants.b: 4",
    );
    let settings = loaded(&text.replace("cap = 9", "cap = 10"));
    assert_eq!((settings.tenants["b"].ceiling, settings.tenants["b"].weight.get()), (Some(8), 3));
    // What an auto cap is, only the server can tell.
    assert_eq!(loaded(&text.replace("cap = 9", "cap = \"auto\"")).servers["main"].cap, OrAuto::Auto);
}

#[test]
fn budgets_that_make_no_sense_are_refused() {
    for (keys, part) in [
        ("floor = 5\nceiling = 4", "5 is more than ceiling 4"),
        ("ceiling = 0", "at least 1"),
        ("weight = 0", "at least 1"),
        ("weight = 1001", "write 1 to 1000"),
    ] {
        one_problem(&format!("{MINIMUM}{keys}\n"), "tenantry.toml:", part);
    }
    let any = "[servers.main]\nhost = \"127.0.0.1\"\n[tenants.\"*\"]\nfloor = 1\n";
    one_problem(any, "tenantry.toml:4: tenants.\"*\".floor: ", "a section of their own");
}

#[test]
fn a_floor_that_no_pool_can_use_and_a_ceiling_below_the_warm_connections_are_refused() {
    let roles = "[[roles]]\nname = \"own\"\npool_size = 4\n[[roles]]\nname = \"all\"\n";
    let text = |keys: &str| {
        format!(
            "[auth]\nauth_type = \"trust\"\n[servers.main]\nhost = \"::1\"\n[tenants.a]\npool_size = 3\n{keys}\n\
             [[tenants.a.roles]]\nname = \"own\"\n{roles}"
        )
    };
    // Its own role hides the shared one of the same name: 3 and 3.
    one_problem(&text("floor = 7"), "tenantry.toml:7: tenants.a.floor: ", "more than the 6 connections");
    assert_eq!(loaded(&text("floor = 6")).tenants["a"].floor, 6);
    let warm = "min_pool_size = 2\nceiling = ";
    one_problem(&text(&format!("{warm}3")), "tenantry.toml:8: tenants.a.ceiling: ", "less than the 4 connections");
    assert_eq!(loaded(&text(&format!("{warm}4"))).tenants["a"].ceiling, Some(4));
}

#[test]
fn workers_are_a_number_or_auto() {
    assert_eq!(loaded(MINIMUM).process.workers, OrAuto::Auto);
    assert_eq!(loaded(&format!("[process]\nworkers = \"auto\"\n{MINIMUM}")).process.workers, OrAuto::Auto);
    let three = loaded(&format!("[process]\nworkers = 3\n{MINIMUM}")).process.workers;
    assert_eq!(three, OrAuto::Is(NonZeroU32::MIN.saturating_add(2)));
    one_problem(&format!("[process]\nworkers = 0\n{MINIMUM}"), "tenantry.toml:2: ", "at least 1, or \"auto\"");
    one_problem(&format!("[process]\nworkers = 5000\n{MINIMUM}"), "tenantry.toml:2: ", "at most 1024");
}

#[test]
fn a_control_login_needs_a_role_and_the_password_itself() {
    let control = |keys: &str| format!("[servers.a]\nhost = \"::1\"\n[servers.a.control]\n{keys}\n[tenants.acme]\n");
    let settings = loaded(&control("role = \"tenantry\"\npassword = \"x\"\nconnection_limits = true"));
    let login = settings.servers["a"].control.as_ref().unwrap();
    assert_eq!((login.role.as_str(), login.database.as_str(), login.connection_limits), ("tenantry", "postgres", true));
    one_problem(&control(""), "tenantry.toml:3: servers.a.control.role: ", "must be 1 to 63 bytes");
    let md5 = format!("role = \"t\"\npassword = \"md5{}\"", "0".repeat(32));
    one_problem(&control(&md5), "tenantry.toml:5: servers.a.control.password: ", "the password itself");
}

#[test]
fn tls_to_the_server_is_off_only_where_it_is_local() {
    for (host, mode) in [
        ("/run/postgresql", ServerTlsMode::Disable),
        ("localhost", ServerTlsMode::Disable),
        ("127.8.9.1", ServerTlsMode::Disable),
        ("::1", ServerTlsMode::Disable),
        ("::ffff:127.0.0.1", ServerTlsMode::Disable),
        ("10.0.0.1", ServerTlsMode::VerifyFull),
        ("localhost.example.com", ServerTlsMode::VerifyFull),
        ("127.0.0.1.example.com", ServerTlsMode::VerifyFull),
    ] {
        let settings = loaded(&format!("[servers.main]\nhost = \"{host}\"\n[tenants.acme]\n"));
        assert_eq!(settings.servers["main"].tls.mode, mode, "{host}");
    }
    let written = loaded("[servers.main]\nhost = \"::1\"\ntls.mode = \"require\"\n[tenants.acme]\n");
    assert_eq!(written.servers["main"].tls.mode, ServerTlsMode::Require);
}

#[test]
fn all_problems_are_told_at_once_with_their_lines() {
    let text = "\
[pool]
pool_sise = 5
query_wait_timeout = 30
pool_mode = \"transactional\"

[servers.main]
host = \"db\"
cap = 0

[tenants.postgres]
[tenants.acme]
server = \"mian\"
[[tenants.acme.roles]]
name = \"a\"
password = \"x\"
[[tenants.acme.roles]]
name = \"a\"
password = 5
[lisen]
";
    let env = Overrides::default().environment([("TENANTRY__POOL__MAX_PINNED", "many")]).flag("log.level", "info");
    let told = try_load(text, &env).unwrap_err();
    let wanted = [
        "tenantry.toml:2: pool.pool_sise: unknown key; did you mean \"pool_size\"?",
        "tenantry.toml:3: pool.query_wait_timeout: 30 has no unit; write e.g. \"30s\" or \"30ms\"",
        "tenantry.toml:4: pool.pool_mode: \"transactional\" is not a word for this; \
         write one of transaction, session, statement",
        "tenantry.toml:8: servers.main.cap: must be at least 1, or \"auto\"",
        "tenantry.toml:10: tenants.postgres: cannot be a tenant: the name is reserved \
         (postgres, template0, template1, rdsadmin, pgbouncer, tenantry); choose another",
        "tenantry.toml:12: tenants.acme.server: there is no server \"mian\"; did you mean \"main\"?",
        "tenantry.toml:17: tenants.acme.roles[1].name: \"a\" is there twice; remove one",
        "tenantry.toml:18: tenants.acme.roles[1].password: must be a string in quotes",
        "tenantry.toml:19: lisen: unknown key; did you mean \"listen\"?",
        "--set log.level: log.level: unknown key; known here: filter, format",
        "TENANTRY__POOL__MAX_PINNED: pool.max_pinned: must be a whole number from 0 to 4294967295",
    ];
    assert_eq!(told, wanted.join("\n"));
}

#[test]
fn hostile_tenant_names_are_refused() {
    let long = "a".repeat(64);
    for name in ["a\\\"b", "a;b", "a\\u0000", "..", long.as_str(), "\u{430}cme", "postgres", "Acme", "a\\nb", "", "a.b"]
    {
        let text = format!("[servers.main]\nhost = \"::1\"\n[tenants.\"{name}\"]\npool_size = 1\n");
        one_problem(&text, "tenantry.toml:3: tenants.", "cannot be a tenant");
    }
}

#[test]
fn values_that_cannot_be_meant_are_refused() {
    for (line, part) in [
        ("query_wait_timeout = \"30\"", "has no unit"),
        ("query_wait_timeout = \"0s\"", "longer than 0"),
        ("query_wait_timeout = \"off\"", "cannot be off"),
        ("query_timeout = \"0s\"", "longer than 0"),
        ("query_timeout = \"2years\"", "too long"),
        ("query_timeout = \"soon\"", "is not a time"),
        ("query_timeout = \"99999999999999999999y\"", "is not a time"),
        ("pool_size = -1", "whole number"),
        ("pool_size = 4294967296", "whole number"),
        ("pool_size = 99999999999999999999", "whole number"),
        ("pool_size = 1.5", "whole number"),
        ("pool_size = 1979-05-27", "whole number"),
        ("pool_size = 0", "at least 1"),
        ("min_pool_size = 21", "min_pool_size 21 is more than pool_size 20"),
        ("server_round_robin = 1", "true or false"),
    ] {
        one_problem(&format!("[pool]\n{line}\n{MINIMUM}"), "tenantry.toml:2: pool.", part);
    }
    for (line, part) in [
        ("max_message_size = 16", "must be a size"),
        ("max_message_size = \"16\"", "has no unit"),
        ("max_message_size = \"0MiB\"", "out of range"),
        ("unix_socket_mode = \"0999\"", "file mode"),
        ("unix_socket_mode = 511", "in octal"),
        ("addresses = [\"localhost:1\"]", "is not an address"),
        ("addresses = []", "at least one address"),
        ("addresses = [\"[::1]:5\", \"[::1]:5\"]", "listed twice"),
        ("tls.cert_file = \"/c\"", "needs listen.tls.key_file"),
        ("tls.key_file = \"/c\"", "needs listen.tls.cert_file"),
        ("tls = \"require\"", "must be a section"),
        ("max_client_conn = 0", "at least 1"),
    ] {
        one_problem(&format!("[listen]\n{line}\n{MINIMUM}"), "tenantry.toml:2: listen.", part);
    }
}

#[test]
fn settings_that_do_not_fit_together_are_refused() {
    let auth = format!("[auth]\nauth_type = \"password\"\n[listen.tls]\nmode = \"disable\"\n{MINIMUM}");
    one_problem(&auth, "tenantry.toml:2: auth.auth_type: ", "in the clear");
    let admin = format!("[admin]\naddress = \"127.0.0.1:6432\"\n{MINIMUM}");
    one_problem(&admin, "tenantry.toml:2: admin.address: ", "also in listen.addresses");
    let two = "[servers.a]\nhost=\"a\"\n[servers.b]\nhost=\"b\"\n[tenants.acme]\n";
    one_problem(two, "tenantry.toml:5: tenants.acme.server: ", "write one of a, b");
    one_problem("[tenants.acme]\n", "tenantry.toml: servers: ", "no server");
    one_problem("[servers.a]\nhost=\"a\"\n", "tenantry.toml: tenants: ", "no tenant");
    one_problem("[servers.a]\n[tenants.acme]\n", "tenantry.toml:1: servers.a.host: ", "is missing");
    let direct = "[servers.a]\nhost=\"::1\"\ntls.direct = true\n[tenants.acme]\n";
    one_problem(direct, "tenantry.toml:3: servers.a.tls.direct: ", "needs TLS");
    one_problem("[servers.A]\nhost=\"::1\"\n[tenants.acme]\n", "tenantry.toml:1: servers.A: ", "other than");
}

#[test]
fn warm_connections_must_fit_the_cap() {
    let text = "\
[auth]
auth_type = \"trust\"
[servers.main]
host = \"::1\"
cap = 9
[tenants.a]
min_pool_size = 3
[[tenants.a.roles]]
name = \"own\"
[tenants.b]
min_pool_size = 4
[[roles]]
name = \"own\"
[[roles]]
name = \"all\"
";
    one_problem(text, "tenantry.toml:5: servers.main.cap: 9 is less than the 14 ", "tenants.b: 8, tenants.a: 6");
    assert_eq!(loaded(&text.replace("cap = 9", "cap = 14")).servers["main"].cap, cap(14));
}

#[test]
fn a_stored_secret_must_suit_the_auth_type() {
    const KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let md5 = format!("password = \"md5{}\"", "0123456789abcdef".repeat(2));
    let scram = format!("password = \"SCRAM-SHA-256$4096:c2FsdA==${KEY}:{KEY}\"");
    let plain = "password = \"x\"".to_owned();
    for (auth_type, secret, part) in [
        ("scram-sha-256", &plain, ""),
        ("scram-sha-256", &scram, ""),
        ("scram-sha-256", &md5, "md5 hash cannot serve"),
        ("md5", &plain, ""),
        ("md5", &md5, ""),
        ("md5", &scram, "verifier cannot serve"),
        ("password", &md5, ""),
        ("password", &scram, ""),
        ("trust", &md5, ""),
        ("trust", &String::new(), ""),
        ("scram-sha-256", &String::new(), "has no secret"),
    ] {
        let text =
            format!("[auth]\nauth_type = \"{auth_type}\"\n{MINIMUM}[[tenants.acme.roles]]\nname = \"a\"\n{secret}\n");
        match try_load(&text, &Overrides::default()) {
            Ok(_) => assert_eq!(part, "", "{auth_type} {secret}"),
            Err(told) => assert!(!part.is_empty() && told.contains(part), "{auth_type} {secret}: {told}"),
        }
    }
}

#[test]
fn secrets_are_never_shown() {
    for lines in [
        "password = \"hunter2\"\npassword_env = \"P\"",
        "password = hunter2",
        "password = \"hunter2",
        "pasword = \"hunter2\"\npassword = \"x\"",
        "password = [\"hunter2\"]",
        "password = \"SCRAM-SHA-256$hunter2\"",
        "password = \"hunter2\\u0000\"",
        "password_env = \"BAD\"",
        "password_env = \"hunter2\"",
        "password_file = \"hunter2\"",
    ] {
        let text = format!("{MINIMUM}[[tenants.acme.roles]]\nname = \"a\"\n{lines}\n");
        let overrides = Overrides::default().environment([("P", "x"), ("BAD", "SCRAM-SHA-256$hunter2")]);
        let told = try_load(&text, &overrides).unwrap_err();
        assert!(told.contains("tenantry.toml:") && !told.contains("hunter2"), "{told}");
        assert!(!format!("{overrides:?}").contains("hunter2"));
    }
    let text = format!("{MINIMUM}[[tenants.acme.roles]]\nname = \"a\"\npassword = \"hunter2\"\n");
    assert!(!format!("{:?}", loaded(&text)).contains("hunter2"));
}

#[test]
fn a_secret_has_one_source_that_can_be_read() {
    let role = |line: &str| format!("{MINIMUM}[[tenants.acme.roles]]\nname = \"a\"\n{line}\n");
    let start = "tenantry.toml:6: tenants.acme.roles[0].password";
    one_problem(&role("password_env = \"NOPE\""), start, "it names is not set");
    one_problem(&role("password_file = \"/nonexistent/x\""), start, "cannot be read");
    one_problem(&role("password = \"\""), start, "is empty");
    one_problem(&role("password_env = \"\""), start, "is empty");
    one_problem(&role("password_file = \"/dev/zero\""), start, "larger than");
}

#[test]
fn a_file_that_is_no_toml_is_told_with_its_lines() {
    let told = problems("[pool\npool_size = = 1\n");
    assert!(told.starts_with("tenantry.toml:1: is not TOML") && told.contains("tenantry.toml:2"), "{told}");
    let missing = load(Some("/nonexistent/tenantry.toml".as_ref()), &Overrides::default()).unwrap_err();
    assert!(missing.to_string().starts_with("/nonexistent/tenantry.toml: cannot be read"));
}

#[test]
fn variables_that_collide_are_told() {
    let overrides = Overrides::default().environment([("TENANTRY__POOL", "1"), ("TENANTRY__POOL__POOL_SIZE", "1")]);
    let told = try_load(MINIMUM, &overrides).unwrap_err();
    assert!(told.contains("TENANTRY__POOL__POOL_SIZE: pool.pool_size: another variable"), "{told}");
    let folded = Overrides::default().environment([("TENANTRY__LOG__FILTER", "a"), ("tenantry__log__filter", "b")]);
    assert!(try_load(MINIMUM, &folded).unwrap_err().contains("tenantry__log__filter: log.filter: another variable"));
}
