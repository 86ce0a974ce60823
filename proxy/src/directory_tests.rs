//! Tests of `directory`: what a login finds, across changes of the settings. No server is ever reached.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tenantry_config::{Control, FormerSecret, Role, RoleSecret, Secret, Standing};
use tenantry_wire::scram::{self, Verifier};

use super::*;
use crate::server::credentials::Credentials;

const SALT: &[u8] = b"0123456789abcdef";
const ROLE: &str = "app";

fn verifier(password: &str) -> (Verifier, ClientKey) {
    Verifier::derive(password.as_bytes(), SALT, 16)
}

fn role(secret: RoleSecret) -> Role {
    Role { name: ROLE.to_owned(), secret, pool_mode: None, pool_size: None, former: None }
}

fn scram_role(password: &str) -> Role {
    role(RoleSecret::Scram(Secret::new(verifier(password).0.to_pg_string())))
}

fn plain_role(password: &str) -> Role {
    role(RoleSecret::Plain(Secret::from(password)))
}

/// One server where nobody listens, and the tenant `shop`.
fn settings(role: Role) -> Settings {
    let mut settings = Settings::default();
    settings.listen.addresses = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
    settings.listen.tls.mode = ClientTlsMode::Disable;
    let mut server = tenantry_config::Server { host: "127.0.0.1".to_owned(), port: 1, ..Default::default() };
    server.tls.mode = tenantry_config::ServerTlsMode::Disable;
    settings.servers.insert("main".to_owned(), server);
    let tenant = tenantry_config::Tenant { server: "main".to_owned(), roles: vec![role], ..Default::default() };
    settings.tenants.insert(id("shop"), tenant);
    settings
}

fn id(name: &str) -> TenantId {
    TenantId::parse(name).unwrap()
}

fn shop(settings: &mut Settings) -> &mut tenantry_config::Tenant {
    settings.tenants.get_mut("shop").unwrap()
}

async fn start(settings: &Settings) -> Arc<Directory> {
    Directory::start(settings.clone()).await.unwrap()
}

fn entry(directory: &Directory) -> Arc<RoleEntry> {
    directory.tenant("shop").unwrap().role(ROLE).unwrap()
}

/// As at the end of a login: what a client proved with this password.
fn log_in(directory: &Directory, password: &str) -> Seat {
    let (role, seat) = directory.enter("shop", &entry(directory)).unwrap();
    if let Some(credentials) = role.credentials_from(&verifier(password).1) {
        seat.pool.learn_credentials(credentials);
    }
    seat
}

fn key_of(pool: &Pool) -> Option<[u8; 32]> {
    pool.login().0.credentials.client_key().map(|key| *key.0)
}

#[tokio::test]
async fn a_login_under_way_across_a_reload_gets_what_is_now() {
    let mut settings = settings(plain_role("secret"));
    let directory = start(&settings).await;
    let (old, proved) = (directory.tenant("shop").unwrap(), entry(&directory));
    let tenant = shop(&mut settings);
    (tenant.ceiling, tenant.database, tenant.pool.pool_size) = (Some(7), Some("elsewhere".to_owned()), 3);
    directory.reload(settings.clone()).unwrap();
    assert!(matches!(old.seat(&proved), Err(NoSeat::Retired)), "the old tenant lets nobody in");
    let (_, seat) = directory.enter("shop", &proved).unwrap();
    assert_eq!((seat.pool.place().database.as_str(), seat.pool.settings().pool.pool_size), ("elsewhere", 3));
    let budget = directory.snapshot().pools[0].snapshot.budget.unwrap();
    assert_eq!(budget.ceiling, 7);
    // Taken out, or drained, while somebody logs in.
    shop(&mut settings).standing = Standing { number: None, state: TenantState::Drained, plans: 0, room: 0 };
    directory.reload(settings.clone()).unwrap();
    assert_eq!(directory.enter("shop", &proved).unwrap_err().code, "57P03");
    settings.tenants.clear();
    directory.reload(settings).unwrap();
    assert_eq!(directory.enter("shop", &proved).unwrap_err().code, "3D000");
}

#[tokio::test]
async fn a_proof_of_another_secret_does_not_let_in() {
    let mut settings = settings(plain_role("old"));
    let directory = start(&settings).await;
    let proved = entry(&directory);
    shop(&mut settings).roles = vec![plain_role("new")];
    directory.reload(settings).unwrap();
    assert_eq!(directory.enter("shop", &proved).unwrap_err().code, "28P01");
}

#[tokio::test]
async fn a_new_budget_counts_for_pools_whose_secret_or_role_changed_too() {
    let mut settings = settings(plain_role("a"));
    let directory = start(&settings).await;
    let (_, seat) = directory.enter("shop", &entry(&directory)).unwrap();
    let tenant = shop(&mut settings);
    (tenant.ceiling, tenant.roles) = (Some(5), vec![]);
    directory.reload(settings).unwrap();
    assert_eq!(seat.pool.server.snapshot(&seat.pool).budget.unwrap().ceiling, 5);
}

#[tokio::test]
async fn a_tenant_takes_max_client_conn_clients_and_no_more() {
    let mut settings = settings(plain_role("a"));
    shop(&mut settings).max_client_conn = Some(2);
    let directory = start(&settings).await;
    let enter = || directory.enter("shop", &entry(&directory));
    let seats = [enter().unwrap(), enter().unwrap()];
    assert_eq!(enter().unwrap_err().code, "53300");
    drop(seats);
    let again = enter().unwrap();
    // Those of before a reload count.
    directory.reload(settings.clone()).unwrap();
    let second = enter().unwrap();
    assert_eq!(enter().unwrap_err().code, "53300");
    drop((again, second));
    assert!(enter().is_ok());
}

#[tokio::test]
async fn names_under_the_star_that_nobody_uses_are_forgotten() {
    let mut settings = settings(plain_role("a"));
    settings.any_tenant = Some(tenantry_config::Tenant { server: "main".to_owned(), ..Default::default() });
    settings.roles = vec![plain_role("a")];
    let directory = start(&settings).await;
    let role = directory.any_role(ROLE).unwrap();
    for n in 0..10 * MAX_ANY_TENANTS {
        directory.enter(&format!("invented{n}"), &role).unwrap();
    }
    assert!(directory.any.lock().len() <= MAX_ANY_TENANTS);
    let held: Vec<_> = (0..MAX_ANY_TENANTS).map(|n| directory.enter(&format!("used{n}"), &role).unwrap()).collect();
    assert_eq!(directory.enter("one_more", &role).unwrap_err().code, "3D000");
    forget_unused(&mut directory.any.lock());
    assert_eq!(directory.any.lock().len(), held.len());
}

#[tokio::test]
async fn a_renamed_server_goes_on_with_its_ledger_and_so_does_one_that_comes_back() {
    let mut settings = settings(plain_role("a"));
    let directory = start(&settings).await;
    let (_, seat) = directory.enter("shop", &entry(&directory)).unwrap();
    let server = settings.servers.remove("main").unwrap();
    settings.servers.insert("primary".to_owned(), server.clone());
    shop(&mut settings).server = "primary".to_owned();
    directory.reload(settings.clone()).unwrap();
    assert_eq!(directory.snapshot().servers[0].name, "primary");
    let (_, again) = directory.enter("shop", &entry(&directory)).unwrap();
    assert!(Arc::ptr_eq(&seat.pool, &again.pool), "its pools live on");
    // Out of the file, and in again, while a session holds what it has.
    let (tenants, mut empty) = (settings.tenants.clone(), settings.clone());
    empty.tenants.clear();
    empty.servers.clear();
    directory.reload(empty.clone()).unwrap();
    directory.reload(empty).unwrap();
    assert!(directory.snapshot().servers.is_empty());
    settings.tenants = tenants;
    directory.reload(settings.clone()).unwrap();
    let (_, back) = directory.enter("shop", &entry(&directory)).unwrap();
    assert!(Arc::ptr_eq(&back.pool.server, &seat.pool.server), "one ledger");
    // Who has moved keeps its name and its sessions, even if another one comes to where it was.
    let moved = settings.servers.get_mut("primary").unwrap();
    moved.port = 2;
    settings.servers.insert("second".to_owned(), server);
    directory.reload(settings).unwrap();
    let (_, there) = directory.enter("shop", &entry(&directory)).unwrap();
    assert!(Arc::ptr_eq(&there.pool.server, &seat.pool.server));
    assert_eq!(there.pool.server.endpoint().port, 2);
}

#[tokio::test]
async fn the_control_roles_secret_is_not_held() {
    let mut settings = settings(plain_role("a"));
    let secret = RoleSecret::Plain(Secret::from("canary"));
    let control = Control { role: "c".to_owned(), database: "postgres".to_owned(), secret, connection_limits: true };
    settings.servers.get_mut("main").unwrap().control = Some(control);
    let directory = start(&settings).await;
    assert_eq!(directory.settings().servers["main"].control, None);
    directory.reload(settings).unwrap();
    assert_eq!(directory.settings().servers["main"].control, None);
}

#[tokio::test]
async fn a_changed_password_keeps_the_pool_which_tries_the_new_one_and_then_the_old() {
    let mut settings = settings(plain_role("a"));
    let directory = start(&settings).await;
    let seat = log_in(&directory, "a");
    for password in ["b", "a"] {
        shop(&mut settings).roles = vec![plain_role(password)];
        directory.reload(settings.clone()).unwrap();
        assert!(Arc::ptr_eq(&log_in(&directory, password).pool, &seat.pool));
        let Credentials::Password(known) = seat.pool.login().0.credentials else { panic!("no password") };
        assert_eq!(known.as_str(), password);
    }
    let turn = seat.pool.login().1;
    assert!(seat.pool.password_refused(turn), "PostgreSQL has the other one");
    assert!(!seat.pool.password_refused(turn.wrapping_add(1)), "it has neither");
}

/// `old` became `new`, and who proves `old` can cross.
fn rotated(accepts: bool, with_bridge: bool) -> Role {
    let bridge = scram::bridge(&verifier("old").1, &verifier("new").1);
    let former = FormerSecret {
        verifier: Secret::new(verifier("old").0.to_pg_string()),
        bridge: with_bridge.then(|| Secret::new(STANDARD.encode(bridge))),
        accepts,
    };
    Role { former: Some(former), ..scram_role("new") }
}

#[tokio::test]
async fn a_pool_crosses_the_bridge_to_the_new_key() {
    let mut settings = settings(scram_role("old"));
    let directory = start(&settings).await;
    assert_eq!(directory.client_key("shop", ROLE).map(|key| *key.0), None, "nobody has logged in");
    let seat = log_in(&directory, "old");
    let (old, new) = (*verifier("old").1.0, *verifier("new").1.0);
    assert_eq!(directory.client_key("shop", ROLE).map(|key| *key.0), Some(old));
    shop(&mut settings).roles = vec![rotated(true, true)];
    directory.reload(settings.clone()).unwrap();
    assert_eq!(key_of(&seat.pool), Some(new));
    // PostgreSQL has the old one still; then it has the new one.
    for key in [old, new] {
        let turn = seat.pool.login().1;
        assert!(seat.pool.password_refused(turn));
        seat.pool.login_worked(seat.pool.login().1);
        assert_eq!(key_of(&seat.pool), Some(key));
    }
    // Neither a client with the new password nor one with the old changes anything any more.
    let turn = seat.pool.login().1;
    log_in(&directory, "new");
    log_in(&directory, "old");
    assert_eq!(seat.pool.login().1, turn);
    assert!(!format!("{:?} {:?}", entry(&directory), seat.pool).contains(&STANDARD.encode(new)));
}

#[tokio::test]
async fn who_proves_the_former_password_brings_the_new_key_to_a_fresh_pool_or_nothing() {
    let new = *verifier("new").1.0;
    for (with_bridge, key) in [(true, Some(new)), (false, None)] {
        let directory = start(&settings(rotated(true, with_bridge))).await;
        assert_eq!(key_of(&log_in(&directory, "old").pool), key);
        assert_eq!(key_of(&log_in(&directory, "new").pool), Some(new));
        assert_eq!(key_of(&log_in(&directory, "guess").pool), Some(new));
    }
}

#[tokio::test]
async fn without_a_bridge_the_old_keys_stay_until_a_client_proves_the_new_password() {
    let mut settings = settings(scram_role("old"));
    let directory = start(&settings).await;
    let seat = log_in(&directory, "old");
    shop(&mut settings).roles = vec![rotated(false, false)];
    directory.reload(settings).unwrap();
    assert_eq!(key_of(&seat.pool), Some(*verifier("old").1.0));
    log_in(&directory, "new");
    assert_eq!(key_of(&seat.pool), Some(*verifier("new").1.0));
}

#[tokio::test]
async fn a_login_with_the_former_password_that_was_under_way_is_let_in_while_it_is_accepted() {
    for accepts in [true, false] {
        let mut settings = settings(scram_role("old"));
        let directory = start(&settings).await;
        let proved = entry(&directory);
        shop(&mut settings).roles = vec![rotated(accepts, true)];
        directory.reload(settings).unwrap();
        assert_eq!(directory.enter("shop", &proved).is_ok(), accepts);
        assert_eq!(entry(&directory).former_verifier().is_some(), accepts);
    }
}

#[tokio::test]
async fn a_server_that_stays_where_it_is_keeps_its_last_good_address() {
    let mut settings = settings(plain_role("a"));
    let directory = start(&settings).await;
    let address = SocketAddr::from(([192, 0, 2, 1], 1));
    let server = Arc::clone(&directory.tenant("shop").unwrap().server);
    *server.endpoint().last_good.lock() = Some(address);
    directory.reload(settings.clone()).unwrap();
    assert_eq!(*server.endpoint().last_good.lock(), Some(address));
    settings.servers.get_mut("main").unwrap().port = 2;
    directory.reload(settings).unwrap();
    assert_eq!(*server.endpoint().last_good.lock(), None);
}

#[tokio::test]
async fn a_reload_that_fails_shows_no_new_certificate() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut settings = settings(plain_role("a"));
    settings.listen.tls.mode = ClientTlsMode::Allow;
    settings.listen.tls.state_dir = one.path().to_owned();
    let directory = start(&settings).await;
    let shown = || directory.acceptor().unwrap().identity();
    let before = shown();
    let good = settings.clone();
    settings.listen.tls.state_dir = two.path().to_owned();
    shop(&mut settings).server = "nowhere".to_owned();
    assert!(directory.reload(settings.clone()).is_err());
    assert!(Arc::ptr_eq(&before, &shown()));
    shop(&mut settings).server = good.tenants["shop"].server.clone();
    directory.reload(settings).unwrap();
    assert!(!Arc::ptr_eq(&before, &shown()));
}

#[tokio::test]
async fn a_tenant_that_moves_to_another_server_takes_sessions_statements_counters_and_login_along() {
    let mut settings = settings(scram_role("a"));
    let server = settings.servers["main"].clone();
    settings.servers.insert("other".to_owned(), tenantry_config::Server { port: 2, ..server });
    shop(&mut settings).standing.number = Some(1);
    let directory = start(&settings).await;
    let seat = log_in(&directory, "a");
    seat.pool.stats.error("53300");
    for (name, port) in [("other", 2), ("main", 1), ("other", 2)] {
        let before = seat.pool.latest();
        shop(&mut settings).server = name.to_owned();
        directory.reload(settings.clone()).unwrap();
        let now = seat.pool.latest();
        assert!(before.has_moved() && !now.has_moved());
        assert!(Arc::ptr_eq(&now, &log_in(&directory, "a").pool), "who comes now gets the same pool");
        assert_eq!((now.server.endpoint().port, key_of(&now)), (port, key_of(&seat.pool)));
        assert!(Arc::ptr_eq(&now.statements, &seat.pool.statements) && Arc::ptr_eq(&now.stats, &seat.pool.stats));
        assert_ne!(now.plans(), before.plans(), "statements are looked at once more");
        // Whoever has not heard of it is let in nowhere.
        assert_eq!(before.server.gate(before.id), Gate::Shut);
        assert_eq!(now.server.gate(now.id), Gate::Open);
    }
    // Without a number it is another tenant of the same name.
    let mut file = settings.clone();
    shop(&mut file).standing.number = None;
    directory.reload(file.clone()).unwrap();
    let (_, of_file) = directory.enter("shop", &entry(&directory)).unwrap();
    shop(&mut file).server = "main".to_owned();
    directory.reload(file).unwrap();
    assert!(!of_file.pool.has_moved());
}
