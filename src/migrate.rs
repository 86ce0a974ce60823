//! `tenantry migrate`: reads a directory of files, has them applied, follows that, reports.

use std::{fs, path::Path};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{cli, client::Client, failure::Failure, output, rollout};

/// In a comment before the first statement.
const MARK: &str = "tenantry: no-transaction";

pub async fn run(args: cli::Migrate) -> Result<(), Failure> {
    let cli::Migrate { dir, waves, lock_retries, out_of_order, no_wait, api } = args;
    let client = Client::new(&api)?;
    let begun = match (waves.resume, dir) {
        (Some(id), _) => client.post(&format!("/v1/rollouts/{id}/resume"), &json!({})).await?,
        (None, Some(dir)) => {
            let mut wish = rollout::wish(&waves);
            wish.insert("migrations".to_owned(), json!(files(&dir)?));
            wish.insert("lock_retries".to_owned(), json!(lock_retries));
            wish.insert("allow_out_of_order".to_owned(), json!(out_of_order));
            let wish = Value::Object(wish);
            if waves.dry_run {
                return rollout::plan(&client, &api, &wish).await;
            }
            rollout::begin(&client, &wish).await?
        }
        (None, None) => return Err(Failure::Usage("the directory of the files is needed".to_owned())),
    };
    let Some(id) = begun["id"].as_i64() else { return output::line(&begun.to_string()) };
    if no_wait {
        let text = format!("rollout {id} is under way; `tenantry rollout watch {id}` follows it");
        return output::line(&if api.json { begun.to_string() } else { text });
    }
    let end = rollout::follow(&client, id, !api.json).await?;
    rollout::report(&api, &end)
}

/// The files NNNN_name.sql of a directory, by number; one of another name is refused, not passed over.
fn files(dir: &Path) -> Result<Vec<Value>, Failure> {
    let wrong = |path: &Path, error: &dyn std::fmt::Display| Failure::Usage(format!("{}: {error}", path.display()));
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|error| wrong(dir, &error))? {
        let path = entry.map_err(|error| wrong(dir, &error))?.path();
        if path.extension().is_none_or(|kind| kind != "sql") {
            continue;
        }
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let version = version(&name).ok_or_else(|| {
            wrong(&path, &"a file of SQL is called NNNN_name.sql here: its number, an underscore, a name")
        })?;
        let sql = fs::read_to_string(&path).map_err(|error| wrong(&path, &error))?;
        let checksum: String = Sha256::digest(sql.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        let transactional = !is_marked(&sql);
        found.push((
            version,
            json!({
                "version": version, "name": name, "sql": sql, "checksum": checksum, "transactional": transactional,
            }),
        ));
    }
    if found.is_empty() {
        return Err(wrong(dir, &"there is no file NNNN_name.sql in it"));
    }
    found.sort_by_key(|(version, _)| *version);
    Ok(found.into_iter().map(|(_, file)| file).collect())
}

fn version(name: &str) -> Option<i64> {
    let (digits, rest) = name.split_once('_')?;
    let is_fit = digits.bytes().all(|byte| byte.is_ascii_digit()) && rest.len() > ".sql".len();
    digits.parse().ok().filter(|version| is_fit && *version > 0)
}

/// Whether the comments that the file begins with mark it.
fn is_marked(sql: &str) -> bool {
    let comments = sql
        .trim_start_matches('\u{feff}')
        .lines()
        .map(str::trim)
        .take_while(|line| line.is_empty() || line.starts_with("--"));
    comments.into_iter().any(|line| line.trim_start_matches('-').trim() == MARK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_their_numbers_and_one_of_another_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("0010_b.sql", "-- first\n-- tenantry: no-transaction\nVACUUM;");
        write("0002_a.sql", "SELECT 1; -- tenantry: no-transaction");
        write("README.md", "not SQL");
        let found = files(dir.path()).unwrap();
        let told: Vec<_> = found.iter().map(|file| (&file["version"], &file["transactional"])).collect();
        assert_eq!(told, [(&json!(2), &json!(true)), (&json!(10), &json!(false))]);
        assert_eq!(found[0]["checksum"].as_str().map(str::len), Some(64));
        write("later.sql", "SELECT 1");
        assert!(files(dir.path()).unwrap_err().to_string().contains("later.sql"));
        let empty = tempfile::tempdir().unwrap();
        assert!(files(empty.path()).is_err() && files(&empty.path().join("none")).is_err());
    }

    #[test]
    fn a_name_has_a_number_an_underscore_and_more() {
        let versions =
            ["0001_init.sql", "20260101120000_x.sql", "1_.sql", "x_1.sql", "0001.sql", "0_a.sql", "-1_a.sql"]
                .map(version);
        assert_eq!(versions, [Some(1), Some(20_260_101_120_000), None, None, None, None, None]);
    }
}
