//! Failed logins by (tenant, address): past a rate the address is not even asked for that tenant. Pure.
//!
//! A token bucket for each pair: full at first, one token less for each failure, filled up again over a minute. Only a
//! guess that was heard and was wrong costs one: logins that are under way, however many and however slow, cost nothing, and
//! as each verdict looks at the bucket once more, many guesses at once are no way around. Others, with other addresses, are
//! not held up by it: nobody can lock a tenant out. What always holds: no more than `MAX_PAIRS` are remembered, none that
//! never failed; the one that failed longest ago is forgotten first. Names that no tenant has are one to an address.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroUsize,
};

use lru::LruCache;
use tenantry_config::TenantId;

use crate::clock::Millis;

const MAX_PAIRS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(9_999);
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
    tenant: Option<TenantId>,
    network: Network,
}

impl Pair {
    /// `tenant`: none if there is none of the name that was asked for.
    #[must_use]
    pub fn new(tenant: Option<TenantId>, address: Option<IpAddr>) -> Self {
        Self { tenant, network: network(address) }
    }
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Failures that are left, in thousandths.
    left: u64,
    at: Millis,
}

/// Failures a minute, and what each pair has left of them.
#[derive(Debug)]
pub struct Attempts(LruCache<Pair, Bucket>);

impl Default for Attempts {
    fn default() -> Self {
        Self(LruCache::new(MAX_PAIRS))
    }
}

impl Attempts {
    /// Has it a failure left? `limit`: failures a minute.
    #[must_use]
    pub fn may_try(&self, pair: &Pair, limit: u32, now: Millis) -> bool {
        self.left(pair, limit, now) >= 1_000
    }

    /// A guess was made. False: it is not heard, be it right or wrong, since too many were wrong meanwhile.
    #[must_use]
    pub fn judge(&mut self, pair: &Pair, is_right: bool, limit: u32, now: Millis) -> bool {
        let left = self.left(pair, limit, now).checked_sub(1_000);
        if let Some(left) = left.filter(|_| !is_right) {
            self.0.put(pair.clone(), Bucket { left, at: now });
        }
        left.is_some()
    }

    fn left(&self, pair: &Pair, limit: u32, now: Millis) -> u64 {
        let full = u64::from(limit) * 1_000;
        self.0.peek(pair).map_or(full, |bucket| {
            let elapsed = now.0.saturating_sub(bucket.at.0).min(MINUTE);
            (bucket.left + full * elapsed / MINUTE).min(full)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(tenant: &str, address: &str) -> Pair {
        Pair::new(TenantId::parse(tenant).ok(), Some(address.parse().unwrap()))
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
        assert!(attempts.0.is_empty(), "who did not fail is not remembered");
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
    fn invented_names_make_nobody_forget_a_guesser() {
        let mut attempts = Attempts::default();
        let guesser = pair("shop", "192.0.2.1");
        assert!((0..3).all(|_| attempts.judge(&guesser, false, 3, Millis(0))));
        let invented = Pair::new(None, Some("192.0.2.1".parse().unwrap()));
        let heard = (0..20_000).filter(|_| attempts.judge(&invented, false, 3, Millis(0))).count();
        assert_eq!((heard, attempts.0.len()), (3, 2));
        assert!(!attempts.may_try(&guesser, 3, Millis(0)));
    }

    #[test]
    fn a_whole_ipv6_network_is_one_address() {
        assert_eq!(pair("d", "2001:db8::1"), pair("d", "2001:db8::ffff:2"));
        assert_ne!(pair("d", "2001:db8::1"), pair("d", "2001:db8:0:1::1"));
        assert_eq!(pair("d", "::ffff:192.0.2.1"), pair("d", "192.0.2.1"));
    }
}
