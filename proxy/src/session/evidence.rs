//! Pin on suspicion, unpin on evidence: what a session does when something it ran may have left state behind.
//!
//! What always holds: a lease with reasons is not given back; reasons go only when PostgreSQL itself was asked. A look (what
//! functions may have left, `pool/functions.rs`) adds no reason and takes none: it lets a connection go, or the probe follows.

use std::sync::Arc;

use tenantry_config::PoolMode;
use tenantry_wire::message;

use super::{
    errors,
    owed::{For, Kind},
    pin::PinReason,
    probe::{self, Evidence},
    relay::{End, Session},
};
use crate::{
    clock::Millis,
    pool::{
        functions::{Learned, Look},
        lease::Lease,
    },
    server::signs::{MAX_CUSTOM, Signs},
};

impl Session {
    pub(super) fn needs_probe(&self, now: Millis) -> bool {
        let signs = &self.signs;
        if self.mode == PoolMode::Session {
            // All of its state is its own; only RESET does not know what the client began with.
            return signs.resets && !self.startup.is_empty();
        }
        let changed = signs.suspect || signs.opaque || signs.seeds || !signs.custom.is_empty();
        // A probe that failed is tried again after the client's next transaction.
        let again = self.worked && self.pins.has(PinReason::Unknown);
        let called = self.worked && (self.pool.functions.are_suspect(now) || self.settings.makes_temporary());
        let listens_here = self.listening.as_ref().is_some_and(|listening| listening.is_own());
        let less = (self.pinned || listens_here) && self.signs.loosen;
        changed || again || called || less
    }

    pub(super) fn start_probe(&mut self, now: Millis) -> Result<(), End> {
        if let Some(look) = self.look_enough(now) {
            return self.start_look(look);
        }
        let functions = &self.pool.functions;
        self.reads_functions = functions.to_ask(now);
        for name in std::mem::take(&mut self.signs.custom).into_iter().chain(functions.custom()) {
            if !self.custom.contains(&name) {
                self.custom.push(name);
            }
        }
        if self.custom.len() > MAX_CUSTOM {
            self.custom.truncate(MAX_CUSTOM);
            self.signs.opaque = true;
        }
        if self.signs.opaque {
            self.pins.add(PinReason::Opaque);
        }
        if self.signs.seeds {
            self.pins.add(PinReason::Seed);
        }
        self.signs = Signs::default();
        self.worked = false;
        if let Some(conn) = self.lease.as_mut().and_then(Lease::conn) {
            conn.forget_unnamed();
        }
        let look = functions.looked_at();
        let sql = probe::probe(&self.custom, self.reads_functions, look.as_deref());
        message::write_query(&mut self.to_server.buf, &sql).map_err(|_| End::Fatal(errors::internal()))?;
        self.owed.push(Kind::Query, For::Probe, None);
        self.evidence = Some(Box::default());
        Ok(())
    }

    /// What only functions may have done is looked at, unless it needs the probe; `None` if it does.
    fn look_enough(&self, now: Millis) -> Option<Arc<Look>> {
        let signs = &self.signs;
        let is_suspect = signs.suspect || signs.opaque || signs.seeds || !signs.custom.is_empty();
        let is_plain =
            self.mode != PoolMode::Session && self.pins.is_empty() && !self.pinned && self.listening.is_none();
        if is_suspect || !is_plain || self.made_functions || self.settings.makes_temporary() {
            return None;
        }
        self.pool.functions.look(now)
    }

    fn start_look(&mut self, look: Arc<Look>) -> Result<(), End> {
        self.signs = Signs::default();
        self.worked = false;
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        probe::write_look(&mut self.to_server.buf, &mut self.owed, &look, &mut conn.prepared)
            .map_err(|_| End::Fatal(errors::internal()))?;
        self.looking = Some(look);
        self.evidence = Some(Box::default());
        Ok(())
    }

    /// A look's answer is complete, or failed: whatever is not as it should be is for the probe.
    fn conclude_look(&mut self, look: &Look, evidence: Option<&Evidence>) -> Result<(), End> {
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        match evidence {
            Some(evidence) => self.signs.suspect |= !evidence.is_as_expected(look, &self.pool.role, conn),
            None => {
                conn.prepared.forget_look();
                self.signs.suspect = true;
            }
        }
        Ok(())
    }

    /// The probe's answer is complete, or failed (`None`).
    pub(super) fn conclude_probe(&mut self, evidence: Option<Evidence>) -> Result<(), End> {
        if let Some(look) = self.looking.take() {
            return self.conclude_look(&look, evidence.as_ref());
        }
        self.conclude_functions(evidence.as_ref());
        let mut pins = self.pins.forever();
        let mut evidence = evidence;
        let channels = evidence.as_mut().and_then(Evidence::take_channels);
        let touched = evidence.as_mut().map(Evidence::take_touched).unwrap_or_default();
        match evidence.and_then(|e| e.conclude(&self.pool.role)) {
            Some((settings, found)) => {
                found.iter().for_each(|r| pins.add(r));
                if let Some(conn) = self.lease.as_mut().and_then(Lease::conn) {
                    conn.label = settings.clone();
                    for (name, value) in touched.iter().filter(|(name, _)| settings.get(name).is_none()) {
                        conn.learn_default(name, value);
                    }
                }
                // A startup setting that is gone was reset, and RESET goes back to what the client asked for at the start.
                let gone = self.startup.iter().filter(|(name, _)| settings.get(name).is_none());
                self.settings = gone.fold(settings.clone(), |all, (name, value)| all.with(name, Some(value)));
            }
            None => pins.add(PinReason::Unknown),
        }
        self.pins = pins;
        let may_move = self.found_channels(channels);
        self.registered.shared.pin(pins);
        if pins.is_empty() && self.mode != PoolMode::Session {
            self.drop_pin();
            return Ok(());
        }
        if !may_move {
            self.take_pin()?;
        }
        // It stays on this connection, where a RESET may have undone what the client began with.
        self.replay("")
    }

    /// What functions in the database may do, if the probe asked.
    fn conclude_functions(&mut self, evidence: Option<&Evidence>) {
        let asked = self.reads_functions.take();
        let made = std::mem::take(&mut self.made_functions);
        if let Some((asked, evidence)) = asked.zip(evidence) {
            match self.pool.read_functions(asked, evidence.functions.clone(), made, Millis::now()) {
                // They were not asked for in this probe; in another one, before the connection goes on.
                Learned::Fresh(mut names) => {
                    names.retain(|name| !self.custom.contains(name));
                    self.signs.custom = names;
                }
                // Others are changing something: what was left here that has no known name, nobody can say.
                Learned::Nothing if asked.is_all => self.retire = true,
                // The print was another one.
                Learned::Nothing => self.signs.suspect = true,
            }
        } else if made {
            self.pool.functions.maker_vanished();
        }
    }

    pub(super) fn take_pin(&mut self) -> Result<(), End> {
        if self.pinned || self.mode == PoolMode::Session {
            return Ok(());
        }
        if !self.pool.pin() {
            return Err(End::Fatal(errors::too_many_pinned(&self.pool)));
        }
        self.pinned = true;
        let mut counts = self.pool.stats.pins.lock();
        for reason in self.pins.iter() {
            *counts.entry(reason.as_str()).or_default() += 1;
        }
        Ok(())
    }

    pub(super) fn drop_pin(&mut self) {
        if std::mem::take(&mut self.pinned) {
            self.pool.unpin();
        }
    }
}
