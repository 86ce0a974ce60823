//! `tenantry exec`: runs a command once per tenant, on this machine, with a login that Tenantry makes for it.
//!
//! The API has the state: whose turn it is, who is done, who failed. This side makes the password (the API is told only a
//! verifier of it), runs what has its turn, and tells how it ended. What always holds: a command runs only while its login is
//! open; whatever ends this ends the commands, with all that they started; nothing that a command prints goes to the API.

use std::{
    collections::BTreeMap,
    fs::{DirBuilder, File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::{Value, json};
use tenantry_admin::api::rollouts::login_secret;
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    cli,
    client::Client,
    commands::{millis, word},
    failure::Failure,
    output,
    rollout::{self, Progress},
};

/// Between two words to the API: it takes us for gone after 30 s.
const TELL: Duration = Duration::from_millis(500);
/// What is told must arrive at last; then the API has long closed the logins.
const AWAY: u32 = 120;
/// For a command to end by itself when it is told to.
const PATIENCE: Duration = Duration::from_secs(10);
/// Of a log's end in the report.
const TAIL_BYTES: u64 = 4 << 10;
const TAIL_LINES: usize = 8;

/// What all commands share.
struct Job {
    words: Vec<String>,
    host: String,
    port: String,
    password: String,
    limit: Duration,
    retries: u32,
    logs: PathBuf,
}

/// A tenant's command under way.
struct Running {
    attempt: u64,
    stop: CancellationToken,
}

/// How a command ended: the tenant, its attempt, what went wrong and the last lines of its log.
type Ended = (String, u64, Result<(), (String, String)>);

pub async fn run(args: cli::Exec) -> Result<(), Failure> {
    let cli::Exec { waves, timeout, retries, logs, api, command } = args;
    let client = Client::new(&api)?;
    let (password, verifier) = login_secret();
    let mut wish = rollout::wish(&waves);
    wish.insert("exec".to_owned(), json!({ "command": command, "verifier": verifier, "timeout_ms": millis(timeout) }));
    let wish = Value::Object(wish);
    if waves.dry_run {
        return rollout::plan(&client, &api, &wish).await;
    }
    // Before anything is begun.
    let logs = directory(logs)?;
    let tenants = client.get("/v1/tenants?limit=1").await?;
    let address = tenants["items"][0]["address"].clone();
    let begun = match waves.resume {
        Some(id) => client.post(&format!("/v1/rollouts/{id}/resume"), &json!({ "verifier": verifier })).await?,
        None => rollout::begin(&client, &wish).await?,
    };
    let words: Vec<String> = serde_json::from_value(begun["command"].clone()).unwrap_or_default();
    let (Some(id), false) = (begun["id"].as_i64(), words.is_empty()) else {
        return Err(Failure::Refused(
            "that rollout has no command: `tenantry migrate --resume` goes on with files".to_owned(),
        ));
    };
    let limit = Duration::from_millis(begun["plan"]["timeout_ms"].as_u64().unwrap_or_else(|| millis(timeout)));
    let (host, port) = (word(&address["host"]), word(&address["port"]));
    let password = password.to_string();
    let job = Arc::new(Job { words, host, port, password, limit, retries, logs });
    let mut runner = Runner {
        client,
        id,
        verifier,
        job: Arc::clone(&job),
        running: BTreeMap::new(),
        tasks: JoinSet::new(),
        unheard: Vec::new(),
        ended: BTreeMap::new(),
        tails: BTreeMap::new(),
    };
    let end = runner.run(!api.json).await;
    runner.stop().await;
    report(&api, end?, &runner.tails, &job.logs)
}

/// The directory, for nobody else: output may hold anything.
fn directory(wanted: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let Some(dir) = wanted else {
        let made = tempfile::Builder::new().prefix("tenantry-exec-").tempdir();
        return Ok(made.map_err(Failure::internal("cannot make a directory for the commands' output"))?.keep());
    };
    // What is there already is as whoever made it wants it.
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|error| Failure::Usage(format!("{}: {error}", dir.display())))?;
    Ok(dir)
}

fn report(api: &cli::Api, mut end: Value, tails: &BTreeMap<String, String>, logs: &Path) -> Result<(), Failure> {
    end["logs"] = json!(logs.display().to_string());
    for turn in end["tenants"].as_array_mut().into_iter().flatten() {
        if turn["state"] == "failed"
            && let Some(tail) = turn["name"].as_str().and_then(|name| tails.get(name))
        {
            turn["output"] = json!(tail);
        }
    }
    let verdict = rollout::report(api, &end);
    if !api.json {
        for turn in end["tenants"].as_array().into_iter().flatten().filter(|turn| turn["output"].is_string()) {
            eprintln!(
                "\n{}, the end of {}:\n{}",
                word(&turn["name"]),
                log_of(logs, &word(&turn["name"])).display(),
                word(&turn["output"])
            );
        }
        output::line(&format!("the commands' output is in {}", logs.display()))?;
    }
    verdict
}

/// Whoever runs the commands of one rollout.
struct Runner {
    client: Client,
    id: i64,
    /// As the API knows it: nobody else's word counts.
    verifier: String,
    job: Arc<Job>,
    running: BTreeMap<String, Running>,
    tasks: JoinSet<Ended>,
    /// Ends that the API was not told yet.
    unheard: Vec<Value>,
    /// The last attempt of each that has ended: one is begun once, also if the API has not taken its end over yet.
    ended: BTreeMap<String, u64>,
    /// Last lines of those that failed.
    tails: BTreeMap<String, String>,
}

impl Runner {
    /// To the end of the rollout; a signal stops it, and then waits for its end.
    async fn run(&mut self, is_shown: bool) -> Result<Value, Failure> {
        let listen = |kind| signal(kind).map_err(Failure::internal("cannot listen to signals"));
        let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
        // The terminal is gone: the commands, which have process groups of their own, would stay.
        let mut hangup = listen(SignalKind::hangup())?;
        let (progress, mut away, mut is_stopping) = (Progress::new(is_shown), 0, false);
        loop {
            match self.tell().await {
                Ok(rollout) => {
                    away = 0;
                    progress.show(&rollout);
                    if rollout::is_over(&rollout) && self.running.is_empty() {
                        progress.end();
                        return Ok(rollout);
                    }
                    self.follow(&rollout, is_stopping);
                }
                Err(Failure::Unavailable(_)) if away < AWAY => away += 1,
                Err(failure) => {
                    progress.end();
                    return Err(failure);
                }
            }
            tokio::select! {
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => self.note(ended),
                () = tokio::time::sleep(TELL) => {}
                _ = interrupt.recv() => is_stopping = self.interrupted(is_stopping).await?,
                _ = terminate.recv() => is_stopping = self.interrupted(is_stopping).await?,
                _ = hangup.recv() => is_stopping = self.interrupted(is_stopping).await?,
            }
        }
    }

    /// Tells what ended since, and that we are there; how the rollout stands.
    async fn tell(&mut self) -> Result<Value, Failure> {
        let path = format!("/v1/rollouts/{}/outcomes", self.id);
        let told = self.client.post(&path, &json!({ "ended": self.unheard, "verifier": self.verifier })).await?;
        self.unheard.clear();
        Ok(told)
    }

    /// Begins what has its turn, ends what has none any more.
    fn follow(&mut self, rollout: &Value, is_stopping: bool) {
        let mut open = BTreeMap::new();
        for turn in rollout["tenants"].as_array().into_iter().flatten() {
            if let (Some(name), Some(login), Some(attempt)) =
                (turn["name"].as_str(), turn["login"].as_str(), turn["attempts"].as_u64())
            {
                open.insert(name.to_owned(), (login.to_owned(), attempt));
            }
        }
        let is_cancelled = rollout["state"] == "cancelled";
        for (name, running) in &self.running {
            if is_cancelled || open.get(name).is_none_or(|(_, attempt)| *attempt != running.attempt) {
                running.stop.cancel();
            }
        }
        for (name, (login, attempt)) in open {
            if is_stopping
                || is_cancelled
                || self.running.contains_key(&name)
                || self.ended.get(&name) == Some(&attempt)
            {
                continue;
            }
            let stop = CancellationToken::new();
            self.running.insert(name.clone(), Running { attempt, stop: stop.clone() });
            self.tasks.spawn(command(Arc::clone(&self.job), name, login, attempt, stop));
        }
    }

    fn note(&mut self, ended: Result<Ended, tokio::task::JoinError>) {
        let Ok((name, attempt, outcome)) = ended else { return };
        self.running.remove(&name);
        self.ended.insert(name.clone(), attempt);
        let error = match outcome {
            Ok(()) => Value::Null,
            Err((why, tail)) => {
                self.tails.insert(name.clone(), tail);
                json!(why)
            }
        };
        self.unheard.push(json!({ "tenant": name, "attempt": attempt, "error": error }));
    }

    /// Nobody else begins, and what runs is ended; a second time: nothing is waited for.
    async fn interrupted(&mut self, again: bool) -> Result<bool, Failure> {
        if again {
            return Err(Failure::Incomplete(format!("interrupted; `tenantry exec --resume {}` goes on", self.id)));
        }
        eprintln!("interrupted: the commands are ended");
        self.running.values().for_each(|running| running.stop.cancel());
        let path = format!("/v1/rollouts/{}/cancel", self.id);
        match self.client.post(&path, &json!({})).await {
            // It may be over already.
            Ok(_) | Err(Failure::Refused(_) | Failure::Unavailable(_)) => Ok(true),
            Err(failure) => Err(failure),
        }
    }

    /// Nothing runs afterwards.
    async fn stop(&mut self) {
        self.running.values().for_each(|running| running.stop.cancel());
        while let Some(ended) = self.tasks.join_next().await {
            self.note(ended);
        }
        if !self.unheard.is_empty() {
            // Else the API finds out by itself.
            let _ = self.tell().await;
        }
    }
}

fn log_of(logs: &Path, tenant: &str) -> PathBuf {
    logs.join(format!("{tenant}.log"))
}

/// A tenant's command, and again if it failed and may be run again.
async fn command(job: Arc<Job>, name: String, login: String, attempt: u64, stop: CancellationToken) -> Ended {
    let mut outcome = Err(("it was not run".to_owned(), String::new()));
    // The login is as old as the first try.
    let deadline = Instant::now() + job.limit;
    for _ in 0..=job.retries {
        outcome = once(&job, &name, &login, deadline, &stop).await;
        if outcome.is_ok() || stop.is_cancelled() || Instant::now() >= deadline {
            break;
        }
    }
    (name, attempt, outcome)
}

async fn once(
    job: &Job,
    name: &str,
    login: &str,
    deadline: Instant,
    stop: &CancellationToken,
) -> Result<(), (String, String)> {
    let path = log_of(&job.logs, name);
    let fault = |what: &str, error: &std::io::Error| (format!("{what}: {error}"), String::new());
    let (log, begin) = open_log(&path, job).map_err(|error| fault("its log cannot be written", &error))?;
    let errors = log.try_clone().map_err(|error| fault("its log cannot be written", &error))?;
    let (program, words) = job.words.split_first().ok_or_else(|| ("there is no command".to_owned(), String::new()))?;
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0).kill_on_drop(true);
    command.envs(variables(job, name, login));
    let mut child = command.spawn().map_err(|error| fault(&format!("{program} cannot be run"), &error))?;
    let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
    let ended = tokio::select! {
        ended = timeout_at(deadline, child.wait()) => match ended {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(told(status)),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("it took longer than {}", humantime::format_duration(job.limit))),
        },
        () = stop.cancelled() => Err("interrupted".to_owned()),
    };
    end(&mut child, group).await;
    ended.map_err(|why| (why, tail(&path, begin)))
}

/// In words: a status, or the signal that ended it.
fn told(status: ExitStatus) -> String {
    status.code().map_or_else(|| status.to_string(), |code| format!("exit status {code}"))
}

/// It, and all that it started and left, is gone.
async fn end(child: &mut Child, group: Option<Pid>) {
    let Some(group) = group else { return };
    if matches!(child.try_wait(), Ok(None)) {
        let _ = killpg(group, Signal::SIGTERM);
        let _ = timeout(PATIENCE, child.wait()).await;
    }
    let _ = killpg(group, Signal::SIGKILL);
    let _ = child.wait().await;
}

/// For Django's and everybody's habits, and for libpq's programs; the rest of the environment is ours.
fn variables(job: &Job, name: &str, login: &str) -> Vec<(&'static str, String)> {
    let Job { host, port, password, .. } = job;
    let in_url = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let url = format!("postgresql://{login}:{password}@{in_url}:{port}/{name}");
    let own = |text: &str| text.to_owned();
    vec![
        ("DATABASE_URL", url),
        ("DATABASE_HOST", own(host)),
        ("DATABASE_PORT", own(port)),
        ("DATABASE_NAME", own(name)),
        ("DATABASE_USER", own(login)),
        ("DATABASE_PASSWORD", own(password)),
        ("PGHOST", own(host)),
        ("PGPORT", own(port)),
        ("PGDATABASE", own(name)),
        ("PGUSER", own(login)),
        ("PGPASSWORD", own(password)),
        ("TENANTRY_TENANT", own(name)),
    ]
}

/// Appended to; and where what comes now begins.
fn open_log(path: &Path, job: &Job) -> std::io::Result<(File, u64)> {
    let mut log = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    writeln!(log, "$ {}", job.words.join(" "))?;
    let begin = log.seek(SeekFrom::End(0))?;
    Ok((log, begin))
}

/// The last lines since then.
fn tail(path: &Path, begin: u64) -> String {
    let read = || {
        let mut log = File::open(path)?;
        let end = log.seek(SeekFrom::End(0))?;
        log.seek(SeekFrom::Start(begin.max(end.saturating_sub(TAIL_BYTES))))?;
        let mut bytes = Vec::new();
        log.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(TAIL_LINES)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn job(dir: &Path, words: &[&str], limit: Duration, retries: u32) -> Arc<Job> {
        Arc::new(Job {
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            host: "::1".to_owned(),
            port: "6432".to_owned(),
            password: "secret".to_owned(),
            limit,
            retries,
            logs: dir.to_owned(),
        })
    }

    async fn outcome(job: &Arc<Job>) -> Result<(), (String, String)> {
        command(Arc::clone(job), "shop".to_owned(), "login".to_owned(), 1, CancellationToken::new()).await.2
    }

    #[tokio::test]
    async fn a_command_has_the_variables_and_its_output_is_in_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let hour = Duration::from_secs(3_600);
        let well =
            job(dir.path(), &["sh", "-c", "echo $DATABASE_URL $PGUSER $DATABASE_NAME; test -n \"$PATH\""], hour, 0);
        assert_eq!(outcome(&well).await, Ok(()));
        let log = fs::read_to_string(dir.path().join("shop.log")).unwrap();
        assert!(log.contains("\npostgresql://login:secret@[::1]:6432/shop login shop\n"), "{log}");
        let ill = job(dir.path(), &["sh", "-c", "echo one; echo two >&2; exit 3"], hour, 0);
        assert_eq!(outcome(&ill).await, Err(("exit status 3".to_owned(), "one\ntwo".to_owned())));
        let none = job(dir.path(), &["/no/such/program"], hour, 0);
        assert!(outcome(&none).await.unwrap_err().0.contains("cannot be run"));
    }

    #[tokio::test]
    async fn one_that_failed_is_run_again_only_if_that_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let script = format!("test -e {0} || {{ touch {0}; exit 1; }}", dir.path().join("mark").display());
        let words = ["sh", "-c", script.as_str()];
        assert_eq!(outcome(&job(dir.path(), &words, Duration::from_secs(60), 1)).await, Ok(()));
        fs::remove_file(dir.path().join("mark")).unwrap();
        assert!(outcome(&job(dir.path(), &words, Duration::from_secs(60), 0)).await.is_err());
    }

    #[tokio::test]
    async fn a_command_that_takes_too_long_is_ended_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let words = ["sh", "-c", "sleep 1000 & echo $!; wait"];
        let (why, tail) = outcome(&job(dir.path(), &words, Duration::from_millis(300), 0)).await.unwrap_err();
        assert!(why.contains("longer than 300ms"), "{why}");
        let child = Pid::from_raw(tail.trim().parse().unwrap());
        // It was killed; the kernel may take a moment, and its new parent another.
        let is_gone = || {
            let state = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            state.is_empty() || state.contains(") Z ")
        };
        let gone = async {
            while !is_gone() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), gone).await.expect("the command's child is gone");
    }
}
