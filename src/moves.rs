//! `tenantry tenant move`, `rollback-move` and `confirm-move`: what is asked of the API, and what a dry run found.

use reqwest::Method;
use serde_json::{Map, Value, json};

use crate::{
    cli::{
        self,
        moves::{ConfirmMove, Move, Pause, RollbackMove},
    },
    client::{Client, Options},
    commands::{millis, segment, verb, verdict, watch, word},
    failure::Failure,
    output,
};

pub async fn there(wish: Move) -> Result<(), Failure> {
    let Move { name, to, method, pause, streams, how, api } = wish;
    let mut body = said(&pause);
    body.insert("server".to_owned(), json!(to));
    body.insert("method".to_owned(), json!(method.word()));
    body.insert("streams".to_owned(), json!(streams));
    let body = Value::Object(body);
    if how.dry_run { look(&api, &name, &body).await } else { verb(&api, &name, "move", &body, &how, None).await }
}

pub async fn back(wish: RollbackMove) -> Result<(), Failure> {
    let RollbackMove { name, force, pause, how, api } = wish;
    let mut body = said(&pause);
    body.insert("force".to_owned(), json!(force));
    verb(&api, &name, "move/rollback", &Value::Object(body), &how, None).await
}

pub async fn stay(wish: ConfirmMove) -> Result<(), Failure> {
    let ConfirmMove { name, how, api } = wish;
    verb(&api, &name, "move/confirm", &json!({}), &how, None).await
}

fn said(pause: &Pause) -> Map<String, Value> {
    let Pause { wait, cancel, verify } = pause;
    let said = json!({ "wait_ms": wait.map(millis), "cancel": cancel, "verify": verify.map(cli::moves::Verify::word) });
    said.as_object().cloned().unwrap_or_default()
}

/// What stands in the way, what is good to know, and the steps: a job that changes nothing finds out.
async fn look(api: &cli::Api, name: &str, body: &Value) -> Result<(), Failure> {
    let client = Client::new(api)?;
    let path = format!("/v1/tenants/{}/move?dry_run=true", segment(name));
    let options = Options { no_wait: true, ..Options::default() };
    let begun = client.send(Method::POST, &path, Some(body), options).await?;
    let Some(id) = begun["job"]["id"].as_i64() else { return output::line(&begun.to_string()) };
    let job = watch(&client, id, !api.json).await?;
    if api.json {
        return output::line(&job.to_string());
    }
    if job["state"] != "succeeded" {
        return verdict(&job);
    }
    output::line(&told(&job["result"]))
}

fn told(result: &Value) -> String {
    let (findings, steps) = (result["findings"].as_array(), result["steps"].as_array());
    let finding = |finding: &Value| {
        let head = if finding["refuses"] == true { "in the way: " } else { "" };
        let mut line = format!("{head}{}", word(&finding["what"]));
        for (key, open, close) in [("names", ":\n  ", ""), ("advice", "\n  -> ", "")] {
            let text = word(&finding[key]);
            if !text.is_empty() {
                line.push_str(&format!("{open}{text}{close}"));
            }
        }
        line
    };
    let mut lines: Vec<String> = findings.into_iter().flatten().map(finding).collect();
    if lines.is_empty() {
        lines.push("nothing stands in the way".to_owned());
    }
    let steps: Vec<String> = steps.into_iter().flatten().map(word).collect();
    lines.push(format!("steps: {}", steps.join(", ")));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dry_run_found_is_told_with_its_names_and_what_to_do() {
        let found = json!({ "findings": [
            { "refuses": true, "what": "1 tables without a key", "names": ["public.t"], "advice": "ALTER TABLE" },
            { "refuses": false, "what": "3 sequences" } ], "steps": ["check", "hold"] });
        let wanted =
            "in the way: 1 tables without a key:\n  public.t\n  -> ALTER TABLE\n3 sequences\nsteps: check, hold";
        assert_eq!(told(&found), wanted);
        assert_eq!(told(&json!({ "findings": [], "steps": ["check"] })), "nothing stands in the way\nsteps: check");
    }
}
