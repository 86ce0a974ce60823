//! How many connections a server may be asked to hold now: what the operator set, what PostgreSQL has, what others use. Pure.
//!
//! What always holds: never more than the operator set, never more than PostgreSQL has left beside the connections of
//! others; at least 1, so that somebody finds out when there is room again.

use crate::{backoff::Backoff, clock::Millis};

/// What a server said of its connections, asked on a connection of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// `max_connections` without those kept for superusers and for `pg_use_reserved_connections`.
    pub slots: u32,
    /// Connections to its databases, ours among them.
    pub connections: u32,
}

/// PostgreSQL refused a connection for want of room: so many it had, and one more is tried after each pause.
#[derive(Debug, Clone, Copy)]
struct Shrunk {
    had: u32,
    /// No more than it had is asked for in a pause.
    backoff: Backoff,
    /// The pause is over.
    probing: bool,
}

/// First pause before one more connection is tried; doubled up to `LONGEST_PAUSE` as long as PostgreSQL refuses.
const FIRST_PAUSE: u64 = 200;
const LONGEST_PAUSE: u64 = 5_000;

/// An auto cap before the server was asked.
const UNASKED: u32 = 4;

#[derive(Debug)]
pub struct Cap {
    /// `None`: auto.
    set: Option<u32>,
    /// Kept for people and maintenance when the cap is auto.
    reserve: u32,
    slots: Option<u32>,
    others: u32,
    shrunk: Option<Shrunk>,
}

impl Cap {
    #[must_use]
    pub fn new(set: Option<u32>, reserve: u32) -> Self {
        Self { set, reserve, slots: None, others: 0, shrunk: None }
    }

    pub fn change(&mut self, set: Option<u32>, reserve: u32) {
        self.set = set;
        self.reserve = reserve;
    }

    /// What may be held now. Before the server was ever asked, auto is a few: the first logins find out.
    #[must_use]
    pub fn effective(&self) -> u32 {
        let set = self.set.unwrap_or_else(|| self.slots.map_or(UNASKED, |slots| slots.saturating_sub(self.reserve)));
        let left = self.slots.map_or(u32::MAX, |slots| slots.saturating_sub(self.others));
        let shrunk = self.shrunk.map_or(u32::MAX, |shrunk| shrunk.had + u32::from(shrunk.probing));
        set.min(left).min(shrunk).max(1)
    }

    /// PostgreSQL told what it has; `ours` of the connections it counts are ours.
    pub fn observe(&mut self, room: Room, ours: u32) {
        self.slots = Some(room.slots);
        self.others = room.connections.saturating_sub(ours);
    }

    /// PostgreSQL refused (53300) while it held `had` other connections of ours.
    pub fn refused(&mut self, had: u32, now: Millis) {
        let mut shrunk = match self.shrunk {
            // Several dials that were refused together are one refusal.
            Some(shrunk) if !shrunk.probing => Shrunk { had: shrunk.had.min(had), ..shrunk },
            Some(shrunk) => Shrunk { had, probing: false, ..shrunk },
            None => Shrunk { had, backoff: Backoff::default(), probing: false },
        };
        shrunk.backoff.fail(FIRST_PAUSE, LONGEST_PAUSE, now);
        self.shrunk = Some(shrunk);
    }

    /// What was observed is old: perhaps there is room for one more than `held`.
    pub fn presume_room(&mut self, held: u32) {
        let left = |slots: u32| slots.saturating_sub(held.saturating_add(1));
        self.others = self.slots.map_or(self.others, |slots| self.others.min(left(slots)));
    }

    /// PostgreSQL took another connection, and has `has` of ours now: there is room again, if it never had as many since it
    /// refused. A connection that only took another's place says nothing.
    pub fn took(&mut self, has: u32) {
        let Some(mut shrunk) = self.shrunk.take() else { return };
        if has > shrunk.had {
            shrunk.had = has;
            shrunk.backoff = Backoff::default();
        }
        if shrunk.had < self.effective() {
            self.shrunk = Some(shrunk);
        }
    }

    /// While this holds, nothing is dialled: PostgreSQL has just refused, and holds none of ours that could be moved.
    #[must_use]
    pub fn is_pausing(&self, now: Millis) -> bool {
        self.shrunk.is_some_and(|shrunk| shrunk.had == 0 && shrunk.backoff.is_pausing(now))
    }

    /// A pause may be over: then one more is tried.
    pub fn tick(&mut self, now: Millis) {
        if let Some(shrunk) = &mut self.shrunk {
            shrunk.probing |= !shrunk.backoff.is_pausing(now);
        }
    }

    /// What PostgreSQL has for roles that are not privileged, if it was asked.
    #[must_use]
    pub fn slots(&self) -> Option<u32> {
        self.slots
    }

    /// PostgreSQL itself is the limit now.
    #[must_use]
    pub fn is_shrunk(&self) -> bool {
        self.shrunk.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_what_postgresql_has_without_the_reserve() {
        let mut cap = Cap::new(None, 10);
        assert_eq!(cap.effective(), UNASKED, "nobody knows yet");
        cap.observe(Room { slots: 97, connections: 1 }, 1);
        assert_eq!(cap.effective(), 87);
    }

    #[test]
    fn it_yields_to_the_connections_of_others() {
        let mut cap = Cap::new(None, 10);
        cap.observe(Room { slots: 97, connections: 30 }, 22);
        assert_eq!(cap.effective(), 87, "eight others fit into the reserve");
        cap.observe(Room { slots: 97, connections: 60 }, 20);
        assert_eq!(cap.effective(), 57);
        let mut set = Cap::new(Some(90), 10);
        set.observe(Room { slots: 97, connections: 60 }, 20);
        assert_eq!(set.effective(), 57);
        set.observe(Room { slots: 97, connections: 2000 }, 20);
        assert_eq!(set.effective(), 1, "somebody must find out when there is room again");
    }

    #[test]
    fn a_refusal_shrinks_it_and_it_grows_back_as_connections_succeed() {
        let mut cap = Cap::new(Some(6), 0);
        cap.refused(4, Millis(1_000));
        cap.refused(4, Millis(1_000));
        assert_eq!((cap.effective(), cap.is_pausing(Millis(1_100))), (4, false), "what it has may be moved");
        cap.tick(Millis(1_100));
        assert_eq!(cap.effective(), 4);
        cap.tick(Millis(1_200));
        assert_eq!(cap.effective(), 5, "one more may be tried");
        cap.took(5);
        assert_eq!((cap.effective(), cap.is_shrunk()), (6, true));
        cap.took(6);
        assert_eq!((cap.effective(), cap.is_shrunk()), (6, false));
    }

    #[test]
    fn a_connection_that_took_anothers_place_is_no_sign_of_room() {
        let mut cap = Cap::new(Some(6), 0);
        cap.refused(4, Millis(0));
        cap.tick(Millis(200));
        cap.refused(4, Millis(200));
        cap.took(4);
        cap.tick(Millis(500));
        assert_eq!((cap.effective(), cap.is_shrunk()), (4, true), "the pause goes on");
        cap.tick(Millis(600));
        assert_eq!(cap.effective(), 5);
    }

    #[test]
    fn while_postgresql_goes_on_refusing_the_pauses_grow() {
        let mut cap = Cap::new(Some(6), 0);
        let mut pauses = Vec::new();
        let mut now = Millis(0);
        for _ in 0..7 {
            cap.refused(0, now);
            let until = (now.0..).find(|t| !cap.is_pausing(Millis(*t))).expect("it ends");
            pauses.push(until - now.0);
            now = Millis(until);
            cap.tick(now);
        }
        assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
    }
}
