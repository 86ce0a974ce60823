//! What `migrate`, `exec` and `rollout` share: what is asked for, how it is followed, the report at the end.

use std::{collections::BTreeMap, time::Duration};

use indicatif::ProgressBar;
use serde_json::{Map, Value, json};

use crate::{
    cli,
    client::{Client, Options},
    commands::{bar, list, millis, word},
    failure::Failure,
    output,
};

/// Before a stream is asked for again, behind some tries of the client's own.
const PAUSE: Duration = Duration::from_secs(2);
/// So often nobody may answer while a rollout is followed: half a minute, and more.
const AWAY: u32 = 6;

/// What the API is asked, of which tenants and in which waves.
pub fn wish(waves: &cli::Waves) -> Map<String, Value> {
    let mut wish = Map::new();
    let mut say = |key: &str, value: Value| drop(wish.insert(key.to_owned(), value));
    let says_which = !waves.tenants.is_empty() || waves.application.is_some() || waves.stage.is_some();
    if waves.tenants == ["*"] && waves.application.is_none() && waves.stage.is_none() {
        say("all", json!(true));
    } else if says_which {
        say("tenants", json!(waves.tenants));
    }
    say("application", json!(waves.application));
    say("stage", json!(waves.stage));
    match waves.canary.parse::<u32>() {
        Ok(count) => say("canary", json!(count)),
        Err(_) => say("canary_tenants", json!(waves.canary.split(',').map(str::trim).collect::<Vec<_>>())),
    }
    say("wave", json!(waves.wave));
    say("parallel", json!(waves.parallel));
    say("stop_after", json!(waves.stop_after));
    say("lock_timeout_ms", json!(millis(waves.lock_timeout)));
    say("busy_timeout_ms", json!(millis(waves.busy_timeout)));
    say("statement_timeout_ms", json!(waves.statement_timeout.map(millis)));
    wish
}

/// Begins one, once: the request may be made twice.
pub async fn begin(client: &Client, wish: &Value) -> Result<Value, Failure> {
    let key = format!("tenantry-{:032x}", rand::random::<u128>());
    let options = Options { idempotency_key: Some(&key), ..Options::default() };
    let post = || client.send(reqwest::Method::POST, "/v1/rollouts", Some(wish), options);
    match post().await {
        Err(Failure::Unavailable(_)) => {
            tokio::time::sleep(Duration::from_secs(2)).await;
            post().await
        }
        other => other,
    }
}

/// What would be done.
pub async fn plan(client: &Client, api: &cli::Api, wish: &Value) -> Result<(), Failure> {
    let planned = client.post("/v1/rollouts?dry_run=true", wish).await?;
    list_or_whole(api, &planned, ["WAVE", "TENANT", "FILES", "WHY NOT"], |turn| {
        [wave(turn), word(&turn["name"]), word(&turn["files"]), word(&turn["error"])]
    })
}

fn list_or_whole<const N: usize>(
    api: &cli::Api,
    rollout: &Value,
    header: [&str; N],
    row: impl Fn(&Value) -> [String; N],
) -> Result<(), Failure> {
    let turns = rollout["tenants"].as_array().map(Vec::as_slice).unwrap_or_default();
    output::line(&if api.json { rollout.to_string() } else { output::table(header, turns.iter().map(row)) })
}

fn wave(turn: &Value) -> String {
    match turn["wave"].as_u64() {
        Some(0) => "canary".to_owned(),
        _ => word(&turn["wave"]),
    }
}

/// How far it is.
pub struct Progress(ProgressBar);

impl Progress {
    pub fn new(is_shown: bool) -> Self {
        Self(bar(is_shown, "{bar:30} {pos}/{len} {wide_msg}"))
    }

    pub fn show(&self, rollout: &Value) {
        let turns = rollout["tenants"].as_array().into_iter().flatten();
        self.show_turns(&rollout["counts"], turns.filter(|turn| turn["state"] == "running"));
    }

    fn show_turns<'a>(&self, counts: &Value, running: impl Iterator<Item = &'a Value>) {
        let count = |state: &str| counts[state].as_u64().unwrap_or(0);
        let all: u64 = ["waiting", "running", "done", "failed", "skipped"].map(count).iter().sum();
        self.0.set_length(all);
        self.0.set_position(count("done") + count("failed") + count("skipped"));
        let running: Vec<&Value> = running.take(4).collect();
        let names = running.iter().map(|turn| word(&turn["name"])).collect::<Vec<_>>().join(", ");
        let wave = running.first().map_or_else(String::new, |turn| match wave(turn).as_str() {
            "canary" => "canary: ".to_owned(),
            wave => format!("wave {wave}: "),
        });
        self.0.set_message(format!("{} failed; {wave}{names}", count("failed")));
    }

    pub fn end(&self) {
        self.0.finish_and_clear();
    }
}

/// Whether nothing of it is under way or to come.
pub fn is_over(rollout: &Value) -> bool {
    rollout["state"] != "running" && rollout["counts"]["running"].as_u64().unwrap_or(0) == 0
}

/// To its end, as it is told; the API may be away for a while.
pub async fn follow(client: &Client, id: i64, is_shown: bool) -> Result<Value, Failure> {
    let (progress, mut away) = (Progress::new(is_shown), 0);
    let path = format!("/v1/rollouts/{id}/events");
    loop {
        let (mut running, mut counts) = (BTreeMap::new(), Value::Null);
        let (mut was_told, mut end) = (false, Value::Null);
        let followed = client.follow(&path, |event, data| {
            was_told = true;
            match event {
                // From here on everything is told anew where a stream was cut.
                "turn" if data["state"] == "running" => drop(running.insert(word(&data["name"]), data.clone())),
                "turn" => drop(running.remove(&word(&data["name"]))),
                "progress" => counts = data["counts"].clone(),
                "end" => end = data.clone(),
                _ => {}
            }
            progress.show_turns(&counts, running.values());
            event == "end"
        });
        let failure = match followed.await {
            Ok(()) => {
                progress.end();
                return Ok(end);
            }
            Err(failure) => failure,
        };
        away = if was_told { 0 } else { away + 1 };
        match failure {
            Failure::Unavailable(_) if away < AWAY => {}
            Failure::Unavailable(why) => {
                progress.end();
                let goes_on = format!("{why}\nrollout {id} may go on; `tenantry rollout watch {id}` follows it");
                return Err(Failure::Unavailable(goes_on));
            }
            other => return Err(other),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What became of each tenant, and of the whole; one that is not well is a failure.
pub fn report(api: &cli::Api, rollout: &Value) -> Result<(), Failure> {
    if api.json {
        output::line(&rollout.to_string())?;
    } else {
        list_or_whole(api, rollout, ["TENANT", "WAVE", "STATE", "TRIES", "WHAT"], |turn| {
            let what = if turn["error"].is_null() { word(&turn["files"]) } else { word(&turn["error"]) };
            [word(&turn["name"]), wave(turn), state(rollout, turn), word(&turn["attempts"]), what]
        })?;
    }
    let told = verdict(rollout);
    match rollout["state"].as_str() {
        Some("succeeded" | "running") if api.json => Ok(()),
        Some("succeeded" | "running") => output::line(&told),
        _ => Err(Failure::Incomplete(told)),
    }
}

fn state(rollout: &Value, turn: &Value) -> String {
    match turn["state"].as_str() {
        Some("waiting") if rollout["state"] != "running" => "not reached".to_owned(),
        _ => word(&turn["state"]),
    }
}

fn verdict(rollout: &Value) -> String {
    let (id, state) = (word(&rollout["id"]), word(&rollout["state"]));
    let count = |state: &str| rollout["counts"][state].as_u64().unwrap_or(0);
    let mut counts = vec![format!("{} done", count("done"))];
    let unreached = if state == "running" { "to come" } else { "not reached" };
    for (key, what) in [("failed", "failed"), ("skipped", "skipped"), ("running", "running"), ("waiting", unreached)] {
        if count(key) > 0 {
            counts.push(format!("{} {what}", count(key)));
        }
    }
    let why = rollout["error"].as_str().map_or_else(String::new, |why| format!(": {why}"));
    let kind = word(&rollout["kind"]);
    let further = match state.as_str() {
        "succeeded" => String::new(),
        "running" => format!("; `tenantry rollout watch {id}` follows it"),
        _ => format!("; `tenantry {kind} --resume {id}` goes on"),
    };
    format!("rollout {id}: {state}{why}; {}{further}", counts.join(", "))
}

pub async fn run(command: cli::Rollout) -> Result<(), Failure> {
    use cli::Rollout as R;
    match command {
        R::List { api } => {
            let found = Client::new(&api)?.get("/v1/rollouts").await?;
            let items = found["items"].as_array().cloned().unwrap_or_default();
            list(&api, &items, ["ID", "KIND", "STATE", "DONE", "FAILED", "LEFT", "BY", "ERROR"], |rollout| {
                let counts = &rollout["counts"];
                let number = |state: &str| counts[state].as_u64().unwrap_or(0);
                [
                    word(&rollout["id"]),
                    word(&rollout["kind"]),
                    word(&rollout["state"]),
                    number("done").to_string(),
                    number("failed").to_string(),
                    (number("waiting") + number("running")).to_string(),
                    word(&rollout["actor"]),
                    word(&rollout["error"]),
                ]
            })
        }
        R::Show { id, api } => report_only(&api, &Client::new(&api)?.get(&format!("/v1/rollouts/{id}")).await?),
        R::Watch { id, api } => report(&api, &follow(&Client::new(&api)?, id, !api.json).await?),
        R::Cancel { id, api } => {
            let rollout = Client::new(&api)?.post(&format!("/v1/rollouts/{id}/cancel"), &json!({})).await?;
            output::line(&if api.json { rollout.to_string() } else { format!("rollout {id} stops") })
        }
    }
}

/// To look at one that did not go well is no failure.
fn report_only(api: &cli::Api, rollout: &Value) -> Result<(), Failure> {
    match report(api, rollout) {
        Err(Failure::Incomplete(_)) if api.json => Ok(()),
        Err(Failure::Incomplete(told)) => output::line(&told),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_says_what_was_reached_and_how_to_go_on() {
        let rollout = json!({
            "id": 5, "kind": "exec", "state": "stopped", "error": "1 failed, which is as many as may: b",
            "counts": { "done": 3, "failed": 1, "waiting": 46, "running": 0, "skipped": 0 },
        });
        let told = "rollout 5: stopped: 1 failed, which is as many as may: b; 3 done, 1 failed, 46 not reached; \
                    `tenantry exec --resume 5` goes on";
        assert_eq!(verdict(&rollout), told);
        let well = json!({ "id": 5, "kind": "migrate", "state": "succeeded", "counts": { "done": 3 } });
        assert_eq!(verdict(&well), "rollout 5: succeeded; 3 done");
    }
}
