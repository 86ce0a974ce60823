//! The packets before and during a login.

use bytes::BytesMut;
use tenantry_wire::{
    frame::{self, HEADER},
    sasl as packets,
    scram::{
        self, ChannelBinding, ClientBinding, ClientExchange, ClientKey, ClientSecret, ScramError, ServerExchange,
        Verifier,
    },
    startup::{self as first, First, MAX_STARTUP, Startup, StartupError},
};
use zeroize::Zeroizing;

/// Rounds of PBKDF2 that a run may spend.
const FEW: u32 = 64;
const NONCE: &str = "fuzz";

/// The first packet of a connection, and the `options` in it.
pub fn startup(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        options(text);
    }
    let decoded = first::decode(data);
    let whole = match &decoded {
        Ok(Some((_, length))) => *length,
        Ok(None) | Err(_) => data.len(),
    };
    for cut in 0..whole {
        match (first::decode(&data[..cut]), &decoded) {
            (Ok(None), _) => {}
            // A length is refused as soon as it is there; what else is wrong shows in the whole packet only.
            (Err(StartupError::Length), Err(StartupError::Length)) => {}
            (Err(early), Err(late)) if early == *late => {}
            (early, late) => panic!("{cut} bytes: {early:?}, all: {late:?}"),
        }
    }
    let Ok(Some((packet, length))) = decoded else { return };
    assert!((8..=MAX_STARTUP).contains(&length) && length <= data.len());
    assert_eq!(first::decode(&data[..length]), Ok(Some((packet.clone(), length))), "what follows matters");
    let mut same = BytesMut::new();
    match &packet {
        First::SslRequest => {
            first::write_ssl_request(&mut same);
            assert_eq!(same, data[..length]);
        }
        First::GssEncRequest => assert_eq!(length, 8),
        First::CancelRequest(key) => {
            first::write_cancel_request(&mut same, key);
            assert_eq!(same, data[..length]);
        }
        First::Startup(startup) => {
            let rewritten = started(startup);
            // The values of protocol options are not kept, nor where they stood.
            if startup.protocol_options.is_empty() {
                assert_eq!(rewritten, data[..length]);
            }
            startup.parameters.iter().for_each(|(_, value)| options(value));
        }
    }
}

/// Gives the packet as we would write it.
fn started(startup: &Startup) -> BytesMut {
    let mut parameters: Vec<(&str, &str)> = startup.parameters.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    for (name, _) in &parameters {
        assert!(!name.starts_with("_pq_.") && !name.is_empty());
        assert!(startup.parameter(name).is_some());
    }
    parameters.extend(startup.protocol_options.iter().map(|option| (option.as_str(), "")));
    let mut same = BytesMut::new();
    first::write_startup(&mut same, startup.minor, &parameters);
    if same.len() <= MAX_STARTUP {
        let packet = First::Startup(startup.clone());
        assert_eq!(first::decode(&same), Ok(Some((packet, same.len()))));
    }
    if startup.needs_negotiation() {
        let mut answer = BytesMut::new();
        startup.write_negotiation(&mut answer);
        let header = frame::server_header(&answer).expect("a header").expect("whole");
        assert_eq!(header.total(), answer.len());
        let options = answer[HEADER + 8..].iter().filter(|byte| **byte == 0).count();
        assert_eq!(options, startup.protocol_options.len());
    } else {
        assert_eq!(startup.agreed_minor(), startup.minor);
    }
    same
}

fn options(text: &str) {
    let Ok(settings) = first::split_options(text) else { return };
    let quoted = |word: &str| word.chars().flat_map(|c| ['\\', c]).collect::<String>();
    let words = settings.iter().map(|(name, value)| format!("-c {}", quoted(&format!("{name}={value}"))));
    let again = first::split_options(&words.collect::<Vec<_>>().join(" "));
    assert_eq!(again, Ok(settings));
}

/// Both sides of SCRAM. The messages stand in `data` with 0xFF, which is in no text, between them.
pub fn sasl(data: &[u8]) {
    if let Some((mechanism, message)) = packets::read_initial_response(data) {
        let mut same = BytesMut::new();
        packets::write_initial_response(&mut same, mechanism, message).expect("short enough");
        assert_eq!(&same[HEADER..], data);
        serve(mechanism, message, b"");
    }
    let mut messages = data.split(|byte| *byte == 0xFF);
    let one = messages.next().unwrap_or_default();
    let two = messages.next().unwrap_or_default();
    for mechanism in [scram::SCRAM_SHA_256, scram::SCRAM_SHA_256_PLUS] {
        serve(mechanism, one, two);
    }
    ask(one, two);
    honest(one, two);
    if let Ok(text) = std::str::from_utf8(one) {
        stored(text);
    }
}

fn out_of_order<T>(step: Result<T, ScramError>) -> bool {
    matches!(step, Err(ScramError::OutOfOrder))
}

/// A client that knows no password.
fn serve(mechanism: &str, client_first: &[u8], client_final: &[u8]) {
    for binding in [ChannelBinding::Unsupported, ChannelBinding::Available(vec![7; 32])] {
        let verifier = Verifier::mock("nobody", &[1; 32], 4096);
        let mut exchange = ServerExchange::new(verifier, NONCE.to_owned(), binding);
        if let Ok(challenge) = exchange.first(mechanism, client_first) {
            let challenge = String::from_utf8(challenge).expect("text");
            assert!(challenge.starts_with("r=") && challenge.contains("fuzz,s=") && challenge.ends_with(",i=4096"));
            assert!(exchange.finish(client_final).is_err(), "nobody knows this password");
        }
        assert!(out_of_order(exchange.finish(client_final)) && out_of_order(exchange.first(mechanism, client_first)));
    }
}

/// A server that knows no verifier.
fn ask(server_first: &[u8], server_final: &[u8]) {
    for binding in [ClientBinding::Unsupported, ClientBinding::NotOffered, ClientBinding::EndPoint(vec![7; 32])] {
        let keys = ClientSecret::Keys { client_key: ClientKey(Zeroizing::new([3; 32])), server_key: [4; 32] };
        for secret in [ClientSecret::Password(Zeroizing::new(b"secret".to_vec())), keys] {
            let mut exchange = ClientExchange::new(secret, NONCE.to_owned(), binding.clone());
            let begun = exchange.read_server_first(server_first);
            assert_eq!(begun.is_ok(), exchange.iterations().is_some());
            if exchange.iterations().is_some_and(|rounds| rounds > FEW) {
                continue;
            }
            assert_eq!(begun.is_ok(), exchange.client_final().is_ok());
            assert!(exchange.verify_server_final(server_final).is_err(), "nobody knows this verifier");
            assert!(out_of_order(exchange.client_final()) && out_of_order(exchange.read_server_first(server_first)));
        }
    }
}

/// Any password and salt: the right one is let in, by both sides, and a wrong one is not.
fn honest(password: &[u8], salt: &[u8]) {
    if salt.is_empty() || salt.len() > 1024 {
        return;
    }
    let verifier = Verifier::from_password(password, salt, 2);
    // No text has a byte 0xFF: this cannot be prepared to the same password.
    let wrong = [b"\xFF", password].concat();
    for (given, right) in [(password, true), (&wrong[..], false)] {
        let hash = vec![9; 32];
        let mut server =
            ServerExchange::new(verifier.clone(), "server".to_owned(), ChannelBinding::Available(hash.clone()));
        let secret = ClientSecret::Password(Zeroizing::new(given.to_vec()));
        let mut client = ClientExchange::new(secret, "client".to_owned(), ClientBinding::EndPoint(hash));
        let (mechanism, message) = client.first();
        let challenge = server.first(mechanism, &message).expect("a good message");
        client.read_server_first(&challenge).expect("a good challenge");
        let proof = client.client_final().expect("its turn");
        match server.finish(&proof) {
            Ok(proof) => {
                assert!(right, "a wrong password was let in");
                client.verify_server_final(&proof.message).expect("the right server");
            }
            Err(error) => assert!(!right && error == ScramError::WrongProof, "{error}"),
        }
    }
}

fn stored(text: &str) {
    if let Ok(verifier) = Verifier::parse(text) {
        let written = verifier.to_pg_string();
        assert_eq!(Verifier::parse(&written).expect("its own text").to_pg_string(), written);
        if verifier.iterations() <= FEW {
            let _ = verifier.check_password(b"secret");
        }
    }
    if let Some(response) = scram::md5_from_stored(text, [1, 2, 3, 4]) {
        assert_eq!(response.len(), 35);
    }
}
