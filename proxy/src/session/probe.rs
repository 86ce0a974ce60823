//! Asking PostgreSQL what a session has left behind on its connection, and telling a connection what it should have.
//!
//! With `pool/functions.rs` the only file of the data plane that builds SQL text; its inputs are names and values that
//! PostgreSQL itself gave or accepted, quoted here. Pure.

use std::{fmt::Write as _, sync::Arc};

use bytes::BytesMut;
use tenantry_wire::{
    extended::{self, Parse},
    frame::FrameError,
    message,
    tag::frontend,
};

use super::{
    owed::{For, Kind, Owed},
    pin::{PinReason, Pins},
};
use crate::{
    pool::functions::{Look, PRINT, Question, READ, Reading},
    server::{
        conn::ServerConn,
        settings::{Difference, Settings, is_role},
        sql::literal,
        statements::Prepared,
    },
};

/// One row per setting of the session: kind, name, value.
const SETTINGS: &str = "SELECT 'setting', name, pg_catalog.current_setting(name) FROM pg_catalog.pg_settings \
WHERE source OPERATOR(pg_catalog.=) 'session' AND name OPERATOR(pg_catalog.<>) ALL (ARRAY['transaction_isolation', 'transaction_read_only', 'transaction_deferrable']) \
UNION ALL ";

/// One row per other thing that is left.
const REST: &str = "SELECT 'setting', 'role', pg_catalog.current_setting('role') \
WHERE pg_catalog.current_setting('role') OPERATOR(pg_catalog.<>) 'none' \
UNION ALL SELECT 'user', session_user::pg_catalog.text, '' \
UNION ALL SELECT 'advisory_lock', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_locks \
WHERE locktype OPERATOR(pg_catalog.=) 'advisory' AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()) \
UNION ALL SELECT 'cursor', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable) \
UNION ALL SELECT 'temp', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_depend \
WHERE refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_namespace'::pg_catalog.regclass \
AND refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()) \
UNION ALL SELECT 'prepare', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql) \
UNION ALL SELECT 'listen', channel, '' FROM pg_catalog.pg_listening_channels() AS channel";

/// The settings that functions touch, one row each.
fn add_touched(sql: &mut String, look: &Look) {
    for name in &look.names {
        let name = literal(name);
        let _ =
            write!(sql, " UNION ALL SELECT 'touched', {name}, COALESCE(pg_catalog.current_setting({name}, true), '')");
    }
}

/// Writes the look at what functions may have left; its statement is prepared once on each connection, since to plan it
/// costs PostgreSQL more than to run it.
pub fn write_look(out: &mut BytesMut, owed: &mut Owed, look: &Look, prepared: &mut Prepared) -> Result<(), FrameError> {
    if prepared.look().is_none_or(|(id, _)| id != look.id) {
        if let Some((_, old)) = prepared.look() {
            extended::write_statement_target(out, frontend::CLOSE, old)?;
            owed.push(Kind::Close, For::Probe, None);
        }
        prepared.prepare_look(look.id);
        let mut sql = REST.to_owned();
        add_touched(&mut sql, look);
        let (_, name) = prepared.look().unwrap_or_default();
        Parse { name, query: sql.as_bytes(), types: b"\0\0" }.write_as(out, name)?;
        owed.push(Kind::Parse, For::Probe, None);
    }
    let (_, name) = prepared.look().unwrap_or_default();
    extended::write_plain_run(out, name)?;
    owed.push(Kind::Bind, For::Probe, None);
    owed.push(Kind::Execute, For::Probe, None);
    out.extend_from_slice(message::SYNC);
    owed.push(Kind::Sync, For::Probe, None);
    Ok(())
}

/// The probe, with the custom settings that the session is known to have touched; `functions`: and what functions may do.
#[must_use]
pub fn probe(custom: &[String], functions: Option<Question>, look: Option<&Look>) -> String {
    let mut sql = SETTINGS.to_owned();
    sql.push_str(REST);
    if let Some(asked) = functions {
        sql.push_str(" UNION ALL ");
        sql.push_str(if asked.is_all { READ.as_str() } else { PRINT });
    }
    if let Some(look) = look {
        add_touched(&mut sql, look);
    }
    for name in custom {
        let name = literal(name);
        let _ = write!(
            sql,
            " UNION ALL SELECT 'setting', {name}, pg_catalog.current_setting({name}, true) \
             WHERE pg_catalog.current_setting({name}, true) IS NOT NULL"
        );
    }
    sql
}

/// What a probe found.
#[derive(Debug, Default)]
pub struct Evidence {
    settings: Vec<(String, String)>,
    pub pins: Pins,
    user: Option<String>,
    /// Of functions, if they were asked about.
    pub functions: Reading,
    malformed: bool,
    /// Settings that functions touch, and their values, which may be defaults.
    touched: Vec<(String, String)>,
    channels: Vec<Arc<str>>,
    /// A channel whose name is no UTF-8.
    unreadable: bool,
}

impl Evidence {
    /// Takes the body of one DataRow.
    pub fn row(&mut self, body: &[u8]) {
        let columns = message::read_data_row(body).unwrap_or_default();
        if let Some(&Some(b"listen")) = columns.first() {
            self.pins.add(PinReason::Listen);
            match columns.get(1).copied().flatten().and_then(|v| std::str::from_utf8(v).ok()) {
                Some(channel) => self.channels.push(channel.into()),
                None => self.unreadable = true,
            }
            return;
        }
        let text = |i: usize| columns.get(i).copied().flatten().and_then(|v| std::str::from_utf8(v).ok());
        let (Some(kind), Some(name), Some(value)) = (text(0), text(1), text(2)) else {
            self.malformed = true;
            return;
        };
        match kind {
            "setting" => self.settings.push((name.to_owned(), value.to_owned())),
            "touched" => self.touched.push((name.to_owned(), value.to_owned())),
            "user" => self.user = Some(name.to_owned()),
            "advisory_lock" => self.pins.add(PinReason::AdvisoryLock),
            "cursor" => self.pins.add(PinReason::Cursor),
            "temp" => self.pins.add(PinReason::TempObject),
            "prepare" => self.pins.add(PinReason::Prepare),
            _ => self.malformed |= !self.functions.row(kind, name),
        }
    }

    /// The channels that the session listens to; `None` if one of their names cannot be read.
    #[must_use]
    pub fn take_channels(&mut self) -> Option<Vec<Arc<str>>> {
        (!self.unreadable).then(|| std::mem::take(&mut self.channels))
    }

    /// What a look found is what the connection should have, and nothing else is left.
    #[must_use]
    pub fn is_as_expected(&self, look: &Look, role: &str, conn: &ServerConn) -> bool {
        !self.malformed
            && self.pins.is_empty()
            && self.user.as_deref() == Some(role)
            && self.settings.iter().all(|(name, value)| conn.label.get(name) == Some(value))
            && self.touched.len() == look.names.len()
            && self.touched.iter().all(|(name, value)| conn.expects(name, value))
    }

    pub fn take_touched(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.touched)
    }

    /// What is left, once the answer was complete: settings that can be replayed elsewhere, and reasons that cannot.
    /// `None` if the answer made no sense.
    #[must_use]
    pub fn conclude(mut self, role: &str) -> Option<(Settings, Pins)> {
        if self.malformed {
            return None;
        }
        if self.user? != role {
            self.pins.add(PinReason::Authorization);
        }
        Some((self.settings.into_iter().collect(), self.pins))
    }
}

/// Makes what `random()` gives one's own: nobody can tell the seed, and there is nothing to go back to.
pub const SEED: &str = "SELECT pg_catalog.setseed(pg_catalog.mod(pg_catalog.hashtextextended(\
pg_catalog.gen_random_uuid()::pg_catalog.text, 0), 1000000) OPERATOR(pg_catalog./) 1000000.0::pg_catalog.float8);";

/// The statement that only a replay which succeeded leaves behind, for as long as it takes to look.
pub const GUARD: &[u8] = b"tenantry_guard";

/// Writes what wipes a session; `begins_as_another`: DISCARD ALL forgets whom its role begins as. `guarded`: if PostgreSQL does not do it, it discards what comes behind: a statement that
/// is still there cannot be prepared once more.
pub fn write_wipe(
    out: &mut BytesMut,
    owed: &mut Owed,
    begins_as_another: bool,
    guarded: bool,
) -> Result<(), FrameError> {
    let guard = Parse { name: GUARD, query: b"", types: b"\0\0" };
    if guarded {
        guard.write_as(out, GUARD)?;
        owed.push(Kind::Parse, For::Us, None);
    }
    message::write_query(out, "DISCARD ALL")?;
    owed.push(Kind::Query, For::Us, None);
    if begins_as_another {
        message::write_query(out, "RESET ROLE")?;
        owed.push(Kind::Query, For::Us, None);
    }
    if guarded {
        guard.write_as(out, GUARD)?;
        owed.push_guard(Kind::Parse);
        extended::write_statement_target(out, frontend::CLOSE, GUARD)?;
        owed.push_guard(Kind::Close);
        out.extend_from_slice(message::FLUSH);
    }
    Ok(())
}

/// One simple query that does what is `first`, then turns a connection's label into the wanted settings; `guarded`: and
/// prepares `GUARD` behind.
#[must_use]
pub fn replay(first: &str, difference: &Difference, guarded: bool) -> String {
    let mut sql = first.to_owned();
    // Everything is done as the role that logged in, which may do what the client once did: the old role goes first, the
    // new one comes last.
    if difference.changes_role() {
        sql.push_str("RESET session_authorization;RESET role;");
    }
    for name in difference.reset.iter().filter(|name| !is_role(name)) {
        let _ = write!(sql, "RESET {};", identifier(name));
    }
    let last = |(name, _): &&(String, String)| is_role(name);
    let first = difference.set.iter().filter(|pair| !last(pair));
    let roles = difference.set.iter().filter(last).rev();
    for (n, (name, value)) in first.chain(roles).enumerate() {
        // set_config takes the value as current_setting gave it; SET would quote a list as one word.
        let separator = if n == 0 { "SELECT " } else { "," };
        let _ = write!(sql, "{separator}pg_catalog.set_config({},{},false)", literal(name), literal(value));
    }
    if guarded {
        let separator = if difference.set.is_empty() { "" } else { ";" };
        let _ = write!(sql, "{separator}PREPARE tenantry_guard AS SELECT");
    }
    sql
}

/// Listens to some channels and leaves others.
#[must_use]
pub fn listen(channels: &[Arc<str>], leave: &[Arc<str>]) -> String {
    let mut sql = String::new();
    for (verb, channels) in [("LISTEN", channels), ("UNLISTEN", leave)] {
        for channel in channels {
            let _ = write!(sql, "{verb} {};", quoted(channel));
        }
    }
    sql
}

/// Listens to these channels, and puts a mark into the stream of notifications; in one transaction.
#[must_use]
pub fn mark(channels: &[Arc<str>], marker: &str, token: u128) -> String {
    let mut sql = listen(channels, &[]);
    let marker = quoted(marker);
    let _ = write!(sql, "LISTEN {marker};NOTIFY {marker},'{token:032x}'");
    sql
}

/// Leaves every channel.
pub const UNLISTEN_ALL: &str = "UNLISTEN *";

/// One name, dots and all.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A setting's name: each part quoted.
fn identifier(name: &str) -> String {
    let parts = name.split('.').map(|part| format!("\"{}\"", part.replace('"', "\"\"")));
    parts.collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_whatever_they_hold() {
        let difference = Difference {
            reset: vec!["app.x".into(), "a\"b".into()],
            set: vec![("search_path".into(), "\"$user\", o'x\\".into()), ("b".into(), "1".into())],
        };
        assert_eq!(
            replay("", &difference, false),
            "RESET \"app\".\"x\";RESET \"a\"\"b\";SELECT pg_catalog.set_config(E'search_path',E'\"$user\", o''x\\\\',false)\
             ,pg_catalog.set_config(E'b',E'1',false)"
        );
    }

    #[test]
    fn the_old_role_goes_first_and_the_new_one_comes_last() {
        let difference = Difference {
            reset: vec!["log_statement".into()],
            set: vec![
                ("role".into(), "b".into()),
                ("session_authorization".into(), "a".into()),
                ("x.y".into(), "1".into()),
            ],
        };
        let sql = replay("DISCARD SEQUENCES;", &difference, true);
        let places = ["RESET session_authorization;RESET role;", "log_statement", "x.y", "E'session_auth", "E'role'"]
            .map(|part| sql.find(part).expect(part));
        assert!(places.is_sorted() && sql.ends_with(";PREPARE tenantry_guard AS SELECT"), "{sql}");
    }

    #[test]
    fn channels_are_quoted_whatever_they_are_called() {
        let names = [Arc::from("a\"b"), Arc::from("A.b;--")];
        assert_eq!(listen(&names, &names[..1]), "LISTEN \"a\"\"b\";LISTEN \"A.b;--\";UNLISTEN \"a\"\"b\";");
        let marked = "LISTEN \"m\";NOTIFY \"m\",'0000000000000000000000000000000f'";
        assert_eq!(mark(&[], "m", 15), marked);
    }

    #[test]
    fn a_probe_that_makes_no_sense_concludes_nothing() {
        let mut evidence = Evidence::default();
        evidence.row(b"\0\x01\0\0\0\x01a");
        assert!(evidence.conclude("r").is_none());
        assert!(Evidence::default().conclude("r").is_none(), "an answer without a user row");
    }
}
