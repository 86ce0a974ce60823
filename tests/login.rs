//! Who may log in, how, and what those who may not are told.

use std::{net::SocketAddr, process::Output, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tenantry_config::{
    ClientTlsMode, FormerSecret, Role, RoleSecret, Secret, Server, ServerTlsMode, Settings, TenantId, TenantState,
};
use tenantry_proxy::directory::Directory;
use tenantry_testkit::{
    Client, Connect, Load, Proxy, ProxyBuilder, Tenant,
    client::{Endpoint, Protection},
    cluster, eventually, one_server, say,
};
use tenantry_wire::scram::{self, Verifier};

/// Runs `SELECT current_user` with libpq and the given connection options.
async fn psql(proxy: &Proxy, tenant: &Tenant, options: &str) -> Output {
    let how = format!(
        "host=127.0.0.1 port={} user={} dbname={} password={} {options}",
        proxy.address().port(),
        tenant.role,
        tenant.name,
        tenant.password,
    );
    let mut command = tokio::process::Command::new(cluster().program("psql"));
    command.args(["-X", "-At", "-c", "SELECT current_user", &how]).env("LC_ALL", "C").env("HOME", "/nonexistent");
    command.output().await.expect("psql")
}

#[track_caller]
fn says(output: &Output, tenant: &Tenant) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(out.trim(), tenant.role, "{err}");
}

async fn proxy_for(tenant: &Tenant, auth_type: &str) -> Proxy {
    ProxyBuilder::new(cluster()).tenant(tenant).set("auth.auth_type", auth_type).start().await
}

async fn works(mut client: Client, tenant: &Tenant) {
    assert_eq!(client.value("SELECT current_user").await, tenant.role);
}

#[tokio::test]
async fn scram_over_tcp_tls_direct_tls_and_unix_socket() {
    let (tenant, proxy) = one_server("login").await;
    for protection in [Protection::Plain, Protection::Tls, Protection::DirectTls] {
        works(proxy.connect(&tenant).protection(protection).login().await, &tenant).await;
    }
    let mut unix = proxy.connect(&tenant);
    unix.endpoint = proxy.unix();
    works(unix.login().await, &tenant).await;
}

#[tokio::test]
async fn libpq_with_sslmode_require_takes_the_self_signed_certificate() {
    let (tenant, proxy) = one_server("login").await;
    says(&psql(&proxy, &tenant, "sslmode=require").await, &tenant);
    says(&psql(&proxy, &tenant, "sslmode=prefer").await, &tenant);
    says(&psql(&proxy, &tenant, "sslmode=disable").await, &tenant);
    let file = proxy.dir().join("tenantry.crt");
    says(&psql(&proxy, &tenant, &format!("sslmode=verify-ca sslrootcert={}", file.display())).await, &tenant);
}

#[tokio::test]
async fn libpq_binds_the_channel() {
    let (tenant, proxy) = one_server("login").await;
    says(&psql(&proxy, &tenant, "sslmode=require channel_binding=require").await, &tenant);
}

#[tokio::test]
async fn tls_mode_require_refuses_plain_tcp_and_disable_refuses_tls() {
    let tenant = cluster().tenant("login").await;
    let require = ProxyBuilder::new(cluster()).tenant(&tenant).set("listen.tls.mode", "require").start().await;
    let refused = require.connect(&tenant).try_login().await.err().expect("refused");
    assert_eq!(refused.faults().len(), 1, "{:?}", refused.trace());
    assert_eq!(refused.of(b'R').count(), 0, "a password was asked for");
    works(require.connect(&tenant).protection(Protection::Tls).login().await, &tenant).await;
    let disable = ProxyBuilder::new(cluster()).tenant(&tenant).set("listen.tls.mode", "disable").start().await;
    let mut plain = disable.connect(&tenant).open().await.expect("connected");
    plain.send(&say::packet(say::SSL_REQUEST, b"")).await;
    assert_eq!(plain.byte().await, Some(b'N'));
    works(disable.connect(&tenant).login().await, &tenant).await;
}

#[tokio::test]
async fn md5_from_a_plain_and_from_a_stored_md5_password() {
    let tenant = cluster().tenant("login").await;
    let (role, password) = (&tenant.role, &tenant.password);
    cluster()
        .sql(&format!(
            "GRANT kit_md5 TO {role}; SET password_encryption = 'md5'; ALTER ROLE {role} PASSWORD '{password}'"
        ))
        .await;
    works(proxy_for(&tenant, "md5").await.connect(&tenant).login().await, &tenant).await;
    let stored =
        cluster().sql(&format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{role}'")).await.expect("a hash");
    assert!(stored.starts_with("md5"));
    let proxy =
        ProxyBuilder::new(cluster()).role(&tenant.name, role, Some(&stored)).set("auth.auth_type", "md5").start().await;
    works(proxy.connect(&tenant).login().await, &tenant).await;
    proxy.connect(&tenant).password("wrong").try_login().await.err().expect("refused").fatal("28P01");
}

#[tokio::test]
async fn password_is_asked_for_over_tls_and_never_over_plain_tcp() {
    let tenant = cluster().tenant("login").await;
    let proxy = proxy_for(&tenant, "password").await;
    works(proxy.connect(&tenant).protection(Protection::Tls).login().await, &tenant).await;
    proxy
        .connect(&tenant)
        .protection(Protection::Tls)
        .password("wrong")
        .try_login()
        .await
        .err()
        .expect("refused")
        .fatal("28P01");
    let mut plain = proxy.connect(&tenant).open().await.expect("connected");
    plain.send(&say::startup(0, &[("user", &tenant.role), ("database", &tenant.name)])).await;
    let first = plain.next().await.expect("an answer");
    assert_ne!((first.tag, first.body.as_ref()), (b'R', &[0, 0, 0, 3][..]), "asked for a password in the clear");
}

#[tokio::test]
async fn trust_asks_nothing() {
    let tenant = cluster().tenant("login").await;
    let proxy = proxy_for(&tenant, "trust").await;
    works(proxy.connect(&tenant).password("whatever").login().await, &tenant).await;
}

#[tokio::test]
async fn a_role_without_any_password_works_with_trust_on_both_sides() {
    let tenant = cluster().tenant("login").await;
    cluster().sql(&format!("GRANT kit_trust TO {0}; ALTER ROLE {0} PASSWORD NULL", tenant.role)).await;
    let proxy = ProxyBuilder::new(cluster())
        .role(&tenant.name, &tenant.role, None)
        .set("auth.auth_type", "trust")
        .start()
        .await;
    works(proxy.connect(&tenant).login().await, &tenant).await;
}

#[tokio::test]
async fn whoever_may_not_is_told_the_same() {
    let (tenant, proxy) = one_server("login").await;
    let connect = proxy.connect(&tenant);
    let refused = [
        ("wrong password", connect.clone().password("wrong")),
        ("empty password", connect.clone().password("")),
        ("unknown user", connect.clone().user("nobody_such")),
        ("unknown database", connect.clone().database("no_such_database")),
        ("both unknown", connect.clone().user("nobody_such").database("no_such_database")),
        ("superuser", connect.clone().user("postgres").database("postgres")),
    ];
    for (what, connect) in refused {
        let answer = connect.try_login().await.err().unwrap_or_else(|| panic!("{what}: logged in"));
        let fault = answer.fatal("28P01");
        assert_eq!(fault.message, format!("password authentication failed for user \"{}\"", connect.user), "{what}");
        // One request, one challenge, one refusal: the same steps for all.
        assert_eq!(answer.tags(), "RRE", "{what}");
    }
    works(proxy.connect(&tenant).login().await, &tenant).await;
}

#[tokio::test]
async fn an_unknown_name_is_challenged_with_a_salt_that_stays_the_same() {
    let (tenant, proxy) = one_server("login").await;
    let salt = async |user: &str| {
        let answer = proxy.connect(&tenant).user(user).try_login().await.err().expect("refused");
        let challenge = answer.of(b'R').nth(1).expect("a challenge").body.clone();
        let text = String::from_utf8_lossy(&challenge[4..]).into_owned();
        text.split(',').find_map(|part| part.strip_prefix("s=").map(str::to_owned)).expect("a salt")
    };
    assert_eq!(salt("ghost").await, salt("ghost").await);
    assert_ne!(salt("ghost").await, salt("other").await);
}

#[tokio::test]
async fn a_verifier_alone_is_enough_to_log_in_through_to_postgresql() {
    let tenant = cluster().tenant("login").await;
    let sql = format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{}'", tenant.role);
    let verifier = cluster().sql(&sql).await.expect("a verifier");
    let proxy = ProxyBuilder::new(cluster()).role(&tenant.name, &tenant.role, Some(&verifier)).start().await;
    for protection in [Protection::Plain, Protection::Tls] {
        works(proxy.connect(&tenant).protection(protection).login().await, &tenant).await;
    }
    proxy.connect(&tenant).password("wrong").try_login().await.err().expect("refused").fatal("28P01");
    proxy.connect(&tenant).password(&verifier).try_login().await.err().expect("refused").fatal("28P01");
}

#[tokio::test]
async fn the_server_is_reached_over_tls_with_its_certificate_verified() {
    let tenant = cluster().tenant("login").await;
    cluster().sql(&format!("GRANT kit_tls TO {}", tenant.role)).await;
    let builder = ProxyBuilder::new(cluster()).tenant(&tenant).set("servers.main.tls.mode", "verify-full");
    let good = builder.clone().set("servers.main.tls.ca_file", cluster().ca_file().display().to_string()).start().await;
    let mut client = good.connect(&tenant).login().await;
    assert_eq!(client.value("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").await, "t");
    // S19: the system's roots do not know this authority; nothing falls back to plain text.
    let bad = builder.set("pool.query_wait_timeout", "500ms").start().await;
    let refused = match bad.connect(&tenant).try_login().await {
        Err(answer) => answer,
        Ok(mut client) => client.query("SELECT 1").await,
    };
    assert_eq!(refused.faults().len(), 1, "{:?}", refused.trace());
}

#[tokio::test]
async fn the_server_is_reached_over_its_unix_socket() {
    let tenant = cluster().tenant("login").await;
    let proxy = ProxyBuilder::new(cluster())
        .tenant(&tenant)
        .set("servers.main.host", cluster().socket_dir().display().to_string())
        .start()
        .await;
    let mut client = proxy.connect(&tenant).login().await;
    assert_eq!(client.value("SELECT inet_client_addr() IS NULL").await, "t");
}

#[tokio::test]
async fn a_password_that_the_server_does_not_take_is_told_once() {
    let tenant = cluster().tenant("login").await;
    let proxy = ProxyBuilder::new(cluster()).role(&tenant.name, &tenant.role, Some("not-the-servers")).start().await;
    let answer = match proxy.connect(&tenant).password("not-the-servers").try_login().await {
        Err(answer) => answer,
        Ok(mut client) => client.query("SELECT 1").await,
    };
    assert_eq!(answer.faults().len(), 1, "{:?}", answer.trace());
    assert!(!format!("{:?}", answer.trace()).contains("127.0.0.1"));
}

#[tokio::test]
async fn any_database_is_served_by_the_star() {
    let tenant = cluster().tenant("login").await;
    let proxy = ProxyBuilder::new(cluster()).role("*", &tenant.role, Some(&tenant.password)).start().await;
    works(proxy.connect(&tenant).login().await, &tenant).await;
    // Only after the login is it told that there is no such database.
    let answer = match proxy.connect(&tenant).database("no_such_database").try_login().await {
        Err(answer) => answer,
        Ok(mut client) => client.query("SELECT 1").await,
    };
    assert_eq!(answer.faults().iter().map(|f| f.code.as_str()).collect::<Vec<_>>(), ["3D000"], "{:?}", answer.trace());
}

#[tokio::test]
async fn a_replication_connection_is_refused() {
    let (tenant, proxy) = one_server("login").await;
    let refused = proxy.connect(&tenant).parameter("replication", "true").try_login().await.err().expect("refused");
    assert_eq!(refused.faults().len(), 1, "{:?}", refused.trace());
}

#[tokio::test]
async fn incident_c07_file_descriptors_run_out_and_come_back() {
    let tenant = cluster().tenant("login").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 2).max_files(64).start().await;
    let mut first = proxy.connect(&tenant).login().await;
    assert_eq!(first.value("SELECT 1").await, "1");
    let mut crowd = Vec::new();
    for _ in 0..100 {
        if let Ok(client) = proxy.connect(&tenant).open().await {
            crowd.push(client);
        }
    }
    for n in 0..20 {
        assert_eq!(first.value(&format!("SELECT {n}")).await, n.to_string());
    }
    assert!(proxy.runs());
    let lines = proxy.log().lines().count();
    assert!(lines < 300, "{lines} lines in the log");
    drop(crowd);
    eventually("new clients are served again", async || proxy.connect(&tenant).try_login().await.ok()).await;
}

#[tokio::test]
async fn an_address_that_guesses_is_turned_away_and_others_are_not() {
    let tenant = cluster().tenant("login").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("auth.max_failed_logins", 2).start().await;
    for _ in 0..2 {
        let fault = proxy.connect(&tenant).password("guess").try_login().await.err().expect("refused").fatal("28P01");
        assert!(!format!("{fault:?}").contains("FAILED_LOGINS"), "{fault:?}");
    }
    // Now even the right one is not heard, and nothing of it is told that a wrong one would not be.
    let right = proxy.connect(&tenant).try_login().await.err().expect("refused").fatal("28P01");
    assert!(format!("{right:?}").contains("FAILED_LOGINS"), "{right:?}");
    assert_eq!(proxy.metric("tenantry_throttled_logins_total").await, 1.0);
    // Another way in, and so another address.
    let mut client = Connect::new(proxy.unix(), &tenant, &tenant.name).login().await;
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn logins_under_way_are_no_failures_however_many_and_slow() {
    let (tenant, proxy) = one_server("login").await;
    let connect = proxy.connect(&tenant);
    let mut slow = Vec::new();
    // More than max_failed_logins, all from one address.
    for _ in 0..100 {
        let mut client = connect.open().await.expect("connected");
        client.send(&say::startup(0, &[("user", &tenant.role), ("database", &tenant.name)])).await;
        slow.push(client);
    }
    works(connect.login().await, &tenant).await;
    for client in &mut slow {
        let answer = client.authenticate(&tenant.role, &tenant.password).await;
        assert_eq!(answer.status(), Some('I'), "{:?}", answer.trace());
    }
    let storm: Vec<_> = (0..200)
        .map(|_| {
            let connect = connect.clone();
            tokio::spawn(async move { connect.try_login().await.map(drop).map_err(|answer| answer.trace()) })
        })
        .collect();
    for login in storm {
        assert_eq!(login.await.expect("no panic"), Ok(()));
    }
    assert_eq!(proxy.metric("tenantry_throttled_logins_total").await, 0.0);
}

#[tokio::test]
async fn guesses_at_once_are_heard_no_more_often_than_the_limit() {
    let tenant = cluster().tenant("login").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("auth.max_failed_logins", 3).start().await;
    let mut guesses = Vec::new();
    for _ in 0..10 {
        let mut client = proxy.connect(&tenant).open().await.expect("connected");
        client.send(&say::startup(0, &[("user", &tenant.role), ("database", &tenant.name)])).await;
        guesses.push(client);
    }
    let mut turned_away = 0;
    // The last is right, and hears what the others hear.
    for (n, client) in guesses.iter_mut().enumerate() {
        let password = if n == 9 { &tenant.password } else { "guess" };
        let answer = client.authenticate(&tenant.role, password).await;
        let fault = answer.fatal("28P01");
        turned_away += usize::from(format!("{fault:?}").contains("FAILED_LOGINS"));
    }
    assert_eq!(turned_away, 7);
}

/// A data plane in this process, with one tenant: for what only the catalog can say.
async fn data_plane(tenant: &Tenant, role: Role) -> (Arc<Directory>, Settings) {
    let mut settings = Settings::default();
    settings.listen.addresses = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
    settings.listen.tls.mode = ClientTlsMode::Disable;
    let address = cluster().address();
    let mut server = Server { host: address.ip().to_string(), port: address.port(), ..Server::default() };
    server.tls.mode = ServerTlsMode::Disable;
    settings.servers.insert("main".to_owned(), server);
    let mut entry = tenantry_config::Tenant { server: "main".to_owned(), roles: vec![role], ..Default::default() };
    // Logins to the server go on all the time.
    entry.pool.server_lifetime = Duration::from_millis(50);
    settings.tenants.insert(TenantId::parse(&tenant.name).expect("a name"), entry);
    (Directory::start(settings.clone()).await.expect("it starts"), settings)
}

#[tokio::test]
async fn a_password_is_rotated_without_an_error_for_anybody() {
    let tenant = cluster().tenant("login").await;
    let sql = format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{}'", tenant.role);
    let old_text = cluster().sql(&sql).await.expect("a verifier");
    let old = Verifier::parse(&old_text).expect("a verifier");
    let (new, new_key) = Verifier::derive(b"the-new-one", old.salt(), old.iterations());
    let secret = |text: String| RoleSecret::Scram(Secret::new(text));
    let role = Role {
        name: tenant.role.clone(),
        secret: secret(old_text.clone()),
        pool_mode: None,
        pool_size: Some(2),
        former: None,
    };
    let (directory, mut settings) = data_plane(&tenant, role.clone()).await;
    let with_old = Connect::new(Endpoint::Tcp(directory.addresses()[0]), &tenant, &tenant.name);
    let with_new = with_old.clone().password("the-new-one");
    let load = Load::start(&with_old).await;
    load.outlives_its_connections(&tenant).await;

    let old_key = directory.client_key(&tenant.name, &tenant.role).expect("a client logged in");
    assert!(old.fits(&old_key));
    let bridge = STANDARD.encode(scram::bridge(&old_key, &new_key));
    let former = |accepts| FormerSecret {
        verifier: Secret::new(old_text.clone()),
        bridge: Some(Secret::new(bridge.clone())),
        accepts,
    };
    let mut serve = |accepts| {
        let role = Role { secret: secret(new.to_pg_string()), former: Some(former(accepts)), ..role.clone() };
        settings.tenants.values_mut().for_each(|tenant| tenant.roles = vec![role.clone()]);
        directory.reload(settings.clone()).expect("good settings");
    };
    serve(true);
    for connect in [&with_old, &with_new] {
        works(connect.login().await, &tenant).await;
    }
    load.outlives_its_connections(&tenant).await;
    cluster().sql(&format!("ALTER ROLE {} PASSWORD '{}'", tenant.role, new.to_pg_string())).await;
    load.outlives_its_connections(&tenant).await;
    for connect in [&with_old, &with_new] {
        works(connect.login().await, &tenant).await;
    }
    serve(false);
    with_old.try_login().await.err().expect("refused").fatal("28P01");
    works(with_new.login().await, &tenant).await;
    load.outlives_its_connections(&tenant).await;
    load.stop().await;
    directory.drain(Duration::from_secs(1)).await;
}

#[tokio::test]
async fn a_suspended_tenant_that_woke_gives_its_connections_up_whenever_it_is_told_to() {
    let tenant = cluster().tenant("login").await;
    let secret = RoleSecret::Plain(Secret::from(tenant.password.as_str()));
    let role = Role { name: tenant.role.clone(), secret, pool_mode: None, pool_size: None, former: None };
    let (directory, mut settings) = data_plane(&tenant, role).await;
    let lasting = |tenant: &mut tenantry_config::Tenant| tenant.pool.server_lifetime = Duration::from_secs(3_600);
    settings.tenants.values_mut().for_each(lasting);
    let suspend = |tenant: &mut tenantry_config::Tenant| tenant.standing.state = TenantState::Suspended;
    settings.tenants.values_mut().for_each(suspend);
    directory.reload(settings).expect("good settings");
    let mut client = Connect::new(Endpoint::Tcp(directory.addresses()[0]), &tenant, &tenant.name).login().await;
    for _ in 0..2 {
        assert_eq!(client.value("SELECT 1").await, "1");
        cluster().settled(&tenant, 1).await;
        directory.release(&tenant.name);
        cluster().settled(&tenant, 0).await;
    }
    // A transaction keeps its connection to its end.
    client.run("BEGIN").await;
    directory.release(&tenant.name);
    assert_eq!(client.value("SELECT 1").await, "1");
    client.run("COMMIT").await;
    cluster().settled(&tenant, 0).await;
    directory.drain(Duration::from_secs(1)).await;
}
