//! A role for one piece of work inside a tenant's database: the control role never runs what a tenant wrote.
//!
//! What always holds: a hand is a member of the tenant's owner and of nothing else, has no attribute but LOGIN, a password
//! that nobody else knows and that opens nothing after some minutes; it is dropped in the step that made it, whatever came
//! of the step, and looked for and dropped before another is made and on the way back. Triggers, CHECK constraints, casts,
//! views and the like may run while it works, and can do what the tenant itself can do.

use std::time::Duration;

use rand::{Rng, distr::Alphanumeric};
use tenantry_config::{Control, RoleSecret};
use tenantry_wire::scram;
use tokio_postgres::{Client, error::SqlState, types::ToSql};
use zeroize::Zeroizing;

use super::{Site, StepError, database, half_made};
use crate::{
    catalog::model::Entry,
    control::{self, ControlError},
    sql,
};

/// Its password opens sessions for so long; they may last longer.
pub const OPEN_FOR: &str = "10 minutes";
const PASSWORD_CHARACTERS: usize = 32;
/// Rounds make guessing slow, and nobody guesses 32 random letters; a move makes hands while clients wait.
const ITERATIONS: u32 = 16;
const PG16: i32 = 160_000;
/// Its sessions are ended so many times, so far apart, before a step gives up.
const TRIES: u32 = 200;
const BETWEEN: Duration = Duration::from_millis(50);

/// A role that is there until `drop_of`.
pub struct Hand {
    pub role: String,
    /// Whom it becomes.
    pub owner: String,
    pub server: String,
    password: Zeroizing<String>,
}

/// No tenant's role: it is no valid name of one.
fn name(catalog: &str, number: i64) -> String {
    format!("{}-hand", half_made(catalog, number))
}

/// Made for work in these databases.
pub async fn make(site: &mut Site, entry: &Entry, databases: &[&str]) -> Result<Hand, StepError> {
    drop_of(site, entry).await?;
    let hand = Hand::new(name(&database::catalog_id(site), entry.number), entry);
    let verifier = hand.verifier().await?;
    let client = site.control(&entry.server).await?;
    let version = client.query_one("SHOW server_version_num", &[]).await?;
    let version: i32 = version.try_get::<_, String>(0)?.parse().unwrap_or(0);
    let until: String = client.query_one(sql::SOON, &[&OPEN_FOR]).await?.try_get(0)?;
    let mut statements = sql::create_hand(&hand.role, &verifier, &until, &hand.owner, version >= PG16);
    for database in databases {
        statements.push_str("; ");
        statements.push_str(&sql::grant_only_connect(database, &hand.role));
    }
    site.execute(&entry.server, &statements).await?;
    Ok(hand)
}

/// What the owner's own sessions begin with (ALTER ROLE SET, and that of the tenant's database) holds for this role's, too.
pub async fn set_as_owner(site: &mut Site, entry: &Entry, role: &str) -> Result<(), StepError> {
    let parameters: [&(dyn ToSql + Sync); 2] = [&entry.owner_role, &entry.database];
    let rows = site.control(&entry.server).await?.query(sql::SETTINGS_OF_ROLE, &parameters).await?;
    for row in rows {
        let (setting, value): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let statement = sql::set_role_default(role, None, &setting, &value);
        match site.control(&entry.server).await?.batch_execute(&statement).await {
            Ok(()) => {}
            // A superuser's, and we are none; or one that PostgreSQL does not know any more, which is no error at a login either.
            Err(error) if error.as_db_error().is_some() && !error.is_closed() => {
                let code = error.code().map_or("", SqlState::code);
                tracing::warn!(tenant = %entry.name, %setting, code, "a setting of the owner's role is not in force for this job");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// After its work, whatever came of it.
pub async fn put_down<T>(site: &mut Site, entry: &Entry, done: Result<T, StepError>) -> Result<T, StepError> {
    match (done, drop_of(site, entry).await) {
        // The work counts only when nothing of it is left.
        (Ok(done), dropped) => dropped.map(|()| done),
        (Err(why), Ok(())) => Err(why),
        (Err(why), Err(left)) => {
            tracing::warn!(%left, "a role that a job made is left for now");
            // The next try, or the way back, drops it.
            Err(if matches!(why, StepError::Lost(_)) { why } else { StepError::Away(why.to_string()) })
        }
    }
}

/// Ends what it does and drops it, if it is there.
pub async fn drop_of(site: &mut Site, entry: &Entry) -> Result<(), StepError> {
    let role = name(&database::catalog_id(site), entry.number);
    drop_role(site, entry, &role).await
}

/// The same, of any role that was made for a while and may have become the tenant's owner.
pub async fn drop_role(site: &mut Site, entry: &Entry, role: &str) -> Result<(), StepError> {
    if site.control(&entry.server).await?.query_opt(sql::ROLE, &[&role]).await?.is_none() {
        return Ok(());
    }
    // First, so that none of its sessions that ends now is followed by another.
    site.execute(&entry.server, &sql::no_login(role)).await?;
    end_sessions(site, entry, role).await?;
    let mut rights = Vec::new();
    for row in site.control(&entry.server).await?.query(sql::HELD_BY, &[&role]).await? {
        let (database, is_right): (String, bool) = (row.try_get(0)?, row.try_get(1)?);
        if is_right {
            rights.push(database);
        } else {
            // Something of the tenant made it own something: it is the tenant's.
            let client = site.connect(&entry.server, &database).await?;
            site.plane.fuse.burn();
            client.batch_execute(&sql::hand_over(role, &entry.owner_role)).await?;
        }
    }
    site.execute(&entry.server, &sql::drop_hand(role, &rights)).await
}

async fn end_sessions(site: &mut Site, entry: &Entry, role: &str) -> Result<(), StepError> {
    for _ in 0..TRIES {
        let row = site.control(&entry.server).await?.query_one(sql::END_SESSIONS_OF_ROLE, &[&role]).await?;
        if row.try_get::<_, i64>(0)? == 0 {
            return Ok(());
        }
        tokio::time::sleep(BETWEEN).await;
    }
    Err(StepError::Away(format!("sessions of {role} do not end")))
}

impl Hand {
    /// With a new password; the role is yet to be made.
    pub fn new(role: String, entry: &Entry) -> Self {
        let password: String =
            rand::rng().sample_iter(Alphanumeric).take(PASSWORD_CHARACTERS).map(char::from).collect();
        let (owner, server) = (entry.owner_role.clone(), entry.server.clone());
        Self { role, owner, server, password: Zeroizing::new(password) }
    }

    pub fn password(&self) -> &str {
        &self.password
    }

    pub async fn verifier(&self) -> Result<String, StepError> {
        let (password, salt): (_, [u8; 16]) = (self.password.clone(), rand::random());
        let made = move || scram::Verifier::from_password(password.as_bytes(), &salt, ITERATIONS).to_pg_string();
        tokio::task::spawn_blocking(made).await.map_err(|_| StepError::Away("no verifier could be made".to_owned()))
    }

    /// A session as the tenant's owner, who reads and writes nothing down.
    pub async fn connect(&self, site: &Site, database: &str) -> Result<Client, StepError> {
        let client = self.log_in(site, database).await?;
        client.batch_execute(&sql::plain_text_as(&self.owner)).await?;
        Ok(client)
    }

    /// A session as nobody but the hand.
    pub async fn log_in(&self, site: &Site, database: &str) -> Result<Client, StepError> {
        let settings = site.plane.file();
        let (server, control) = site.plane.server_of(&settings, &self.server)?;
        let secret = RoleSecret::Plain(self.password.to_string().into());
        let login = Control { role: self.role.clone(), secret, ..control.clone() };
        control::connect_to(server, &login, database).await.map_err(|error| self.kept_out(error))
    }

    fn kept_out(&self, error: ControlError) -> StepError {
        let code = if let ControlError::Postgres(error) = &error { error.code().cloned() } else { None };
        match code {
            Some(SqlState::INVALID_AUTHORIZATION_SPECIFICATION | SqlState::INVALID_PASSWORD) => {
                StepError::Refused(format!(
                    "PostgreSQL does not let in {}, the role that this job made for its work: pg_hba.conf must let in all \
                     roles from here, with scram-sha-256",
                    self.role
                ))
            }
            _ => error.into(),
        }
    }
}
