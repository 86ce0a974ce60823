//! Commands that go to the API, and what they print: a table for people, JSON with `--json`.

use std::{io::IsTerminal as _, time::Duration};

use clap::CommandFactory as _;
use reqwest::Method;
use serde_json::{Map, Value, json};
use tenantry_admin::{
    api::{tokens, types::NewToken},
    catalog::{Catalog, model::Access},
};

use crate::{
    cli::{self, Cli, EnvFormat},
    client::{Client, Options},
    failure::Failure,
    import, moves, output, serve,
};

/// Until a request whose answer did not come is made once more.
const BEFORE_REPEATING: Duration = Duration::from_secs(2);

pub async fn tenant(command: cli::Tenant) -> Result<(), Failure> {
    use cli::Tenant as T;
    match command {
        T::Create {
            name,
            server,
            shared_role,
            archive,
            extensions,
            settings,
            env,
            idempotency_key,
            spec,
            how,
            api,
        } => {
            let mut said = spec_of(&spec);
            said.insert("extensions".to_owned(), json!(extensions));
            said.insert(
                "settings".to_owned(),
                json!(settings.into_iter().collect::<std::collections::BTreeMap<_, _>>()),
            );
            let body =
                json!({ "name": name, "server": server, "shared_role": shared_role, "archive": archive, "spec": said });
            let options =
                Options { idempotency_key: idempotency_key.as_deref(), no_wait: how.no_wait, ..Options::default() };
            begin(&api, Method::POST, "/v1/tenants", &body, &how, options, env).await
        }
        T::Adopt { name, server, database, role, verifier_file, spec, api } => {
            let verifier = verifier_file.map(|file| {
                let text = std::fs::read_to_string(&file);
                text.map_err(|error| Failure::Usage(format!("{}: {error}", file.display())))
            });
            let verifier = verifier.transpose()?.map(|text| text.trim().to_owned());
            let body = json!({
                "server": server, "database": database, "role": role, "verifier": verifier, "spec": spec_of(&spec),
            });
            let adopted = Client::new(&api)?.post(&format!("/v1/tenants/{}/adopt", segment(&name)), &body).await?;
            one_tenant(&api, &adopted)
        }
        T::List { api } => tenants(&api).await,
        T::Show { name, api } => {
            let shown = Client::new(&api)?.get(&format!("/v1/tenants/{}", segment(&name))).await?;
            one_tenant(&api, &shown)
        }
        T::Update { name, spec, api } => {
            let options = Options { if_match: true, ..Options::default() };
            let path = format!("/v1/tenants/{}", segment(&name));
            let body = Value::Object(spec_of(&spec));
            let changed = Client::new(&api)?.send(Method::PATCH, &path, Some(&body), options).await?;
            one_tenant(&api, &changed)
        }
        T::Rename { name, to, wait, how, api } => {
            verb(&api, &name, "rename", &json!({ "to": to, "wait_ms": wait.map(millis) }), &how, None).await
        }
        T::Drain { name, deadline, how, api } => {
            verb(&api, &name, "drain", &json!({ "deadline_ms": millis(deadline) }), &how, None).await
        }
        T::Archive { name, deadline, how, api } => {
            verb(&api, &name, "archive", &json!({ "deadline_ms": millis(deadline) }), &how, None).await
        }
        T::Restore { name, archive, how, api } => {
            verb(&api, &name, "restore", &json!({ "archive": archive }), &how, None).await
        }
        T::Rotate { name, role, grace, env, how, api } => {
            verb(&api, &name, "rotate", &json!({ "role": role, "grace_ms": grace.map(millis) }), &how, env).await
        }
        T::Separate { name, role, finish, env, how, api } => {
            verb(&api, &name, "separate", &json!({ "role": role, "finish": finish }), &how, env).await
        }
        T::Import { name, file, dry_run, replace, no_wait, api } => {
            import::run(&api, &name, &file, import::How { dry_run, replace, no_wait }).await
        }
        T::Move(wish) => moves::there(wish).await,
        T::RollbackMove(wish) => moves::back(wish).await,
        T::ConfirmMove(wish) => moves::stay(wish).await,
        T::Pause { name, api } => at_once(&api, &name, "pause").await,
        T::Resume { name, api } => at_once(&api, &name, "resume").await,
        T::Suspend { name, api } => at_once(&api, &name, "suspend").await,
        T::Wake { name, api } => at_once(&api, &name, "wake").await,
        T::Delete { name, confirm, without_archive, how, api } => {
            let body = json!({ "confirm": confirm, "without_archive": without_archive });
            let options = Options { if_match: true, no_wait: how.no_wait, ..Options::default() };
            begin(&api, Method::DELETE, &format!("/v1/tenants/{}", segment(&name)), &body, &how, options, None).await
        }
        T::Env { name, format, password, api } => {
            let shown = Client::new(&api)?.get(&format!("/v1/tenants/{}", segment(&name))).await?;
            let password = password.unwrap_or_else(|| "CHANGE_ME".to_owned());
            let credentials = json!({
                "host": shown["address"]["host"], "port": shown["address"]["port"], "database": shown["name"],
                "user": user_of(&shown), "password": password,
            });
            output::line(&variables(&credentials, format))
        }
        T::Clients { name, pinned, api } => clients(&api, &name, pinned).await,
        T::Explain { name, api } => explain(&api, &name).await,
    }
}

/// Every tenant, in a line.
async fn tenants(api: &cli::Api) -> Result<(), Failure> {
    let items = all(&Client::new(api)?, "/v1/tenants?limit=500").await?;
    let header = ["NAME", "STATE", "SERVER", "CLIENTS", "ACTIVE", "CONNECTIONS", "FLOOR", "CEILING", "OWNER", "STAGE"];
    list(api, &items, header, |t| {
        [
            word(&t["name"]),
            if t["is_static"] == true { "static".to_owned() } else { word(&t["state"]) },
            word(&t["server"]),
            word(&t["live"]["clients"]),
            word(&t["live"]["active"]),
            word(&t["live"]["connections"]),
            word(&t["spec"]["floor"]),
            word(&t["spec"]["ceiling"]),
            word(&t["spec"]["owner"]),
            word(&t["spec"]["stage"]),
        ]
    })
}

/// The sessions of a tenant's clients.
async fn clients(api: &cli::Api, name: &str, pinned: bool) -> Result<(), Failure> {
    let path = format!("/v1/tenants/{}/clients?limit=1000&pinned={pinned}", segment(name));
    let items = all(&Client::new(api)?, &path).await?;
    list(api, &items, ["ID", "PROCESS", "ROLE", "STATE", "SECONDS", "SERVER", "POOL", "PINS"], |client| {
        [
            word(&client["id"]),
            word(&client["process"]),
            word(&client["role"]),
            word(&client["state"]),
            format!("{:.1}", client["seconds"].as_f64().unwrap_or_default()),
            word(&client["server"]),
            word(&client["pool"]),
            word(&client["pins"]),
        ]
    })
}

/// What its clients wait for, and what would help.
async fn explain(api: &cli::Api, name: &str) -> Result<(), Failure> {
    let explained = Client::new(api)?.get(&format!("/v1/explain/{}", segment(name))).await?;
    let roles = explained["roles"].as_array().cloned().unwrap_or_default();
    let header = ["ROLE", "LIMIT", "WAITING", "WAITED_MS", "CONNECTIONS", "WHAT WOULD HELP"];
    list(api, &roles, header, |why| {
        [
            word(&why["role"]),
            word(&why["blocked"]),
            word(&why["waiting"]),
            word(&why["waited_ms"]),
            format!("{}/{}", word(&why["connections"]), word(&why["pool_size"])),
            word(&why["remedy"]),
        ]
    })
}

pub async fn server(command: cli::Server) -> Result<(), Failure> {
    let cli::Server::List { api } = command;
    let items = all(&Client::new(&api)?, "/v1/servers").await?;
    list(&api, &items, ["NAME", "CONNECTIONS", "CAP", "TENANTS", "FLOORS"], |s| {
        [word(&s["name"]), word(&s["connections"]), word(&s["cap"]), word(&s["tenants"]), word(&s["floors"])]
    })
}

pub async fn job(command: cli::Job) -> Result<(), Failure> {
    use cli::Job as J;
    match command {
        J::List { tenant, api } => {
            let filter = tenant.map_or_else(String::new, |tenant| format!("?tenant={}", segment(&tenant)));
            let found = Client::new(&api)?.get(&format!("/v1/jobs{filter}")).await?;
            let items = found["items"].as_array().cloned().unwrap_or_default();
            list(&api, &items, ["ID", "KIND", "TENANT", "STATE", "STEP", "BY", "ERROR"], |job| {
                let steps = job["steps"].as_array().map_or(0, Vec::len);
                [
                    word(&job["id"]),
                    word(&job["kind"]),
                    word(&job["tenant"]),
                    word(&job["state"]),
                    format!("{}/{steps}", word(&job["step"])),
                    word(&job["actor"]),
                    word(&job["error"]),
                ]
            })
        }
        J::Show { id, api } => {
            let job = Client::new(&api)?.get(&format!("/v1/jobs/{id}")).await?;
            output::line(&serde_json::to_string_pretty(&job).unwrap_or_default())
        }
        J::Watch { id, api } => {
            let end = watch(&Client::new(&api)?, id, !api.json).await?;
            if api.json { output::line(&end.to_string()) } else { verdict(&end) }
        }
        J::Cancel { id, api } => {
            let job = Client::new(&api)?.post(&format!("/v1/jobs/{id}/cancel"), &json!({})).await?;
            output::line(&if api.json { job.to_string() } else { format!("job {id} turns back") })
        }
    }
}

pub async fn audit(command: cli::Audit) -> Result<(), Failure> {
    match command {
        cli::Audit::List { limit, api } => {
            let found = Client::new(&api)?.get(&format!("/v1/audit?limit={limit}")).await?;
            let items = found["items"].as_array().cloned().unwrap_or_default();
            list(&api, &items, ["ID", "AT", "BY", "FROM", "ACTION", "TENANT", "OUTCOME", "REQUEST"], |row| {
                ["id", "at", "actor", "peer", "action", "tenant", "outcome", "request"].map(|key| word(&row[key]))
            })
        }
        cli::Audit::Verify { api } => {
            let chain = Client::new(&api)?.get("/v1/audit/verify").await?;
            if let Some(broken) = chain["broken"].as_i64() {
                return Err(Failure::Refused(format!(
                    "row {broken} of the audit log does not fit the rows before it: it was changed, or one before it is gone"
                )));
            }
            let whole = || {
                format!("{} rows, whole; row {}: {}", word(&chain["rows"]), word(&chain["last"]), word(&chain["chain"]))
            };
            output::line(&if api.json { chain.to_string() } else { whole() })
        }
    }
}

pub async fn token(command: cli::Token) -> Result<(), Failure> {
    use cli::Token as T;
    match command {
        T::Create { label, access, days, source } => {
            let access = Access::parse(&access)
                .ok_or_else(|| Failure::Usage("--access: must be viewer, operator or admin".to_owned()))?;
            let wish = NewToken { label, access, days };
            tokens::check(&wish).map_err(|problem| Failure::Usage(problem.detail))?;
            let settings = source.load()?;
            let (server, control) = serve::catalog_login(&settings).ok_or_else(|| {
                Failure::Usage("admin.catalog is not set: there is no API to make a token for".to_owned())
            })?;
            let catalog = Catalog::new(server, control).map_err(Failure::unavailable("the catalog"))?;
            catalog.migrate(serve::may_begin(&settings)).await.map_err(Failure::unavailable("the catalog"))?;
            let made = tokens::make(&catalog, "tenantry token create", &wish).await;
            output::line(&made.map_err(Failure::unavailable("the catalog"))?.token)
        }
        T::List { api } => {
            let items = all(&Client::new(&api)?, "/v1/tokens").await?;
            list(&api, &items, ["ID", "LABEL", "ACCESS", "EXPIRES"], |token| {
                [word(&token["id"]), word(&token["label"]), word(&token["access"]), word(&token["expires_at"])]
            })
        }
        T::Delete { id, api } => {
            let path = format!("/v1/tokens/{}", segment(&id));
            Client::new(&api)?.send(Method::DELETE, &path, None, Options::default()).await?;
            output::line(&format!("token {id} is good no more"))
        }
    }
}

pub fn completion(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tenantry", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())
}

pub async fn verb(
    api: &cli::Api,
    name: &str,
    verb: &str,
    body: &Value,
    how: &cli::How,
    env: Option<EnvFormat>,
) -> Result<(), Failure> {
    let options = Options { no_wait: how.no_wait, ..Options::default() };
    begin(api, Method::POST, &format!("/v1/tenants/{}/{verb}", segment(name)), body, how, options, env).await
}

/// Begins a job and, unless told otherwise, follows it to its end.
async fn begin(
    api: &cli::Api,
    method: Method,
    path: &str,
    body: &Value,
    how: &cli::How,
    options: Options<'_>,
    env: Option<EnvFormat>,
) -> Result<(), Failure> {
    let client = Client::new(api)?;
    let path = if how.dry_run { format!("{path}?dry_run=true") } else { path.to_owned() };
    // The job is begun at once and followed, so that a person sees how far it is; under a key, so that it may be asked for
    // twice.
    let own_key = (!how.dry_run).then(|| format!("tenantry-{:032x}", rand::random::<u128>()));
    let idempotency_key = options.idempotency_key.or(own_key.as_deref());
    let options = Options { no_wait: true, idempotency_key, ..options };
    let (mut begun, is_repeated) = match client.send(method.clone(), &path, Some(body), options).await {
        Err(Failure::Unavailable(_)) if !how.dry_run => {
            tokio::time::sleep(BEFORE_REPEATING).await;
            (client.send(method, &path, Some(body), options).await?, true)
        }
        other => (other?, false),
    };
    if how.dry_run {
        let steps: Vec<String> = begun["steps"].as_array().into_iter().flatten().map(word).collect();
        return output::line(&if api.json { begun.to_string() } else { steps.join("\n") });
    }
    let Some(id) = begun["job"]["id"].as_i64() else { return output::line(&begun.to_string()) };
    let followed = match how.no_wait {
        true => Ok(()),
        false => watch(&client, id, !api.json && env.is_none()).await.map(|job| begun["job"] = job),
    };
    if followed.is_ok() && !how.no_wait && begun["job"]["state"] != "succeeded" {
        return verdict(&begun["job"]);
    }
    let kind = begun["job"]["kind"].as_str();
    if is_repeated && begun["credentials"].is_null() && matches!(kind, Some("create" | "rotate" | "separate")) {
        let name = word(&begun["job"]["tenant"]);
        eprintln!("the answer with the password was lost on its way; `tenantry tenant rotate {name}` makes a new one");
    }
    // Also where the job could not be followed: the password is in this answer and nowhere else.
    tell(api, &begun, how.no_wait || followed.is_err(), env)?;
    followed
}

/// What was begun, or done.
fn tell(api: &cli::Api, begun: &Value, is_open: bool, env: Option<EnvFormat>) -> Result<(), Failure> {
    let (id, credentials) = (word(&begun["job"]["id"]), &begun["credentials"]);
    let is_shown = credentials.is_object();
    match env {
        Some(format) if is_shown => output::line(&variables(credentials, format)),
        _ if api.json => output::line(&begun.to_string()),
        _ if is_shown => output::line(&format!(
            "{}\n\nThe password is told this once.{} Connect{} with:\n  {}",
            variables(credentials, EnvFormat::Env),
            match (&begun["job"]["kind"], begun["job"]["result"]["old_password_until"].as_str()) {
                (_, Some(until)) => format!(" The old one is good until {until}."),
                (kind, None) if kind == "rotate" && !is_open => " The old one is good for no new login.".to_owned(),
                _ => String::new(),
            },
            if is_open { format!(", once job {id} has succeeded,") } else { String::new() },
            word(&credentials["url"])
        )),
        _ if is_open => output::line(&format!("job {id} is under way; `tenantry job watch {id}` follows it")),
        _ => verdict(&begun["job"]),
    }
}

/// Follows a job to its end, with a bar on a terminal; the job as it is then.
pub async fn watch(client: &Client, id: i64, is_shown: bool) -> Result<Value, Failure> {
    let bar = bar(is_shown, "{bar:30} {pos}/{len} {wide_msg}");
    if let Ok(job) = client.get(&format!("/v1/jobs/{id}")).await {
        bar.set_length(job["steps"].as_array().map_or(0, |steps| u64::try_from(steps.len()).unwrap_or(0)));
    }
    let followed = follow(client, id, |event, text| {
        if event == "step" && text.ends_with(" done") {
            bar.inc(1);
        }
        bar.set_message(text.to_owned());
    })
    .await;
    bar.finish_and_clear();
    followed
}

/// Tells what a job tells, `step` or `progress`, and its text; the job as it is at its end.
pub async fn follow(client: &Client, id: i64, mut told: impl FnMut(&str, &str)) -> Result<Value, Failure> {
    let mut end = Value::Null;
    let followed = client
        .follow(&format!("/v1/jobs/{id}/events"), |event, data| {
            match event {
                "step" | "progress" => told(event, data["text"].as_str().unwrap_or_default()),
                "end" => end = data.clone(),
                _ => {}
            }
            event == "end"
        })
        .await;
    let goes_on = |why: String| format!("{why}\njob {id} may go on; `tenantry job watch {id}` follows it");
    followed.map_err(|failure| match failure {
        Failure::Unavailable(why) => Failure::Unavailable(goes_on(why)),
        other => other,
    })?;
    Ok(end)
}

/// On a terminal; `shape` is a template of indicatif's.
pub fn bar(is_shown: bool, shape: &str) -> indicatif::ProgressBar {
    if !is_shown || !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::hidden();
    }
    let style = indicatif::ProgressStyle::with_template(shape);
    let bar = indicatif::ProgressBar::new(0);
    bar.set_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()));
    bar
}

/// How a job ended, in words; a failed one is a failure.
pub fn verdict(job: &Value) -> Result<(), Failure> {
    let what = format!("job {}, {} of {}", word(&job["id"]), word(&job["kind"]), word(&job["tenant"]));
    if job["state"] == "succeeded" {
        return output::line(&format!("{what}: succeeded{}", found(job)));
    }
    // What a migration or a command committed stays.
    let is_of_rollout = job["kind"] == "migrate" || job["kind"] == "exec";
    let undone = if is_of_rollout { "what was committed stays" } else { "what it had done is undone" };
    Err(Failure::Refused(format!("{what}: {}: {}; {undone}", word(&job["state"]), word(&job["error"]))))
}

/// What there is to tell of a job that succeeded.
fn found(job: &Value) -> String {
    let result = &job["result"];
    let drain = &result["drain"];
    let mut told = String::new();
    if drain.is_object() {
        let [under_way, cancelled, cut] = ["under_way", "cancelled", "cut"].map(|key| word(&drain[key]));
        told.push_str(&format!("; {under_way} under way, {cancelled} cancelled, {cut} cut"));
    }
    if result["archive"].is_number() {
        let (archive, bytes) = (word(&result["archive"]), result["bytes"].as_u64().unwrap_or(0));
        told.push_str(&format!("; archive {archive}, {}", indicatif::HumanBytes(bytes)));
    }
    if result["left_behind"].is_object() {
        told.push_str(&format!("; left behind: {}", word(&result["left_behind"]["what"])));
    }
    if job["kind"] == "import" {
        let (rows, tables) = (word(&result["rows"]), result["tables"].as_object().map_or(0, Map::len));
        told.push_str(&format!("; {rows} rows in {tables} tables, counts, checksums and foreign keys compared"));
    }
    told
}

async fn at_once(api: &cli::Api, name: &str, verb: &str) -> Result<(), Failure> {
    let path = format!("/v1/tenants/{}/{verb}", segment(name));
    let changed = Client::new(api)?.post(&path, &json!({})).await?;
    if api.json {
        return output::line(&changed.to_string());
    }
    let live = &changed["live"];
    output::line(&format!(
        "{}: {}; {} clients, {} waiting, {} server connections",
        word(&changed["name"]),
        word(&changed["state"]),
        word(&live["clients"]),
        word(&live["waiting"]),
        word(&live["connections"])
    ))
}

fn one_tenant(api: &cli::Api, tenant: &Value) -> Result<(), Failure> {
    if api.json {
        return output::line(&tenant.to_string());
    }
    let mut rows: Vec<[String; 2]> = Vec::new();
    for (key, value) in tenant.as_object().into_iter().flatten() {
        match value {
            Value::Object(inner) => {
                rows.extend(
                    inner.iter().filter(|(_, v)| !v.is_null()).map(|(name, v)| [format!("{key}.{name}"), word(v)]),
                );
            }
            Value::Null => {}
            value => rows.push([key.clone(), word(value)]),
        }
    }
    output::line(&output::table(["KEY", "VALUE"], rows))
}

pub fn list<const N: usize>(
    api: &cli::Api,
    items: &[Value],
    header: [&str; N],
    row: impl Fn(&Value) -> [String; N],
) -> Result<(), Failure> {
    output::line(&if api.json { json!(items).to_string() } else { output::table(header, items.iter().map(row)) })
}

/// All pages of a list.
pub async fn all(client: &Client, path: &str) -> Result<Vec<Value>, Failure> {
    let (mut items, mut next) = (Vec::new(), String::new());
    loop {
        let page = client.get(&format!("{path}{next}")).await?;
        items.extend(page["items"].as_array().cloned().unwrap_or_default());
        match page["next"].as_str() {
            Some(after) => next = format!("{}after={}", if path.contains('?') { "&" } else { "?" }, segment(after)),
            None => return Ok(items),
        }
    }
}

fn spec_of(spec: &cli::Spec) -> Map<String, Value> {
    let cli::Spec {
        application,
        owner,
        stage,
        deployed,
        floor,
        ceiling,
        weight,
        pool_mode,
        isolation,
        reuse_unnamed_statements,
        pool_size,
        max_client_conn,
    } = spec;
    let said = json!({
        "application": application, "owner": owner, "stage": stage, "deployed": deployed, "floor": floor,
        "ceiling": ceiling, "weight": weight, "pool_mode": pool_mode, "isolation": isolation,
        "reuse_unnamed_statements": reuse_unnamed_statements, "pool_size": pool_size, "max_client_conn": max_client_conn,
    });
    let said = said.as_object().cloned().unwrap_or_default();
    said.into_iter().filter(|(_, value)| !value.is_null()).collect()
}

/// What a fork of the application reads.
pub fn variables(credentials: &Value, format: EnvFormat) -> String {
    let pairs = [
        ("DATABASE_HOST", "host"),
        ("DATABASE_PORT", "port"),
        ("DATABASE_NAME", "database"),
        ("DATABASE_USER", "user"),
        ("DATABASE_PASSWORD", "password"),
    ];
    let pairs = pairs.map(|(name, key)| (name, word(&credentials[key])));
    match format {
        EnvFormat::Env => pairs.map(|(name, value)| format!("{name}={value}")).join("\n"),
        EnvFormat::Compose => {
            let lines = pairs.map(|(name, value)| format!("      {name}: {}", json!(value)));
            format!("services:\n  web:\n    environment:\n{}", lines.join("\n"))
        }
    }
}

/// Whom its clients log in as: the owner, or of an adopted tenant the role that was named then.
fn user_of(tenant: &Value) -> &Value {
    let roles = tenant["roles"].as_array().map(Vec::as_slice).unwrap_or_default();
    let owner = &tenant["owner_role"];
    if roles.contains(owner) { owner } else { roles.first().unwrap_or(owner) }
}

/// A part of a path, whatever it holds.
pub fn segment(text: &str) -> String {
    text.bytes()
        .map(|b| {
            if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect()
}

pub fn word(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(word).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenants_clients_log_in_as_its_owner_only_if_the_owner_may() {
        assert_eq!(user_of(&json!({ "owner_role": "o", "roles": ["r", "o"] })), "o");
        assert_eq!(user_of(&json!({ "owner_role": "o", "roles": ["r"] })), "r");
        assert_eq!(user_of(&json!({ "owner_role": "o", "roles": [] })), "o");
    }
}
