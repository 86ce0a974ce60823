//! An SQLite file into a tenant: the body goes to `admin.imports_dir` as it comes in, the rest is a job.
//!
//! What always holds: a body is never in memory as a whole; one that is too long, too slow or no SQLite file leaves nothing
//! behind, and so does one of which no job was made.

use std::{path::PathBuf, time::Duration};

use axum::{
    Extension,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use serde_json::json;
use tenantry_config::TenantState as S;

use super::{
    Plane, Shared, Who,
    begin::{Begin, Once},
    body::{Asked, At, Conditions},
    find,
    problem::{Answer, Errors, Problem},
    types::{Begun, DryRun, ImportQuery, SqliteFile},
};
use crate::{
    http::Busy,
    import::{file::MAGIC, spool::Upload},
    jobs::work::Work,
};

/// Between two pieces of a body.
const PIECE_LIMIT: Duration = Duration::from_secs(30);
/// What is left of a body that is refused is read for so long: whoever sends it would else see a broken connection, and no reason.
const LINGER: Duration = Duration::from_secs(5);
const TYPES: [&str; 2] = ["application/octet-stream", "application/vnd.sqlite3"];
const MOST_REPLACED: usize = 100;

/// Fills a tenant, whose tables are there and empty, with the rows of an SQLite file: all of them, in one transaction, compared
/// with the file before it is committed, or none. Clients go on; they see nothing until it is committed, and whoever writes
/// into a table that is filled waits. The answer comes when the file is here; the job tells how far it is and, where something
/// does not fit, every problem with table, row and value (`result.problems`). `application/vnd.sqlite3` is taken, too.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/import", operation_id = "import_sqlite",
    request_body(content = SqliteFile, content_type = "application/octet-stream"),
    params(("tenant" = String, Path), ImportQuery, ("If-Match" = Option<String>, Header), ("Idempotency-Key" = Option<String>, Header),
        ("Prefer" = Option<String>, Header, description = "wait=SECONDS or respond-async")),
    responses((status = 200, body = Begun), (status = 202, body = Begun), Errors))]
pub async fn import(
    State(plane): Plane,
    who: Who,
    Extension(shared): Extension<Shared>,
    At(name): At,
    conditions: Conditions,
    Asked(query): Asked<ImportQuery>,
    request: Request,
) -> Answer<Response> {
    let replace = replaced(query.replace.as_deref())?;
    let states = &[S::Active, S::Paused, S::Suspended, S::Drained];
    let (dry, wish) = (DryRun::default(), json!({ "dry_run": query.dry_run, "replace": replace }));
    let once = Once::new((&plane, &who, &conditions, &dry), ("import", &name, &wish), StatusCode::OK);
    let early = Begin { once, action: "import", name: &name, states };
    // Before a long upload that nothing could come of. Whether the same was asked before, which may have changed the tenant, is
    // known when the file is here.
    let is_first = match &conditions.key {
        Some(key) => plane.catalog.idempotent(&who.asker.actor, key).await?.is_none(),
        None => true,
    };
    if is_first && let Err(problem) = find(&plane, &name).and_then(|entry| early.may(&entry)) {
        linger(request.into_body()).await;
        return Err(problem);
    }
    let place = shared.uploads.try_acquire_owned();
    let place = place.map_err(|_| {
        let problem = Problem::too_many("too many files are being uploaded; try again in a while");
        Problem { retry_after: Some(30), ..problem }
    })?;
    let file = plane.file();
    let (dir, most) = (file.admin.imports_dir.clone(), u64::try_from(file.admin.max_import_size).unwrap_or(u64::MAX));
    let mut upload = receive(request, dir, most).await?;
    drop(place);
    let bytes = upload.bytes();
    let (upload, settled) = aside(move || {
        let settled = upload.settle();
        (upload, settled)
    })
    .await?;
    let (file, sha256) = settled.map_err(|error| no_room(&error))?;
    let wish = json!({ "dry_run": query.dry_run, "replace": replace, "bytes": bytes, "sha256": sha256 });
    let once = Once::new((&plane, &who, &conditions, &dry), ("import", &name, &wish), StatusCode::OK);
    if let Some(answered) = once.before().await? {
        return Ok(answered);
    }
    let begin = Begin { once, action: "import", name: &name, states };
    let work = Work::Import { file: file.clone(), sha256, bytes, dry_run: query.dry_run, replace };
    let made = async {
        let entry = find(&plane, &name)?;
        begin.begin(&entry, wish, work, None).await
    };
    let made = made.await;
    // A job that was begun needs its file, whatever became of the answer.
    let is_begun = match &made {
        Ok(_) => true,
        Err(problem) => problem.word() == "job-failed" || problem.status.is_server_error(),
    };
    if is_begun {
        upload.keep();
    }
    begin.once.after(made).await
}

fn replaced(list: Option<&str>) -> Answer<Vec<String>> {
    let names = list.unwrap_or_default().split(',').map(str::trim).filter(|name| !name.is_empty());
    let names: Vec<String> = names.map(str::to_owned).collect();
    if names.len() > MOST_REPLACED || names.iter().any(|name| name.contains('\0')) {
        return Err(Problem::invalid(format!(
            "replace: at most {MOST_REPLACED} names of tables, with commas between them"
        )));
    }
    Ok(names)
}

async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Answer<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Problem::internal("the file could not be stored"))
}

fn no_room(error: &std::io::Error) -> Problem {
    tracing::error!(%error, "an uploaded file cannot be stored in admin.imports_dir");
    Problem { retry_after: Some(60), ..Problem::away("the file cannot be stored here now; the log says why") }
}

/// Whether it may come in at all.
fn admit(headers: &HeaderMap, most: u64) -> Answer<()> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !TYPES.iter().any(|known| kind.eq_ignore_ascii_case(known)) {
        return Err(Problem::media_type(format!("send the file itself, with Content-Type: {}", TYPES.join(" or "))));
    }
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > most) { Err(too_large(most)) } else { Ok(()) }
}

fn too_large(most: u64) -> Problem {
    Problem::too_large(format!("the file is larger than admin.max_import_size, {most} bytes"))
}

/// The body, into a file.
async fn receive(request: Request, dir: PathBuf, most: u64) -> Answer<Upload> {
    let busy = request.extensions().get::<Busy>().cloned().unwrap_or_default();
    let _busy = busy.begin();
    let admitted = admit(request.headers(), most);
    let mut body = request.into_body();
    let received = match admitted {
        Ok(()) => store(&mut body, dir, most).await,
        Err(problem) => Err(problem),
    };
    if received.is_err() {
        linger(body).await;
    }
    received
}

async fn linger(mut body: axum::body::Body) {
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    let _ = tokio::time::timeout(LINGER, rest).await;
}

async fn store(body: &mut axum::body::Body, dir: PathBuf, most: u64) -> Answer<Upload> {
    let mut upload = aside(move || Upload::begin(&dir)).await?.map_err(|error| no_room(&error))?;
    let mut head = Vec::new();
    while let Some(piece) = piece(body).await? {
        if upload.bytes() + u64::try_from(piece.len()).unwrap_or(u64::MAX) > most {
            return Err(too_large(most));
        }
        if head.len() < MAGIC.len() {
            head.extend(piece.iter().take(MAGIC.len() - head.len()));
            is_sqlite(&head)?;
        }
        let (back, written) = aside(move || {
            let written = upload.write(&piece);
            (upload, written)
        })
        .await?;
        written.map_err(|error| no_room(&error))?;
        upload = back;
    }
    if head.len() < MAGIC.len() { Err(no_sqlite()) } else { Ok(upload) }
}

/// As far as it came in.
fn is_sqlite(head: &[u8]) -> Answer<()> {
    if MAGIC.starts_with(head) { Ok(()) } else { Err(no_sqlite()) }
}

fn no_sqlite() -> Problem {
    Problem::invalid("the body is no SQLite 3 file (or an encrypted one)")
}

async fn piece(body: &mut axum::body::Body) -> Answer<Option<Bytes>> {
    loop {
        let frame = tokio::time::timeout(PIECE_LIMIT, body.frame()).await;
        let frame = frame.map_err(|_| Problem::slow(format!("nothing of the body came for {PIECE_LIMIT:?}")))?;
        match frame {
            None => return Ok(None),
            Some(Err(_)) => return Err(Problem::malformed("the body ended early")),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}
