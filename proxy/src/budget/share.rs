//! What each tenant of a server gets when all of them want all they can get: the worst case of its budget. Pure.

use super::fair::Budget;

/// Floors first; then one connection after another to the tenant that has the least for its weight, up to its ceiling.
/// What `fair` comes to in the long run. In the order of `budgets`; the sum is at most `cap`.
#[must_use]
pub fn worst_case(cap: u32, budgets: &[Budget]) -> Vec<u32> {
    let mut shares: Vec<u32> = Vec::with_capacity(budgets.len());
    let mut left = cap;
    for budget in budgets {
        let floor = budget.floor.min(budget.ceiling).min(left);
        left -= floor;
        shares.push(floor);
    }
    while left > 0 {
        // Compared crosswise, so that nothing is rounded.
        let wanting = shares.iter().zip(budgets).enumerate().filter(|(_, (share, budget))| *share < &budget.ceiling);
        let least = wanting.min_by(|(_, (a, of_a)), (_, (b, of_b))| {
            let (a, b) = (u64::from(**a), u64::from(**b));
            (a * u64::from(of_b.weight)).cmp(&(b * u64::from(of_a.weight)))
        });
        let Some(share) = least.map(|(n, _)| n).and_then(|n| shares.get_mut(n)) else { break };
        *share += 1;
        left -= 1;
    }
    shares
}

#[cfg(test)]
mod tests {
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
        assert_eq!(
            worst_case(4, &[budget(3, 9, 1), budget(3, 9, 1)]),
            [3, 1],
            "an impossible promise is kept in order"
        );
    }
}
