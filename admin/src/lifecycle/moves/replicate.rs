//! Logical replication between two servers, in one direction: made, watched, and taken apart.
//!
//! What always holds: the roles, the publication, the slot and the subscription of a direction have names of their own, by
//! which they are found again and dropped; who sends and who applies are roles made for it, whose passwords nobody knows, and
//! who are the tenant inside its database and nobody else. Taking apart begins with the slot, which keeps the sender's disk
//! from being freed, and does as much as it can while one of the servers is away.

use std::time::Duration;

use serde_json::Value;
use tenantry_config::{RoleSecret, ServerTlsMode};
use tokio::time::{Instant, timeout};
use tokio_postgres::{Client, error::SqlState};

use super::{Direction, Site, StepError, still::Still};
use crate::{
    catalog::{model::Entry, store::JobRow},
    jobs::work::Step,
    lifecycle::{
        database, hand,
        hand::Hand,
        progress::{Progress, mib},
    },
    sql::{self, moves as of},
};

/// A subscription is made within this: its slot waits for transactions that are open at the other server.
const MADE_WITHIN: Duration = Duration::from_secs(120);
/// Between two looks at tables that are being copied.
const LOOK: Duration = Duration::from_millis(250);
/// Failures without a table copied meanwhile, before a copy is given up; a server that restarts brings some.
pub const FAILURES: i64 = 20;
/// Whoever uses a slot is ended so many times, so far apart.
const TRIES: u32 = 100;
const BETWEEN: Duration = Duration::from_millis(100);

/// What a server, and our role there, are good for.
#[derive(Debug, Clone)]
pub struct Abilities {
    pub version: i32,
    pub wal_level: String,
    pub slots: i32,
    pub senders: i32,
    pub workers: i32,
    pub superuser: bool,
    pub replication: bool,
    pub subscribes: bool,
}

/// PostgreSQL 16 lets a role that is no superuser have subscriptions, and make roles with REPLICATION if it has that.
const PG16: i32 = 160_000;

impl Abilities {
    pub async fn of(site: &mut Site, server: &str) -> Result<Self, StepError> {
        let row = site.control(server).await?.query_one(of::ABILITIES, &[]).await?;
        Ok(Self {
            version: row.try_get(0)?,
            wal_level: row.try_get(1)?,
            slots: row.try_get(2)?,
            senders: row.try_get(3)?,
            workers: row.try_get(4)?,
            superuser: row.try_get(5)?,
            replication: row.try_get(6)?,
            subscribes: row.try_get(7)?,
        })
    }

    pub fn major(&self) -> u32 {
        u32::try_from(self.version / 10_000).unwrap_or(0)
    }

    /// A role of its own may be made to send; else our own login does.
    fn makes_senders(&self) -> bool {
        self.superuser || self.replication && self.version >= PG16
    }
}

pub async fn is_subscribed(site: &mut Site, direction: &Direction) -> Result<bool, StepError> {
    let Direction { to, name, .. } = direction;
    let found = site.control(&to.server).await?.query_opt(of::SUBSCRIPTION, &[&to.database, name]).await?;
    Ok(found.is_some())
}

async fn has_slot(site: &mut Site, direction: &Direction) -> Result<bool, StepError> {
    Ok(site.control(&direction.from.server).await?.query_opt(of::SLOT, &[&direction.name]).await?.is_some())
}

/// From now on what is written at one place is applied at the other; with `copy_data`, after all that is there.
pub async fn begin(site: &mut Site, direction: &Direction, copy_data: bool) -> Result<(), StepError> {
    if is_subscribed(site, direction).await? {
        if !has_slot(site, direction).await? {
            return Err(StepError::Refused("a subscription has lost its slot".to_owned()));
        }
        if !Abilities::of(site, &direction.from.server).await?.makes_senders() {
            // It was made in parts, and an earlier try may not have come to the last.
            let login = make_sender(site, direction).await?;
            let conninfo = conninfo(site, &direction.from, &login)?;
            let client = as_applier(site, direction).await?;
            let led = lead(site, direction, &client, &conninfo, copy_data).await;
            return led.map_err(|error| told(&error, &direction.from, &direction.to));
        }
        return Ok(());
    }
    let Direction { from, to, name, .. } = direction;
    drop_slots(site, from, name).await?;
    publish(site, direction).await?;
    let login = make_sender(site, direction).await?;
    let conninfo = conninfo(site, from, &login)?;
    let applier = make_applier(site, direction).await?;
    let client = applier.log_in(site, &to.database).await?;
    client.batch_execute(&of::work_as(&applier.role)).await?;
    let made = timeout(MADE_WITHIN, async {
        if login.0 == direction.sender {
            site.plane.fuse.burn();
            return Ok(client.batch_execute(&of::create_subscription(name, &conninfo, copy_data)).await);
        }
        subscribe_quietly(site, direction, &client, &conninfo, copy_data).await
    });
    let Ok(made) = made.await else {
        return Err(StepError::Refused(format!(
            "replication did not begin within {}: a transaction at {} has been open for so long; end it, and try again",
            humantime::format_duration(MADE_WITHIN),
            from.server
        )));
    };
    made?.map_err(|error| told(&error, from, to))
}

/// The same in parts, of which none that may fail has the password in its text: PostgreSQL's log has the text of what failed.
async fn subscribe_quietly(
    site: &mut Site,
    direction: &Direction,
    client: &Client,
    conninfo: &str,
    copy_data: bool,
) -> Result<Result<(), tokio_postgres::Error>, StepError> {
    let Direction { from, name, .. } = direction;
    let sender = site.connect(&from.server, &from.database).await?;
    site.plane.fuse.burn();
    sender.batch_execute(of::NO_LIMIT).await?;
    sender.query_one(of::CREATE_SLOT, &[name]).await?;
    drop(sender);
    site.plane.fuse.burn();
    Ok(match client.batch_execute(&of::create_idle_subscription(name)).await {
        Ok(()) => lead(site, direction, client, conninfo, copy_data).await,
        Err(error) => Err(error),
    })
}

/// An idle subscription is told where it leads, and begins. May be done again.
async fn lead(
    site: &Site,
    direction: &Direction,
    client: &Client,
    conninfo: &str,
    copy_data: bool,
) -> Result<(), tokio_postgres::Error> {
    let name = &direction.name;
    client.batch_execute(of::MAKE_SUBSCRIBE).await?;
    site.plane.fuse.burn();
    client.query_one(of::SUBSCRIBE_QUIETLY, &[name, &conninfo]).await?;
    for statement in of::begin_subscription(name, copy_data) {
        site.plane.fuse.burn();
        client.batch_execute(&statement).await?;
    }
    Ok(())
}

/// Whether `to` can log in at `from` for what is to follow later: before anything is copied for nothing. Leaves nothing.
pub async fn rehearse(site: &mut Site, direction: &Direction) -> Result<(), StepError> {
    let Direction { from, to, name, .. } = direction;
    if is_subscribed(site, direction).await? {
        return Ok(());
    }
    let login = make_sender(site, direction).await?;
    let conninfo = conninfo(site, from, &login)?;
    let applier = make_applier(site, direction).await?;
    let tried = async {
        let client = applier.log_in(site, &to.database).await?;
        client.batch_execute(&of::work_as(&applier.role)).await?;
        site.plane.fuse.burn();
        let tried = timeout(MADE_WITHIN, client.batch_execute(&of::try_subscription(name, &conninfo))).await;
        let tried =
            tried.map_err(|_| StepError::Refused(format!("{} does not let {} in in time", from.server, to.server)))?;
        tried.map_err(|error| told(&error, from, to))
    };
    let tried: Result<(), StepError> = tried.await;
    end(site, direction).await?;
    tried.map_err(|why| match why {
        StepError::Refused(why) => StepError::Refused(format!("the old copy could not follow the new one: {why}")),
        other => other,
    })
}

/// The position in the log up to which all is known to be applied, if there is a slot.
pub async fn confirmed(site: &mut Site, Direction { from, name, .. }: &Direction) -> Result<Option<String>, StepError> {
    let slot = site.control(&from.server).await?.query_opt(of::CONFIRMED, &[name]).await?;
    Ok(slot.map_or(Ok(None), |row| row.try_get(0))?)
}

/// How far a direction has come (confirmed, received; positions in the log that only grow while it works), and how often
/// something could not be applied.
pub async fn come(site: &mut Site, direction: &Direction) -> Result<((u64, u64), i64), StepError> {
    let Direction { to, name, .. } = direction;
    let confirmed = confirmed(site, direction).await?;
    let row = site.control(&to.server).await?.query_opt(of::RECEIVED, &[&to.database, name]).await?;
    let (received, failures) = match row {
        Some(row) => (row.try_get::<_, Option<String>>(0)?, row.try_get::<_, Option<i64>>(1)?),
        None => (None, None),
    };
    let number = |text: Option<String>| text.as_deref().and_then(lsn).unwrap_or(0);
    Ok(((number(confirmed), number(received)), failures.unwrap_or(0)))
}

/// A position in the log as a number.
fn lsn(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    Some(u64::from_str_radix(high, 16).ok()? << 32 | u64::from_str_radix(low, 16).ok()?)
}

/// What another server says where a login fails for want of room; its SQLSTATE does not come through.
const NO_ROOM: [&str; 4] = [
    "too many connections for",
    "too many clients already",
    "connection slots are reserved",
    "number of requested standby connections exceeds",
];

/// Of what PostgreSQL says, no address and no secret.
fn told(error: &tokio_postgres::Error, from: &Entry, to: &Entry) -> StepError {
    let Some(db) = error.as_db_error() else { return StepError::Away("the connection broke".to_owned()) };
    tracing::warn!(error = db.message(), "a subscription was not made");
    let is_full = NO_ROOM.iter().any(|words| db.message().contains(words));
    match *db.code() {
        _ if is_full => StepError::Away(format!(
            "no connection is free at {} for {} to log in with (max_connections, max_wal_senders, or a CONNECTION LIMIT of the \
             database or a role)",
            from.server, to.server
        )),
        SqlState::CONNECTION_FAILURE | SqlState::SQLCLIENT_UNABLE_TO_ESTABLISH_SQLCONNECTION => {
            StepError::Refused(format!(
                "{} cannot log in at {}: it must reach the host and port that the settings have for {1}, and pg_hba.conf there \
                 must ask for a password (the log has PostgreSQL's words)",
                to.server, from.server
            ))
        }
        _ => StepError::Refused(format!("replication cannot begin: {}", db.message())),
    }
}

async fn publish(site: &mut Site, direction: &Direction) -> Result<(), StepError> {
    let Direction { from, name, .. } = direction;
    let hand = hand::make(site, from, &[&from.database]).await?;
    let done = async {
        let client = hand.log_in(site, &from.database).await?;
        client.batch_execute(&of::work_as(&hand.owner)).await?;
        let mut tables = Vec::new();
        for row in client.query(sql::TABLES, &[]).await? {
            tables.push((row.try_get(0)?, row.try_get(1)?));
        }
        site.plane.fuse.burn();
        client.batch_execute(&of::drop_publication(name)).await?;
        Ok(client.batch_execute(&of::create_publication(name, &tables)).await?)
    };
    let done: Result<(), StepError> = done.await;
    hand::put_down(site, from, done).await
}

/// How the other server logs in: role and password.
struct Login(String, String);

async fn make_sender(site: &mut Site, direction: &Direction) -> Result<Login, StepError> {
    let Direction { from, sender, .. } = direction;
    if !Abilities::of(site, &from.server).await?.makes_senders() {
        let settings = site.plane.file();
        let control = site.plane.server_of(&settings, &from.server)?.1;
        let RoleSecret::Plain(password) = &control.secret else {
            return Err(StepError::Refused(
                "the control role has no password that replication could log in with".to_owned(),
            ));
        };
        let login = Login(control.role.clone(), password.expose().to_owned());
        site.execute(&from.server, &of::take_time(&login.0, &from.database)).await?;
        return Ok(login);
    }
    hand::drop_role(site, from, sender).await?;
    let hand = Hand::new(sender.clone(), from);
    let verifier = hand.verifier().await?;
    let since_16 = database::is_since_16(site, &from.server).await?;
    site.execute(&from.server, &of::create_sender(sender, &verifier, &from.owner_role, since_16)).await?;
    site.execute(&from.server, &sql::grant_only_connect(&from.database, sender)).await?;
    Ok(Login(sender.clone(), hand.password().to_owned()))
}

async fn make_applier(site: &mut Site, direction: &Direction) -> Result<Hand, StepError> {
    let Direction { to, applier, .. } = direction;
    hand::drop_role(site, to, applier).await?;
    let hand = Hand::new(applier.clone(), to);
    let verifier = hand.verifier().await?;
    let until = soon(site, &to.server).await?;
    site.execute(&to.server, &of::create_applier(applier, &verifier, &until, &to.owner_role)).await?;
    site.execute(&to.server, &sql::grant_only_connect(&to.database, applier)).await?;
    Ok(hand)
}

async fn soon(site: &mut Site, server: &str) -> Result<String, StepError> {
    Ok(site.control(server).await?.query_one(sql::SOON, &[&hand::OPEN_FOR]).await?.try_get(0)?)
}

/// With a new password: whoever works in the background as this role notices nothing.
async fn as_applier(site: &mut Site, direction: &Direction) -> Result<Client, StepError> {
    let Direction { to, applier, .. } = direction;
    let hand = Hand::new(applier.clone(), to);
    let (verifier, until) = (hand.verifier().await?, soon(site, &to.server).await?);
    site.execute(&to.server, &of::renew_password(applier, &verifier, &until)).await?;
    // What lifted a fence may have taken it.
    site.execute(&to.server, &sql::grant_only_connect(&to.database, applier)).await?;
    let client = hand.log_in(site, &to.database).await?;
    client.batch_execute(&of::work_as(applier)).await?;
    Ok(client)
}

fn conninfo(site: &Site, from: &Entry, Login(user, password): &Login) -> Result<String, StepError> {
    let settings = site.plane.file();
    let server = site.plane.server_of(&settings, &from.server)?.0;
    let port = server.port.to_string();
    let mut parts = vec![
        ("host", server.host.as_str()),
        ("port", &port),
        ("dbname", &from.database),
        ("user", user),
        ("password", password),
        ("connect_timeout", "10"),
        ("keepalives_idle", "10"),
        ("keepalives_interval", "5"),
        ("keepalives_count", "3"),
    ];
    parts.extend(match server.tls.mode {
        ServerTlsMode::Disable => vec![("sslmode", "disable")],
        ServerTlsMode::Prefer => vec![("sslmode", "prefer")],
        // The roots are on this machine, not on that one; who cannot show the password's verifier over exactly this
        // connection is not the server.
        _ => vec![("sslmode", "require"), ("channel_binding", "require")],
    });
    Ok(of::conninfo(&parts))
}

/// Until every table is copied.
pub async fn await_copy(
    site: &mut Site,
    job: &JobRow,
    direction: &Direction,
    result: &mut Value,
) -> Result<(), StepError> {
    let to = &direction.to;
    let mut still = Still::of(site, job, Step::AwaitCopy, result).await?;
    let hand = hand::make(site, to, &[&to.database]).await?;
    let waited = watch_copy(site, job, direction, &hand, (&mut still, result)).await;
    hand::put_down(site, to, waited).await
}

async fn watch_copy(
    site: &mut Site,
    job: &JobRow,
    direction: &Direction,
    hand: &Hand,
    (still, result): (&mut Still, &mut Value),
) -> Result<(), StepError> {
    let stall = site.plane.file().admin.archive_stall_timeout;
    let client = hand.log_in(site, &direction.to.database).await?;
    let mut progress = Progress::of(job.id);
    let mut failed_before = None;
    loop {
        let row = client.query_one(of::COPIED, &[&direction.name]).await?;
        let (tables, copied, failures): (i64, i64, Option<i64>) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let bytes = u64::try_from(row.try_get::<_, i64>(3)?).unwrap_or(0);
        if copied == tables {
            return Ok(());
        }
        still.at(site, job, (u64::try_from(copied).unwrap_or(0), bytes), result).await?;
        let failures = failures.unwrap_or(0);
        let before = *failed_before.get_or_insert((copied, failures));
        if before.0 != copied {
            failed_before = Some((copied, failures));
        } else if failures - before.1 >= FAILURES {
            return Err(StepError::Refused(format!(
                "rows cannot be applied at {}: its log says why; {copied} of {tables} tables were copied",
                direction.to.server
            )));
        }
        if still.is_over(stall) {
            let limit = humantime::format_duration(stall);
            return Err(StepError::Refused(format!(
                "the copy hangs: nothing came for {limit}, at {copied} of {tables} tables; the servers' logs say why"
            )));
        }
        progress.tell(site, || format!("copy: {copied} of {tables} tables, {} MiB there", mib(bytes))).await;
        tokio::time::sleep(LOOK).await;
    }
}

/// All that is committed at a server now is on its disk, and before this position in its log.
pub async fn position(site: &mut Site, server: &str) -> Result<String, StepError> {
    let client = site.control(server).await?;
    client.batch_execute(of::FLUSH).await?;
    Ok(client.query_one(of::POSITION, &[]).await?.try_get(0)?)
}

/// False if it was not applied in time.
pub async fn reached(
    site: &mut Site,
    direction: &Direction,
    position: &str,
    limit: Duration,
) -> Result<bool, StepError> {
    let Direction { to, name, .. } = direction;
    let (begun, mut pause) = (Instant::now(), Duration::from_millis(2));
    loop {
        let client = site.control(&to.server).await?;
        if client.query_one(of::HAS_APPLIED, &[&to.database, name, &position]).await?.try_get(0)? {
            return Ok(true);
        }
        if begun.elapsed() >= limit {
            return Ok(false);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Takes a direction apart, as far as it is there.
pub async fn end(site: &mut Site, direction: &Direction) -> Result<(), StepError> {
    // What is sent from keeps its disk full; what is sent to may be away for long, or for ever.
    let from = end_sending(site, direction).await;
    let to = end_applying(site, direction).await;
    from.and(to)
}

pub async fn end_sending(site: &mut Site, direction: &Direction) -> Result<(), StepError> {
    let Direction { from, name, sender, .. } = direction;
    if !is_known(site, from) || direction.lost.as_ref() == Some(&from.server) {
        return Ok(());
    }
    let is_there = site.control(&from.server).await?.query_opt(sql::ROLE, &[sender]).await?.is_some();
    if is_there {
        site.execute(&from.server, &sql::no_login(sender)).await?;
    }
    drop_slots(site, from, name).await?;
    let usable = database::look(site, &from.server, &from.database).await?.is_some_and(|found| found.is_usable());
    if usable {
        let hand = hand::make(site, from, &[&from.database]).await?;
        let done = async {
            let client = hand.log_in(site, &from.database).await?;
            client.batch_execute(&of::work_as(&hand.owner)).await?;
            site.plane.fuse.burn();
            // Also the one of an earlier move, which a database that was sealed then could not be rid of.
            let base = name.strip_suffix(super::BACK).unwrap_or(name);
            let both = [base.to_owned(), format!("{base}{}", super::BACK)].map(|name| of::drop_publication(&name));
            Ok(client.batch_execute(&both.join("; ")).await?)
        };
        let done: Result<(), StepError> = done.await;
        hand::put_down(site, from, done).await?;
    }
    if is_there {
        return hand::drop_role(site, from, sender).await;
    }
    let own = {
        let settings = site.plane.file();
        site.plane.server_of(&settings, &from.server)?.1.role.clone()
    };
    match database::look(site, &from.server, &from.database).await? {
        Some(_) => site.execute(&from.server, &of::take_no_time(&own, &from.database)).await,
        None => Ok(()),
    }
}

pub async fn end_applying(site: &mut Site, direction: &Direction) -> Result<(), StepError> {
    let Direction { to, name, applier, .. } = direction;
    if !is_known(site, to) || direction.lost.as_ref() == Some(&to.server) {
        return Ok(());
    }
    if is_subscribed(site, direction).await? {
        let client = as_applier(site, direction).await?;
        for statement in of::drop_subscription(name) {
            site.plane.fuse.burn();
            client.batch_execute(&statement).await?;
        }
    }
    hand::drop_role(site, to, applier).await
}

/// A server that was taken out of the settings is gone for good.
pub fn is_known(site: &Site, place: &Entry) -> bool {
    site.plane.file().servers.contains_key(&place.server)
}

/// Ours, and those of tables that were being copied: a database with somebody else's slots is not moved.
async fn drop_slots(site: &mut Site, from: &Entry, name: &str) -> Result<(), StepError> {
    for _ in 0..TRIES {
        let rows = site.control(&from.server).await?.query(of::END_SLOTS, &[&from.database, &name]).await?;
        if rows.is_empty() {
            return Ok(());
        }
        for row in rows {
            let (slot, user): (String, Option<i32>) = (row.try_get(0)?, row.try_get(1)?);
            if user.is_some() {
                continue;
            }
            site.plane.fuse.burn();
            match site.control(&from.server).await?.query_one(of::DROP_SLOT, &[&slot]).await {
                Err(error) if matches!(error.code(), Some(&SqlState::OBJECT_IN_USE | &SqlState::UNDEFINED_OBJECT)) => {}
                other => drop(other?),
            }
        }
        tokio::time::sleep(BETWEEN).await;
    }
    Err(StepError::Away(format!("the replication slot {name} at {} is in use and cannot be dropped", from.server)))
}
