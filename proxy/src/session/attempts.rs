//! Failed logins by (database, address): past a rate the address is not even asked for that database. Pure.
//!
//! A token bucket for each pair: full at first, one token less for each failure, filled up again over a minute. Others,
//! with other addresses, are not held up by it: nobody can lock a tenant out. What always holds: no more than
//! `MAX_PAIRS` are remembered; the one that failed longest ago is forgotten first.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroUsize,
};

use lru::LruCache;

use crate::clock::Millis;

const MAX_PAIRS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(9_999);
const MINUTE: u64 = 60_000;

/// Who tries what. One who has an IPv6 network has all of its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pair {
    database: String,
    network: Option<IpAddr>,
}

impl Pair {
    /// `address`: none for a Unix socket.
    #[must_use]
    pub fn new(database: &str, address: Option<IpAddr>) -> Self {
        let network = address.map(|address| match address.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
            v4 => v4,
        });
        Self { database: database.to_owned(), network }
    }
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Failures that are left, in thousandths.
    left: u64,
    at: Millis,
}

#[derive(Debug)]
pub struct Attempts(LruCache<Pair, Bucket>);

impl Default for Attempts {
    fn default() -> Self {
        Self(LruCache::new(MAX_PAIRS))
    }
}

impl Attempts {
    /// May it try? Taken for a failure until `give_back`, so that many at once are no way around. `limit`: failures a minute.
    #[must_use]
    pub fn take(&mut self, pair: &Pair, limit: u32, now: Millis) -> bool {
        let full = u64::from(limit) * 1_000;
        let left = self.0.peek(pair).map_or(full, |bucket| filled(*bucket, limit, now));
        let Some(less) = left.checked_sub(1_000) else { return false };
        self.0.put(pair.clone(), Bucket { left: less, at: now });
        true
    }

    /// It did not fail.
    pub fn give_back(&mut self, pair: &Pair, limit: u32) {
        if let Some(bucket) = self.0.peek_mut(pair) {
            bucket.left = (bucket.left + 1_000).min(u64::from(limit) * 1_000);
        }
    }
}

fn filled(bucket: Bucket, limit: u32, now: Millis) -> u64 {
    let full = u64::from(limit) * 1_000;
    let elapsed = now.0.saturating_sub(bucket.at.0).min(MINUTE);
    (bucket.left + full * elapsed / MINUTE).min(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(database: &str, address: &str) -> Pair {
        Pair::new(database, Some(address.parse().unwrap()))
    }

    #[test]
    fn past_the_rate_it_must_wait_and_others_need_not() {
        let mut attempts = Attempts::default();
        let (guesser, tenant) = (pair("shop", "192.0.2.1"), pair("shop", "192.0.2.2"));
        for n in 0..3 {
            assert!(attempts.take(&guesser, 3, Millis(n)));
        }
        assert!(!attempts.take(&guesser, 3, Millis(100)));
        assert!(attempts.take(&tenant, 3, Millis(100)) && attempts.take(&pair("other", "192.0.2.1"), 3, Millis(100)));
        assert!(attempts.take(&guesser, 3, Millis(20_010)), "a third of a minute for one of three");
        assert!(!attempts.take(&guesser, 3, Millis(20_011)));
        attempts.give_back(&guesser, 3);
        assert!(attempts.take(&guesser, 3, Millis(20_012)), "it was right");
    }

    #[test]
    fn a_whole_ipv6_network_is_one_address() {
        assert_eq!(pair("d", "2001:db8::1"), pair("d", "2001:db8::ffff:2"));
        assert_ne!(pair("d", "2001:db8::1"), pair("d", "2001:db8:0:1::1"));
        assert_eq!(pair("d", "::ffff:192.0.2.1"), pair("d", "192.0.2.1"));
    }
}
