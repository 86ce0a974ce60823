//! Waves: a canary first, then the rest in parts; what may begin next, and when to stop.
//!
//! What always holds: nobody of a wave begins before all of the wave before it are over; at most `parallel` are under way;
//! one that cannot begin yet, since another job has it, keeps nobody else of its wave waiting; once `stop_after` have failed, or one of the canary, nobody else begins; who is done is never begun again.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The wave of the canary.
pub const CANARY: u32 = 0;

/// Where a tenant is in a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Turn {
    /// Its turn has not come, or another job has the tenant; of a rollout that is over: it was not reached.
    Waiting,
    Running,
    Done,
    Failed,
    /// Nothing could be done to it: it is archived, drained or gone.
    Skipped,
}

impl Turn {
    pub const ALL: [Self; 5] = [Self::Waiting, Self::Running, Self::Done, Self::Failed, Self::Skipped];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }

    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|turn| turn.as_str() == word)
    }

    fn is_open(self) -> bool {
        matches!(self, Self::Waiting | Self::Running)
    }
}

/// How far a rollout goes at once, and when it stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Tenants under way at once.
    pub parallel: u32,
    /// So many failures, and nobody else begins.
    pub stop_after: u32,
}

/// The end of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Nobody failed.
    Succeeded,
    /// All had their turn, and some failed: fewer than `stop_after`.
    Failed,
    /// It stopped, and some had no turn.
    Stopped,
}

/// What comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Move {
    /// Of these, by their places and in this order, so many begin; one that cannot yet is passed over.
    Start {
        waiting: Vec<usize>,
        free: usize,
    },
    /// Those under way are waited for.
    Wait,
    End(End),
}

/// A number of tenants, or a part of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    Count(u32),
    Percent(u32),
}

impl Size {
    /// `10` or `25%`; never nothing.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (digits, is_percent) = text.strip_suffix('%').map_or((text, false), |digits| (digits, true));
        let is_number =
            digits.bytes().all(|byte| byte.is_ascii_digit()) && !digits.starts_with('0') && digits.len() < 10;
        let number: u32 = digits.parse().ok().filter(|_| is_number)?;
        match is_percent {
            true => (number <= 100).then_some(Self::Percent(number)),
            false => Some(Self::Count(number)),
        }
    }

    /// Of so many, at least one.
    fn of(self, all: usize) -> usize {
        let at_least_one = |count: usize| count.max(1);
        match self {
            Self::Count(count) => at_least_one(usize::try_from(count).unwrap_or(usize::MAX)),
            Self::Percent(percent) => {
                at_least_one(all.saturating_mul(usize::try_from(percent).unwrap_or(100)).div_ceil(100))
            }
        }
    }
}

/// In which wave each is: the first `canary` in wave 0, the others from 1 on; `wave` is of all that there are.
#[must_use]
pub fn arrange(all: usize, canary: usize, wave: Option<Size>) -> Vec<u32> {
    let canary = canary.min(all);
    let size = wave.map_or(all.max(1), |wave| wave.of(all));
    let of = |place: usize| match place.checked_sub(canary) {
        None => CANARY,
        Some(after) => u32::try_from(after / size).unwrap_or(u32::MAX).saturating_add(1),
    };
    (0..all).map(of).collect()
}

/// What comes next, of tenants in their order.
#[must_use]
pub fn next(tenants: &[(u32, Turn)], limits: Limits) -> Move {
    let count = |turn: Turn| tenants.iter().filter(|(_, now)| *now == turn).count();
    let (running, failed) = (count(Turn::Running), count(Turn::Failed));
    let has_sick_canary = tenants.iter().any(|(wave, turn)| *wave == CANARY && *turn == Turn::Failed);
    let is_stopped = has_sick_canary || failed >= usize::try_from(limits.stop_after.max(1)).unwrap_or(usize::MAX);
    let wave = tenants.iter().filter(|(_, turn)| turn.is_open()).map(|(wave, _)| *wave).min();
    let Some(wave) = wave else { return Move::End(if failed > 0 { End::Failed } else { End::Succeeded }) };
    if is_stopped {
        return if running > 0 { Move::Wait } else { Move::End(End::Stopped) };
    }
    let free = usize::try_from(limits.parallel.max(1)).unwrap_or(usize::MAX).saturating_sub(running);
    let waits = tenants.iter().enumerate().filter(|(_, (of, turn))| *of == wave && *turn == Turn::Waiting);
    let waiting: Vec<usize> = waits.map(|(place, _)| place).collect();
    if waiting.is_empty() || free == 0 { Move::Wait } else { Move::Start { waiting, free } }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { parallel: 2, stop_after: 2 };

    /// Walks a rollout in which these fail, one step of one tenant at a time; who was begun, in order, and the end.
    fn walk(tenants: &mut [(u32, Turn)], limits: Limits, failing: &[usize]) -> (Vec<usize>, End) {
        let mut begun = Vec::new();
        loop {
            match next(tenants, limits) {
                Move::Start { waiting, free } => {
                    for place in waiting.into_iter().take(free) {
                        assert_eq!(tenants[place].1, Turn::Waiting, "begun twice");
                        tenants[place].1 = Turn::Running;
                        begun.push(place);
                    }
                    let running = tenants.iter().filter(|(_, turn)| *turn == Turn::Running);
                    assert!(running.clone().count() <= limits.parallel as usize);
                    let waves: std::collections::BTreeSet<u32> = running.map(|(wave, _)| *wave).collect();
                    assert_eq!(waves.len(), 1, "two waves at once");
                }
                Move::Wait => {
                    let place =
                        tenants.iter().position(|(_, turn)| *turn == Turn::Running).expect("it waits for nobody");
                    tenants[place].1 = if failing.contains(&place) { Turn::Failed } else { Turn::Done };
                }
                Move::End(end) => return (begun, end),
            }
        }
    }

    fn fresh(all: usize, canary: usize, wave: Option<Size>) -> Vec<(u32, Turn)> {
        arrange(all, canary, wave).into_iter().map(|wave| (wave, Turn::Waiting)).collect()
    }

    #[test]
    fn the_canary_is_first_and_waves_are_of_the_size_that_was_asked_for() {
        assert_eq!(arrange(7, 1, Some(Size::Count(3))), [0, 1, 1, 1, 2, 2, 2]);
        assert_eq!(arrange(5, 2, None), [0, 0, 1, 1, 1]);
        assert_eq!(arrange(4, 0, Some(Size::Percent(50))), [1, 1, 2, 2]);
        assert_eq!(arrange(3, 0, Some(Size::Percent(1))), [1, 2, 3], "never nothing");
        assert_eq!(arrange(2, 9, None), [0, 0]);
        assert_eq!(arrange(0, 1, None), Vec::<u32>::new());
        let sizes = ["3", "25%", "0", "0%", "101%", "", "%", "x", "+1"].map(Size::parse);
        let wanted = [Some(Size::Count(3)), Some(Size::Percent(25)), None, None, None, None, None, None, None];
        assert_eq!(sizes, wanted);
    }

    #[test]
    fn all_have_their_turn_in_order_and_never_too_many_at_once() {
        for parallel in 1..5 {
            let mut tenants = fresh(9, 1, Some(Size::Count(3)));
            let (begun, end) = walk(&mut tenants, Limits { parallel, stop_after: 1 }, &[]);
            assert_eq!((begun, end), ((0..9).collect(), End::Succeeded));
        }
        assert_eq!(next(&[], LIMITS), Move::End(End::Succeeded));
    }

    #[test]
    fn a_failing_canary_stops_everything_whatever_the_number() {
        let mut tenants = fresh(5, 1, None);
        let (begun, end) = walk(&mut tenants, Limits { parallel: 3, stop_after: 99 }, &[0]);
        assert_eq!((begun, end), (vec![0], End::Stopped));
    }

    #[test]
    fn it_stops_after_so_many_failures_and_waits_for_those_under_way() {
        let mut tenants = fresh(9, 1, None);
        let (begun, end) = walk(&mut tenants, LIMITS, &[2, 4]);
        assert_eq!((begun, end), (vec![0, 1, 2, 3, 4, 5], End::Stopped), "5 was under way when 4 failed");
        assert_eq!(tenants[5].1, Turn::Done);
        assert_eq!(tenants[6].1, Turn::Waiting);
    }

    #[test]
    fn fewer_failures_than_that_let_it_go_on_and_it_is_not_well() {
        let mut tenants = fresh(5, 1, None);
        assert_eq!(walk(&mut tenants, LIMITS, &[2]).1, End::Failed);
        assert_eq!(tenants.iter().filter(|(_, turn)| *turn == Turn::Done).count(), 4);
        // The last one's failure leaves nobody who had no turn.
        let mut tenants = fresh(2, 0, None);
        assert_eq!(walk(&mut tenants, Limits { parallel: 1, stop_after: 1 }, &[1]).1, End::Failed);
    }

    #[test]
    fn resumed_it_begins_the_failed_and_the_waiting_and_no_other() {
        let mut tenants = fresh(6, 1, Some(Size::Count(2)));
        let (first, _) = walk(&mut tenants, Limits { parallel: 1, stop_after: 1 }, &[2]);
        assert_eq!(first, [0, 1, 2]);
        tenants.iter_mut().filter(|(_, turn)| *turn == Turn::Failed).for_each(|(_, turn)| *turn = Turn::Waiting);
        let (second, end) = walk(&mut tenants, Limits { parallel: 1, stop_after: 1 }, &[]);
        assert_eq!((second, end), (vec![2, 3, 4, 5], End::Succeeded));
    }

    #[test]
    fn who_is_skipped_holds_up_nobody() {
        let tenants = [(0, Turn::Skipped), (1, Turn::Waiting), (2, Turn::Waiting)];
        assert_eq!(next(&tenants, LIMITS), Move::Start { waiting: vec![1], free: 2 });
    }
}
