//! Saturation with tagged rows: many clients of three tenants on few server connections, while cancels arrive, clients vanish
//! and server connections are terminated. Every row must carry the tag of who asked; no sample may exceed the cap.
//!
//! `SOAK_QUERIES` (default 20,000) says how many queries; `cargo test --release --test soak -- --nocapture` shows the summary.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tenantry_testkit::{Answer, Client, Connect, Endpoint, ProxyBuilder, Tenant, client::send_cancel, cluster, say};
use tokio::task::JoinSet;

const CLIENTS: u64 = 60;
const CAP: i64 = 10;
const PIPELINE: u64 = 10;

/// What happened, over all clients.
#[derive(Default)]
struct Tally {
    /// Queries whose rows were checked.
    answered: AtomicU64,
    /// Rows of somebody else, twice, late or out of order.
    foreign: AtomicU64,
    /// Answers that ended short without saying why, or said it twice.
    dishonest: AtomicU64,
    vanished: AtomicU64,
    cancels: AtomicU64,
    logins: AtomicU64,
    done: AtomicBool,
    errors: Mutex<BTreeMap<String, u64>>,
    wrong: Mutex<Vec<String>>,
}

impl Tally {
    fn complain(&self, count: &AtomicU64, text: String) {
        count.fetch_add(1, Ordering::Relaxed);
        self.wrong.lock().expect("no panic inside").push(text);
    }

    fn error(&self, code: &str) {
        *self.errors.lock().expect("no panic inside").entry(code.to_owned()).or_default() += 1;
    }
}

/// One client task: its tag, and how far its queries are counted.
struct Asker {
    connect: Connect,
    endpoint: Endpoint,
    tenant: String,
    id: u64,
    next: u64,
    random: StdRng,
    tally: Arc<Tally>,
}

impl Asker {
    async fn work(mut self, total: u64) {
        while self.tally.answered.load(Ordering::Relaxed) < total {
            let mut client = match self.connect.try_login().await {
                Ok(client) => client,
                Err(answer) => {
                    answer.faults().iter().for_each(|fault| self.tally.error(&format!("login {}", fault.code)));
                    continue;
                }
            };
            client.deadline = Duration::from_secs(60);
            self.tally.logins.fetch_add(1, Ordering::Relaxed);
            self.session(client, total).await;
        }
    }

    /// Asks until the session ends, by its own will or not.
    async fn session(&mut self, mut client: Client, total: u64) {
        let text = format!("SELECT '{}', {}, $1::bigint", self.tenant, self.id);
        let prepare = [say::parse("s", &text), say::sync()].concat();
        if !self.check(&client.ask(&prepare).await, &[]) {
            return;
        }
        let mut prepared = true;
        while self.tally.answered.load(Ordering::Relaxed) < total {
            let (bytes, tags, readies) = self.compose(prepared);
            client.send(&bytes).await;
            match self.random.random_range(0..2000) {
                0..8 => {
                    self.tally.vanished.fetch_add(1, Ordering::Relaxed);
                    return client.vanish();
                }
                8..40 => {
                    self.tally.cancels.fetch_add(1, Ordering::Relaxed);
                    let (endpoint, request) = (self.endpoint.clone(), client.cancel_request());
                    tokio::spawn(async move { send_cancel(&endpoint, &request).await });
                }
                _ => {}
            }
            let mut status = Some('I');
            let mut answers = Answer::default();
            for _ in 0..readies {
                let answer = client.until_ready().await;
                status = answer.status();
                answers.messages.extend(answer.messages);
                answers.closed |= answer.closed;
                if answers.closed {
                    break;
                }
            }
            if !self.check(&answers, &tags) {
                return;
            }
            if status != Some('I') {
                let answer = client.query("ROLLBACK").await;
                if !self.check(&answer, &[]) {
                    return;
                }
            }
            prepared = prepared || self.random.random_bool(0.5);
        }
        client.leave().await;
    }

    /// Bytes to send, the numbers that come back in this order, and how many ReadyForQuery.
    fn compose(&mut self, prepared: bool) -> (Vec<u8>, Vec<u64>, usize) {
        let first = self.next;
        let simple = |n: u64| say::query(&format!("SELECT '{}', {}, {n}::bigint", self.tenant, self.id));
        let unnamed = |n: u64| say::unnamed(&format!("SELECT '{}', {}, {n}::bigint", self.tenant, self.id), &[]);
        let named = |n: u64| [say::bind("", "s", &[Some(&n.to_string())]), say::execute("", 0)].concat();
        let kind = self.random.random_range(0..if prepared { 6 } else { 4 });
        let (bytes, count, readies) = match kind {
            0 => (simple(first), 1, 1),
            1 => ([unnamed(first), say::sync()].concat(), 1, 1),
            2 => {
                let parts = [say::query("BEGIN"), simple(first), unnamed(first + 1), say::sync(), say::query("COMMIT")];
                (parts.concat(), 2, 4)
            }
            3 => ((0..PIPELINE).flat_map(|i| simple(first + i)).collect(), PIPELINE, 10),
            4 => ([named(first), say::sync()].concat(), 1, 1),
            _ => {
                let mut bytes: Vec<u8> = (0..PIPELINE).flat_map(|i| [named(first + i), say::sync()].concat()).collect();
                bytes.extend([unnamed(first + PIPELINE), named(first + PIPELINE + 1), say::sync()].concat());
                (bytes, PIPELINE + 2, 11)
            }
        };
        self.next += count;
        (bytes, (first..first + count).collect(), readies)
    }

    /// Whether the session goes on. Every row is this client's, in the order asked; what is missing is explained by an error.
    fn check(&mut self, answer: &Answer, tags: &[u64]) -> bool {
        let mut expected = tags.iter().peekable();
        let mut rows = 0;
        for row in answer.rows() {
            let mine = row.first().and_then(Option::as_deref) == Some(self.tenant.as_str())
                && row.get(1).and_then(Option::as_deref) == Some(self.id.to_string().as_str());
            let number: Option<u64> = row.get(2).and_then(Option::as_deref).and_then(|n| n.parse().ok());
            // After an error rows may be missing, but none may come twice or late.
            let in_order = mine && expected.by_ref().any(|tag| Some(*tag) == number);
            if !in_order {
                let text =
                    format!("{}/{} asked {tags:?} and got {row:?} in {:#?}", self.tenant, self.id, answer.trace());
                self.tally.complain(&self.tally.foreign, text);
            }
            rows += 1;
        }
        self.tally.answered.fetch_add(rows, Ordering::Relaxed);
        let faults = answer.faults();
        for fault in &faults {
            self.tally.error(&format!("{} {}", fault.severity, fault.code));
        }
        let (missing, fatal) = (rows < tags.len() as u64, faults.iter().filter(|f| f.severity == "FATAL").count());
        if faults.is_empty() && (missing || answer.closed) || fatal > 1 {
            let text = format!("{}/{} asked {tags:?}: {:#?}", self.tenant, self.id, answer.trace());
            self.tally.complain(&self.tally.dishonest, text);
        }
        !answer.closed
    }
}

/// Samples connection counts and ends some; returns the highest sum and how many were ended.
async fn watch(tenants: Vec<Tenant>, tally: Arc<Tally>) -> (i64, u64) {
    let admin = cluster().admin("postgres").await;
    let names: Vec<String> = tenants.iter().map(|t| t.name.clone()).collect();
    let count = admin.prepare("SELECT count(*) FROM pg_stat_activity WHERE datname = ANY($1)").await.expect("prepared");
    let strike =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = ANY($1) ORDER BY random() LIMIT 1";
    let strike = admin.prepare(strike).await.expect("prepared");
    let (mut most, mut strikes, mut sample) = (0, 0, 0_u64);
    while !tally.done.load(Ordering::Relaxed) {
        let sum: i64 = admin.query_one(&count, &[&names]).await.expect("counted").get(0);
        most = most.max(sum);
        sample += 1;
        if sample.is_multiple_of(10) {
            strikes += admin.query(&strike, &[&names]).await.expect("terminated").len() as u64;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (most, strikes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_row_carries_the_askers_tag_whatever_happens() {
    let total = std::env::var("SOAK_QUERIES").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000);
    let mut tenants = Vec::new();
    for _ in 0..3 {
        tenants.push(cluster().tenant("soak").await);
    }
    let proxy = tenants
        .iter()
        .fold(ProxyBuilder::new(cluster()), ProxyBuilder::tenant)
        .set("servers.main.cap", CAP)
        .set("pool.pool_size", 5)
        .set("pool.max_prepared_statements", 20)
        .start()
        .await;
    let tally = Arc::new(Tally::default());
    let watcher = tokio::spawn(watch(tenants.clone(), Arc::clone(&tally)));
    let start = Instant::now();
    let mut askers = JoinSet::new();
    for id in 0..CLIENTS {
        let tenant = &tenants[usize::try_from(id).expect("small") % tenants.len()];
        let asker = Asker {
            connect: proxy.connect(tenant),
            endpoint: proxy.endpoint(),
            tenant: tenant.name.clone(),
            id,
            next: 0,
            random: StdRng::seed_from_u64(id),
            tally: Arc::clone(&tally),
        };
        askers.spawn(asker.work(total));
    }
    while let Some(ended) = askers.join_next().await {
        ended.expect("a client task");
    }
    let seconds = start.elapsed().as_secs_f64();
    tally.done.store(true, Ordering::Relaxed);
    let (most, strikes) = watcher.await.expect("the watcher");
    let answered = tally.answered.load(Ordering::Relaxed);
    let errors = tally.errors.lock().expect("no panic inside").clone();
    println!(
        "soak: {answered} rows checked in {seconds:.1} s ({:.0}/s), {} foreign, {} answers cut without a word; {CLIENTS} clients, {} logins, {} vanished, \
         {} cancels, {strikes} server connections terminated; at most {most} of {CAP} connections; errors {errors:?}",
        answered as f64 / seconds,
        tally.foreign.load(Ordering::Relaxed),
        tally.dishonest.load(Ordering::Relaxed),
        tally.logins.load(Ordering::Relaxed),
        tally.vanished.load(Ordering::Relaxed),
        tally.cancels.load(Ordering::Relaxed),
    );
    let wrong = std::mem::take(&mut *tally.wrong.lock().expect("no panic inside"));
    assert!(wrong.is_empty(), "{} wrong answers, among them:\n{}", wrong.len(), wrong[..wrong.len().min(5)].join("\n"));
    assert!(most <= CAP, "{most} connections, the cap is {CAP}");
    let expected = ["ERROR 57014", "FATAL 57P01", "FATAL 08006", "FATAL 08007"];
    // A canceled BEGIN leaves COMMIT and ROLLBACK without a transaction; a failed transaction refuses what follows.
    let strange: Vec<_> =
        errors.keys().filter(|code| !expected.contains(&code.as_str()) && *code != "ERROR 25P02").collect();
    assert!(strange.is_empty(), "unexpected errors: {strange:?}");
    // Everything comes to rest, and everybody is served.
    for tenant in &tenants {
        cluster().at_rest(tenant).await;
        assert_eq!(proxy.connect(tenant).login().await.value("SELECT current_database()").await, tenant.name);
    }
}
