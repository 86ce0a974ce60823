//! Copies that moves left behind, between one job and the next: closed where that could not be done before, and followed for
//! only as long as that costs little.
//!
//! What always holds: done by the process that runs the jobs, and never for a tenant that has a job, at which is looked once more
//! right before each effect; only the copy that the catalog calls kept is closed, and a database that PostgreSQL has under
//! another number is left alone; the slot is dropped before it is written down that nothing follows any more, so that no
//! server keeps its log for a copy that was given up.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use time::OffsetDateTime;
use tokio::time::timeout;

use super::{Pair, Site, StepError, at, replicate};
use crate::{
    catalog::{
        model::{Ended, Entry, Kept},
        store::MOST_OPEN_JOBS,
    },
    lifecycle::{database, hand, progress::mib},
    plane::ControlPlane,
    sql::{self, moves as of},
};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(2);
/// For one copy.
const LIMIT: Duration = Duration::from_secs(60);

/// What following costs, by tenant number: as this process saw it last, if it runs the jobs.
#[derive(Debug, Default)]
pub struct Copies(Mutex<BTreeMap<i64, Seen>>);

/// Of one tenant.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub tenant: String,
    pub server: String,
    /// Log that the server keeps for the copy; `None`: it could not be asked.
    pub bytes: Option<u64>,
    /// All that was written until then is at the copy.
    pub applied: Option<OffsetDateTime>,
    /// The position in the log that the copy has confirmed.
    pub position: Option<String>,
    /// The server's position at an earlier look, which the copy has not confirmed yet.
    ahead: Option<(String, OffsetDateTime)>,
}

impl Copies {
    pub fn seen(&self, number: i64) -> Option<Seen> {
        self.0.lock().get(&number).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Seen> {
        self.0.lock().values().cloned().collect()
    }

    fn put(&self, number: i64, seen: Seen) {
        self.0.lock().insert(number, seen);
    }

    fn only(&self, numbers: &BTreeSet<i64>) {
        self.0.lock().retain(|number, _| numbers.contains(number));
    }
}

/// While this process runs the jobs, under that number. Cancel-safe: what is left undone is found at the next look.
pub async fn watch(plane: Arc<ControlPlane>, leader: i64) {
    let mut site = Site::new(Arc::clone(&plane), leader);
    let mut told = BTreeSet::new();
    loop {
        look(&mut site, &mut told).await;
        tokio::time::sleep(EVERY).await;
    }
}

/// `told`: what was told once and need not be told at every look.
async fn look(site: &mut Site, told: &mut BTreeSet<(i64, String)>) {
    let known = site.plane.known();
    let copies = known.tenants.iter().filter_map(|entry| Some((entry, entry.kept.as_ref()?)));
    let copies: Vec<(&Entry, &Kept)> = copies.filter(|(_, kept)| kept.follows || kept.is_open).collect();
    let followed = copies.iter().filter(|(_, kept)| kept.follows);
    site.plane.copies.only(&followed.map(|(entry, _)| entry.number).collect());
    if copies.is_empty() {
        told.clear();
        return;
    }
    let busy: BTreeSet<i64> = match site.plane.catalog.open_jobs().await {
        Ok((jobs, unreadable)) if unreadable.is_empty() && jobs.len() < MOST_OPEN_JOBS => {
            jobs.iter().map(|job| job.tenant).collect()
        }
        _ => return,
    };
    let mut away = BTreeSet::new();
    for (entry, kept) in copies.into_iter().filter(|(entry, _)| !busy.contains(&entry.number)) {
        let asked = if kept.is_open { &kept.server } else { &entry.server };
        if away.contains(asked) {
            continue;
        }
        let done = timeout(LIMIT, async {
            if kept.is_open { close(site, entry, kept).await } else { measure(site, entry, kept).await }
        });
        let done = done.await.unwrap_or_else(|_| Err(StepError::Away(format!("no answer within {LIMIT:?}"))));
        let Err(error) = done else {
            told.retain(|(number, _)| *number != entry.number);
            continue;
        };
        if matches!(error, StepError::Away(_)) {
            away.insert(asked.clone());
        }
        forget_bytes(site, entry);
        if told.insert((entry.number, error.to_string())) {
            tracing::warn!(tenant = %entry.name, server = %asked, %error, "a copy that a move left cannot be looked after; tried on and on");
        }
    }
}

/// A figure that nobody can renew would be a lie.
fn forget_bytes(site: &Site, entry: &Entry) {
    if let Some(seen) = site.plane.copies.seen(entry.number) {
        site.plane.copies.put(entry.number, Seen { bytes: None, ..seen });
    }
}

/// Of a server that is back: nobody gets into the copy, and nothing is sent from it.
async fn close(site: &mut Site, entry: &Entry, kept: &Kept) -> Result<(), StepError> {
    let found = database::look(site, &kept.server, &kept.database).await?;
    still_so(site, entry, kept).await?;
    if let Some(found) = &found {
        if kept.oid != 0 && found.oid != kept.oid {
            return Err(StepError::Refused(format!(
                "there is another database {} at {} than the one that was left: nobody touches it, and nothing leads there; \
                 close or drop it by hand, then confirm the move",
                kept.database, kept.server
            )));
        }
        if kept.ended.is_some() {
            // It applied, and let nobody else in. What did that is dropped from within.
            let given_up = Pair { old: at(entry, &kept.server), new: at(entry, &entry.server), lost: None };
            replicate::end_applying(site, &given_up.back(site)).await?;
            still_so(site, entry, kept).await?;
        }
        site.execute(&kept.server, &sql::allow_connections(&kept.database, false)).await?;
        database::quiet_around(site, &kept.server, &kept.database).await?;
    }
    // If it was left on the way back, it sent: what followed was named so.
    let left = Pair { old: at(entry, &entry.server), new: at(entry, &kept.server), lost: None };
    still_so(site, entry, kept).await?;
    replicate::end_sending(site, &left.back(site)).await?;
    hand::drop_of(site, &left.new).await?;
    still_so(site, entry, kept).await?;
    let oid = found.map(|found| found.oid);
    site.change(entry.number, |e| {
        if let Some(kept) = &mut e.kept {
            kept.is_open = false;
            kept.oid = oid.unwrap_or(kept.oid);
        }
        Ok(())
    })
    .await?;
    tracing::warn!(tenant = %entry.name, server = %kept.server, "the copy that was left there is closed now");
    Ok(())
}

/// Nothing has become of the tenant since it was looked at: no job has it, and the copy is the one that it was.
async fn still_so(site: &Site, entry: &Entry, kept: &Kept) -> Result<(), StepError> {
    let (jobs, _) = site.plane.catalog.open_jobs().await?;
    let known = site.plane.known();
    let now = known.tenants.iter().find(|now| now.number == entry.number).filter(|now| now.server == entry.server);
    let is_same = now.and_then(|now| now.kept.as_ref()).is_some_and(|now| {
        (&now.server, &now.database, now.oid, now.follows, now.is_open)
            == (&kept.server, &kept.database, kept.oid, kept.follows, kept.is_open)
    });
    if is_same && jobs.iter().all(|job| job.tenant != entry.number) {
        return Ok(());
    }
    Err(StepError::InUse("it is another's turn with this tenant".to_owned()))
}

/// How much log is kept for a copy that follows; past the limit it follows no more.
async fn measure(site: &mut Site, entry: &Entry, kept: &Kept) -> Result<(), StepError> {
    let pair = Pair { old: at(entry, &kept.server), new: at(entry, &entry.server), lost: None };
    let direction = pair.back(site);
    let seen = site.plane.copies.seen(entry.number).unwrap_or_default();
    let ahead = seen.ahead.as_ref().map(|(position, _)| position.as_str());
    // Of before the position that is asked for: what was written since may be behind it.
    let asked = OffsetDateTime::now_utc();
    let row = site.control(&entry.server).await?.query_opt(of::KEPT_LOG, &[&direction.name, &ahead]).await?;
    let Some(row) = row else {
        return give_up(site, entry, (kept, &pair), "its replication slot is gone".to_owned()).await;
    };
    let (status, bytes): (Option<String>, Option<i64>) = (row.try_get(0)?, row.try_get(1)?);
    let (now, is_past): (String, bool) = (row.try_get(2)?, row.try_get(3)?);
    let bytes = u64::try_from(bytes.unwrap_or(0)).unwrap_or(0);
    let is_first = seen.ahead.is_none();
    let applied = if is_past { seen.ahead.as_ref().map(|(_, at)| *at) } else { seen.applied };
    site.plane.copies.put(
        entry.number,
        Seen {
            tenant: entry.name.clone(),
            server: entry.server.clone(),
            bytes: Some(bytes),
            applied,
            position: row.try_get(4)?,
            ahead: if is_first || is_past { Some((now, asked)) } else { seen.ahead },
        },
    );
    if status.as_deref() == Some("lost") {
        let why = "the server dropped log that it needed (max_slot_wal_keep_size)".to_owned();
        return give_up(site, entry, (kept, &pair), why).await;
    }
    let most = u64::try_from(site.plane.file().admin.max_followed_wal).unwrap_or(u64::MAX);
    if bytes > most {
        let why = format!(
            "{} kept {} MiB of its log for it, more than admin.max_followed_wal ({} MiB)",
            entry.server,
            mib(bytes),
            mib(most)
        );
        return give_up(site, entry, (kept, &pair), why).await;
    }
    // So that it does not come and go with every segment.
    let is_dear = if kept.is_dear { bytes > most / 4 } else { bytes > most / 2 };
    if is_dear != kept.is_dear {
        if is_dear {
            tracing::warn!(tenant = %entry.name, server = %entry.server, kept_mib = %mib(bytes), limit_mib = %mib(most),
                "log is kept for the copy of a move, more than half of what may be: confirm the move, or roll it back");
        }
        set(site, entry, |kept| kept.is_dear = is_dear).await?;
    }
    Ok(())
}

async fn set(site: &Site, entry: &Entry, edit: impl Fn(&mut Kept) + Send) -> Result<(), StepError> {
    site.change(entry.number, |e| {
        e.kept.iter_mut().for_each(edit);
        Ok(())
    })
    .await
}

/// From now on the copy is as it is. Its own server may be away: it is closed, and what is left there is dropped, once it is back.
async fn give_up(site: &mut Site, entry: &Entry, (kept, pair): (&Kept, &Pair), why: String) -> Result<(), StepError> {
    let direction = pair.back(site);
    still_so(site, entry, kept).await?;
    replicate::end_sending(site, &direction).await?;
    still_so(site, entry, kept).await?;
    tracing::warn!(tenant = %entry.name, copy = %direction.to.server, why,
        "the copy of a move follows no more: a rollback would leave behind what was written since");
    let ended = Ended { why, at: OffsetDateTime::now_utc() };
    set(site, entry, |kept| {
        (kept.follows, kept.is_dear, kept.is_open, kept.ended) = (false, false, true, Some(ended.clone()));
    })
    .await?;
    site.plane
        .copies
        .only(&site.plane.known().tenants.iter().filter(|e| e.number != entry.number).map(|e| e.number).collect());
    Ok(())
}
