//! The API, from the command line: requests, and what its errors mean for the exit code.

use std::time::Duration;

use reqwest::{Method, StatusCode, header};
use serde_json::Value;
use tenantry_config::{ServerTls, ServerTlsMode};
use tenantry_proxy::net::tls::Connector;

use crate::{cli, failure::Failure};

/// Longer than the API lets a request wait for its job.
const REQUEST_LIMIT: Duration = Duration::from_secs(330);
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// One API, one token.
pub struct Client {
    http: reqwest::Client,
    url: String,
    token: String,
}

/// What changes how a request is made.
#[derive(Debug, Default)]
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
        let connector = Connector::load(&tls, "").map_err(|error| Failure::Usage(error.to_string()))?;
        let http = reqwest::Client::builder().timeout(REQUEST_LIMIT).connect_timeout(CONNECT_LIMIT);
        let http = http.use_preconfigured_tls(connector.client_config());
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
        let mut request = self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.token);
        if let Some(body) = body {
            request = request.json(body);
        }
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

    /// Server-sent events, one by one: (event, data).
    pub async fn events(&self, path: &str, mut told: impl FnMut(&str, &Value)) -> Result<(), Failure> {
        let request = self.http.get(format!("{}{path}", self.url)).bearer_auth(&self.token);
        let mut response = request.send().await.map_err(|error| self.unreachable(&error))?;
        if !response.status().is_success() {
            let status = response.status();
            let value = response.json().await.unwrap_or_default();
            return Err(refused(status, &value));
        }
        let (mut text, mut event) = (String::new(), String::new());
        while let Some(chunk) = response.chunk().await.map_err(|error| self.unreachable(&error))? {
            text.push_str(&String::from_utf8_lossy(&chunk));
            while let Some(end) = text.find('\n') {
                let line: String = text.drain(..=end).collect();
                match line.trim_end().split_once(':') {
                    Some(("event", name)) => name.trim().clone_into(&mut event),
                    Some(("data", data)) => told(&event, &serde_json::from_str(data.trim()).unwrap_or_default()),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let cause = std::error::Error::source(error).map_or_else(String::new, |source| format!(": {source}"));
        Failure::Unavailable(format!(
            "{}: {error}{cause}; is `tenantry serve` running, with admin.catalog set?",
            self.url
        ))
    }
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
