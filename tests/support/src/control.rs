//! A Tenantry with a control plane: its role, its database, a token, and the API over HTTP.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use reqwest::{Method, header::HeaderMap};
use serde_json::{Value, json};

use crate::{
    postgres::{Cluster, Tenant, cluster},
    proxy::{Proxy, ProxyBuilder, binary},
    relay::Relay,
    wait::eventually,
};

const PASSWORD: &str = "secret-of-the-control-role";

/// What the documentation says the control role needs, and nothing more: the file that it tells to run.
pub async fn control_role(cluster: &Cluster) {
    control_role_with(cluster, &[]).await;
}

/// The same with variables of the file, `NAME=VALUE`.
pub async fn control_role_with(cluster: &Cluster, variables: &[&str]) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/control-role.sql");
    let psql = [cluster.program("psql"), PathBuf::from("/usr/bin/psql")].into_iter().find(|path| path.exists());
    let mut command = tokio::process::Command::new(psql.expect("psql"));
    command.args(["-X", "-q", "-v", &format!("password={PASSWORD}")]);
    for variable in variables {
        command.args(["-v", variable]);
    }
    command.arg("-f").arg(file);
    command.arg(format!("host=127.0.0.1 port={} user=postgres dbname=postgres", cluster.port()));
    let done = command.output().await.expect("psql");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Settings with the catalog on `main`.
pub fn control_builder(builder: ProxyBuilder) -> ProxyBuilder {
    builder.set("servers.main.control", login()).set("admin.catalog", "main").set("servers.main.cap", 30)
}

/// One more server of the settings, with the control role's login.
#[must_use]
pub fn with_server(builder: ProxyBuilder, name: &str, address: SocketAddr) -> ProxyBuilder {
    let key = |last: &str| format!("servers.{name}.{last}");
    builder
        .set(&key("host"), address.ip().to_string())
        .set(&key("port"), i64::from(address.port()))
        .set(&key("control"), login())
}

/// A proxy whose catalog is behind a link that can break; the server `data` is the same PostgreSQL, reached directly.
pub async fn control_behind(relay: &Relay) -> (Proxy, Api) {
    control_role(cluster()).await;
    let builder = control_builder(ProxyBuilder::to(relay.address()));
    let proxy = with_server(builder, "data", cluster().address()).start().await;
    let api = Api::new(&proxy, "admin").await;
    (proxy, api)
}

fn login() -> toml::Table {
    let control = [("role", "tenantry_control"), ("database", "tenantry_control"), ("password", PASSWORD)];
    toml::Table::from_iter(control.map(|(key, value)| (key.to_owned(), toml::Value::from(value))))
}

/// A proxy whose catalog is on the shared cluster, and the API as admin.
pub async fn control_proxy() -> (Proxy, Api) {
    control_role(cluster()).await;
    let proxy = control_builder(ProxyBuilder::new(cluster())).start().await;
    let api = Api::new(&proxy, "admin").await;
    (proxy, api)
}

/// The API with one token.
#[derive(Debug, Clone)]
pub struct Api {
    pub base: SocketAddr,
    pub token: String,
    http: reqwest::Client,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Api {
    /// With a token made by the command line, once the proxy knows it.
    pub async fn new(proxy: &Proxy, access: &str) -> Self {
        let made = Command::new(binary())
            .args(["token", "create", "--label", "test", "--access", access, "--config"])
            .arg(proxy.file())
            .output()
            .expect("tenantry token");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let token = String::from_utf8_lossy(&made.stdout).trim().to_owned();
        let api = Self { base: proxy.admin(), token, http: http() };
        eventually("the token is known", async || (api.get("/v1/tenants").await.status == 200).then_some(())).await;
        api
    }

    /// The same at another process.
    #[must_use]
    pub fn at(&self, proxy: &Proxy) -> Self {
        Self { base: proxy.admin(), ..self.clone() }
    }

    #[must_use]
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: token.to_owned(), ..self.clone() }
    }

    /// One request; a connection that breaks is `None`.
    pub async fn try_send(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        headers: &[(&str, &str)],
    ) -> Option<Reply> {
        let mut request = self.request(method, path, headers);
        if let Some(body) = body {
            request = request.json(body);
        }
        Self::reply(request).await
    }

    /// A body of bytes; a connection that breaks is `None`.
    pub async fn try_upload(&self, path: &str, body: Vec<u8>, headers: &[(&str, &str)]) -> Option<Reply> {
        Self::reply(self.request("POST", path, headers).body(body)).await
    }

    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> reqwest::RequestBuilder {
        let method = Method::from_bytes(method.as_bytes()).expect("a method");
        let mut request = self.http.request(method, format!("http://{}{path}", self.base));
        if !self.token.is_empty() {
            request = request.bearer_auth(&self.token);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request
    }

    async fn reply(request: reqwest::RequestBuilder) -> Option<Reply> {
        let response = request.timeout(Duration::from_secs(60)).send().await.ok()?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let bytes = response.bytes().await.ok()?;
        let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| json!(String::from_utf8_lossy(&bytes)));
        Some(Reply { status, headers, body })
    }

    pub async fn send(&self, method: &str, path: &str, body: Option<&Value>, headers: &[(&str, &str)]) -> Reply {
        let reply = self.try_send(method, path, body, headers).await;
        reply.unwrap_or_else(|| panic!("{method} {path}: no answer"))
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, None, &[]).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.send("POST", path, Some(&body), &[]).await
    }

    /// Makes a tenant; how its clients log in.
    pub async fn create(&self, name: &str) -> Tenant {
        let reply = self.post("/v1/tenants", json!({ "name": name })).await;
        assert_eq!(reply.status, 201, "{}", reply.body);
        tenant_of(&reply.body)
    }

    /// Waits until no job is under way.
    pub async fn no_open_job(&self) {
        eventually("no open job", async || {
            let jobs = self.try_send("GET", "/v1/jobs?limit=500", None, &[]).await?;
            let items = jobs.body["items"].as_array()?.clone();
            let is_over = |job: &Value| matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled"));
            items.iter().all(is_over).then_some(())
        })
        .await;
    }
}

/// Never TLS; but without a configuration it would want a provider of the whole process.
fn http() -> reqwest::Client {
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls =
        rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
    let tls = tls.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    reqwest::Client::builder().use_preconfigured_tls(tls).build().expect("a client")
}

/// The credentials in an answer.
pub fn tenant_of(body: &Value) -> Tenant {
    let text = |key: &str| body["credentials"][key].as_str().unwrap_or_else(|| panic!("no {key} in {body}")).to_owned();
    Tenant { name: text("database"), role: text("user"), password: text("password") }
}
