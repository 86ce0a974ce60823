//! Every key once: one row per setting, walked by the loader and by the reference alike.
//!
//! What always holds: a row is a field of `settings.rs` under its own name, and a field without a row does not compile.

use std::path::PathBuf;

use documented::{Documented, DocumentedFields};

use crate::{
    Admin, Auth, ClientTls, Listen, Log, Pool, PoolMode, Process, Secret, Server, ServerTls, Tenant,
    value::{Octal, Setting},
};

/// What is done at each row.
pub(crate) trait Visitor {
    fn key<T: Setting>(&mut self, name: &'static str, field: &mut T);
    fn section<S: Section>(&mut self, name: &'static str, section: &mut S);
}

/// A table of the file.
pub(crate) trait Section: Documented + DocumentedFields {
    fn keys(&mut self, visitor: &mut impl Visitor);
}

/// `section!(Type { key, key as Form; section, … ; field handled elsewhere, … })`
macro_rules! section {
    ($type:ident { $($key:ident $(as $form:ident)?),* ; $($section:ident),* ; $($other:ident),* }) => {
        impl Section for $type {
            fn keys(&mut self, visitor: &mut impl Visitor) {
                let Self { $($key,)* $($section,)* $($other: _,)* } = self;
                $(section!(@key visitor $key $($form)?);)*
                $(visitor.section(stringify!($section), $section);)*
            }
        }
    };
    (@key $visitor:ident $key:ident) => {
        $visitor.key(stringify!($key), $key);
    };
    (@key $visitor:ident $key:ident $form:ident) => {
        let mut form = $form(*$key);
        $visitor.key(stringify!($key), &mut form);
        *$key = form.0;
    };
}

section!(Process { workers; ; });
section!(Listen {
    addresses, unix_socket_dir, unix_socket_mode as Octal, max_client_conn, client_login_timeout, max_message_size,
    max_message_memory;
    tls;
});
section!(ClientTls { mode, cert_file, key_file, state_dir; ; });
section!(Auth { auth_type, scram_iterations, max_failed_logins; ; });
section!(Pool {
    pool_mode, pool_size, min_pool_size, max_waiters, query_wait_timeout, server_round_robin, server_lifetime,
    server_idle_timeout, server_connect_timeout, server_check_delay, max_prepared_statements, query_timeout,
    idle_transaction_timeout, transaction_timeout, client_idle_timeout, rollback_timeout, max_pinned,
    isolation, reuse_unnamed_statements;
    ;
});
section!(Admin {
    address, cert_file, key_file, client_ca_file, catalog, state_dir, archives, archives_volatile, archive_stall_timeout,
    imports_dir, max_import_size, import_timeout, max_followed_wal, postgres_bin, extensions, public_address;
    ;
});
section!(Log { filter, format; ; });
section!(Server {
    host, port, cap, reserve, max_connecting, server_login_retry, tcp_user_timeout, max_cancels;
    tls;
    control
});
section!(ServerTls { mode, ca_file, direct; ; });
section!(Tenant { server, database, aliases, floor, ceiling, weight, max_client_conn; ; pool, roles, standing });
section!(ControlKeys { role, database, password, password_file, password_env, connection_limits; ; });
section!(RoleKeys { name, password, password_file, password_env, pool_mode, pool_size; ; });

/// `[[tenants.NAME.roles]]`: a role that may log in to this tenant; `[[roles]]` takes the same keys, for every tenant.
#[derive(Debug, Default, Documented, DocumentedFields)]
pub(crate) struct RoleKeys {
    /// The name that clients log in with.
    pub(crate) name: String,
    /// Plain, `md5<32 hex>` or `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`, as in `pg_authid`. At most one
    /// of `password`, `password_file` and `password_env`; none is only good for `auth_type = "trust"`.
    pub(crate) password: Option<Secret>,
    /// File that holds the secret; one newline at its end is dropped.
    pub(crate) password_file: Option<PathBuf>,
    /// Environment variable that holds the secret.
    pub(crate) password_env: Option<String>,
    /// Overrides the tenant's.
    pub(crate) pool_mode: Option<PoolMode>,
    /// Overrides the tenant's.
    pub(crate) pool_size: Option<u32>,
}

/// `[servers.NAME.control]`: Tenantry's own login, for what is done to databases; clients never get it. It uses one
/// connection now and then, which is not part of `cap`.
#[derive(Debug, Documented, DocumentedFields)]
pub(crate) struct ControlKeys {
    /// Role; for `connection_limits` it must own the databases or be a member of their owners.
    pub(crate) role: String,
    /// Database that it logs in to.
    pub(crate) database: String,
    /// Plain. At most one of `password`, `password_file` and `password_env`; none where the server trusts the role.
    pub(crate) password: Option<Secret>,
    /// File that holds the password; one newline at its end is dropped.
    pub(crate) password_file: Option<PathBuf>,
    /// Environment variable that holds the password.
    pub(crate) password_env: Option<String>,
    /// Keep PostgreSQL's own CONNECTION LIMIT of each tenant's database equal to the tenant's `ceiling`, so that nobody
    /// gets past it, not even around Tenantry (superusers excepted; not those of [tenants."*"]). Limits that were set stay when
    /// this is turned off.
    pub(crate) connection_limits: bool,
}

impl Default for ControlKeys {
    fn default() -> Self {
        Self {
            role: String::new(),
            database: "postgres".to_owned(),
            password: None,
            password_file: None,
            password_env: None,
            connection_limits: false,
        }
    }
}

/// The keys that `[tenants.NAME]` takes: its own and, flat, those of `[pool]`.
pub(crate) struct FlatTenant<'a>(pub(crate) &'a mut Tenant);

impl FlatTenant<'_> {
    pub(crate) fn keys(&mut self, visitor: &mut impl Visitor) {
        self.0.keys(visitor);
        self.0.pool.keys(visitor);
    }
}
