//! The API, from the command line: requests, and what its errors mean for the exit code.

use std::{path::Path, sync::Arc, time::Duration};

use eventsource_stream::Eventsource as _;
use futures_util::StreamExt as _;
use reqwest::{Method, StatusCode, header};
use rustls::{
    ClientConfig,
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::Value;
use tenantry_config::{ServerTls, ServerTlsMode};
use tenantry_proxy::net::tls::Connector;

use crate::{cli, failure::Failure};

/// Longer than the API lets a request wait for its job.
const REQUEST_LIMIT: Duration = Duration::from_secs(330);
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Between two pieces of a stream; the API sends a sign of life every 15 s.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Streams in a row that end, or do not begin, without a word: then it is given up. Waits between them: doubled each time.
const MOST_TRIES: u32 = 6;
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// One API, one token.
pub struct Client {
    http: reqwest::Client,
    url: String,
    token: String,
}

/// What changes how a request is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    pub if_match: bool,
    pub idempotency_key: Option<&'a str>,
    pub no_wait: bool,
}

impl Client {
    pub fn new(api: &cli::Api) -> Result<Self, Failure> {
        let token = match (&api.token, &api.token_file) {
            (Some(token), _) => token.trim().to_owned(),
            (None, Some(file)) => {
                let text = std::fs::read_to_string(file);
                text.map_err(|error| Failure::Usage(format!("{}: {error}", file.display())))?.trim().to_owned()
            }
            (None, None) => {
                return Err(Failure::Forbidden(
                    "a token is needed: set TENANTRY_TOKEN or TENANTRY_TOKEN_FILE; `tenantry token create` makes one"
                        .to_owned(),
                ));
            }
        };
        // Also where it is not used: without one it asks for a provider of the whole process.
        let mode = if api.url.starts_with("https:") { ServerTlsMode::VerifyFull } else { ServerTlsMode::Require };
        let tls = ServerTls { mode, ca_file: api.ca_file.clone(), direct: false };
        let url = reqwest::Url::parse(&api.url).map_err(|error| Failure::Usage(format!("--url: {error}")))?;
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let connector = Connector::load(&tls, host).map_err(|error| Failure::Usage(error.to_string()))?;
        let mut tls = connector.client_config();
        if let (Some(cert), Some(key)) = (&api.cert_file, &api.key_file) {
            show_certificate(&mut tls, cert, key)?;
        }
        // No limit on the whole: a job's events take as long as the job.
        let http = reqwest::Client::builder().connect_timeout(CONNECT_LIMIT).use_preconfigured_tls(tls);
        let http = http.build().map_err(Failure::internal("cannot make an HTTP client"))?;
        Ok(Self { http, url: api.url.trim_end_matches('/').to_owned(), token })
    }

    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.send(Method::GET, path, None, Options::default()).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.send(Method::POST, path, Some(body), Options::default()).await
    }

    pub async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        options: Options<'_>,
    ) -> Result<Value, Failure> {
        let mut request = self.request(method, path).timeout(REQUEST_LIMIT);
        if let Some(body) = body {
            request = request.json(body);
        }
        self.answer(request, options).await
    }

    /// A body of so many bytes, which takes as long as it takes.
    pub async fn upload(
        &self,
        path: &str,
        (body, bytes): (reqwest::Body, u64),
        options: Options<'_>,
    ) -> Result<Value, Failure> {
        let request = self.request(Method::POST, path).header(header::CONTENT_TYPE, "application/vnd.sqlite3");
        self.answer(request.header(header::CONTENT_LENGTH, bytes).body(body), options).await
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.token)
    }

    async fn answer(&self, mut request: reqwest::RequestBuilder, options: Options<'_>) -> Result<Value, Failure> {
        if options.if_match {
            request = request.header(header::IF_MATCH, "*");
        }
        if let Some(key) = options.idempotency_key {
            request = request.header("Idempotency-Key", key);
        }
        if options.no_wait {
            request = request.header("Prefer", "respond-async");
        }
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let body = response.bytes().await.map_err(|error| self.unreachable(&error))?;
        let value: Value =
            if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap_or_default() };
        if status.is_success() { Ok(value) } else { Err(refused(status, &value)) }
    }

    /// Follows server-sent events (event, data) until `told` says that it was the last; goes on after the last one where a
    /// connection breaks.
    pub async fn follow(&self, path: &str, mut told: impl FnMut(&str, &Value) -> bool) -> Result<(), Failure> {
        let (mut last, mut tries) = (String::new(), 0);
        loop {
            let began = tokio::time::Instant::now();
            let why = match self.events(path, &mut last, &mut tries, &mut told).await {
                Ok(true) => return Ok(()),
                Ok(false) => Failure::Unavailable(format!("{}: the stream of events ended early", self.url)),
                Err(failure @ Failure::Unavailable(_)) => failure,
                Err(failure) => return Err(failure),
            };
            // A stream may live for minutes without a word, and is cut after ten.
            tries = if began.elapsed() > SILENCE_LIMIT { 1 } else { tries + 1 };
            if tries == MOST_TRIES {
                return Err(why);
            }
            tokio::time::sleep(FIRST_WAIT * 2u32.saturating_pow(tries - 1)).await;
        }
    }

    /// One stream; whether its end was seen.
    async fn events(
        &self,
        path: &str,
        last: &mut String,
        tries: &mut u32,
        told: &mut impl FnMut(&str, &Value) -> bool,
    ) -> Result<bool, Failure> {
        let mut request = self.http.get(format!("{}{path}", self.url)).bearer_auth(&self.token);
        if !last.is_empty() {
            request = request.header("Last-Event-ID", last.as_str());
        }
        let silent = || Failure::Unavailable(format!("{}: nothing came for {SILENCE_LIMIT:?}", self.url));
        let response = tokio::time::timeout(SILENCE_LIMIT, request.send()).await;
        let response = response.map_err(|_| silent())?.map_err(|error| self.unreachable(&error))?;
        if !response.status().is_success() {
            let status = response.status();
            let value = response.json().await.unwrap_or_default();
            return Err(refused(status, &value));
        }
        // The limit is on the bytes: signs of life are no events.
        let bytes = response.bytes_stream().boxed();
        let bytes = futures_util::stream::unfold(bytes, |mut bytes| async {
            let next = tokio::time::timeout(SILENCE_LIMIT, bytes.next()).await.ok()??;
            Some((next, bytes))
        });
        let mut events = Box::pin(bytes.eventsource());
        while let Some(event) = events.next().await {
            let event = event.map_err(|error| Failure::Unavailable(format!("{}: {error}", self.url)))?;
            *tries = 0;
            if !event.id.is_empty() {
                last.clone_from(&event.id);
            }
            if told(&event.event, &serde_json::from_str(&event.data).unwrap_or_default()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let cause = std::error::Error::source(error).map_or_else(String::new, |source| format!(": {source}"));
        Failure::Unavailable(format!(
            "{}: {error}{cause}; is `tenantry serve` running, with admin.catalog set?",
            self.url
        ))
    }
}

/// For an API that wants to see one (`admin.client_ca_file`).
fn show_certificate(tls: &mut ClientConfig, cert: &Path, key: &Path) -> Result<(), Failure> {
    let wrong = |file: &Path, error: &dyn std::fmt::Display| Failure::Usage(format!("{}: {error}", file.display()));
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.map_err(|error| wrong(cert, &error))?;
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, &error))?;
    let shown = CertifiedKey::from_der(chain, secret, tls.crypto_provider()).map_err(|error| wrong(key, &error))?;
    tls.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(shown));
    Ok(())
}

fn refused(status: StatusCode, problem: &Value) -> Failure {
    let text = match (problem["title"].as_str(), problem["detail"].as_str()) {
        (Some(title), Some(detail)) => format!("{title}: {detail}"),
        _ => format!("the API answered {status}"),
    };
    let text = match problem["job"].as_i64() {
        Some(job) => format!("{text} (job {job})"),
        None => text,
    };
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::Forbidden(text),
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Failure::Unavailable(text),
        status if status.is_server_error() => Failure::Internal(text),
        _ => Failure::Refused(text),
    }
}
