//! What the demo tells people: how to connect, and where to look.

use std::net::SocketAddr;

use super::{Fork, place::Place, postgres::Cluster};

pub fn text(
    cluster: &Cluster,
    address: SocketAddr,
    admin: Option<SocketAddr>,
    place: &Place,
    forks: &[Fork],
) -> String {
    let mut text = format!(
        "Tenantry serves {} tenants at {address}; PostgreSQL behind it is at 127.0.0.1:{} ({}).\n",
        forks.len(),
        cluster.port,
        cluster.bin.display(),
    );
    for fork in forks {
        text.push_str(&tenant(fork, address, place));
    }
    if let Some(admin) = admin {
        text.push_str(&format!(
            "\nMetrics: http://{admin}/metrics   Health: http://{admin}/readyz   API: http://{admin}/openapi.json\n\n\
             One more tenant, with one call:\n  \
             export TENANTRY_URL=http://{admin} TENANTRY_TOKEN_FILE={dir}/token\n  \
             tenantry tenant create delta\n  \
             curl -H \"Authorization: Bearer $(cat {dir}/token)\" -H 'Content-Type: application/json' \\\n       \
             -d '{{\"name\": \"epsilon\"}}' http://{admin}/v1/tenants\n\n",
            dir = place.path().display(),
        ));
    }
    text.push_str(&format!("Settings: {}/tenantry.toml\n\nCtrl-C ends it.", place.path().display()));
    text
}

fn tenant(Fork { name, password }: &Fork, address: SocketAddr, place: &Place) -> String {
    let (host, port) = (address.ip(), address.port());
    format!(
        r#"
{name}
  psql "postgresql://{name}:{password}@{host}:{port}/{name}?sslmode=verify-full&sslrootcert={certificate}"
  DATABASES = {{
      "default": {{
          "ENGINE": "django.db.backends.postgresql",
          "HOST": "{host}", "PORT": {port}, "NAME": "{name}", "USER": "{name}",
          "PASSWORD": "{password}",
          "CONN_MAX_AGE": 600,
          "OPTIONS": {{"sslmode": "require"}},
      }}
  }}
"#,
        certificate = place.certificate().display(),
    )
}
