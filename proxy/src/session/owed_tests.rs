//! PostgreSQL's message flow as a specification of the queue.

use super::*;

fn client(owed: &mut Owed, kinds: &[Kind]) {
    for kind in kinds {
        owed.push(*kind, For::Client, None);
    }
}

fn replies(owed: &mut Owed, tags: &[u8]) {
    for tag in tags {
        assert_eq!(owed.reply(*tag), Ok(Verdict::Deliver), "{}", char::from(*tag));
        if *tag == b'Z' {
            owed.ready(status::IDLE);
        }
    }
}

#[test]
fn a_simple_query_is_at_rest_after_its_ready() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Query]);
    replies(&mut owed, b"TDDCTDC");
    assert!(!owed.is_at_rest() && owed.client_waits());
    replies(&mut owed, b"Z");
    assert!(owed.is_at_rest() && !owed.client_waits());
}

#[test]
fn every_sync_in_flight_is_owed_its_own_ready() {
    let mut owed = Owed::default();
    let batch = [Kind::Parse, Kind::Bind, Kind::Describe, Kind::Execute, Kind::Sync];
    client(&mut owed, &batch);
    client(&mut owed, &batch);
    replies(&mut owed, b"12TDCZ");
    assert!(!owed.is_at_rest(), "the first ready is not the last");
    replies(&mut owed, b"12nCZ");
    assert!(owed.is_at_rest());
}

#[test]
fn an_error_skips_to_the_sync_queries_included() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Parse, Kind::Execute, Kind::Query, Kind::Sync]);
    assert_eq!(owed.error(), Ok(Verdict::Deliver));
    replies(&mut owed, b"Z");
    assert!(owed.is_at_rest());
}

#[test]
fn an_error_before_the_sync_was_sent_skips_what_comes_until_it() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Parse]);
    owed.error().unwrap();
    assert!(owed.is_skipping() && !owed.is_at_rest());
    client(&mut owed, &[Kind::Sync]);
    assert!(!owed.is_skipping());
    replies(&mut owed, b"Z");
    assert!(owed.is_at_rest());
}

#[test]
fn an_error_in_a_simple_query_skips_nothing() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Query, Kind::Query]);
    owed.error().unwrap();
    replies(&mut owed, b"ZCZ");
    assert!(owed.is_at_rest());
}

#[test]
fn a_commit_that_fails_at_the_sync_is_still_answered_by_its_ready() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Parse, Kind::Bind, Kind::Execute, Kind::Sync]);
    replies(&mut owed, b"12C");
    owed.error().unwrap();
    replies(&mut owed, b"Z");
    assert!(owed.is_at_rest());
}

#[test]
fn a_flush_leaves_the_batch_open() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Parse]);
    replies(&mut owed, b"1");
    assert!(owed.is_empty() && !owed.is_at_rest());
}

#[test]
fn what_is_ours_is_swallowed_and_what_is_the_clients_delivered() {
    let mut owed = Owed::default();
    owed.push(Kind::Query, For::Us, None);
    owed.push(Kind::Parse, For::Us, None);
    client(&mut owed, &[Kind::Bind, Kind::Execute, Kind::Sync]);
    for tag in b"DCZ1" {
        assert_eq!(owed.reply(*tag), Ok(Verdict::Swallow));
    }
    replies(&mut owed, b"2CZ");
}

#[test]
fn an_error_in_a_look_is_nobodys_and_the_connection_rests_behind_its_sync() {
    let mut owed = Owed::default();
    for kind in [Kind::Parse, Kind::Bind, Kind::Execute, Kind::Sync] {
        owed.push(kind, For::Probe, None);
    }
    assert!(owed.is_probe_only() && owed.runs_ours() && !owed.client_waits());
    assert_eq!(owed.reply(b'1'), Ok(Verdict::Read));
    assert_eq!(owed.error(), Ok(Verdict::Swallow));
    assert!(!owed.is_at_rest());
    assert_eq!(owed.reply(b'Z'), Ok(Verdict::Read));
    owed.ready(status::IDLE);
    assert!(owed.is_at_rest());
}

#[test]
fn an_error_in_our_own_parse_is_the_clients() {
    let mut owed = Owed::default();
    owed.push(Kind::Parse, For::Us, Some(Box::new(Undo::OnServer(7))));
    client(&mut owed, &[Kind::Bind, Kind::Sync]);
    assert_eq!(owed.error(), Ok(Verdict::Deliver));
    assert!(matches!(owed.take_undone().as_slice(), [Undo::OnServer(7)]));
    replies(&mut owed, b"Z");
}

#[test]
fn a_query_that_fails_with_ours_before_it_gets_its_ready_behind_an_open_batch_too() {
    let ours = |owed: &mut Owed| owed.push(Kind::Parse, For::Us, None);
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Parse]);
    replies(&mut owed, b"1");
    ours(&mut owed);
    client(&mut owed, &[Kind::Query]);
    assert_eq!(owed.error(), Ok(Verdict::Deliver));
    assert!(owed.take_stranded() && owed.is_skipping());
    // The client's Bind failed for it: its query waits for its Sync, as everything does.
    let mut owed = Owed::default();
    ours(&mut owed);
    client(&mut owed, &[Kind::Bind, Kind::Query]);
    assert_eq!(owed.error(), Ok(Verdict::Deliver));
    assert!(!owed.take_stranded() && owed.is_skipping());
}

#[test]
fn own_replies_come_in_their_turn_and_are_taken_back_with_what_is_skipped() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Bind]);
    owed.push_own(Own::CloseComplete, None);
    assert_eq!(owed.next_own(), None, "not before the bind is answered");
    replies(&mut owed, b"2");
    assert_eq!(owed.next_own(), Some(Own::CloseComplete));
    client(&mut owed, &[Kind::Parse]);
    owed.push_own(Own::ParseComplete, Some(Box::new(Undo::Name(b"s".as_slice().into()))));
    owed.error().unwrap();
    assert_eq!(owed.next_own(), None, "skipped");
    assert_eq!(owed.take_undone().len(), 1);
}

#[test]
fn a_poisoned_message_has_its_error_replaced() {
    let mut owed = Owed::default();
    owed.push_poison(ErrorResponse::error("42P05", "exists"));
    client(&mut owed, &[Kind::Sync]);
    let Ok(Verdict::Replace(error)) = owed.error() else { panic!() };
    assert_eq!(error.code, "42P05");
    replies(&mut owed, b"Z");
    assert!(owed.is_at_rest());
}

#[test]
fn a_sync_behind_an_extended_copy_is_ignored_and_the_one_after_its_end_is_not() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Bind, Kind::Execute, Kind::Sync]);
    replies(&mut owed, b"2G");
    assert!(owed.in_copy_in());
    owed.copy_ended();
    client(&mut owed, &[Kind::Sync]);
    replies(&mut owed, b"CZ");
    assert!(owed.is_at_rest());
}

#[test]
fn copy_data_may_be_sent_before_it_was_asked_for() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Query]);
    owed.copy_ended();
    client(&mut owed, &[Kind::Query]);
    replies(&mut owed, b"G");
    assert!(!owed.in_copy_in(), "its end is on the way already");
    replies(&mut owed, b"CZTDCZ");
    assert!(owed.is_at_rest());
    // Extended: the Sync before the end is ignored, the one after it is not.
    client(&mut owed, &[Kind::Execute, Kind::Sync]);
    owed.copy_ended();
    client(&mut owed, &[Kind::Sync]);
    replies(&mut owed, b"GCZ");
    assert!(owed.is_at_rest());
    // No COPY after all: the end is ignored.
    client(&mut owed, &[Kind::Query]);
    owed.copy_ended();
    replies(&mut owed, b"CZ");
    assert!(owed.is_at_rest() && owed.is_empty());
}

#[test]
fn a_copy_that_fails_after_a_sync_inside_it_leaves_the_connection_unclear() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Execute]);
    replies(&mut owed, b"G");
    client(&mut owed, &[Kind::Sync]);
    owed.error().unwrap();
    assert!(owed.is_unclear() && !owed.is_at_rest());
    assert_eq!(owed.reply(b'Z'), Ok(Verdict::Deliver));
}

#[test]
fn a_simple_copy_that_fails_is_at_rest_after_its_ready() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Query]);
    replies(&mut owed, b"G");
    owed.error().unwrap();
    assert!(!owed.in_copy_in());
    replies(&mut owed, b"Z");
    assert!(owed.is_at_rest());
}

#[test]
fn what_nobody_asked_for_is_unexpected() {
    for tag in b"ZCD12T" {
        assert_eq!(Owed::default().reply(*tag), Err(Unexpected(*tag)));
    }
    assert_eq!(Owed::default().error(), Err(Unexpected(b'E')));
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Parse, Kind::Sync]);
    assert_eq!(owed.reply(b'2'), Err(Unexpected(b'2')), "wrong order");
    assert_eq!(owed.reply(b'Z'), Err(Unexpected(b'Z')), "too early");
}

#[test]
fn a_transaction_is_not_at_rest() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Query]);
    owed.reply(b'C').unwrap();
    owed.reply(b'Z').unwrap();
    owed.ready(status::TRANSACTION);
    assert!(owed.is_empty() && !owed.is_at_rest());
}

#[test]
fn a_copy_that_fails_before_it_read_anything_answers_the_sync_that_was_taken_for_ignored() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Bind, Kind::Execute, Kind::Sync]);
    owed.copy_ended();
    client(&mut owed, &[Kind::Sync]);
    replies(&mut owed, b"2G");
    owed.error().unwrap();
    replies(&mut owed, b"Z");
    assert!(!owed.is_at_rest(), "one more may come, and must not become somebody else's");
    replies(&mut owed, b"Z");
    assert!(owed.is_unclear() && !owed.is_at_rest());
}

#[test]
fn a_sync_inside_a_simple_copy_that_fails_is_unclear_too() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Query]);
    replies(&mut owed, b"G");
    client(&mut owed, &[Kind::Sync]);
    owed.copy_ended();
    owed.error().unwrap();
    assert!(owed.is_unclear());
}

#[test]
fn a_simple_query_ends_what_extended_messages_before_it_began() {
    let mut owed = Owed::default();
    client(&mut owed, &[Kind::Parse, Kind::Query]);
    replies(&mut owed, b"1TDC");
    assert!(owed.has_open_batch());
    replies(&mut owed, b"Z");
    assert!(owed.is_at_rest());
}

fn guarded() -> Owed {
    let mut owed = Owed::default();
    owed.push(Kind::Query, For::Us, None);
    owed.push_guard(Kind::Describe);
    owed.push_guard(Kind::Close);
    owed
}

#[test]
fn what_comes_behind_a_sync_waits_for_the_guard_before_it() {
    let mut owed = guarded();
    client(&mut owed, &[Kind::Parse, Kind::Bind, Kind::Execute]);
    assert!(!owed.is_past_guard(), "one batch goes with it");
    client(&mut owed, &[Kind::Sync]);
    assert!(owed.is_past_guard());
    for tag in b"TDCZtT" {
        assert_eq!(owed.reply(*tag), Ok(Verdict::Swallow));
    }
    assert!(owed.is_past_guard() && owed.runs_ours());
    assert_eq!(owed.reply(b'3'), Ok(Verdict::Swallow));
    assert!(!owed.is_past_guard() && !owed.runs_ours());
    replies(&mut owed, b"12CZ");
    assert!(owed.is_at_rest());
}

#[test]
fn a_guard_that_nothing_follows_needs_a_sync_of_ours() {
    let mut owed = guarded();
    assert!(!owed.needs_our_sync());
    for tag in b"TDCZtT3" {
        assert_eq!(owed.reply(*tag), Ok(Verdict::Swallow));
    }
    assert!(owed.needs_our_sync() && !owed.is_at_rest());
    owed.push(Kind::Sync, For::Us, None);
    assert_eq!(owed.reply(b'Z'), Ok(Verdict::Swallow));
    assert!(owed.is_at_rest());
}
