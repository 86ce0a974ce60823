//! Who listens to what on a hub's connection, and from where to where in its stream of notifications. Pure.
//!
//! PostgreSQL gives notifications to all sessions of a database in one order. A *mark* is a notification of our own, on a
//! channel that nobody can guess, with a token: the client's connection and the hub's both see it at the same place of
//! that order. So a subscriber begins (or ends) in the hub's stream exactly where it ends (or begins) in its own.
//!
//! What always holds: a channel is listened to while a subscriber wants it; one is `confirmed` only while PostgreSQL has
//! said so and was not told otherwise since.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// A channel's name, as PostgreSQL has it.
pub type Channel = Arc<str>;

/// Most channels that one client may have at the hub; with more, it keeps its connection.
pub const MAX_CHANNELS_OF_ONE: usize = 256;
/// Most channels of one hub; a client that would bring more keeps its connection.
pub const MAX_CHANNELS: usize = 4096;
/// So many are asked for in one query: it must fit where it is written without waiting.
const MAX_AT_ONCE: usize = 256;

/// Which part of the hub's stream is a subscriber's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// None: it hears its own connection.
    Off,
    /// From this mark on.
    From(u128),
    /// All of it.
    On,
    /// Up to this mark.
    Until(u128),
    /// From the first mark up to the second: the client went back before the hub came to the first.
    Part(u128, u128),
}

impl Phase {
    /// The mark that it changes at.
    fn token(self) -> Option<u128> {
        match self {
            Self::From(token) | Self::Until(token) | Self::Part(token, _) => Some(token),
            Self::Off | Self::On => None,
        }
    }
}

#[derive(Debug)]
struct Subscriber {
    channels: Vec<Channel>,
    phase: Phase,
}

/// What a notification means.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// It is for these.
    For(Vec<u64>),
    /// A mark: this one's part of the stream ends here.
    Ends(u64),
    /// A mark that nobody has to be told of, or one that is nobody's.
    Nothing,
}

/// Whether a subscriber's channels can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// PostgreSQL has been asked for all of them, and confirmed it.
    Confirmed,
    /// They will be asked for.
    Asked,
    /// There would be too many; nothing was changed.
    TooMany,
}

/// What is to be said to PostgreSQL.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    pub listen: Vec<Channel>,
    pub unlisten: Vec<Channel>,
}

/// See the file's head.
#[derive(Debug)]
pub struct Subscribers {
    marker: Channel,
    all: BTreeMap<u64, Subscriber>,
    wanted: BTreeMap<Channel, BTreeSet<u64>>,
    confirmed: BTreeSet<Channel>,
    tokens: BTreeMap<u128, u64>,
    next: u64,
}

impl Subscribers {
    /// `marker`: the channel that marks come on.
    #[must_use]
    pub fn new(marker: Channel) -> Self {
        Self {
            marker,
            all: BTreeMap::new(),
            wanted: BTreeMap::new(),
            confirmed: BTreeSet::new(),
            tokens: BTreeMap::new(),
            next: 0,
        }
    }

    /// One more, who wants nothing yet.
    pub fn join(&mut self) -> u64 {
        self.next += 1;
        self.all.insert(self.next, Subscriber { channels: Vec::new(), phase: Phase::Off });
        self.next
    }

    pub fn leave(&mut self, id: u64) {
        self.set_phase(id, Phase::Off);
        self.set_channels(id, Vec::new());
        self.all.remove(&id);
    }

    /// It wants these and no others.
    pub fn want(&mut self, id: u64, channels: &[Channel]) -> Wanted {
        let fresh = channels.iter().filter(|channel| !self.wanted.contains_key(*channel)).count();
        if channels.len() > MAX_CHANNELS_OF_ONE || self.wanted.len() + fresh > MAX_CHANNELS {
            return Wanted::TooMany;
        }
        self.set_channels(id, channels.to_vec());
        if self.is_confirmed(id) { Wanted::Confirmed } else { Wanted::Asked }
    }

    /// PostgreSQL listens to all that it wants, and to marks.
    #[must_use]
    pub fn is_confirmed(&self, id: u64) -> bool {
        let all = |of: &Subscriber| of.channels.iter().all(|channel| self.confirmed.contains(channel));
        self.confirmed.contains(&self.marker) && self.all.get(&id).is_some_and(all)
    }

    /// The stream is its own from here on.
    pub fn begin(&mut self, id: u64) {
        self.set_phase(id, Phase::On);
    }

    /// The stream is its own from that mark on.
    pub fn begin_at(&mut self, id: u64, token: u128) {
        self.set_phase(id, Phase::From(token));
    }

    /// The stream is its own up to that mark; false if no part of it is.
    pub fn end_at(&mut self, id: u64, token: u128) -> bool {
        let phase = match self.all.get(&id).map(|subscriber| subscriber.phase) {
            Some(Phase::From(first) | Phase::Part(first, _)) => Phase::Part(first, token),
            Some(Phase::On | Phase::Until(_)) => Phase::Until(token),
            Some(Phase::Off) | None => return false,
        };
        self.set_phase(id, phase);
        true
    }

    /// No part of the stream is its own any more.
    pub fn end(&mut self, id: u64) {
        self.set_phase(id, Phase::Off);
    }

    fn set_phase(&mut self, id: u64, phase: Phase) {
        let Some(subscriber) = self.all.get_mut(&id) else { return };
        if let Some(token) = std::mem::replace(&mut subscriber.phase, phase).token() {
            self.tokens.remove(&token);
        }
        if let Some(token) = phase.token() {
            self.tokens.insert(token, id);
        }
    }

    fn set_channels(&mut self, id: u64, channels: Vec<Channel>) {
        let Some(subscriber) = self.all.get_mut(&id) else { return };
        for channel in std::mem::take(&mut subscriber.channels) {
            if let Some(who) = self.wanted.get_mut(&channel) {
                who.remove(&id);
                if who.is_empty() {
                    self.wanted.remove(&channel);
                }
            }
        }
        for channel in &channels {
            self.wanted.entry(Arc::clone(channel)).or_default().insert(id);
        }
        subscriber.channels = channels;
    }

    /// A notification came.
    pub fn hear(&mut self, channel: &str, payload: &str) -> Heard {
        if *channel == *self.marker {
            let id = u128::from_str_radix(payload, 16).ok().and_then(|token| self.tokens.get(&token).copied());
            let Some((id, phase)) = id.and_then(|id| Some((id, self.all.get(&id)?.phase))) else {
                return Heard::Nothing;
            };
            let (next, heard) = match phase {
                Phase::From(_) => (Phase::On, Heard::Nothing),
                Phase::Part(_, until) => (Phase::Until(until), Heard::Nothing),
                Phase::Until(_) | Phase::On | Phase::Off => (Phase::Off, Heard::Ends(id)),
            };
            self.set_phase(id, next);
            return heard;
        }
        let is_on = |id: &u64| matches!(self.all.get(id), Some(s) if matches!(s.phase, Phase::On | Phase::Until(_)));
        Heard::For(self.wanted.get(channel).into_iter().flatten().copied().filter(is_on).collect())
    }

    /// What PostgreSQL is to be told, or a part of it. What it is told to leave counts as left from here on.
    pub fn difference(&mut self) -> Difference {
        let needed = |channel: &Channel| self.wanted.contains_key(channel) || *channel == self.marker;
        let unlisten: Vec<_> = self.confirmed.iter().filter(|c| !needed(c)).take(MAX_AT_ONCE).cloned().collect();
        for channel in &unlisten {
            self.confirmed.remove(channel);
        }
        let missing = self.wanted.keys().chain([&self.marker]).filter(|c| !self.confirmed.contains(*c));
        Difference { listen: missing.take(MAX_AT_ONCE).cloned().collect(), unlisten }
    }

    /// PostgreSQL listens to these.
    pub fn confirm(&mut self, channels: Vec<Channel>) {
        self.confirmed.extend(channels);
    }

    /// PostgreSQL listens to nothing: another connection, or one that was told so.
    pub fn forget_confirmed(&mut self) {
        self.confirmed.clear();
    }

    #[must_use]
    pub fn marker(&self) -> &Channel {
        &self.marker
    }

    /// PostgreSQL has confirmed the channel of the marks.
    #[must_use]
    pub fn hears_marks(&self) -> bool {
        self.confirmed.contains(&self.marker)
    }

    /// Nobody is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Channels that are wanted.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.wanted.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<Channel> {
        list.iter().map(|name| Channel::from(*name)).collect()
    }

    /// With all that it wants confirmed.
    fn settle(all: &mut Subscribers) -> Difference {
        let difference = all.difference();
        all.confirm(difference.listen.clone());
        difference
    }

    #[test]
    fn a_channel_is_asked_for_once_and_left_with_its_last_subscriber() {
        let mut all = Subscribers::new("m".into());
        let (a, b) = (all.join(), all.join());
        assert_eq!(all.want(a, &names(&["x", "y"])), Wanted::Asked);
        assert_eq!(all.want(b, &names(&["y"])), Wanted::Asked);
        assert_eq!(settle(&mut all), Difference { listen: names(&["x", "y", "m"]), unlisten: vec![] });
        assert!(all.is_confirmed(a) && all.is_confirmed(b));
        assert_eq!(all.want(b, &names(&["x"])), Wanted::Confirmed);
        all.leave(a);
        assert_eq!(settle(&mut all), Difference { listen: vec![], unlisten: names(&["y"]) });
        all.leave(b);
        assert_eq!(settle(&mut all), Difference { listen: vec![], unlisten: names(&["x"]) });
        assert!(all.is_empty() && all.channels() == 0);
    }

    #[test]
    fn what_is_being_left_is_asked_for_again() {
        let mut all = Subscribers::new("m".into());
        let a = all.join();
        all.want(a, &names(&["x"]));
        settle(&mut all);
        all.want(a, &[]);
        assert_eq!(all.difference().unlisten, names(&["x"]));
        // UNLISTEN is on its way.
        assert_eq!(all.want(a, &names(&["x"])), Wanted::Asked);
        assert_eq!(all.difference().listen, names(&["x"]));
    }

    #[test]
    fn a_subscriber_hears_from_its_mark_to_its_mark() {
        let mut all = Subscribers::new("m".into());
        let (a, b) = (all.join(), all.join());
        all.want(a, &names(&["x"]));
        all.want(b, &names(&["x"]));
        all.begin(b);
        assert_eq!(all.hear("x", ""), Heard::For(vec![b]));
        all.begin_at(a, 0xa);
        assert_eq!(all.hear("x", ""), Heard::For(vec![b]), "its mark did not come yet");
        assert_eq!(all.hear("m", "b"), Heard::Nothing, "nobody's mark");
        assert_eq!(all.hear("m", "a"), Heard::Nothing);
        assert_eq!(all.hear("x", ""), Heard::For(vec![a, b]));
        assert!(all.end_at(a, 0xc));
        assert_eq!(all.hear("m", "a"), Heard::Nothing, "a mark counts once");
        assert_eq!(all.hear("x", ""), Heard::For(vec![a, b]));
        assert_eq!(all.hear("m", "c"), Heard::Ends(a));
        assert_eq!(all.hear("x", ""), Heard::For(vec![b]));
        assert_eq!(all.hear("y", ""), Heard::For(vec![]));
    }

    #[test]
    fn who_goes_back_before_its_first_mark_hears_what_lies_between_the_two() {
        let mut all = Subscribers::new("m".into());
        let a = all.join();
        all.want(a, &names(&["x"]));
        all.begin_at(a, 1);
        assert!(all.end_at(a, 2));
        assert_eq!(all.hear("x", ""), Heard::For(vec![]), "it heard that itself");
        assert_eq!(all.hear("m", "1"), Heard::Nothing);
        assert_eq!(all.hear("x", ""), Heard::For(vec![a]));
        assert_eq!(all.hear("m", "2"), Heard::Ends(a));
        assert_eq!(all.hear("x", ""), Heard::For(vec![]));
    }

    #[test]
    fn a_mark_that_was_given_up_does_nothing() {
        let mut all = Subscribers::new("m".into());
        let a = all.join();
        all.want(a, &names(&["x"]));
        all.begin_at(a, 1);
        all.end(a);
        assert!(!all.end_at(a, 2));
        assert_eq!(all.hear("m", "1"), Heard::Nothing);
        assert_eq!(all.hear("x", ""), Heard::For(vec![]));
    }

    #[test]
    fn there_is_a_limit_for_one_and_one_for_all() {
        let mut all = Subscribers::new("m".into());
        let many = |of: usize, n: usize| (0..n).map(|i| Channel::from(format!("{of}_{i}"))).collect::<Vec<_>>();
        let first = all.join();
        assert_eq!(all.want(first, &many(0, MAX_CHANNELS_OF_ONE + 1)), Wanted::TooMany);
        for of in 0..MAX_CHANNELS / MAX_CHANNELS_OF_ONE {
            let next = all.join();
            assert_eq!(all.want(next, &many(of, MAX_CHANNELS_OF_ONE)), Wanted::Asked);
        }
        assert_eq!(all.want(first, &names(&["one more"])), Wanted::TooMany);
        assert_eq!(all.want(first, &names(&["0_0"])), Wanted::Asked, "one that is there anyway");
    }
}
