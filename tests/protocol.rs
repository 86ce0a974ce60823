//! The protocol as PostgreSQL speaks it: the same bytes give the same messages, directly and through Tenantry.
//!
//! Every script of the table runs twice, whole and byte by byte, through a pool of one server connection; after each run
//! another client must be able to use it.

use tenantry_testkit::{
    Step,
    client::Protection,
    cluster, one_server,
    oracle::{self, ask},
    say,
};

/// One test per script.
macro_rules! scripts {
    ($($name:ident => $steps:expr;)*) => {$(
        #[tokio::test]
        async fn $name() {
            let (tenant, proxy) = one_server("protocol").await;
            let steps: Vec<Step> = $steps;
            oracle::same(cluster(), &proxy, &tenant, &steps).await;
            oracle::same(cluster(), &proxy, &tenant, &oracle::bytewise(&steps)).await;
        }
    )*};
}

fn join(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.concat()
}

/// Sends everything at once and reads `n` ReadyForQuery.
fn pipeline(parts: &[Vec<u8>], n: usize) -> Vec<Step> {
    vec![Step::Send(join(parts)), Step::Ready(n)]
}

/// Simple queries one after another.
fn queries(texts: &[&str]) -> Vec<Step> {
    texts.iter().flat_map(|text| ask(say::query(text))).collect()
}

const COPY_TABLE: &str = "CREATE TEMP TABLE copied (n int CHECK (n < 100))";

scripts! {
    simple_query => queries(&["SELECT 1 AS one, 'two' AS two, NULL AS three"]);
    simple_query_with_several_statements => queries(&["SELECT 1; SELECT 2; SELECT 3"]);
    simple_query_with_an_error_in_the_middle => queries(&["SELECT 1; SELECT 1/0; SELECT 3", "SELECT 4"]);
    empty_queries => queries(&["", ";", " -- nothing", "SELECT 1;;"]);
    notices_keep_their_place => queries(&[
        "DO $$ BEGIN RAISE NOTICE 'first'; RAISE WARNING 'second'; END $$",
        "SELECT 1; DO $$ BEGIN RAISE NOTICE 'between'; END $$; SELECT 2",
    ]);
    errors_carry_every_field => queries(&[
        "SELECT nothing FROM nowhere",
        "DO $$ BEGIN RAISE EXCEPTION 'm' USING ERRCODE = 'TX001', DETAIL = 'd', HINT = 'h'; END $$",
    ]);
    transaction_status_is_true => queries(&[
        "BEGIN", "SELECT 1", "SELECT 1/0", "SELECT 2", "ROLLBACK", "SELECT 3", "BEGIN; SELECT 4", "COMMIT",
        "START TRANSACTION READ ONLY", "COMMIT AND CHAIN", "SHOW transaction_read_only", "END", "COMMIT", "ROLLBACK",
    ]);
    savepoints => queries(&[
        "BEGIN", "SAVEPOINT a", "SELECT 1/0", "ROLLBACK TO a", "SELECT 1", "RELEASE a", "ROLLBACK TO a", "COMMIT",
    ]);
    transaction_in_one_simple_query => queries(&["BEGIN; SELECT 1; COMMIT", "BEGIN; SELECT 1/0; COMMIT", "ROLLBACK", "SELECT 1; BEGIN; SELECT 2", "COMMIT"]);
    cursors_in_a_transaction => queries(&["BEGIN", "DECLARE c CURSOR FOR SELECT generate_series(1, 5)", "FETCH 2 FROM c", "FETCH ALL FROM c", "CLOSE c", "COMMIT", "FETCH 1 FROM c"]);
    two_phase_commit => queries(&["BEGIN", "CREATE TABLE two_phase (n int)", "PREPARE TRANSACTION 'tp'", "ROLLBACK PREPARED 'tp'"]);
    reported_settings_are_reported => queries(&["SET application_name = 'reported'", "SET TimeZone = 'Europe/Vienna'", "RESET ALL", "SHOW TimeZone"]);
    notifications_to_oneself => queries(&["LISTEN here", "NOTIFY here, 'hello'", "BEGIN; NOTIFY here; SELECT 1", "COMMIT", "UNLISTEN here", "NOTIFY here"]);
    sql_level_prepare => queries(&["PREPARE p AS SELECT $1::int + 1", "EXECUTE p(1)", "PREPARE p AS SELECT 2", "DEALLOCATE p", "EXECUTE p(1)"]);

    extended_query => pipeline(&[say::parse("", "SELECT $1::int + 1"), say::bind("", "", &[Some("41")]), say::describe_portal(""), say::execute("", 0), say::sync()], 1);
    extended_describe_statement => pipeline(&[say::parse("", "SELECT $1::int, $2::text"), say::describe_statement(""), say::sync()], 1);
    extended_without_result => pipeline(&[say::parse("", "CREATE TEMP TABLE t (n int)"), say::describe_statement(""), say::bind("", "", &[]), say::describe_portal(""), say::execute("", 0), say::sync()], 1);
    extended_empty_query => pipeline(&[say::unnamed("", &[]), say::sync()], 1);
    extended_null_parameters => pipeline(&[say::unnamed("SELECT $1::text IS NULL, $2::text", &[None, Some("")]), say::sync()], 1);
    extended_declared_types => pipeline(&[say::parse_typed("", "SELECT $1", &[23]), say::describe_statement(""), say::bind("", "", &[Some("7")]), say::execute("", 0), say::sync()], 1);
    a_portal_is_read_in_pieces => [
        ask(say::query("BEGIN")),
        pipeline(&[say::parse("", "SELECT generate_series(1, 5)"), say::bind("p", "", &[]), say::execute("p", 2), say::sync()], 1),
        pipeline(&[say::execute("p", 2), say::execute("p", 2), say::close_portal("p"), say::execute("p", 2), say::sync()], 1),
        ask(say::query("ROLLBACK")),
    ].concat();
    a_portal_ends_with_its_transaction => [
        pipeline(&[say::parse("", "SELECT generate_series(1, 5)"), say::bind("p", "", &[]), say::execute("p", 2), say::sync()], 1),
        pipeline(&[say::execute("p", 2), say::sync()], 1),
    ].concat();
    a_named_statement_is_used_again => [
        pipeline(&[say::parse("s", "SELECT $1::int * 2"), say::sync()], 1),
        pipeline(&[say::bind("", "s", &[Some("1")]), say::execute("", 0), say::sync()], 1),
        ask(say::query("SELECT 'between'")),
        pipeline(&[say::describe_statement("s"), say::bind("", "s", &[Some("2")]), say::execute("", 0), say::sync()], 1),
        pipeline(&[say::close_statement("s"), say::sync()], 1),
        pipeline(&[say::bind("", "s", &[Some("3")]), say::execute("", 0), say::sync()], 1),
    ].concat();
    the_unnamed_statement_lives_until_the_next => [
        pipeline(&[say::parse("", "SELECT 1"), say::sync()], 1),
        pipeline(&[say::bind("", "", &[]), say::execute("", 0), say::sync()], 1),
        pipeline(&[say::describe_statement(""), say::sync()], 1),
        ask(say::query("SELECT 2")),
        pipeline(&[say::bind("", "", &[]), say::execute("", 0), say::sync()], 1),
    ].concat();
    sync_alone_and_several_syncs => pipeline(&[say::sync(), say::sync(), say::sync()], 3);
    incident_a05_every_sync_of_a_pipeline_is_answered => pipeline(&[
        say::unnamed("SELECT 1", &[]), say::sync(), say::unnamed("SELECT 2", &[]), say::sync(),
        say::unnamed("SELECT 3", &[]), say::sync(), say::query("SELECT 4"), say::query("SELECT 5"),
    ], 5);
    a_pipeline_goes_on_after_an_error_at_the_next_sync => pipeline(&[
        say::unnamed("SELECT 1", &[]), say::sync(), say::unnamed("SELECT 1/0", &[]), say::unnamed("SELECT 2", &[]), say::sync(),
        say::unnamed("SELECT 3", &[]), say::sync(),
    ], 3);
    the_unnamed_statement_survives_what_is_asked_in_between => vec![
        Step::Send(join(&[say::unnamed("SET work_mem = '5MB'", &[]), say::sync()])), Step::Ready(1),
        Step::Send(join(&[say::bind("", "", &[]), say::execute("", 0), say::sync()])), Step::Ready(1),
        Step::Send(join(&[say::unnamed("SELECT current_setting('work_mem')", &[]), say::sync()])), Step::Ready(1),
    ];
    an_unnamed_statement_parsed_behind_a_failing_batch_stands => vec![
        Step::Send(join(&[
            say::unnamed("SELECT 1/0", &[]), say::unnamed("SELECT 2", &[]), say::sync(), say::parse("", "SELECT 3"), say::flush(),
        ])),
        Step::Ready(1), Step::Until(b'1'),
        Step::Send(join(&[say::bind("", "", &[]), say::execute("", 0), say::sync()])), Step::Ready(1),
    ];
    a_pipeline_of_transactions => pipeline(&[
        say::query("BEGIN"), say::unnamed("SELECT 1", &[]), say::sync(), say::query("COMMIT"), say::query("SELECT 2"),
        say::unnamed("BEGIN", &[]), say::unnamed("SELECT 3", &[]), say::unnamed("COMMIT", &[]), say::sync(),
    ], 5);
    flush_without_sync => vec![
        Step::Send(join(&[say::parse("", "SELECT 1"), say::bind("", "", &[]), say::flush()])), Step::Until(b'2'),
        Step::Send(join(&[say::execute("", 0), say::flush()])), Step::Until(b'C'),
        Step::Send(say::sync()), Step::Ready(1),
    ];
    flush_with_an_error_waits_for_sync => vec![
        Step::Send(join(&[say::parse("", "SELECT nonsense"), say::flush()])), Step::Until(b'E'),
        Step::Send(join(&[say::parse("", "SELECT 1"), say::flush(), say::query("SELECT 2"), say::sync()])), Step::Ready(1),
    ];
    incident_b04_a_trailing_describe_of_a_portal => pipeline(&[
        say::unnamed("SELECT 1", &[]), say::parse("", "SELECT 2"), say::bind("", "", &[]), say::flush(), say::describe_portal(""), say::sync(),
    ], 1);
    an_error_skips_the_rest_of_the_batch => pipeline(&[
        say::unnamed("SELECT 1", &[]), say::parse("", "SELEC"), say::unnamed("SELECT 2", &[]), say::sync(),
    ], 1);
    incident_b03_a_simple_query_inside_a_failed_batch => pipeline(&[
        say::parse("", "SELEC"), say::execute("", 0), say::query("SELECT 'skipped'"), say::sync(),
    ], 1);
    a_simple_query_inside_a_batch => pipeline(&[say::parse("", "SELECT 1"), say::query("SELECT 2"), say::sync()], 2);
    duplicate_parse_is_42p05 => [
        pipeline(&[say::parse("twice", "SELECT 1"), say::sync()], 1),
        pipeline(&[say::parse("twice", "SELECT 2"), say::sync()], 1),
        pipeline(&[say::bind("", "twice", &[]), say::execute("", 0), say::sync()], 1),
    ].concat();
    duplicate_parse_inside_one_batch => pipeline(&[say::parse("twice", "SELECT 1"), say::parse("twice", "SELECT 2"), say::sync()], 1);
    a_failed_parse_leaves_no_name => [
        pipeline(&[say::parse("s", "SELEC 1"), say::sync()], 1),
        pipeline(&[say::parse("s", "SELECT 1"), say::bind("", "s", &[]), say::execute("", 0), say::sync()], 1),
    ].concat();
    bind_of_an_unknown_statement_is_26000 => pipeline(&[say::bind("", "unknown", &[]), say::execute("", 0), say::sync()], 1);
    describe_of_an_unknown_statement_is_26000 => pipeline(&[say::describe_statement("unknown"), say::sync()], 1);
    execute_of_an_unknown_portal_is_34000 => pipeline(&[say::execute("unknown", 0), say::sync()], 1);
    describe_of_an_unknown_portal_is_34000 => pipeline(&[say::describe_portal("unknown"), say::sync()], 1);
    close_of_the_unknown_succeeds => pipeline(&[say::close_statement("unknown"), say::close_portal("unknown"), say::sync()], 1);
    describe_of_neither_is_08p01 => pipeline(&[say::message(b'D', b"xname\0"), say::sync()], 1);
    close_of_neither_is_08p01 => pipeline(&[say::message(b'C', b"xname\0"), say::sync()], 1);
    too_few_parameters_is_08p01 => pipeline(&[say::parse("", "SELECT $1::int"), say::bind("", "", &[]), say::sync()], 1);
    parse_of_several_statements_is_42601 => pipeline(&[say::parse("", "SELECT 1; SELECT 2"), say::sync()], 1);

    copy_messages_outside_copy_are_ignored => [
        vec![Step::Send(join(&[say::copy_data("1\n"), say::copy_done(), say::copy_fail("no")]))],
        ask(say::query("SELECT 1")),
    ].concat();
    copy_in => [
        queries(&[COPY_TABLE]),
        vec![Step::Send(say::query("COPY copied FROM STDIN")), Step::Until(b'G')],
        ask(join(&[say::copy_data("1\n2\n"), say::copy_data("3"), say::copy_data("\n"), say::copy_done()])),
        queries(&["SELECT sum(n) FROM copied"]),
    ].concat();
    copy_in_without_waiting => [
        queries(&[COPY_TABLE]),
        ask(join(&[say::query("COPY copied FROM STDIN"), say::copy_data("1\n"), say::copy_done()])),
        queries(&["SELECT sum(n) FROM copied"]),
    ].concat();
    copy_in_ended_by_the_client => [
        queries(&[COPY_TABLE]),
        ask(join(&[say::query("COPY copied FROM STDIN"), say::copy_data("1\n"), say::copy_fail("changed my mind")])),
        queries(&["SELECT count(*) FROM copied"]),
    ].concat();
    incident_b01_copy_messages_after_copy_failed => [
        queries(&[COPY_TABLE]),
        ask(join(&[say::query("COPY copied FROM STDIN"), say::copy_data("1\nbad\n"), say::copy_data("2\n"), say::copy_data("3\n"), say::copy_done()])),
        queries(&["SELECT count(*) FROM copied"]),
    ].concat();
    copy_in_fails_at_once_and_the_data_comes_anyway => [
        ask(join(&[say::query("COPY nowhere FROM STDIN"), say::copy_data("1\n"), say::copy_done()])),
        queries(&["SELECT 1"]),
    ].concat();
    copy_in_in_a_failing_transaction => [
        queries(&[COPY_TABLE, "BEGIN"]),
        ask(join(&[say::query("COPY copied FROM STDIN"), say::copy_data("1000\n"), say::copy_done()])),
        queries(&["SELECT 1", "ROLLBACK"]),
    ].concat();
    copy_in_between_other_statements => [
        queries(&[COPY_TABLE]),
        ask(join(&[say::query("SELECT 1; COPY copied FROM STDIN; SELECT 2"), say::copy_data("1\n"), say::copy_done()])),
    ].concat();
    copy_out => queries(&["COPY (SELECT generate_series(1, 3)) TO STDOUT", "COPY nowhere TO STDOUT"]);
    copy_out_that_fails_in_the_middle => queries(&["COPY (SELECT 1/(3 - n) FROM generate_series(1, 5) n) TO STDOUT", "SELECT 1"]);
    extended_copy_in => [
        queries(&[COPY_TABLE]),
        vec![Step::Send(join(&[say::unnamed("COPY copied FROM STDIN", &[]), say::flush()])), Step::Until(b'G')],
        ask(join(&[say::copy_data("1\n"), say::copy_done(), say::sync()])),
        queries(&["SELECT sum(n) FROM copied"]),
    ].concat();
    extended_copy_in_with_sync_before_the_data => [
        queries(&[COPY_TABLE]),
        vec![Step::Send(join(&[say::unnamed("COPY copied FROM STDIN", &[]), say::sync()])), Step::Until(b'G')],
        ask(join(&[say::copy_data("1\n"), say::copy_done(), say::sync()])),
        queries(&["SELECT sum(n) FROM copied"]),
    ].concat();
    extended_copy_in_that_fails => [
        queries(&[COPY_TABLE]),
        ask(join(&[say::unnamed("COPY copied FROM STDIN", &[]), say::copy_data("bad\n"), say::copy_data("1\n"), say::copy_done(), say::unnamed("SELECT 1", &[]), say::sync()])),
        queries(&["SELECT count(*) FROM copied"]),
    ].concat();
    extended_copy_out => pipeline(&[say::unnamed("COPY (SELECT 1) TO STDOUT", &[]), say::unnamed("SELECT 2", &[]), say::sync()], 1);
    a_query_during_copy_in_ends_the_session => [
        queries(&[COPY_TABLE]),
        vec![Step::Send(say::query("COPY copied FROM STDIN")), Step::Until(b'G'), Step::Send(say::query("SELECT 1")), Step::End],
    ].concat();
    function_call => [
        ask(say::function_call(177, &["40", "2"])),
        ask(say::function_call(154, &["1", "0"])),
        ask(say::function_call(1, &[])),
        queries(&["SELECT 1"]),
    ].concat();
    half_close_gets_its_answer => vec![Step::Send(say::query("SELECT 1")), Step::HalfClose];
    half_close_gets_the_answers_of_a_pipeline => vec![
        Step::Send(join(&[say::query("SELECT pg_sleep(0.05), 1"), say::unnamed("SELECT 2", &[]), say::sync()])), Step::HalfClose,
    ];
    terminate_after_a_query => vec![Step::Send(join(&[say::query("SELECT 1"), say::terminate()])), Step::End];
    terminate_inside_a_transaction => vec![Step::Send(join(&[say::query("BEGIN"), say::query("SELECT 1"), say::terminate()])), Step::End];
    discard_all => queries(&["SET work_mem = '5MB'", "PREPARE p AS SELECT 1", "DISCARD ALL", "SHOW work_mem", "EXECUTE p"]);
    a_transaction_block_may_fail_at_commit => queries(&[
        "CREATE TEMP TABLE d (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)", "BEGIN", "INSERT INTO d VALUES (1), (1)", "COMMIT", "SELECT count(*) FROM d",
    ]);
}

/// Scripts too large to be sent byte by byte.
macro_rules! large {
    ($($name:ident => $steps:expr;)*) => {$(
        #[tokio::test]
        async fn $name() {
            let (tenant, proxy) = one_server("protocol").await;
            let steps: Vec<Step> = $steps;
            oracle::same(cluster(), &proxy, &tenant, &steps).await;
        }
    )*};
}

const MEGABYTE: usize = 1 << 20;

large! {
    a_query_of_5_megabytes => queries(&[&format!("SELECT length('{}')", "x".repeat(5 * MEGABYTE))]);
    a_parameter_of_5_megabytes => pipeline(&[say::unnamed("SELECT length($1)", &[Some(&"x".repeat(5 * MEGABYTE))]), say::sync()], 1);
    a_named_statement_of_2_megabytes => {
        let text = format!("SELECT length('{}')", "x".repeat(2 * MEGABYTE));
        [
            pipeline(&[say::parse("large", &text), say::sync()], 1),
            pipeline(&[say::bind("", "large", &[]), say::execute("", 0), say::sync()], 1),
        ].concat()
    };
    a_row_of_20_megabytes => queries(&["SELECT repeat('x', 20 * 1024 * 1024)", "SELECT 1"]);
    many_rows => queries(&["SELECT n, repeat('x', 100) FROM generate_series(1, 100000) n"]);
    copy_out_of_20_megabytes => queries(&["COPY (SELECT repeat('x', 1000) FROM generate_series(1, 20000)) TO STDOUT"]);
    copy_in_of_20_megabytes => {
        let line = format!("{}\n", "7".repeat(999));
        let data = say::copy_data(&line.repeat(64)).repeat(320);
        [
            queries(&["CREATE TEMP TABLE wide (t text)"]),
            ask(join(&[say::query("COPY wide FROM STDIN"), data, say::copy_done()])),
            queries(&["SELECT count(*), sum(length(t)) FROM wide"]),
        ].concat()
    };
    a_pipeline_of_2000_queries => pipeline(&(0..2000).map(|n| say::query(&format!("SELECT {n}"))).collect::<Vec<_>>(), 2000);
    a_batch_of_2000_statements => {
        let mut parts: Vec<Vec<u8>> = (0..2000).map(|n| say::unnamed(&format!("SELECT {n}"), &[])).collect();
        parts.push(say::sync());
        pipeline(&parts, 1)
    };
    sixty_thousand_parameters => {
        let places: Vec<String> = (1..=60_000).map(|n| format!("(${n}::int)")).collect();
        let values = vec![Some("1"); 60_000];
        pipeline(&[say::unnamed(&format!("SELECT sum(column1) FROM (VALUES {}) v", places.join(",")), &values), say::sync()], 1)
    };
}

#[tokio::test]
async fn protocol_3_2_is_spoken_with_a_longer_cancel_key() {
    let (tenant, proxy) = one_server("protocol").await;
    let connect = proxy.connect(&tenant).minor(2);
    let mut client = connect.open().await.expect("connected");
    let answer = client.login(&connect).await.ok();
    assert_eq!(answer.of(b'v').count(), 0, "{:?}", answer.trace());
    let (_, secret) = client.key.clone().expect("a key");
    assert!((16..=256).contains(&secret.len()), "{} bytes of secret", secret.len());
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_newer_protocol_and_an_unknown_option_are_negotiated_once() {
    let (tenant, proxy) = one_server("protocol").await;
    let connect = proxy.connect(&tenant).minor(9999).parameter("_pq_.test_option", "on");
    let mut client = connect.open().await.expect("connected");
    let answer = client.login(&connect).await.ok();
    let negotiations: Vec<Vec<u8>> = answer.of(b'v').map(|m| m.body.to_vec()).collect();
    let expected = [&[0, 3, 0, 2, 0, 0, 0, 1][..], b"_pq_.test_option\0"].concat();
    assert_eq!(negotiations, [expected]);
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn gssencrequest_is_declined_and_sslrequest_accepted_after_it() {
    let (tenant, proxy) = one_server("protocol").await;
    let mut plain = proxy.connect(&tenant).open().await.expect("connected");
    plain.send(&say::packet(say::GSSENC_REQUEST, b"")).await;
    assert_eq!(plain.byte().await, Some(b'N'));
    plain.send(&say::packet(say::SSL_REQUEST, b"")).await;
    assert_eq!(plain.byte().await, Some(b'S'));
    let mut encrypted = proxy.connect(&tenant).protection(Protection::Tls).login().await;
    assert_eq!(encrypted.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn scripts_give_the_same_over_tls() {
    let (tenant, proxy) = one_server("protocol").await;
    let steps = pipeline(
        &[
            say::unnamed("SELECT repeat('x', 100000)", &[]),
            say::sync(),
            say::unnamed("SELECT 1/0", &[]),
            say::sync(),
            say::query("SELECT 1"),
        ],
        3,
    );
    let direct = oracle::trace(&cluster().direct(&tenant).protection(Protection::Tls), &steps).await;
    for protection in [Protection::Tls, Protection::DirectTls] {
        let connect = proxy.connect(&tenant).protection(protection);
        assert_eq!(oracle::trace(&connect, &steps).await, direct, "{protection:?}");
        assert_eq!(oracle::trace(&connect, &oracle::bytewise(&steps)).await, direct, "{protection:?}, byte by byte");
    }
}

#[tokio::test]
async fn startup_reports_what_postgresql_reports() {
    let (tenant, proxy) = one_server("protocol").await;
    let with = |connect: tenantry_testkit::Connect| {
        connect.parameter("application_name", "mine").parameter("TimeZone", "Asia/Tokyo")
    };
    let direct = with(cluster().direct(&tenant)).login().await.parameters;
    let pooled = with(proxy.connect(&tenant)).login().await.parameters;
    assert_eq!(pooled, direct);
}
