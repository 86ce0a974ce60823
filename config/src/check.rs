//! Cross checks: what each key alone cannot tell.
//!
//! What always holds: pure; a check whose input could not be read stays silent, because that is already told.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    net::SocketAddr,
};

use crate::{
    AuthType, ClientTlsMode, OrAuto, Role, RoleSecret, Server, ServerTlsMode, Settings, Tenant,
    floors::{floors_fit, name_parts},
    layers::join,
    problem::{Report, suggest},
};

/// `sun_path` is 108 bytes with its NUL; the file name is at most `/.s.PGSQL.65535`.
const MAX_SOCKET_DIR_BYTES: usize = 107 - "/.s.PGSQL.65535".len();

/// Far above any machine; below it a typing error cannot eat the memory.
const MOST_WORKERS: u32 = 1024;
/// More would only make the others wait as if they had no weight at all.
const MOST_WEIGHT: u32 = 1000;

pub(crate) fn check(settings: &Settings, report: &mut Report) {
    check_presence(settings, report);
    check_process(settings, report);
    check_listen(settings, report);
    check_pool(settings, report);
    check_admin(settings, report);
    check_aliases(settings, report);
    for (name, server) in &settings.servers {
        check_server(&join("servers", name), server, report);
    }
    check_roles("", &settings.roles, settings, report);
    for (path, tenant) in tenants(settings) {
        check_tenant(&path, tenant, settings, report);
    }
    check_warm_connections(settings, report);
    check_floors(settings, report);
}

/// Every tenant with its path, `"*"` last.
fn tenants(settings: &Settings) -> impl Iterator<Item = (String, &Tenant)> {
    let named = settings.tenants.iter().map(|(id, tenant)| (join("tenants", id.as_str()), tenant));
    named.chain(settings.any_tenant.iter().map(|tenant| (join("tenants", "*"), tenant)))
}

fn check_presence(settings: &Settings, report: &mut Report) {
    if settings.servers.is_empty() {
        report.problem(&["servers"], "no server; add [servers.main] with host = \"...\"");
    }
    // A tenant whose name was refused is still an attempt to write one.
    if tenants(settings).next().is_none() && !report.is_set("tenants") && settings.admin.catalog.is_none() {
        report.problem(&["tenants"], "no tenant; add [tenants.NAME], or [tenants.\"*\"] for any database");
    }
}

fn check_admin(settings: &Settings, report: &mut Report) {
    let admin = &settings.admin;
    if let Some(name) = &admin.catalog {
        match settings.servers.get(name) {
            None => report.problem(
                &["admin.catalog"],
                format!("there is no server {name:?}; {}", suggest(name, settings.servers.keys().map(String::as_str))),
            ),
            Some(server) if server.control.is_none() => {
                report.problem(&["admin.catalog"], format!("needs [servers.{name}.control]: role, database, password"));
            }
            Some(_) => {}
        }
    }
    if admin.cert_file.is_some() != admin.key_file.is_some() {
        report.problem(&["admin.cert_file", "admin.key_file"], "cert_file and key_file belong together; write both");
    }
    if admin.client_ca_file.is_some() && admin.cert_file.is_none() {
        report.problem(&["admin.client_ca_file"], "needs cert_file and key_file: client certificates need TLS");
    }
}

/// A name leads to one tenant.
fn check_aliases(settings: &Settings, report: &mut Report) {
    let mut seen = BTreeMap::new();
    for (name, tenant) in &settings.tenants {
        for alias in &tenant.aliases {
            let other = settings
                .tenants
                .contains_key(alias)
                .then_some(alias)
                .or_else(|| seen.insert(alias, name).map(|_| alias));
            if let Some(alias) = other {
                let key = join(&join("tenants", name.as_str()), "aliases");
                report.problem(
                    &[&key],
                    format!("{alias} is the name of another tenant, or another's alias; choose another"),
                );
            }
        }
    }
}

fn at_least_one(key: &str, number: u32, report: &mut Report) {
    if number == 0 {
        report.problem(&[key], "must be at least 1");
    }
}

fn check_process(settings: &Settings, report: &mut Report) {
    if let OrAuto::Is(workers) = settings.process.workers
        && workers.get() > MOST_WORKERS
    {
        let message = format!("is {workers}; at most {MOST_WORKERS}, and more than the machine has CPUs never helps");
        report.problem(&["process.workers"], message);
    }
}

fn check_listen(settings: &Settings, report: &mut Report) {
    let listen = &settings.listen;
    at_least_one("listen.max_client_conn", listen.max_client_conn, report);
    check_addresses(settings, report);
    if let Some(dir) = &listen.unix_socket_dir
        && dir.as_os_str().len() > MAX_SOCKET_DIR_BYTES
    {
        let message = format!("is longer than {MAX_SOCKET_DIR_BYTES} bytes, too long for a Unix socket; shorten it");
        report.problem(&["listen.unix_socket_dir"], message);
    }
    let (cert, key) = ("listen.tls.cert_file", "listen.tls.key_file");
    match (&listen.tls.cert_file, &listen.tls.key_file) {
        (Some(_), None) => report.problem(&[cert, key], "needs listen.tls.key_file; write both or neither"),
        (None, Some(_)) => report.problem(&[key, cert], "needs listen.tls.cert_file; write both or neither"),
        _ => {}
    }
    if settings.auth.auth_type == AuthType::Password && listen.tls.mode == ClientTlsMode::Disable {
        let message = "\"password\" would send passwords in the clear over TCP with listen.tls.mode = \"disable\"; \
                       write \"scram-sha-256\", or let TLS be used";
        report.problem(&["auth.auth_type", "listen.tls.mode", "listen.addresses"], message);
    }
    if settings.auth.max_failed_logins == Some(0) {
        report.problem(&["auth.max_failed_logins"], "must be at least 1, or \"off\"");
    }
    if settings.log.filter.is_empty() {
        report.problem(&["log.filter"], "is empty; write e.g. \"info\"");
    }
}

fn check_addresses(settings: &Settings, report: &mut Report) {
    const KEY: &str = "listen.addresses";
    if settings.listen.addresses.is_empty() {
        let message = "is empty; write at least one address (its port also names the Unix socket)";
        report.problem(&[KEY], message);
    }
    // Port 0 asks the system for any free port, so two of them are two ports.
    let is_fixed = |address: &&SocketAddr| address.port() != 0;
    let mut seen = BTreeSet::new();
    for address in settings.listen.addresses.iter().filter(is_fixed) {
        if !seen.insert(*address) {
            report.problem(&[KEY], format!("{address} is listed twice; remove one"));
        }
    }
    if let Some(address) = settings.admin.address.filter(|address| seen.contains(address)) {
        let message = format!("{address} is also in listen.addresses; choose another port");
        report.problem(&["admin.address", KEY], message);
    }
}

fn check_pool(settings: &Settings, report: &mut Report) {
    at_least_one("pool.pool_size", settings.pool.pool_size, report);
    let (min, size) = (settings.pool.min_pool_size, settings.pool.pool_size);
    check_min_pool_size(&["pool.min_pool_size", "pool.pool_size"], min, size, report);
}

fn check_min_pool_size(keys: &[&str], min: u32, size: u32, report: &mut Report) {
    if min > size {
        let message = format!("min_pool_size {min} is more than pool_size {size}; lower it or raise pool_size");
        report.problem(keys, message);
    }
}

fn check_server(path: &str, server: &Server, report: &mut Report) {
    if server.host.trim().is_empty() {
        report.problem(&[&join(path, "host")], "is missing; write a host name, an address or a socket directory");
    }
    at_least_one(&join(path, "max_connecting"), server.max_connecting, report);
    at_least_one(&join(path, "max_cancels"), server.max_cancels, report);
    // libpq's rule for sslnegotiation=direct: without a way back to plain, only a mode that insists on TLS makes sense.
    if server.tls.direct && matches!(server.tls.mode, ServerTlsMode::Disable | ServerTlsMode::Prefer) {
        let message = format!("needs TLS, but tls.mode is \"{}\"; write mode = \"verify-full\"", server.tls.mode);
        let tls = join(path, "tls");
        report.problem(&[&join(&tls, "direct"), &join(&tls, "mode")], message);
    }
}

fn check_tenant(path: &str, tenant: &Tenant, settings: &Settings, report: &mut Report) {
    let [min, size] = ["min_pool_size", "pool_size"].map(|key| join(path, key));
    // Taken over from `[pool]`, a bad value is told there.
    if report.is_set(&size) {
        at_least_one(&size, tenant.pool.pool_size, report);
    }
    if report.is_set(&min) || report.is_set(&size) {
        let keys = [min.as_str(), size.as_str(), "pool.min_pool_size", "pool.pool_size"];
        check_min_pool_size(&keys, tenant.pool.min_pool_size, tenant.pool.pool_size, report);
    }
    check_budget(path, tenant, report);
    check_pools_against_budget(path, tenant, settings, report);
    if tenant.max_client_conn == Some(0) {
        report.problem(&[&join(path, "max_client_conn")], "must be at least 1, or \"off\"");
    }
    check_roles(path, &tenant.roles, settings, report);
    for (i, role) in tenant.roles.iter().enumerate() {
        if let Some(own) = role.pool_size.filter(|own| *own > 0) {
            let key = join(&format!("{}[{i}]", join(path, "roles")), "pool_size");
            check_min_pool_size(&[&key, &min, "pool.min_pool_size"], tenant.pool.min_pool_size, own, report);
        }
    }
}

fn check_budget(path: &str, tenant: &Tenant, report: &mut Report) {
    let [floor, ceiling, weight] = ["floor", "ceiling", "weight"].map(|key| join(path, key));
    if let Some(most) = tenant.ceiling {
        at_least_one(&ceiling, most, report);
        if tenant.floor > most {
            let message = format!("{} is more than ceiling {most}; lower it or raise ceiling", tenant.floor);
            report.problem(&[&floor, &ceiling], message);
        }
    }
    if tenant.weight.get() > MOST_WEIGHT {
        report.problem(&[&weight], format!("is {}; write 1 to {MOST_WEIGHT}", tenant.weight));
    }
    if path == join("tenants", "*") && tenant.floor > 0 {
        let message = "any number of databases would each get it; give those that need a floor a section of their own";
        report.problem(&[&floor], message);
    }
}

/// What no pool can ever use, or no budget ever allow.
fn check_pools_against_budget(path: &str, tenant: &Tenant, settings: &Settings, report: &mut Report) {
    let [floor, ceiling, size, min] = ["floor", "ceiling", "pool_size", "min_pool_size"].map(|key| join(path, key));
    let most = tenant.most_connections(&settings.roles);
    // Without a role nobody can use any of it yet.
    if most > 0 && tenant.floor > most {
        let message = format!(
            "{} is more than the {most} connections that the pools of its roles can have; lower it or raise pool_size",
            tenant.floor
        );
        report.problem(&[&floor, &size, "pool.pool_size"], message);
    }
    let warm = warm(tenant, settings);
    if let Some(most) = tenant.ceiling.filter(|most| *most > 0 && warm > u64::from(*most)) {
        let message = format!(
            "{most} is less than the {warm} connections that min_pool_size keeps open; raise it or lower min_pool_size"
        );
        report.problem(&[&ceiling, &min, "pool.min_pool_size"], message);
    }
}

fn check_roles(path: &str, roles: &[Role], settings: &Settings, report: &mut Report) {
    let list = join(path, "roles");
    let mut seen = BTreeSet::new();
    for (i, role) in roles.iter().enumerate() {
        let path = format!("{list}[{i}]");
        if !role.name.is_empty() && !seen.insert(&role.name) {
            report.problem(&[&join(&path, "name")], format!("{:?} is there twice; remove one", role.name));
        }
        if role.pool_size == Some(0) {
            report.problem(&[&join(&path, "pool_size")], "must be at least 1");
        }
        check_secret(&path, &role.secret, settings.auth.auth_type, report);
    }
}

/// Whether `auth_type` can check a client with what is stored.
fn check_secret(path: &str, secret: &RoleSecret, auth_type: AuthType, report: &mut Report) {
    let [password, file, env] = ["password", "password_file", "password_env"].map(|key| join(path, key));
    let keys = [password.as_str(), &file, &env, "auth.auth_type"];
    let message: &dyn Display = match (auth_type, secret) {
        (AuthType::Trust, _)
        | (_, RoleSecret::Plain(_))
        | (AuthType::ScramSha256 | AuthType::Password, RoleSecret::Scram(_))
        | (AuthType::Md5 | AuthType::Password, RoleSecret::Md5(_)) => return,
        (_, RoleSecret::None) => {
            &"has no secret, which is only good for auth_type \"trust\"; add password, password_file or password_env"
        }
        (_, RoleSecret::Md5(_)) => {
            &"an md5 hash cannot serve auth_type \"scram-sha-256\"; store the password or a SCRAM-SHA-256 verifier"
        }
        (_, RoleSecret::Scram(_)) => {
            &"a SCRAM-SHA-256 verifier cannot serve auth_type \"md5\"; store the password, or use \"scram-sha-256\""
        }
    };
    report.problem(&keys, message.to_string());
}

/// Connections that its pools keep open whatever happens.
fn warm(tenant: &Tenant, settings: &Settings) -> u64 {
    let roles = u64::try_from(tenant.all_roles(&settings.roles).count()).unwrap_or(u64::MAX);
    u64::from(tenant.pool.min_pool_size).saturating_mul(roles)
}

/// The connections that are kept open whatever happens must fit into each server's cap; else some tenant's never open.
fn check_warm_connections(settings: &Settings, report: &mut Report) {
    let mut sums: BTreeMap<&str, Vec<(String, u64)>> = BTreeMap::new();
    for (path, tenant) in tenants(settings) {
        let warm = warm(tenant, settings);
        if warm > 0 {
            sums.entry(&tenant.server).or_default().push((path, warm));
        }
    }
    for (name, parts) in sums {
        let Some(server) = settings.servers.get(name) else { continue };
        let sum = parts.iter().fold(0_u64, |sum, (_, warm)| sum.saturating_add(*warm));
        if let OrAuto::Is(cap) = server.cap
            && sum > u64::from(cap.get())
        {
            let message = format!(
                "{cap} is less than the {sum} connections that min_pool_size keeps open ({}); raise it or lower them",
                name_parts(parts),
            );
            report.problem(&[&join(&join("servers", name), "cap"), "pool.min_pool_size"], message);
        }
    }
}

/// A floor is a promise: those of a server's tenants must all be kept at once. An auto cap is known only when the server
/// is asked: then `tenantry check`, a reload and the API tell.
fn check_floors(settings: &Settings, report: &mut Report) {
    let over = floors_fit(settings, |_| None).err().map_or_else(Vec::new, |over| over.0);
    for floors in over {
        let (cap, sum, parts) = (floors.cap.unwrap_or(0), floors.sum, floors.parts("tenants."));
        let message = format!("{cap} is less than the {sum} of all floors ({parts}); raise it or lower them");
        report.problem(&[&join(&join("servers", &floors.server), "cap")], message);
    }
}
