//! The reference: every key with its default and its comment, as a file that can be loaded.
//!
//! What always holds: nothing is typed here that `settings.rs` knows; a key that stands at its default is commented out.

use std::fmt::Write as _;

use crate::{
    Server, Settings, Tenant,
    keys::{ControlKeys, RoleKeys, Section, Visitor},
    value::Setting,
};

const HEAD: &str = "\
# tenantry.toml: every key with its default. Made from the code; do not edit.
#
# A line that starts with \"#\" and a letter is a key at its default: take the \"#\" away to change it. The server and the
# tenant are examples; at least one of each is needed. Any key can also be set in the environment
# (TENANTRY__POOL__POOL_SIZE=5) or with a flag, which win over the file.
";

/// The text of `config/reference.toml`.
#[must_use]
pub fn reference() -> String {
    let mut out = HEAD.to_owned();
    let Settings { mut process, mut listen, mut auth, mut pool, mut admin, mut log, .. } = Settings::default();
    let mut server = Server { host: "db.example.com".to_owned(), ..Server::default() };
    let mut tenant = Tenant { server: "main".to_owned(), ..Tenant::default() };
    let mut control = ControlKeys { role: "tenantry".to_owned(), ..ControlKeys::default() };
    let mut role = RoleKeys { name: "app".to_owned(), ..RoleKeys::default() };
    table(&mut out, "[process]", &[], &mut process);
    table(&mut out, "[listen]", &[], &mut listen);
    table(&mut out, "[auth]", &[], &mut auth);
    table(&mut out, "[pool]", &[], &mut pool);
    table(&mut out, "[admin]", &[], &mut admin);
    table(&mut out, "[log]", &[], &mut log);
    table(&mut out, "[servers.main]", &["host"], &mut server);
    table(&mut out, "#[servers.main.control]", &[], &mut control);
    table(&mut out, "[tenants.acme]", &["server"], &mut tenant);
    out.push_str("# Any key of [pool] may stand here too, and then counts for this tenant.\n");
    out.push_str("# [tenants.\"*\"] takes the same keys and serves any database name that no tenant has.\n");
    table(&mut out, "#[[tenants.acme.roles]]", &[], &mut role);
    out
}

/// One table; `uncommented` are the keys without which the file does not load.
fn table<S: Section>(out: &mut String, header: &str, uncommented: &'static [&'static str], section: &mut S) {
    out.push('\n');
    comment(out, S::DOCS);
    let _ = writeln!(out, "{header}");
    let mut lines = Lines { header, uncommented, docs: docs::<S>, keys: String::new(), tables: String::new() };
    section.keys(&mut lines);
    let Lines { keys, tables, .. } = lines;
    out.push_str(&keys);
    out.push_str(&tables);
}

fn docs<S: Section>(field: &str) -> &'static str {
    S::get_field_docs(field).unwrap_or_default()
}

fn comment(out: &mut String, docs: &str) {
    for line in docs.lines() {
        let _ = writeln!(out, "# {}", line.trim());
    }
}

/// Writes the rows of one table, and the tables in it after them, as TOML wants.
struct Lines<'a> {
    header: &'a str,
    uncommented: &'static [&'static str],
    docs: fn(&str) -> &'static str,
    keys: String,
    tables: String,
}

impl Visitor for Lines<'_> {
    fn key<T: Setting>(&mut self, name: &'static str, field: &mut T) {
        comment(&mut self.keys, (self.docs)(name));
        let mark = if self.uncommented.contains(&name) { "" } else { "#" };
        let _ = writeln!(self.keys, "{mark}{name} = {}", field.render());
    }

    fn section<S: Section>(&mut self, name: &'static str, section: &mut S) {
        let header = format!("[{}]", format_args!("{}.{name}", self.header.trim_matches(['[', ']'])));
        table(&mut self.tables, &header, &[], section);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::{Overrides, Secret, TenantId, load};

    fn on_disk() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("reference.toml")
    }

    #[test]
    #[expect(
        clippy::disallowed_methods,
        reason = "whether to rewrite the file is asked of the person who runs the test"
    )]
    fn the_file_on_disk_is_the_reference() {
        let rewrite = std::env::var_os("UPDATE_REFERENCE").is_some();
        if rewrite {
            fs::write(on_disk(), reference()).unwrap();
        }
        let text = fs::read_to_string(on_disk()).unwrap();
        assert!(text == reference(), "stale; run the tests with UPDATE_REFERENCE=1");
    }

    fn defaults() -> Settings {
        let mut wanted = Settings::default();
        wanted.servers.insert("main".into(), Server { host: "db.example.com".into(), ..Server::default() });
        let tenant = Tenant { server: "main".into(), ..Tenant::default() };
        wanted.tenants.insert(TenantId::parse("acme").unwrap(), tenant);
        wanted
    }

    #[test]
    fn the_reference_loads_as_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tenantry.toml");
        fs::write(&file, reference()).unwrap();
        assert_eq!(load(Some(&file), &Overrides::default()).unwrap(), defaults());
    }

    #[test]
    fn every_commented_key_reads_back_as_its_default() {
        let is_comment = |line: &&str| line.starts_with("# ") || *line == "#" || line.starts_with("#password");
        let text = reference();
        let kept: Vec<&str> = text.lines().filter(|line| !is_comment(line)).collect();
        let text = kept.iter().map(|line| line.strip_prefix('#').unwrap_or(line)).collect::<Vec<_>>().join("\n");
        assert!(text.contains("\nquery_timeout = \"off\"\n"), "{text}");
        let text = text + "\npassword = \"x\"\n";
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tenantry.toml");
        fs::write(&file, text).unwrap();
        let mut wanted = defaults();
        let control = crate::Control {
            role: "tenantry".into(),
            database: "postgres".into(),
            secret: crate::RoleSecret::None,
            connection_limits: false,
        };
        wanted.servers.get_mut("main").unwrap().control = Some(control);
        let role = crate::Role {
            name: "app".into(),
            secret: crate::RoleSecret::Plain(Secret::from("x")),
            pool_mode: None,
            pool_size: None,
            former: None,
        };
        wanted.tenants.get_mut("acme").unwrap().roles.push(role);
        assert_eq!(load(Some(&file), &Overrides::default()).unwrap(), wanted);
    }
}
