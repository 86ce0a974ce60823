//! What is done to a server connection between sessions: reset, check, close. Each has a deadline, the caller's or its own.

use std::{io, time::Duration};

use bytes::BytesMut;
use tenantry_wire::{
    error::Fields,
    frame::{self, HEADER},
    message,
    tag::{backend, status},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use super::{
    conn::ServerConn,
    connect::{self, Endpoint},
    settings::Settings,
};
use crate::{budget::cap::Room, net::stream::Stream};

/// Most bytes that a server may send in answer to upkeep before we give the connection up.
const MAX_UPKEEP_INPUT: usize = 1024 * 1024;
/// How long PostgreSQL may take to close its end after Terminate before its query is cancelled too.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);
/// How long after that until the socket is given up. The permit is held all the while.
const CLOSE_LIMIT: Duration = Duration::from_secs(120);

/// The connection is of no more use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server connection is of no more use")]
pub struct Unusable;

/// Wipes what a session may have left: `ROLLBACK` if need be, then `DISCARD ALL`. The label is the baseline afterwards.
pub async fn reset(conn: &mut ServerConn, in_transaction: bool) -> Result<(), Unusable> {
    if in_transaction {
        run(conn, "ROLLBACK").await?;
    }
    run(conn, "DISCARD ALL").await?;
    if conn.begins_as_another {
        // It also forgets whom the session began as.
        run(conn, "RESET ROLE").await?;
    }
    conn.label = Settings::default();
    conn.prepared.clear();
    conn.forget_unnamed();
    Ok(())
}

/// Ends the transaction and nothing else.
pub async fn rollback(conn: &mut ServerConn) -> Result<(), Unusable> {
    run(conn, "ROLLBACK").await
}

/// Asks for a sign of life with an empty query. Its answer cannot be mistaken for a ReadyForQuery left from before.
pub async fn check(conn: &mut ServerConn) -> Result<(), Unusable> {
    run(conn, "").await
}

/// Asks for a sign of life, and what room the server has. The answer cannot be mistaken for one left from before. An
/// error is a sign of life, too: the session that had it may have left a `statement_timeout` that ends the query.
pub async fn ask_for_room(conn: &mut ServerConn) -> Result<Option<Room>, Unusable> {
    ask(conn, connect::ROOM).await?;
    let answer = settle(conn).await?;
    let row = answer.rows.last().and_then(|row| message::read_data_row(row));
    Ok(row.and_then(|row| connect::room(&row)))
}

/// The rows of a query of ours, as bodies of DataRow; none if PostgreSQL refuses it.
pub async fn ask_for_rows(conn: &mut ServerConn, sql: &str) -> Result<Vec<BytesMut>, Unusable> {
    ask(conn, sql).await?;
    let answer = settle(conn).await?;
    Ok(if answer.failed { Vec::new() } else { answer.rows })
}

/// Anything but success makes the connection unusable.
async fn run(conn: &mut ServerConn, sql: &str) -> Result<(), Unusable> {
    ask(conn, sql).await?;
    if settle(conn).await?.failed { Err(Unusable) } else { Ok(()) }
}

async fn ask(conn: &mut ServerConn, sql: &str) -> Result<(), Unusable> {
    let mut out = BytesMut::new();
    conn.forget_unnamed();
    message::write_query(&mut out, sql).map_err(|_| Unusable)?;
    conn.stream.write_all(&out).await.map_err(|_| Unusable)?;
    conn.stream.flush().await.map_err(|_| Unusable)
}

/// What a query of ours brought.
#[derive(Debug, Default)]
struct Answer {
    failed: bool,
    rows: Vec<BytesMut>,
}

/// Reads up to ReadyForQuery(idle); any other end makes the connection unusable.
async fn settle(conn: &mut ServerConn) -> Result<Answer, Unusable> {
    let mut input = BytesMut::new();
    let mut seen = 0usize;
    let mut answered = false;
    let mut answer = Answer::default();
    loop {
        while let Some(header) = frame::server_header(&input).map_err(|_| Unusable)? {
            if header.total() > MAX_UPKEEP_INPUT {
                return Err(Unusable);
            }
            if input.len() < header.total() {
                break;
            }
            let mut message = input.split_to(header.total());
            let body = message.get(HEADER..).unwrap_or_default();
            match header.tag {
                backend::READY_FOR_QUERY => {
                    let settled = answered && body == [status::IDLE] && input.is_empty();
                    return if settled { Ok(answer) } else { Err(Unusable) };
                }
                backend::PARAMETER_STATUS => {
                    if let Some((name, value)) = message::read_parameter_status(body) {
                        conn.reported(name, value);
                    }
                }
                backend::COMMAND_COMPLETE | backend::EMPTY_QUERY_RESPONSE => answered = true,
                backend::ERROR_RESPONSE => (answered, answer.failed) = (true, true),
                backend::ROW_DESCRIPTION => {}
                backend::DATA_ROW => answer.rows.push(message.split_off(HEADER)),
                backend::NOTICE_RESPONSE | backend::NOTIFICATION_RESPONSE => {}
                _ => return Err(Unusable),
            }
        }
        let n = conn.stream.read_buf(&mut input).await.map_err(|_| Unusable)?;
        seen = seen.saturating_add(n);
        if n == 0 || seen > MAX_UPKEEP_INPUT {
            return Err(Unusable);
        }
    }
}

/// Takes in what came while the connection was idle: notices and parameters are absorbed; an end, an error or anything
/// else makes it unusable. Only called when input is waiting. Gives PostgreSQL's last words, if there were any.
pub async fn absorb(conn: &mut ServerConn) -> Result<(), Option<String>> {
    let mut input = BytesMut::new();
    while conn.stream.has_input() || !input.is_empty() {
        match conn.stream.read_buf(&mut input).await {
            Ok(n) if n > 0 && input.len() <= MAX_UPKEEP_INPUT => {}
            _ => return Err(None),
        }
        while let Ok(Some(header)) = frame::server_header(&input) {
            if input.len() < header.total() {
                break;
            }
            let message = input.split_to(header.total());
            let body = message.get(HEADER..).unwrap_or_default();
            match header.tag {
                backend::PARAMETER_STATUS => {
                    if let Some((name, value)) = message::read_parameter_status(body) {
                        conn.reported(name, value);
                    }
                }
                backend::NOTICE_RESPONSE | backend::NOTIFICATION_RESPONSE => {}
                backend::ERROR_RESPONSE => return Err(Fields::new(body).message().map(str::to_owned)),
                _ => return Err(None),
            }
        }
    }
    Ok(())
}

/// Says Terminate and waits until PostgreSQL has closed its end; only then has it stopped counting the connection.
pub async fn close(mut conn: Box<ServerConn>, endpoint: &Endpoint) {
    // A server that is gone already is as closed as can be.
    let said = tokio::time::timeout(CLOSE_PATIENCE, async {
        conn.stream.write_all(message::TERMINATE).await?;
        conn.stream.shutdown().await
    });
    if !matches!(said.await, Ok(Ok(()))) && !conn.stream.has_input() {
        // Nobody takes our bytes: what it still runs must be told by another way.
        let _ = tokio::time::timeout(CLOSE_PATIENCE, connect::cancel(endpoint, &conn.key)).await;
    }
    if let Ok(end) = tokio::time::timeout(CLOSE_PATIENCE, end_of(&mut conn.stream)).await {
        end.tell();
        return;
    }
    // Terminate is only read between queries: cancel the one that runs.
    let _ = tokio::time::timeout(CLOSE_PATIENCE, connect::cancel(endpoint, &conn.key)).await;
    wait_for_end(&mut conn.stream).await;
}

/// A login that came to nothing: waits until PostgreSQL has closed its end.
pub async fn end(mut stream: Stream) {
    let _ = tokio::time::timeout(CLOSE_PATIENCE, stream.shutdown()).await;
    wait_for_end(&mut stream).await;
}

async fn wait_for_end(stream: &mut Stream) {
    match tokio::time::timeout(CLOSE_LIMIT, end_of(stream)).await {
        Ok(end) => end.tell(),
        Err(_) => tracing::warn!("the server did not close its end in time; giving the connection up"),
    }
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The other side closed it: PostgreSQL counts it no more.
    Closed,
    /// Nothing comes through any more. There is nothing left to wait for, and PostgreSQL may count it until it finds out
    /// by itself (its `tcp_keepalives_idle`): until then it is one of the others' that the cap yields to.
    Lost(io::ErrorKind),
}

impl End {
    fn of(error: &io::Error) -> Self {
        use io::ErrorKind as E;
        match error.kind() {
            // The last is how TLS says that the other side just closed.
            E::ConnectionReset | E::BrokenPipe | E::NotConnected | E::UnexpectedEof => Self::Closed,
            kind => Self::Lost(kind),
        }
    }

    fn tell(self) {
        if let Self::Lost(kind) = self {
            tracing::warn!(reason = %kind, "the link to the server broke; PostgreSQL may count the connection for longer \
                than Tenantry does: set tcp_keepalives_idle there");
        }
    }
}

async fn end_of(stream: &mut (impl AsyncRead + Unpin)) -> End {
    let mut sink = vec![0u8; 16 * 1024];
    loop {
        match stream.read(&mut sink).await {
            Ok(0) => return End::Closed,
            Ok(_) => {}
            Err(error) => return End::of(&error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says one thing, then breaks in this way.
    struct Breaks(io::ErrorKind, bool);

    impl AsyncRead for Breaks {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            buffer: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            if std::mem::replace(&mut self.1, true) {
                return std::task::Poll::Ready(Err(self.0.into()));
            }
            buffer.put_slice(b"N");
            std::task::Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_broken_link_is_not_an_end_that_postgresql_knows_of() {
        assert_eq!(end_of(&mut &b"last words"[..]).await, End::Closed);
        assert_eq!(end_of(&mut Breaks(io::ErrorKind::ConnectionReset, false)).await, End::Closed);
        for kind in [io::ErrorKind::TimedOut, io::ErrorKind::HostUnreachable] {
            assert_eq!(end_of(&mut Breaks(kind, false)).await, End::Lost(kind));
        }
    }
}
