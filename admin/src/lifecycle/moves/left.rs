//! The way back by force: from a place that the copy does not follow any more, or that is lost.
//!
//! What always holds: what can still be had of it is taken along, and nobody waits long for that; nothing is asked of a server
//! that did not answer, and the catalog remembers that its copy is still to be closed; nothing is applied any more to the
//! database that clients are let into.

use std::time::Duration;

use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    BEFORE_THE_FENCE, Direction, IN_THE_FENCE, Pair, Site, StepError,
    cutover::{self, LAST},
    replicate::{self, position, reached},
};
use crate::{
    catalog::{
        model::{Entry, Kept, Method},
        store::JobRow,
    },
    lifecycle::{database, hand},
    sql::moves as of,
};

/// A server that does not answer so often, so far apart, cannot be reached: longer than a restart takes, or than all of its
/// connections are taken for.
const TRIES: u32 = 6;
const BETWEEN: Duration = Duration::from_secs(2);
/// A copy that follows comes so far within this.
const WELL: Duration = Duration::from_secs(3);
/// Where following was stuck before anybody waited, no more is expected of it.
const STUCK: Duration = Duration::from_millis(500);

/// Why a server cannot be reached, if it cannot; one that was taken out of the settings is gone for good.
pub async fn away(site: &mut Site, server: &str) -> Result<Option<String>, StepError> {
    let mut why = String::new();
    if !site.plane.file().servers.contains_key(server) {
        return Ok(Some("it is not in the settings any more".to_owned()));
    }
    for n in 0..TRIES {
        if n > 0 {
            tokio::time::sleep(BETWEEN).await;
        }
        match ask(site, server).await {
            Ok(()) => return Ok(None),
            Err(StepError::Away(words)) => why = words,
            Err(other) => return Err(other),
        }
    }
    Ok(Some(why))
}

async fn ask(site: &mut Site, server: &str) -> Result<(), StepError> {
    site.control(server).await?.query_one(of::POSITION, &[]).await?;
    Ok(())
}

/// What is known before anything is done of how far the copy has come; noted for whoever looks at the job.
pub async fn note(
    site: &mut Site,
    entry: &Entry,
    kept: &Kept,
    pair: &Pair,
    result: &mut Value,
) -> Result<(), StepError> {
    let place = &entry.server;
    let mut left = json!({ "at": place });
    if let Some(ended) = &kept.ended {
        left["why"] = json!(ended.why);
    }
    let seen = site.plane.copies.seen(entry.number);
    let direction = pair.back(site);
    // Until the move all of it was there, whether anybody saw it follow since or not.
    let until = seen.as_ref().and_then(|seen| seen.applied).unwrap_or(kept.since);
    left["applied_until"] = json!(until.format(&Rfc3339).ok());
    left["position"] = json!(match pair.lost {
        None => replicate::confirmed(site, &direction).await?,
        Some(_) => seen.and_then(|seen| seen.position),
    });
    if kept.follows && pair.lost.is_none() && replicate::is_subscribed(site, &direction).await? {
        let at = position(site, place).await?;
        if reached(site, &direction, &at, WELL).await? {
            result["follows_well"] = json!(true);
            left["applied_until"] = json!(OffsetDateTime::now_utc().format(&Rfc3339).ok());
            left["position"] = json!(at);
        }
    }
    left["what"] = json!(words(&left, pair.lost.is_some(), result["follows_well"] == true));
    result["left_behind"] = left;
    Ok(())
}

/// In words.
fn words(left: &Value, is_lost: bool, follows_well: bool) -> String {
    let place = left["at"].as_str().unwrap_or_default();
    if follows_well {
        return format!("nothing that was written at {place} until clients were stopped, but changes of its tables");
    }
    let since = left["applied_until"].as_str().unwrap_or_default();
    let then = if is_lost { "cannot be reached, and is closed once it is back" } else { "is kept, closed" };
    format!("what was written at {place} since {since}, or since a time after that; that copy {then}")
}

/// As of any move; a server that goes meanwhile is left as it is.
pub async fn fence(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    pair: &Pair,
    result: &mut Value,
) -> Result<(), StepError> {
    if pair.lost.is_some() {
        return Ok(());
    }
    match cutover::fence(site, entry, pair).await {
        Err(StepError::Away(why)) => {
            if away(site, &entry.server).await?.is_none() {
                return Err(StepError::Away(why));
            }
            tracing::warn!(tenant = %entry.name, server = %entry.server, why, "a server is left that cannot be closed");
            result["lost"] = json!(IN_THE_FENCE);
            // What clients wrote until now may not all have come.
            result["follows_well"] = json!(false);
            result["left_behind"]["what"] = json!(words(&result["left_behind"], true, false));
            site.note(job, result).await
        }
        other => other,
    }
}

/// What was written last, as far as it comes at once, and the sequences; whatever is in the way of that stays behind.
pub async fn last_rows(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    pair: &Pair,
    result: &mut Value,
) -> Result<(), StepError> {
    let direction = pair.back(site);
    let has_followed = entry.kept.as_ref().is_some_and(|kept| kept.follows || kept.ended.is_some());
    if pair.lost.is_some() || !has_followed {
        return Ok(());
    }
    // Whatever goes wrong from here on, nobody is told that nothing stays behind before it is known.
    let followed_well = result["follows_well"] == true;
    let all_came = result["left_behind"]["what"].clone();
    result["follows_well"] = json!(false);
    result["left_behind"]["what"] = json!(words(&result["left_behind"], false, false));
    site.note(job, result).await?;
    let taken = async {
        if replicate::is_subscribed(site, &direction).await? {
            let limit = if followed_well { LAST } else { STUCK };
            let at = position(site, &direction.from.server).await?;
            if reached(site, &direction, &at, limit).await? && followed_well {
                result["follows_well"] = json!(true);
                result["left_behind"]["what"] = all_came;
                site.note(job, result).await?;
            }
        }
        take_sequences(site, pair).await
    };
    if let Err(why) = taken.await {
        tracing::warn!(tenant = %entry.name, %why, "what could be taken along on the way back was not");
    }
    Ok(())
}

async fn take_sequences(site: &mut Site, pair: &Pair) -> Result<(), StepError> {
    let Pair { old, new, .. } = pair;
    database::unfence(site, &old.server, &old.database).await?;
    let source = hand::make(site, new, &[&new.database]).await?;
    let taken = async {
        let copy = hand::make(site, old, &[&old.database]).await?;
        let done = async {
            let from = source.connect(site, &new.database).await?;
            let to = copy.log_in(site, &old.database).await?;
            to.batch_execute(&of::work_as(&copy.owner)).await?;
            cutover::carry_sequences(site, &from, &to).await
        };
        let done = done.await;
        hand::put_down(site, old, done).await
    };
    let taken = taken.await;
    hand::put_down(site, new, taken).await
}

/// Replication carried rows, and no sequences: each is set behind what its columns hold. Clients wait for it, and the route is
/// changed already: what PostgreSQL refuses of it is told, and done by hand.
pub async fn mend_sequences(site: &mut Site, pair: &Pair, result: &mut Value) -> Result<(), StepError> {
    match raise_sequences(site, pair).await {
        Err(StepError::Refused(why)) => {
            tracing::warn!(tenant = %pair.old.name, server = %pair.old.server, why, "sequences are not set on the way back");
            result["left_behind"]["sequences"] = json!(format!("not set behind the numbers in the tables: {why}"));
            Ok(())
        }
        other => other,
    }
}

async fn raise_sequences(site: &mut Site, pair: &Pair) -> Result<(), StepError> {
    let Pair { old, .. } = pair;
    let method =
        site.plane.known().tenants.iter().find(|e| e.number == old.number).and_then(|e| Some(e.kept.as_ref()?.method));
    if method == Some(Method::Dump) {
        return Ok(());
    }
    database::unfence(site, &old.server, &old.database).await?;
    let hand = hand::make(site, old, &[&old.database]).await?;
    let done = async {
        let client = hand.log_in(site, &old.database).await?;
        client.batch_execute(&of::work_as(&hand.owner)).await?;
        let mut statements = Vec::new();
        for row in client.query(of::COUNTED_COLUMNS, &[]).await? {
            let text = |n: usize| row.try_get::<_, String>(n);
            statements.push(of::raise_sequence(
                (&text(0)?, &text(1)?),
                (&text(2)?, &text(3)?, &text(4)?),
                row.try_get(5)?,
            ));
        }
        site.plane.fuse.burn();
        Ok(client.batch_execute(&statements.join("; ")).await?)
    };
    let done: Result<(), StepError> = done.await;
    hand::put_down(site, old, done).await
}

/// As of any move. What the place that is left does not answer to is done once it is back.
pub async fn end(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    direction: &Direction,
    result: &mut Value,
) -> Result<(), StepError> {
    let left = entry.kept.as_ref().map(|kept| kept.server.clone()).unwrap_or_default();
    match replicate::end(site, direction).await {
        Err(StepError::Away(why)) if direction.lost.is_none() && away(site, &left).await?.is_some() => {
            tracing::warn!(tenant = %entry.name, server = %left, why, "a server is left as it is until it is back");
            site.change(entry.number, |e| {
                e.kept.iter_mut().for_each(|kept| kept.is_open = true);
                Ok(())
            })
            .await?;
            result["lost"] = json!(IN_THE_FENCE);
            site.note(job, result).await?;
            // What is to be done at the other place may not have been.
            Err(StepError::Away(why))
        }
        other => other,
    }
}

/// Before anything is done: whether the place that is left is there at all.
pub async fn look(site: &mut Site, entry: &Entry, kept: &Kept, result: &mut Value) -> Result<bool, StepError> {
    let Some(why) = away(site, &entry.server).await? else { return Ok(true) };
    tracing::warn!(tenant = %entry.name, server = %entry.server, why, "the way back leaves a server that cannot be reached");
    result["lost"] = json!(BEFORE_THE_FENCE);
    // Who may be let in there, should somebody go there once more.
    result["acl"] = json!(kept.acl);
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_behind_is_told_as_far_as_it_is_known() {
        let known = json!({ "at": "other", "applied_until": "2026-11-28T10:00:00Z" });
        let told = words(&known, true, false);
        assert!(told.contains("other since 2026-11-28T10:00:00Z") && told.contains("once it is back"), "{told}");
        assert!(words(&known, false, false).contains("is kept, closed"));
        assert!(words(&known, false, true).starts_with("nothing"));
    }
}
