//! Failed logins by (database, address): past a rate the address is not even asked for that database. Pure.
//!
//! A token bucket for each pair of a name that was asked for and an address: full at first, one token less for each failure,
//! filled up again over a minute. Only a guess that was heard and was wrong costs one: logins that are under way, however
//! many and however slow, cost nothing, and as each verdict looks at the bucket once more, many guesses at once are no way
//! around. Others, with other addresses, are not held up by it: nobody can lock a tenant out. Names that exist are treated
//! as those that do not, so that nothing can be learned from who is turned away; an address as a whole has a bucket too, so
//! that inventing names gains nothing; whoever proved a name from there before is held to that name's bucket only. What always holds: no more than `MOST` pairs and as many addresses are remembered,
//! and none that never failed; the one that failed longest ago is forgotten first, when its bucket has long been full.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroUsize,
};

use lru::LruCache;
use tenantry_config::TenantId;

use crate::clock::Millis;

const MOST: NonZeroUsize = NonZeroUsize::MIN.saturating_add(9_999);
/// An address may fail so many times as often over all names.
const NAMES: u32 = 16;
const MINUTE: u64 = 60_000;

/// Who somebody is as far as an address tells: one who has an IPv6 network has all of its addresses. None: a Unix socket.
pub type Network = Option<IpAddr>;

#[must_use]
pub fn network(address: Option<IpAddr>) -> Network {
    address.map(|address| match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
        v4 => v4,
    })
}

/// Who tries what.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pair {
    /// A name that no tenant can have is none, and as long as it likes.
    database: Option<TenantId>,
    network: Network,
}

impl Pair {
    #[must_use]
    pub fn new(database: &str, address: Option<IpAddr>) -> Self {
        Self { database: TenantId::parse(database).ok(), network: network(address) }
    }
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Failures that are left, in thousandths.
    left: u64,
    at: Millis,
}

/// What each has left.
#[derive(Debug)]
pub struct Attempts {
    pairs: LruCache<Pair, Bucket>,
    networks: LruCache<Network, Bucket>,
    /// From where a login was right before.
    proved: LruCache<Pair, ()>,
}

impl Default for Attempts {
    fn default() -> Self {
        Self { pairs: LruCache::new(MOST), networks: LruCache::new(MOST), proved: LruCache::new(MOST) }
    }
}

impl Attempts {
    /// Has it a failure left? `limit`: failures a minute.
    #[must_use]
    pub fn may_try(&self, pair: &Pair, limit: u32, now: Millis) -> bool {
        self.after_a_failure(pair, limit, now).is_some()
    }

    /// A guess was made. False: it is not heard, be it right or wrong, since too many were wrong meanwhile.
    #[must_use]
    pub fn judge(&mut self, pair: &Pair, is_right: bool, limit: u32, now: Millis) -> bool {
        let Some((own, whole)) = self.after_a_failure(pair, limit, now) else { return false };
        if is_right {
            self.proved.put(pair.clone(), ());
        } else {
            self.pairs.put(pair.clone(), own);
            self.networks.put(pair.network, whole);
        }
        true
    }

    /// The buckets of the pair and of the network as one more failure would leave them.
    fn after_a_failure(&self, pair: &Pair, limit: u32, now: Millis) -> Option<(Bucket, Bucket)> {
        let own = take(self.pairs.peek(pair), limit, now)?;
        let whole = take(self.networks.peek(&pair.network), limit.saturating_mul(NAMES), now);
        let is_known = self.proved.peek(pair).is_some();
        let whole = whole.or_else(|| is_known.then_some(Bucket { left: 0, at: now }))?;
        Some((own, whole))
    }
}

fn take(bucket: Option<&Bucket>, limit: u32, now: Millis) -> Option<Bucket> {
    let full = u64::from(limit) * 1_000;
    let left = bucket.map_or(full, |bucket| {
        let elapsed = now.0.saturating_sub(bucket.at.0).min(MINUTE);
        (bucket.left + full * elapsed / MINUTE).min(full)
    });
    Some(Bucket { left: left.checked_sub(1_000)?, at: now })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(tenant: &str, address: &str) -> Pair {
        Pair::new(tenant, Some(address.parse().unwrap()))
    }

    #[test]
    fn past_the_rate_it_must_wait_and_others_need_not() {
        let mut attempts = Attempts::default();
        let (guesser, tenant) = (pair("shop", "192.0.2.1"), pair("shop", "192.0.2.2"));
        for n in 0..3 {
            assert!(attempts.may_try(&guesser, 3, Millis(n)));
            assert!(attempts.judge(&guesser, false, 3, Millis(n)));
        }
        assert!(!attempts.may_try(&guesser, 3, Millis(100)));
        for other in [tenant, pair("other", "192.0.2.1")] {
            assert!(attempts.may_try(&other, 3, Millis(100)) && attempts.judge(&other, true, 3, Millis(100)));
        }
        assert!(attempts.judge(&guesser, false, 3, Millis(20_010)), "a third of a minute for one of three");
        assert!(!attempts.may_try(&guesser, 3, Millis(20_011)));
        assert!(attempts.judge(&guesser, true, 3, Millis(40_020)), "being right costs nothing");
        assert!(attempts.judge(&guesser, true, 3, Millis(40_020)));
    }

    #[test]
    fn logins_under_way_cost_nothing_however_many() {
        let mut attempts = Attempts::default();
        let pair = pair("shop", "192.0.2.1");
        assert!((0..200).all(|_| attempts.may_try(&pair, 60, Millis(0))));
        assert!((0..200).all(|_| attempts.judge(&pair, true, 60, Millis(1))));
        assert!(attempts.pairs.is_empty() && attempts.networks.is_empty(), "who did not fail is not remembered");
    }

    #[test]
    fn guesses_at_once_are_heard_no_more_often_than_one_after_the_other() {
        let mut attempts = Attempts::default();
        let pair = pair("shop", "192.0.2.1");
        assert!((0..500).all(|_| attempts.may_try(&pair, 60, Millis(0))));
        let heard = (0..499).filter(|_| attempts.judge(&pair, false, 60, Millis(1))).count();
        assert_eq!(heard, 60);
        assert!(!attempts.judge(&pair, true, 60, Millis(1)), "the right one is not told apart");
    }

    #[test]
    fn invented_names_gain_a_guesser_nothing() {
        let mut attempts = Attempts::default();
        let guesser = pair("shop", "192.0.2.1");
        assert!((0..3).all(|_| attempts.judge(&guesser, false, 3, Millis(0))));
        let invented = |n: u32| pair(&format!("invented{n}"), "192.0.2.1");
        let heard = (0..20_000).filter(|n| attempts.judge(&invented(*n), false, 3, Millis(0))).count();
        assert_eq!(heard, 3 * 16 - 3);
        assert!(!attempts.may_try(&guesser, 3, Millis(0)), "it is not forgotten");
        assert!(!attempts.may_try(&pair("other", "192.0.2.1"), 3, Millis(0)));
        assert!(attempts.may_try(&pair("shop", "192.0.2.2"), 3, Millis(0)));
    }

    #[test]
    fn a_name_that_nobody_can_have_costs_no_memory() {
        let long = "x".repeat(10_000);
        assert_eq!(pair(&long, "192.0.2.1"), pair("Not A Name", "192.0.2.1"));
        assert_ne!(pair(&long, "192.0.2.1"), pair("a_name", "192.0.2.1"));
    }

    #[test]
    fn a_whole_ipv6_network_is_one_address() {
        assert_eq!(pair("d", "2001:db8::1"), pair("d", "2001:db8::ffff:2"));
        assert_ne!(pair("d", "2001:db8::1"), pair("d", "2001:db8:0:1::1"));
        assert_eq!(pair("d", "::ffff:192.0.2.1"), pair("d", "192.0.2.1"));
    }
}
