//! The demo's SQL: the only file of the command line that builds SQL text. Names are constants, passwords alphanumeric. Tenants are made through the API.

use tokio_postgres::Error;

use super::{Fork, password, postgres::Cluster};

/// Tenantry's own role, and the database that holds its catalog: what an operator makes once.
pub const CONTROL: &str = "tenantry_control";

/// Where the client is, according to PostgreSQL.
pub const PLACE: &str = "SELECT current_database()::text, current_user::text";
/// What `fill` left there to be seen.
pub const GREETING: &str = "SELECT text FROM greeting";
/// One transaction leaves something, the next one finds it.
pub const NOTE: &str = "INSERT INTO note (text) VALUES ($1)";
pub const NOTES: &str = "SELECT count(*) FROM note WHERE text = $1";

/// With what a cloud gives, which is no superuser; its password.
pub async fn control_role(cluster: &Cluster) -> Result<String, Error> {
    let password = password();
    let superuser = cluster.superuser().await?;
    let statements = [
        format!("CREATE ROLE {CONTROL} LOGIN CREATEDB CREATEROLE PASSWORD '{password}'"),
        format!("GRANT pg_signal_backend TO {CONTROL}"),
        format!("CREATE DATABASE {CONTROL} OWNER {CONTROL}"),
        format!("REVOKE CONNECT ON DATABASE {CONTROL} FROM PUBLIC"),
    ];
    for statement in statements {
        superuser.batch_execute(&statement).await?;
    }
    Ok(password)
}

/// A little content, made by the tenant's own role.
pub async fn fill(cluster: &Cluster, fork: &Fork) -> Result<(), Error> {
    let Fork { name, password } = fork;
    let owner = cluster.connect(name, password, name).await?;
    owner
        .batch_execute(&format!(
            "CREATE TABLE greeting (text text NOT NULL);
             INSERT INTO greeting VALUES ('hello from {name}');
             CREATE TABLE note (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, text text NOT NULL)"
        ))
        .await
}
