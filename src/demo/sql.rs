//! The demo's SQL: the only file of the command line that builds SQL text. Names are constants, passwords alphanumeric.

use tokio_postgres::{Client, Error};

use super::{Fork, password, postgres::Cluster};

/// Creates tenants as Tenantry's operator would: with what a cloud gives, which is no superuser.
const CONTROL_ROLE: &str = "tenantry_ctl";

/// Where the client is, according to PostgreSQL.
pub const PLACE: &str = "SELECT current_database()::text, current_user::text";
/// What `create` left there to be seen.
pub const GREETING: &str = "SELECT text FROM greeting";
/// One transaction leaves something, the next one finds it.
pub const NOTE: &str = "INSERT INTO note (text) VALUES ($1)";
pub const NOTES: &str = "SELECT count(*) FROM note WHERE text = $1";

/// A database, its role and a little content for each fork.
pub async fn create(cluster: &Cluster, forks: &[Fork]) -> Result<(), Error> {
    let control = control_role(cluster).await?;
    for fork in forks {
        create_fork(&control, fork).await?;
        let owner = cluster.connect(&fork.name, &fork.password, &fork.name).await?;
        fill(&owner, &fork.name).await?;
    }
    Ok(())
}

async fn control_role(cluster: &Cluster) -> Result<Client, Error> {
    let password = password();
    let superuser = cluster.superuser().await?;
    superuser
        .batch_execute(&format!("CREATE ROLE {CONTROL_ROLE} LOGIN CREATEDB CREATEROLE PASSWORD '{password}'"))
        .await?;
    cluster.connect(CONTROL_ROLE, &password, "postgres").await
}

async fn create_fork(control: &Client, Fork { name, password }: &Fork) -> Result<(), Error> {
    control.batch_execute(&format!("CREATE ROLE {name} LOGIN PASSWORD '{password}'")).await?;
    // Only a member may give a database to a role.
    control.batch_execute(&format!("GRANT {name} TO {CONTROL_ROLE}")).await?;
    control.batch_execute(&format!("CREATE DATABASE {name} OWNER {name} TEMPLATE template0 ENCODING 'UTF8'")).await?;
    // Else every role could connect to every database.
    control.batch_execute(&format!("REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")).await
}

async fn fill(owner: &Client, name: &str) -> Result<(), Error> {
    owner
        .batch_execute(&format!(
            "CREATE TABLE greeting (text text NOT NULL);
             INSERT INTO greeting VALUES ('hello from {name}');
             CREATE TABLE note (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, text text NOT NULL)"
        ))
        .await
}
