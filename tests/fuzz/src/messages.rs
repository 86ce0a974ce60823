//! Messages after login, of both sides.

use bytes::BytesMut;
use tenantry_wire::{
    error::{ErrorResponse, Fields, write_fatal_from_notice},
    extended::{BindHead, Parse, Target, write_statement_target},
    frame::{self, HEADER, LARGE_MESSAGE, SMALL_MESSAGE},
    message,
    sasl::{self, Authentication},
    tag::{backend, frontend},
};

/// Whole messages of a client, and the same bytes as the body of every message whose names we rewrite.
pub fn frontend(data: &[u8]) {
    let mut rest = data;
    while let Ok(Some(header)) = frame::client_header(rest) {
        assert!(header.body <= LARGE_MESSAGE as usize);
        assert_eq!(header.total(), header.body + HEADER);
        assert_eq!(rest.first(), Some(&header.tag));
        let Some(body) = rest.get(HEADER..header.total()) else { break };
        match header.tag {
            frontend::PARSE => parse(body),
            frontend::BIND => bind(body),
            frontend::DESCRIBE | frontend::CLOSE => target(body, header.tag),
            _ => {}
        }
        rest = rest.get(header.total()..).expect("as long as its header says");
    }
    if let Ok(Some(header)) = frame::login_header(data, SMALL_MESSAGE) {
        assert_eq!(header.tag, frontend::PASSWORD);
        assert!(header.body < SMALL_MESSAGE as usize);
    }
    run(data);
    parse(data);
    bind(data);
    target(data, frontend::DESCRIBE);
}

fn parse(body: &[u8]) {
    let Some(parse) = Parse::read(body) else { return };
    let mut same = BytesMut::new();
    parse.write_as(&mut same, parse.name).expect("short enough");
    assert_message(&same, frontend::PARSE, body);
    let mut other = BytesMut::new();
    parse.write_as(&mut other, b"other").expect("short enough");
    let again = Parse::read(&other[HEADER..]);
    assert_eq!(again, Some(Parse { name: b"other", ..parse }));
}

fn bind(body: &[u8]) {
    let Some(head) = BindHead::read(body) else { return };
    // What is there of the body does not matter as long as both names are.
    assert_eq!(BindHead::read(&body[..head.length]), Some(head));
    assert_eq!(BindHead::read(&body[..head.length - 1]), None);
    let mut same = BytesMut::new();
    head.write_as(&mut same, head.statement, body.len()).expect("short enough");
    same.extend_from_slice(&body[head.length..]);
    assert_message(&same, frontend::BIND, body);
    let mut other = BytesMut::new();
    head.write_as(&mut other, b"other", body.len()).expect("short enough");
    other.extend_from_slice(&body[head.length..]);
    assert_eq!(frame::client_header(&other).expect("a header").expect("whole").total(), other.len());
    let again = BindHead::read(&other[HEADER..]).expect("both names");
    assert_eq!((again.portal, again.statement), (head.portal, &b"other"[..]));
}

fn target(body: &[u8], tag: u8) {
    let Some(target) = Target::read(body) else { return };
    if target.is_statement() {
        let mut same = BytesMut::new();
        write_statement_target(&mut same, tag, target.name).expect("short enough");
        assert_message(&same, tag, body);
    }
}

/// `run_of` beside the plain way to count.
fn run(data: &[u8]) {
    let Some(&tag) = data.first() else { return };
    let mut at = 0;
    while let Some(&[t, a, b, c, d]) = data.get(at..).and_then(|rest| rest.first_chunk::<HEADER>()) {
        let length = i32::from_be_bytes([a, b, c, d]);
        let Ok(length) = usize::try_from(length) else { break };
        if t != tag || length < 4 || length + 1 > data.len() - at {
            break;
        }
        at += length + 1;
    }
    assert_eq!(frame::run_of(data, tag), at);
}

/// Whole messages of a server, and the same bytes as the body of every message that we read.
pub fn backend(data: &[u8]) {
    let mut rest = data;
    while let Ok(Some(header)) = frame::server_header(rest) {
        assert_eq!(header.total(), header.body + HEADER);
        let Some(body) = rest.get(HEADER..header.total()) else { break };
        body_of(header.tag, body);
        rest = rest.get(header.total()..).expect("as long as its header says");
    }
    run(data);
    for tag in [
        backend::ERROR_RESPONSE,
        backend::PARAMETER_STATUS,
        backend::BACKEND_KEY_DATA,
        backend::DATA_ROW,
        backend::AUTHENTICATION,
    ] {
        body_of(tag, data);
    }
}

fn body_of(tag: u8, body: &[u8]) {
    match tag {
        backend::ERROR_RESPONSE | backend::NOTICE_RESPONSE => error(body),
        backend::PARAMETER_STATUS => {
            if let Some((name, value)) = message::read_parameter_status(body) {
                let mut same = BytesMut::new();
                message::write_parameter_status(&mut same, name, value);
                assert_message(&same, tag, body);
            }
        }
        backend::BACKEND_KEY_DATA => {
            if let Some(key) = message::read_backend_key_data(body) {
                let mut same = BytesMut::new();
                message::write_backend_key_data(&mut same, &key);
                assert_message(&same, tag, body);
                assert_eq!(format!("{key:?}"), format!("CancelKey({})", key.process), "the secret shows");
            }
        }
        backend::DATA_ROW => {
            if let Some(columns) = message::read_data_row(body) {
                assert_eq!(row(&columns), body);
            }
        }
        backend::AUTHENTICATION => authentication(body),
        _ => {}
    }
}

fn error(body: &[u8]) {
    let fields = Fields::new(body);
    let _ = (fields.severity(), fields.is_fatal(), fields.code(), fields.message());
    for (kind, value) in fields.iter() {
        assert!(kind != 0 && !value.contains(&0) && fields.get(kind).is_some());
    }

    let mut fatal = BytesMut::new();
    write_fatal_from_notice(&mut fatal, body);
    let header = frame::server_header(&fatal).expect("a header").expect("whole");
    assert_eq!((header.tag, header.total()), (backend::ERROR_RESPONSE, fatal.len()));
    let made = Fields::new(&fatal[HEADER..]);
    assert_eq!(made.iter().count(), fields.iter().count());
    assert_eq!((made.code(), made.message()), (fields.code(), fields.message()));
    assert_eq!(made.is_fatal(), fields.severity().is_some());

    // A text of anybody's making stays inside its field.
    let text = String::from_utf8_lossy(body).into_owned();
    let mut own = BytesMut::new();
    ErrorResponse::error("XX000", text.clone()).detail(text.clone()).write(&mut own);
    let made = Fields::new(&own[HEADER..]);
    assert_eq!(made.iter().count(), 5);
    assert_eq!(made.message(), Some(text.replace('\0', " ").as_str()));
    assert!(!made.is_fatal() && made.code() == Some("XX000"));
}

fn row(columns: &[Option<&[u8]>]) -> Vec<u8> {
    let mut body = u16::try_from(columns.len()).expect("a 16-bit count").to_be_bytes().to_vec();
    for column in columns {
        match column {
            None => body.extend_from_slice(&[0xFF; 4]),
            Some(value) => {
                body.extend_from_slice(&u32::try_from(value.len()).expect("short").to_be_bytes());
                body.extend_from_slice(value);
            }
        }
    }
    body
}

fn authentication(body: &[u8]) {
    let mut same = BytesMut::new();
    match Authentication::read(body) {
        Some(Authentication::Sasl(mechanisms)) => {
            sasl::write_mechanisms(&mut same, &mechanisms);
            assert_eq!(Authentication::read(&same[HEADER..]), Some(Authentication::Sasl(mechanisms)));
        }
        Some(Authentication::SaslContinue(data)) => {
            sasl::write_continue(&mut same, data);
            assert_message(&same, backend::AUTHENTICATION, body);
        }
        Some(Authentication::SaslFinal(data)) => {
            sasl::write_final(&mut same, data);
            assert_message(&same, backend::AUTHENTICATION, body);
        }
        Some(Authentication::Md5(salt)) => {
            message::write_authentication_md5(&mut same, salt);
            assert_message(&same, backend::AUTHENTICATION, &body[..8]);
        }
        Some(Authentication::Other(kind)) => assert!(![0, 3, 5, 10, 11, 12].contains(&kind)),
        Some(Authentication::Ok | Authentication::Cleartext) | None => {}
    }
}

/// `message` is one message with this body.
fn assert_message(message: &[u8], tag: u8, body: &[u8]) {
    let length = u32::try_from(body.len() + 4).expect("short").to_be_bytes();
    assert_eq!(message.split_at(HEADER), (&[&[tag][..], &length].concat()[..], body));
}
