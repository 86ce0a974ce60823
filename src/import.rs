//! `tenantry tenant import`: a copy of the SQLite file as of one moment, its upload, and what the job says of it.

use std::path::Path;

use futures_util::stream;
use serde_json::Value;
use tenantry_admin::import::{copy, file::MAGIC};
use tokio::io::AsyncReadExt as _;

use crate::{
    cli,
    client::{Client, Options},
    commands::{bar, follow, segment, verdict, word},
    failure::Failure,
    output,
};

/// Of one read.
const CHUNK: usize = 64 << 10;
const COPYING: &str = "copy   {bar:30} {percent:>3} %";
const UPLOADING: &str = "upload {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta}";
const FILLING: &str = "rows   {bar:30} {pos} of {len} {wide_msg}";

/// How it is done.
#[derive(Debug)]
pub struct How {
    pub dry_run: bool,
    pub replace: Vec<String>,
    pub no_wait: bool,
}

pub async fn run(api: &cli::Api, name: &str, file: &Path, how: How) -> Result<(), Failure> {
    let client = Client::new(api)?;
    let is_shown = !api.json;
    // Gone at the end, whatever comes.
    let dir = tempfile::tempdir().map_err(Failure::internal("cannot make a directory for a copy of the file"))?;
    let copied = dir.path().join("copy.sqlite3");
    copy_of(file, &copied, is_shown).await?;
    let mut path = format!("/v1/tenants/{}/import?dry_run={}", segment(name), how.dry_run);
    if !how.replace.is_empty() {
        path.push_str(&format!("&replace={}", segment(&how.replace.join(","))));
    }
    let key = format!("tenantry-{:032x}", rand::random::<u128>());
    let options = Options { no_wait: true, idempotency_key: Some(&key), ..Options::default() };
    let begun = match upload(&client, &path, &copied, options, is_shown).await {
        // Under one key it is imported once.
        Err(Failure::Unavailable(_)) => upload(&client, &path, &copied, options, is_shown).await?,
        begun => begun?,
    };
    drop(dir);
    let Some(id) = begun["job"]["id"].as_i64() else { return output::line(&begun.to_string()) };
    if how.no_wait {
        let told = || format!("job {id} is under way; `tenantry job watch {id}` follows it");
        return output::line(&if api.json { begun.to_string() } else { told() });
    }
    let job = filled(&client, id, is_shown).await?;
    tell(api, &job)
}

/// Blocks, elsewhere.
async fn copy_of(file: &Path, to: &Path, is_shown: bool) -> Result<(), Failure> {
    let wrong = |why: String| Failure::Usage(format!("{}: {why}", file.display()));
    let mut head = Vec::new();
    let opened = tokio::fs::File::open(file).await.map_err(|error| wrong(error.to_string()))?;
    let most = u64::try_from(MAGIC.len()).unwrap_or(0);
    opened.take(most).read_to_end(&mut head).await.map_err(|error| wrong(error.to_string()))?;
    if head != MAGIC {
        return Err(wrong("is no SQLite 3 file (or an encrypted one)".to_owned()));
    }
    let bar = bar(is_shown, COPYING);
    let (from, to, shown) = (file.to_owned(), to.to_owned(), bar.clone());
    let copied = tokio::task::spawn_blocking(move || {
        copy(&from, &to, |left, all| {
            shown.set_length(all);
            shown.set_position(all - left.min(all));
        })
    });
    let copied = copied.await.map_err(Failure::internal("cannot copy the file"))?;
    bar.finish_and_clear();
    copied.map_err(wrong)
}

async fn upload(
    client: &Client,
    path: &str,
    file: &Path,
    options: Options<'_>,
    is_shown: bool,
) -> Result<Value, Failure> {
    let cannot = Failure::internal::<std::io::Error>("cannot read the copy of the file");
    let opened = async {
        let file = tokio::fs::File::open(file).await?;
        let bytes = file.metadata().await?.len();
        Ok((file, bytes))
    };
    let (file, bytes) = opened.await.map_err(cannot)?;
    let bar = bar(is_shown, UPLOADING);
    bar.set_length(bytes);
    let pieces = stream::unfold((file, bar.clone()), |(mut file, bar)| async {
        let mut piece = Vec::with_capacity(CHUNK);
        match file.read_buf(&mut piece).await {
            Ok(0) => None,
            Ok(read) => {
                bar.inc(u64::try_from(read).unwrap_or(0));
                Some((Ok::<_, std::io::Error>(piece), (file, bar)))
            }
            Err(error) => Some((Err(error), (file, bar))),
        }
    });
    let begun = client.upload(path, (reqwest::Body::wrap_stream(pieces), bytes), options).await;
    bar.finish_and_clear();
    begun
}

/// Follows the job, by rows.
async fn filled(client: &Client, id: i64, is_shown: bool) -> Result<Value, Failure> {
    let bar = bar(is_shown, FILLING);
    let job = follow(client, id, |_, text| {
        if let Some((done, all, rest)) = rows(text) {
            bar.set_length(all);
            bar.set_position(done);
            bar.set_message(rest.to_owned());
        } else {
            bar.set_message(text.to_owned());
        }
    })
    .await;
    bar.finish_and_clear();
    job
}

/// Of "12 of 100 rows, 1.2 MiB, shop_order".
fn rows(text: &str) -> Option<(u64, u64, &str)> {
    let (done, rest) = text.split_once(" of ")?;
    let (all, rest) = rest.split_once(" rows, ")?;
    Some((done.parse().ok()?, all.parse().ok()?, rest))
}

/// How it ended; where something does not fit, all of it.
fn tell(api: &cli::Api, job: &Value) -> Result<(), Failure> {
    if api.json {
        output::line(&job.to_string())?;
    } else if let Some(groups) = job["result"]["problems"]["groups"].as_array() {
        output::line(&groups.iter().flat_map(problem).collect::<Vec<_>>().join("\n"))?;
    }
    for (column, count) in job["result"]["rounded"].as_object().into_iter().flatten() {
        eprintln!("{column}: {count} numbers are not the same in the column, which does not hold all their digits");
        let rows = job["result"]["rounded_rows"].as_array().into_iter().flatten();
        for row in rows.filter(|row| row["column"] == *column) {
            eprintln!("  {}  {} becomes {}", word(&row["row"]), word(&row["value"]), word(&row["held"]));
        }
    }
    match (job["state"] == "succeeded", api.json) {
        (true, true) => Ok(()),
        _ => verdict(job),
    }
}

/// `shop_order.total: does not fit numeric(6,2): 2 rows`, and the rows.
fn problem(group: &Value) -> Vec<String> {
    let place = [word(&group["table"]), word(&group["column"])].join(".");
    let rows = group["rows"].as_array().map(Vec::as_slice).unwrap_or_default();
    let count = group["count"].as_u64().unwrap_or(0);
    let mut lines = vec![match (rows.len(), count) {
        (0, 0 | 1) => format!("{}: {}", place.trim_matches('.'), word(&group["problem"])),
        (_, 1) => format!("{}: {}: 1 row", place.trim_matches('.'), word(&group["problem"])),
        (_, count) => format!("{}: {}: {count} rows", place.trim_matches('.'), word(&group["problem"])),
    }];
    lines.extend(
        rows.iter().map(|row| format!("  {}  {}", word(&row["row"]), word(&row["value"])).trim_end().to_owned()),
    );
    if !rows.is_empty() && u64::try_from(rows.len()).is_ok_and(|told| told < count) {
        lines.push("  ...".to_owned());
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn progress_is_read_for_the_bar() {
        assert_eq!(rows("12 of 100 rows, 1.2 MiB, a of b"), Some((12, 100, "1.2 MiB, a of b")));
        assert_eq!(rows("fill done"), None);
    }

    #[test]
    fn problems_are_told_with_their_rows() {
        let group = json!({ "table": "t", "column": "a", "problem": "is NULL", "count": 3,
            "rows": [{ "row": "id=1", "value": "NULL" }, { "row": "id=2", "value": "" }] });
        assert_eq!(problem(&group), ["t.a: is NULL: 3 rows", "  id=1  NULL", "  id=2", "  ..."]);
        let group = json!({ "table": "u", "column": "", "problem": "is not there", "count": 1, "rows": [] });
        assert_eq!(problem(&group), ["u: is not there"]);
    }
}
