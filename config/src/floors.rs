//! Whether the floors of a server's tenants fit what it may hold: one answer for the file, a reload, the API and `check`.
//!
//! What always holds: pure; a server whose cap nobody knows yet (`auto`, never asked) has no answer, and none is given.

use crate::{OrAuto, Server, Settings, TenantState};

/// More tenants than this are not named in one line.
const NAMED: usize = 5;

/// The floors of one server's tenants, and what there is to keep them with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Floors {
    /// Name of the server.
    pub server: String,
    /// The most that may be held there over all tenants; `None`: nobody knows.
    pub cap: Option<u32>,
    /// All floors together.
    pub sum: u64,
    /// Tenants that have one.
    pub tenants: Vec<(String, u32)>,
}

impl Floors {
    /// Of one server. `slots`: the connections that PostgreSQL has for roles that are not privileged, where that is known.
    /// A tenant that is archived counts: it may come back at any time. One that is dropped does not.
    #[must_use]
    pub fn of(settings: &Settings, name: &str, slots: Option<u32>) -> Self {
        let here = settings.tenants.iter().filter(|(_, tenant)| tenant.server == name);
        let promised = here.filter(|(_, tenant)| tenant.floor > 0 && tenant.standing.state != TenantState::Dropped);
        let tenants: Vec<_> = promised.map(|(id, tenant)| (id.to_string(), tenant.floor)).collect();
        Self {
            server: name.to_owned(),
            cap: settings.servers.get(name).and_then(|server| server.cap_with(slots)),
            sum: tenants.iter().map(|(_, floor)| u64::from(*floor)).sum(),
            tenants,
        }
    }

    /// By how much they are too many.
    #[must_use]
    pub fn excess(&self) -> u64 {
        self.cap.map_or(0, |cap| self.sum.saturating_sub(u64::from(cap)))
    }

    /// What does not fit, in one line.
    #[must_use]
    pub fn sums(&self) -> String {
        let (server, cap, sum, parts) = (&self.server, self.cap.unwrap_or(0), self.sum, self.parts(""));
        format!(
            "server {server}: its cap of {cap} is less than the {sum} of all floors ({parts}); raise it or lower them"
        )
    }

    pub(crate) fn parts(&self, prefix: &str) -> String {
        name_parts(self.tenants.iter().map(|(name, floor)| (format!("{prefix}{name}"), u64::from(*floor))).collect())
    }
}

/// Servers that promise more than they can keep; as text, with all sums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overpromised(pub Vec<Floors>);

impl std::error::Error for Overpromised {}

impl std::fmt::Display for Overpromised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let told: Vec<_> = self.0.iter().map(Floors::sums).collect();
        f.write_str(&told.join("; "))
    }
}

/// Whether every server can keep the floors of its tenants all at once. `slots`: what PostgreSQL has, by server, as far
/// as it was asked.
///
/// # Errors
/// The servers that cannot.
pub fn floors_fit(settings: &Settings, slots: impl Fn(&str) -> Option<u32>) -> Result<(), Overpromised> {
    let all = settings.servers.keys().map(|name| Floors::of(settings, name, slots(name)));
    or_over(all.filter(|floors| floors.excess() > 0).collect())
}

/// Whether a change makes promises that cannot be kept, and is to be refused. What was promised too much before and gets
/// no worse is not the change's fault: after a server was made smaller, everything else must still go on.
///
/// # Errors
/// The servers where it does.
pub fn floors_still_fit(
    now: &Settings,
    wanted: &Settings,
    slots: impl Fn(&str) -> Option<u32>,
) -> Result<(), Overpromised> {
    let Err(Overpromised(mut over)) = floors_fit(wanted, &slots) else { return Ok(()) };
    over.retain(|floors| floors.excess() > Floors::of(now, &floors.server, slots(&floors.server)).excess());
    or_over(over)
}

fn or_over(over: Vec<Floors>) -> Result<(), Overpromised> {
    if over.is_empty() { Ok(()) } else { Err(Overpromised(over)) }
}

impl Server {
    /// The most that Tenantry holds there, however few the connections of others are; `slots`: what PostgreSQL has for
    /// roles that are not privileged. `None`: that must be known first.
    #[must_use]
    pub fn cap_with(&self, slots: Option<u32>) -> Option<u32> {
        match self.cap {
            OrAuto::Is(cap) => Some(slots.map_or(cap.get(), |slots| slots.min(cap.get()).max(1))),
            OrAuto::Auto => slots.map(|slots| slots.saturating_sub(self.reserve).max(1)),
        }
    }
}

/// The largest few: with thousands of tenants the line must stay readable.
pub(crate) fn name_parts(mut parts: Vec<(String, u64)>) -> String {
    parts.sort_by_key(|(_, number)| std::cmp::Reverse(*number));
    let more = parts.len().saturating_sub(NAMED);
    let shown: Vec<String> = parts.into_iter().take(NAMED).map(|(path, number)| format!("{path}: {number}")).collect();
    let rest = if more > 0 { format!(", and {more} more tenants") } else { String::new() };
    shown.join(", ") + &rest
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::{Standing, Tenant, TenantId};

    fn settings(cap: OrAuto<NonZeroU32>, floors: &[(&str, u32)]) -> Settings {
        let mut settings = Settings::default();
        settings.servers.insert("main".into(), Server { cap, reserve: 10, ..Server::default() });
        for (name, floor) in floors {
            let tenant = Tenant { server: "main".into(), floor: *floor, ..Tenant::default() };
            settings.tenants.insert(TenantId::parse(name).unwrap(), tenant);
        }
        settings
    }

    fn is(cap: u32) -> OrAuto<NonZeroU32> {
        OrAuto::Is(NonZeroU32::new(cap).unwrap())
    }

    #[test]
    fn what_does_not_fit_is_told_with_its_sums() {
        let settings = settings(is(10), &[("a", 7), ("b", 4), ("c", 0)]);
        let over = floors_fit(&settings, |_| None).unwrap_err();
        assert_eq!(
            over.to_string(),
            "server main: its cap of 10 is less than the 11 of all floors (a: 7, b: 4); raise it or lower them"
        );
        assert_eq!((over.0.len(), over.0[0].excess()), (1, 1));
    }

    #[test]
    fn an_auto_cap_counts_once_it_is_known_and_a_written_one_is_no_more_than_postgresql_has() {
        let auto = settings(OrAuto::Auto, &[("a", 87)]);
        assert!(floors_fit(&auto, |_| None).is_ok());
        assert!(floors_fit(&auto, |_| Some(97)).is_ok());
        assert_eq!(floors_fit(&auto, |_| Some(96)).unwrap_err().0[0].cap, Some(86));
        let written = settings(is(50), &[("a", 50)]);
        assert!(floors_fit(&written, |_| Some(50)).is_ok());
        assert!(floors_fit(&written, |_| Some(49)).is_err());
    }

    #[test]
    fn an_archived_tenant_keeps_its_promise_and_a_dropped_one_does_not() {
        let mut settings = settings(is(5), &[("a", 3), ("b", 3)]);
        let mut put = |state| {
            settings.tenants.get_mut("b").unwrap().standing = Standing { number: Some(1), state, plans: 0, room: 0 };
            floors_fit(&settings, |_| None).is_ok()
        };
        assert!(!put(TenantState::Archived));
        assert!(put(TenantState::Dropped));
    }

    #[test]
    fn only_what_makes_it_worse_is_refused() {
        let small = |_: &str| Some(20);
        let of = |floor| settings(OrAuto::Auto, &[("a", 8), ("b", floor)]);
        assert!(floors_still_fit(&of(4), &of(4), small).is_ok(), "12 of 10, as before");
        assert!(floors_still_fit(&of(4), &of(3), small).is_ok(), "better");
        assert!(floors_still_fit(&of(4), &of(5), small).is_err());
        assert!(floors_still_fit(&of(2), &of(3), small).is_err());
        // A new server, too.
        assert!(floors_still_fit(&Settings::default(), &of(3), small).is_err());
    }

    #[test]
    fn floors_beyond_all_numbers_are_only_a_large_sum() {
        let settings = settings(is(5), &[("a", u32::MAX), ("b", u32::MAX)]);
        assert_eq!(floors_fit(&settings, |_| None).unwrap_err().0[0].sum, 2 * u64::from(u32::MAX));
    }
}
