//! What each tenant of a server gets when all of them want all they can get: the worst case of its budget. Pure.

use super::fair::Budget;

/// Levels are counted in this part of a connection per weight: finer than any two tenants with a weight of up to 1000 are
/// apart.
const FINE: u32 = 20;

/// Floors first, in proportion where they do not all fit; then one connection after another to the tenant that has the
/// least for its weight, up to its ceiling. What `fair` comes to in the long run. In the order of `budgets`; the sum is at
/// most `cap`.
#[must_use]
pub fn worst_case(cap: u32, budgets: &[Budget]) -> Vec<u32> {
    let floors = floors(cap, budgets);
    // All that can be given without going one by one, which a large cap would make endless.
    let (mut low, mut high) = (0u64, u64::from(cap) << FINE);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if sum(&level(middle, &floors, budgets)) <= u64::from(cap) { low = middle } else { high = middle - 1 }
    }
    let mut shares = level(low, &floors, budgets);
    let mut left = u64::from(cap).saturating_sub(sum(&shares));
    while left > 0 {
        let Some(share) = least(&shares, budgets).and_then(|n| shares.get_mut(n)) else { break };
        *share += 1;
        left -= 1;
    }
    shares
}

/// What is left to each where any number of others want all they can get: its floor, scaled where the floors do not all fit.
#[must_use]
pub fn floors(cap: u32, budgets: &[Budget]) -> Vec<u32> {
    let floors: Vec<u32> = budgets.iter().map(|budget| budget.floor.min(budget.ceiling)).collect();
    let all = sum(&floors);
    if all <= u64::from(cap) {
        return floors;
    }
    let part = |floor: u32| u64::from(floor).saturating_mul(u64::from(cap)).checked_div(all);
    floors.into_iter().map(|floor| part(floor).and_then(|part| u32::try_from(part).ok()).unwrap_or(0)).collect()
}

/// What each has once everybody has been given all that is less than this level for its weight.
fn level(level: u64, floors: &[u32], budgets: &[Budget]) -> Vec<u32> {
    let share = |(floor, budget): (&u32, &Budget)| {
        let given = (u128::from(level) * u128::from(budget.weight)).div_ceil(1 << FINE);
        u32::try_from(given).unwrap_or(u32::MAX).min(budget.ceiling).max(*floor)
    };
    floors.iter().zip(budgets).map(share).collect()
}

/// Who comes next: the least for its weight, compared crosswise, so that nothing is rounded.
fn least(shares: &[u32], budgets: &[Budget]) -> Option<usize> {
    let wanting = shares.iter().zip(budgets).enumerate().filter(|(_, (share, budget))| *share < &budget.ceiling);
    let least = wanting.min_by(|(_, (a, of_a)), (_, (b, of_b))| {
        let (a, b) = (u64::from(**a), u64::from(**b));
        (a * u64::from(of_b.weight)).cmp(&(b * u64::from(of_a.weight)))
    });
    least.map(|(n, _)| n)
}

fn sum(shares: &[u32]) -> u64 {
    shares.iter().map(|share| u64::from(*share)).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn budget(floor: u32, ceiling: u32, weight: u32) -> Budget {
        Budget { floor, ceiling, weight }
    }

    #[test]
    fn the_rest_is_shared_by_weight() {
        let budgets = [budget(0, u32::MAX, 1), budget(0, u32::MAX, 2), budget(0, u32::MAX, 4)];
        assert_eq!(worst_case(70, &budgets), [10, 20, 40]);
    }

    #[test]
    fn floors_and_ceilings_bound_it() {
        let budgets = [budget(8, u32::MAX, 1), budget(0, 2, 1), budget(0, u32::MAX, 1)];
        assert_eq!(worst_case(16, &budgets), [8, 2, 6]);
        assert_eq!(worst_case(3, &[budget(0, 1, 1)]), [1], "nobody wants the rest");
    }

    #[test]
    fn an_impossible_promise_is_kept_in_proportion() {
        let even = [budget(3, 9, 1), budget(3, 9, 1)];
        assert_eq!((worst_case(4, &even), floors(4, &even)), (vec![2, 2], vec![2, 2]));
        let uneven = [budget(6, 9, 1), budget(2, 9, 1)];
        assert_eq!(worst_case(4, &uneven), [3, 1]);
        // Nothing is lost to rounding.
        assert_eq!(worst_case(3, &[budget(1, 9, 1); 4]), [1, 1, 1, 0]);
    }

    #[test]
    fn numbers_beyond_all_machines_are_dealt_with_at_once() {
        let many = vec![budget(0, u32::MAX, 1); 3_000];
        assert_eq!(sum(&worst_case(u32::MAX, &many)), u64::from(u32::MAX));
        assert_eq!(worst_case(u32::MAX, &[budget(u32::MAX, u32::MAX, 1); 2]), [u32::MAX / 2 + 1, u32::MAX / 2]);
    }

    /// As it is told: one connection after another.
    fn one_by_one(cap: u32, budgets: &[Budget]) -> Vec<u32> {
        let mut shares = floors(cap, budgets);
        while sum(&shares) < u64::from(cap)
            && let Some(n) = least(&shares, budgets)
        {
            shares[n] += 1;
        }
        shares
    }

    proptest! {
        #[test]
        fn it_is_what_giving_one_by_one_comes_to(
            cap in 0u32..300,
            budgets in proptest::collection::vec((0u32..20, 0u32..60, 1u32..=1000), 0..12),
        ) {
            let budgets: Vec<_> = budgets.into_iter().map(|(floor, more, weight)| budget(floor, floor + more, weight)).collect();
            prop_assert_eq!(worst_case(cap, &budgets), one_by_one(cap, &budgets));
        }
    }
}
