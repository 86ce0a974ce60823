//! Connections that have not proved who they are: how many there may be, and which goes when there are too many.
//!
//! They are counted apart from clients, so that sockets that say nothing take no client's place. Above the limit one goes
//! of the network that has most of them: the one that has been silent longest, or else the newest, so that logins that are
//! under way come to their end. Where no network has many, it is the one of all that has been silent longest. What always
//! holds: no more than `limit` stay; one network alone cannot push out another's.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::attempts::{Network, network};

/// The least limit, however few clients are allowed.
const AT_LEAST: u32 = 64;
/// A network with no more than such a part of the limit is no crowd.
const CROWD: usize = 8;

/// Those of all networks.
#[derive(Debug, Default)]
pub struct Lobby {
    crowds: BTreeMap<Network, Crowd>,
    /// Their sizes in order.
    sizes: BTreeSet<(usize, Network)>,
    /// Of all networks, oldest first.
    silent: BTreeSet<(u64, Network)>,
    count: usize,
    next: u64,
}

/// Those of one network, oldest first.
#[derive(Debug, Default)]
struct Crowd {
    guests: BTreeMap<u64, Arc<Notify>>,
    silent: BTreeSet<u64>,
}

/// One connection in the lobby; it leaves when this is dropped.
#[derive(Debug)]
pub struct Guest {
    lobby: Arc<Mutex<Lobby>>,
    network: Network,
    number: u64,
    told_to_go: Arc<Notify>,
    has_spoken: bool,
}

impl Guest {
    /// `clients`: how many clients there may be; as many may be on their way to become one.
    #[must_use]
    pub fn enter(lobby: &Arc<Mutex<Lobby>>, address: Option<IpAddr>, clients: u32) -> Self {
        let limit = usize::try_from(clients.max(AT_LEAST)).unwrap_or(usize::MAX);
        let (network, told_to_go) = (network(address), Arc::new(Notify::new()));
        let number = lobby.lock().enter(network, Arc::clone(&told_to_go), limit);
        Self { lobby: Arc::clone(lobby), network, number, told_to_go, has_spoken: false }
    }

    /// It said something.
    pub fn spoke(&mut self) {
        if std::mem::replace(&mut self.has_spoken, true) {
            return;
        }
        let mut lobby = self.lobby.lock();
        lobby.silent.remove(&(self.number, self.network));
        if let Some(crowd) = lobby.crowds.get_mut(&self.network) {
            crowd.silent.remove(&self.number);
        }
    }

    /// Notified when it must make room.
    #[must_use]
    pub fn told_to_go(&self) -> Arc<Notify> {
        Arc::clone(&self.told_to_go)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.lobby.lock().leave(self.network, self.number);
    }
}

impl Lobby {
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn enter(&mut self, network: Network, told_to_go: Arc<Notify>, limit: usize) -> u64 {
        let number = self.next;
        self.next += 1;
        self.change(network, |crowd| {
            crowd.guests.insert(number, told_to_go);
            crowd.silent.insert(number);
        });
        self.silent.insert((number, network));
        if self.count > limit
            && let Some((network, number)) = self.who_goes(limit)
            && let Some(told_to_go) = self.leave(network, number)
        {
            told_to_go.notify_one();
        }
        number
    }

    fn who_goes(&self, limit: usize) -> Option<(Network, u64)> {
        let (size, network) = self.sizes.last()?;
        if size.saturating_mul(CROWD) <= limit
            && let Some((number, network)) = self.silent.first()
        {
            return Some((*network, *number));
        }
        let crowd = self.crowds.get(network)?;
        let number = crowd.silent.first().or_else(|| crowd.guests.keys().next_back())?;
        Some((*network, *number))
    }

    fn leave(&mut self, network: Network, number: u64) -> Option<Arc<Notify>> {
        self.silent.remove(&(number, network));
        self.change(network, |crowd| {
            crowd.silent.remove(&number);
            crowd.guests.remove(&number)
        })
    }

    /// The one place that counts.
    fn change<T>(&mut self, network: Network, change: impl FnOnce(&mut Crowd) -> T) -> T {
        let crowd = self.crowds.entry(network).or_default();
        let before = crowd.guests.len();
        let outcome = change(crowd);
        let after = crowd.guests.len();
        if after == 0 {
            self.crowds.remove(&network);
        }
        self.sizes.remove(&(before, network));
        if after > 0 {
            self.sizes.insert((after, network));
        }
        self.count = self.count.saturating_sub(before).saturating_add(after);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, 2, last]))
    }

    fn stays(guest: &Guest) -> bool {
        guest.lobby.lock().crowds.get(&guest.network).is_some_and(|crowd| crowd.guests.contains_key(&guest.number))
    }

    fn is_told(told_to_go: &Notify) -> bool {
        let mut told = std::pin::pin!(told_to_go.notified());
        told.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready()
    }

    fn is_told_to_go(guest: &Guest) -> bool {
        is_told(&guest.told_to_go)
    }

    fn crowd(lobby: &Arc<Mutex<Lobby>>, size: u32, from: u8, speaking: bool) -> Vec<Guest> {
        let mut guests: Vec<Guest> = (0..size).map(|_| Guest::enter(lobby, address(from), 0)).collect();
        guests.iter_mut().filter(|_| speaking).for_each(Guest::spoke);
        guests
    }

    #[test]
    fn the_one_that_was_silent_longest_makes_room() {
        let lobby = Arc::default();
        let mut guests = crowd(&lobby, AT_LEAST, 1, false);
        guests[0].spoke();
        let newcomer = Guest::enter(&lobby, address(1), 0);
        assert!(is_told_to_go(&guests[1]) && !is_told_to_go(&guests[0]));
        assert!(stays(&guests[0]) && !stays(&guests[1]) && stays(&guests[2]) && stays(&newcomer));
        drop((guests, newcomer));
        assert!(lobby.lock().is_empty() && lobby.lock().sizes.is_empty());
    }

    #[test]
    fn who_leaves_by_itself_is_not_told_to_go() {
        let lobby = Arc::default();
        let guest = Guest::enter(&lobby, address(1), 0);
        let told_to_go = guest.told_to_go();
        drop(guest);
        assert!(!is_told(&told_to_go));
    }

    #[test]
    fn where_all_speak_the_newest_goes() {
        let lobby = Arc::default();
        let guests = crowd(&lobby, AT_LEAST, 1, true);
        assert!(!stays(&Guest::enter(&lobby, address(1), 0)));
        assert!(guests.iter().all(stays));
    }

    #[test]
    fn silent_ones_of_many_networks_push_out_no_login_that_is_under_way() {
        let lobby = Arc::default();
        let logins = crowd(&lobby, 4, 200, true);
        let silent: Vec<Guest> = (0..=199).map(|n| Guest::enter(&lobby, address(n), 0)).collect();
        assert!(logins.iter().all(stays));
        assert_eq!(lobby.lock().len(), AT_LEAST as usize);
        drop((logins, silent));
        assert!(lobby.lock().is_empty() && lobby.lock().silent.is_empty());
    }

    #[test]
    fn one_network_pushes_out_nobody_of_another() {
        let lobby = Arc::default();
        let few = crowd(&lobby, 3, 2, false);
        let many = crowd(&lobby, 10 * AT_LEAST, 1, true);
        let another = crowd(&lobby, 3, 3, false);
        assert!(few.iter().chain(&another).all(stays));
        assert_eq!(many.iter().filter(|guest| stays(guest)).count() + 6, lobby.lock().len());
        assert_eq!(lobby.lock().len(), AT_LEAST as usize);
    }
}
