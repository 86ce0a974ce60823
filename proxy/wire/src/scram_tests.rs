//! Tests of `scram`.

use postgres_protocol::authentication::{md5_hash, sasl};

use super::*;

const SALT: &[u8] = b"0123456789abcdef";
const CLIENT: &str = "client-nonce";
const SERVER: &str = "server-nonce";

/// Few rounds: a debug build is slow, and the number changes nothing but the time.
fn verifier() -> Verifier {
    Verifier::from_password(b"pencil", SALT, 16)
}

fn password(password: &[u8]) -> ClientSecret {
    ClientSecret::Password(Zeroizing::new(password.to_vec()))
}

fn server(binding: ChannelBinding) -> ServerExchange {
    ServerExchange::new(verifier(), SERVER.to_owned(), binding)
}

/// A whole exchange; the client's checks included.
fn run(secret: ClientSecret, binding: ClientBinding, mut server: ServerExchange) -> Result<ClientKey, ScramError> {
    let mut client = ClientExchange::new(secret, CLIENT.to_owned(), binding);
    let (mechanism, first) = client.first();
    client.read_server_first(&server.first(mechanism, &first)?)?;
    let Proof { message, client_key, .. } = server.finish(&client.client_final()?)?;
    client.verify_server_final(&message)?;
    Ok(client_key)
}

/// A client that has read server-first, and what the server would take as its last message.
fn challenged(binding: ChannelBinding) -> (ServerExchange, String) {
    let client_binding = match &binding {
        ChannelBinding::Unsupported => ClientBinding::Unsupported,
        ChannelBinding::Available(hash) => ClientBinding::EndPoint(hash.clone()),
    };
    let mut server = server(binding);
    let mut client = ClientExchange::new(password(b"pencil"), CLIENT.to_owned(), client_binding);
    let (mechanism, first) = client.first();
    client.read_server_first(&server.first(mechanism, &first).unwrap()).unwrap();
    (server, String::from_utf8(client.client_final().unwrap()).unwrap())
}

fn read(server_first: &str) -> Result<Option<u32>, ScramError> {
    let mut client = ClientExchange::new(password(b"pencil"), CLIENT.to_owned(), ClientBinding::Unsupported);
    client.read_server_first(server_first.as_bytes()).map(|()| client.iterations())
}

#[test]
fn rfc_7677_vector() {
    const NONCE: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
    let verifier = Verifier::from_password(b"pencil", &STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap(), 4096);
    let mut server = ServerExchange::new(verifier, NONCE.to_owned(), ChannelBinding::Unsupported);
    let server_first = server.first(SCRAM_SHA_256, b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO").unwrap();
    let expected = format!("r=rOprNGfwEbeRWgbNEkqO{NONCE},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096");
    assert_eq!(str::from_utf8(&server_first).unwrap(), expected);
    let client_final = format!("c=biws,r=rOprNGfwEbeRWgbNEkqO{NONCE},p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=");
    let proof = server.finish(client_final.as_bytes()).unwrap();
    assert_eq!(proof.message, b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
}

#[test]
fn both_sides_agree() {
    let hash = vec![7; 32];
    let cases = [
        (ClientBinding::Unsupported, ChannelBinding::Unsupported),
        (ClientBinding::NotOffered, ChannelBinding::Unsupported),
        (ClientBinding::Unsupported, ChannelBinding::Available(hash.clone())),
        (ClientBinding::EndPoint(hash.clone()), ChannelBinding::Available(hash)),
    ];
    for (client, offered) in cases {
        let key = run(password(b"pencil"), client.clone(), server(offered.clone())).unwrap();
        // Pass-through: the key that came out of the first login does the second one.
        let keys = ClientSecret::Keys { client_key: key, server_key: *verifier().server_key() };
        run(keys, client, server(offered)).unwrap();
    }
}

#[test]
fn wrong_secrets_are_refused_on_both_sides() {
    let wrong = |secret| run(secret, ClientBinding::Unsupported, server(ChannelBinding::Unsupported)).unwrap_err();
    assert_eq!(wrong(password(b"pencil ")), ScramError::WrongProof);
    assert_eq!(wrong(password(b"")), ScramError::WrongProof);
    let (client_key, server_key) = derive(b"pencil", SALT, 16);
    let bad_key = ClientKey(Zeroizing::new([1; 32]));
    assert_eq!(wrong(ClientSecret::Keys { client_key: bad_key, server_key: *server_key }), ScramError::WrongProof);
    let bad_server = ClientSecret::Keys { client_key, server_key: [1; 32] };
    assert_eq!(wrong(bad_server), ScramError::BadServerSignature);
}

#[test]
fn who_proves_the_old_password_crosses_to_the_new_key_and_nobody_else_does() {
    let (old, old_key) = Verifier::derive(b"pencil", SALT, 16);
    let (new, new_key) = Verifier::derive(b"eraser", SALT, 16);
    assert_eq!(old.to_pg_string(), verifier().to_pg_string());
    assert!(old.fits(&old_key) && new.fits(&new_key) && !new.fits(&old_key) && !old.fits(&new_key));
    let bridge = bridge(&old_key, &new_key);
    assert!(new.fits(&cross(&old_key, &bridge)));
    let stranger = Verifier::derive(b"guess", SALT, 16).1;
    for other in [&stranger, &new_key, &ClientKey(Zeroizing::new(old.stored_key))] {
        assert!(!new.fits(&cross(other, &bridge)));
    }
    assert_ne!(bridge, *new_key.0, "the bridge is not the key");
}

#[test]
fn a_former_password_is_taken_where_it_is_accepted_and_told_apart() {
    let new = || ServerExchange::new(Verifier::from_password(b"eraser", SALT, 16), SERVER.to_owned(), NONE);
    const NONE: ChannelBinding = ChannelBinding::Unsupported;
    let login = |given: &[u8], former: Option<Verifier>| {
        let mut server = new();
        former.into_iter().for_each(|former| server.accept_former(former));
        let mut client = ClientExchange::new(password(given), CLIENT.to_owned(), ClientBinding::Unsupported);
        let (mechanism, first) = client.first();
        client.read_server_first(&server.first(mechanism, &first)?)?;
        let proof = server.finish(&client.client_final()?)?;
        // The client must believe us with either password.
        client.verify_server_final(&proof.message)?;
        Ok::<_, ScramError>(proof.fitted)
    };
    assert_eq!(login(b"eraser", Some(verifier())), Ok(Fitted::Current));
    assert_eq!(login(b"pencil", Some(verifier())), Ok(Fitted::Former));
    assert_eq!(login(b"guess", Some(verifier())), Err(ScramError::WrongProof));
    assert_eq!(login(b"pencil", None), Err(ScramError::WrongProof));
    let elsewhere =
        [Verifier::from_password(b"pencil", b"another salt 123", 16), Verifier::from_password(b"pencil", SALT, 17)];
    for former in elsewhere {
        assert_eq!(login(b"pencil", Some(former.clone())), Err(ScramError::WrongProof), "{former:?}");
        assert_eq!(login(b"eraser", Some(former)), Ok(Fitted::Current));
    }
}

#[test]
fn a_mock_user_looks_real_and_never_gets_in() {
    let mock = |name: &str| Verifier::mock(name, &[9; 32], 16);
    assert_eq!(mock("ann").to_pg_string(), mock("ann").to_pg_string());
    assert_ne!(mock("ann").salt(), mock("bob").salt());
    assert_ne!(mock("ann").salt(), Verifier::mock("ann", &[8; 32], 4096).salt());
    assert_eq!(mock("ann").salt().len(), 16);
    let server = ServerExchange::new(mock("ann"), SERVER.to_owned(), ChannelBinding::Unsupported);
    let error = run(password(b"pencil"), ClientBinding::Unsupported, server).unwrap_err();
    assert_eq!(error, ScramError::WrongProof);
    assert!(!mock("ann").check_password(b"pencil"));
}

#[test]
fn flags_and_mechanisms_must_fit_the_offer() {
    let none = ChannelBinding::Unsupported;
    let some = ChannelBinding::Available(vec![7; 32]);
    let first = |binding: &ChannelBinding, mechanism, flag: &str| {
        let message = format!("{flag},,n=,r=abc");
        server(binding.clone()).first(mechanism, message.as_bytes()).map(|_| ())
    };
    assert_eq!(first(&some, SCRAM_SHA_256, "y"), Err(ScramError::Downgrade));
    assert_eq!(first(&none, SCRAM_SHA_256, "y"), Ok(()));
    assert_eq!(first(&some, SCRAM_SHA_256, "n"), Ok(()));
    assert_eq!(first(&none, SCRAM_SHA_256_PLUS, "p=tls-server-end-point"), Err(ScramError::UnsupportedMechanism));
    assert_eq!(first(&some, "SCRAM-SHA-1", "n"), Err(ScramError::UnsupportedMechanism));
    assert_eq!(first(&some, "", "n"), Err(ScramError::UnsupportedMechanism));
    let kind = Err(ScramError::UnsupportedFeature("channel binding type"));
    assert_eq!(first(&some, SCRAM_SHA_256_PLUS, "p=tls-unique"), kind);
    for (binding, mechanism, flag) in [
        (&none, SCRAM_SHA_256, "p=tls-server-end-point"),
        (&some, SCRAM_SHA_256, "p=tls-server-end-point"),
        (&some, SCRAM_SHA_256_PLUS, "n"),
        (&some, SCRAM_SHA_256_PLUS, "y"),
        (&some, SCRAM_SHA_256, "x"),
        (&some, SCRAM_SHA_256, ""),
    ] {
        let result = first(binding, mechanism, flag);
        assert!(matches!(result, Err(Malformed(_))), "{mechanism} {flag}: {result:?}");
    }
}

#[test]
fn another_certificate_is_a_binding_mismatch() {
    let server = server(ChannelBinding::Available(vec![7; 32]));
    let error = run(password(b"pencil"), ClientBinding::EndPoint(vec![8; 32]), server).unwrap_err();
    assert_eq!(error, ScramError::ChannelBindingMismatch);
}

#[test]
fn each_field_of_client_final_is_checked() {
    type Change = fn(&str) -> String;
    let cases: [(Change, ScramError); 11] = [
        (|m| m.replace("c=biws", "c=eSws"), ScramError::ChannelBindingMismatch),
        (|m| m.replace("c=biws", "c=bi?s"), Malformed("bad channel binding")),
        (|m| m.replace("server-nonce", "server-nonce2"), ScramError::NonceMismatch),
        (|m| m.replace("client-nonce", ""), ScramError::NonceMismatch),
        (|m| m.replace("r=", "x=1,r="), Malformed("unexpected attribute")),
        (|m| m.replace(",p=", ",x=1,p="), ScramError::WrongProof),
        (|m| m.replace(",p=", ",xx,p="), Malformed("attribute without a value")),
        (|m| m.replace(",p=", ",xy=1,p="), Malformed("attribute name is not one letter")),
        (|m| format!("{},p={}", m.split(",p=").next().unwrap(), STANDARD.encode([0; 32])), ScramError::WrongProof),
        (|m| format!("{},p={}", m.split(",p=").next().unwrap(), STANDARD.encode([0; 31])), Malformed("bad proof")),
        (|m| format!("{m},x=1"), Malformed("no proof")),
    ];
    for (change, expected) in cases {
        let (mut server, good) = challenged(ChannelBinding::Unsupported);
        let bad = change(&good);
        assert_ne!(bad, good);
        assert_eq!(server.finish(bad.as_bytes()).unwrap_err(), expected, "{bad}");
        // One try per exchange.
        assert_eq!(server.finish(good.as_bytes()).unwrap_err(), ScramError::OutOfOrder);
    }
}

#[test]
fn any_changed_byte_of_client_final_is_refused() {
    let (_, good) = challenged(ChannelBinding::Available(vec![7; 32]));
    for at in 0..good.len() {
        let (mut server, again) = challenged(ChannelBinding::Available(vec![7; 32]));
        assert_eq!(again, good);
        let mut bad = good.clone().into_bytes();
        bad[at] ^= 1;
        assert!(server.finish(&bad).is_err(), "byte {at} changed");
        let (mut server, _) = challenged(ChannelBinding::Available(vec![7; 32]));
        assert!(server.finish(&good.as_bytes()[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn server_first_is_checked() {
    let ok = "r=client-nonceX,s=c2FsdA==,i=4096";
    assert_eq!(read(ok), Ok(Some(4096)));
    assert_eq!(read(&format!("{ok},x=ignored")), Ok(Some(4096)));
    assert_eq!(read(&ok.replace("4096", "100000")), Ok(Some(100_000)));
    let too_many = Err(ScramError::TooManyIterations);
    assert_eq!(read(&ok.replace("4096", "100001")), too_many);
    assert_eq!(read(&ok.replace("4096", "99999999999999999999")), too_many);
    assert_eq!(read(&ok.replace("nonceX", "nonce")), Err(ScramError::NonceMismatch));
    assert_eq!(read(&ok.replace("client", "klient")), Err(ScramError::NonceMismatch));
    let long_nonce = format!("nonce{}", "x".repeat(MAX_NONCE));
    let long_salt = STANDARD.encode(vec![0; 1025]);
    for (from, to) in [
        ("4096", "0"),
        ("4096", "+5"),
        ("4096", "-1"),
        ("4096", ""),
        ("c2FsdA==", ""),
        ("c2FsdA==", "*"),
        ("c2FsdA==", long_salt.as_str()),
        ("nonceX", long_nonce.as_str()),
        ("nonceX", "nonce\u{e9}"),
        ("nonceX", "nonce "),
        (",i=4096", ""),
        (",s=c2FsdA==", ""),
        ("r=client-nonceX,", ""),
    ] {
        let result = read(&ok.replace(from, to));
        assert!(matches!(result, Err(Malformed(_))), "{from:?} to {to:?}: {result:?}");
    }
    assert_eq!(read("m=x,r=y"), Err(ScramError::UnsupportedFeature("mandatory extension")));
}

#[test]
fn keys_run_no_rounds_so_their_number_is_free() {
    let secret = ClientSecret::Keys { client_key: ClientKey(Zeroizing::new([1; 32])), server_key: [2; 32] };
    let mut client = ClientExchange::new(secret, CLIENT.to_owned(), ClientBinding::Unsupported);
    client.read_server_first(b"r=client-nonceX,s=c2FsdA==,i=600000").unwrap();
    assert_eq!(client.iterations(), Some(0));
    assert!(client.client_final().is_ok());
}

#[test]
fn server_final_is_checked() {
    let proved = || {
        let mut client = ClientExchange::new(password(b"pencil"), CLIENT.to_owned(), ClientBinding::Unsupported);
        client.read_server_first(b"r=client-nonceX,s=c2FsdA==,i=1").unwrap();
        client.client_final().unwrap();
        client
    };
    let wrong = format!("v={}", STANDARD.encode([0; 32]));
    assert_eq!(proved().verify_server_final(wrong.as_bytes()), Err(ScramError::BadServerSignature));
    assert_eq!(proved().verify_server_final(b"e=other-error"), Err(ScramError::ServerRefused));
    for bad in ["", "v=", "v=AAAA", "x=1", "v", ",", "\u{0}"] {
        let result = proved().verify_server_final(bad.as_bytes());
        assert!(matches!(result, Err(Malformed(_))), "{bad:?}: {result:?}");
    }
}

#[test]
fn steps_out_of_order_are_errors() {
    let mut client = ClientExchange::new(password(b"x"), CLIENT.to_owned(), ClientBinding::Unsupported);
    assert_eq!(client.iterations(), None);
    assert_eq!(client.client_final(), Err(ScramError::OutOfOrder));
    assert_eq!(client.verify_server_final(b"v=x"), Err(ScramError::OutOfOrder));
    assert_eq!(client.read_server_first(b"r=x"), Err(ScramError::OutOfOrder));
    let mut server = server(ChannelBinding::Unsupported);
    assert_eq!(server.finish(b"c=biws").unwrap_err(), ScramError::OutOfOrder);
    assert_eq!(server.first(SCRAM_SHA_256, b"n,,n=,r=abc").unwrap_err(), ScramError::OutOfOrder);
}

#[test]
fn hostile_messages_are_errors() {
    let long = [b"n,,n=,r=".to_vec(), vec![b'x'; 5000]].concat();
    let nonce = [b"n,,n=,r=".to_vec(), vec![b'x'; 1025]].concat();
    let messages: [&[u8]; 21] = [
        b"",
        b",",
        b",,",
        b",,,,,,",
        b"n",
        b"n,",
        b"n,,",
        b"n,,n=",
        b"n,,n=,",
        b"n,,n=,r",
        b"n,,n=,r=",
        b"n,,r=abc",
        b"n,,n=,r=a b",
        b"n,,n=,r=abc,",
        b"n,,n=,r=abc,1=",
        b"n,,n=,r=\xff",
        b"n,,n=,r=abc\0",
        b"n,x,n=,r=abc",
        b"\xff\xfe",
        &long,
        &nonce,
    ];
    for message in messages {
        let result = server(ChannelBinding::Unsupported).first(SCRAM_SHA_256, message);
        assert!(matches!(result, Err(Malformed(_))), "{message:?}: {result:?}");
        let (mut server, _) = challenged(ChannelBinding::Unsupported);
        let result = server.finish(message);
        assert!(matches!(result, Err(Malformed(_))), "{message:?}: {result:?}");
        let mut client = ClientExchange::new(password(b"x"), CLIENT.to_owned(), ClientBinding::Unsupported);
        let result = client.read_server_first(message);
        assert!(matches!(result, Err(Malformed(_))), "{message:?}: {result:?}");
    }
    let mut identity = server(ChannelBinding::Unsupported);
    let expected = ScramError::UnsupportedFeature("authorization identity");
    assert_eq!(identity.first(SCRAM_SHA_256, b"n,a=root,n=,r=abc").unwrap_err(), expected);
    let mut extension = server(ChannelBinding::Unsupported);
    let expected = ScramError::UnsupportedFeature("mandatory extension");
    assert_eq!(extension.first(SCRAM_SHA_256, b"n,,m=x,n=,r=abc").unwrap_err(), expected);
}

#[test]
fn the_verifier_text_is_that_of_postgresql() {
    let text = "SCRAM-SHA-256$4096:MDEyMzQ1Njc4OWFiY2RlZg==$";
    let made = Verifier::from_password(b"pencil", SALT, 4096).to_pg_string();
    assert!(made.starts_with(text), "{made}");
    let read = Verifier::parse(&made).unwrap();
    assert_eq!((read.iterations(), read.salt(), read.to_pg_string()), (4096, SALT, made.clone()));
    assert!(read.check_password(b"pencil"));
    assert!(!read.check_password(b"pencils"));
    for (from, to) in [
        ("SCRAM-SHA-256", "SCRAM-SHA-1"),
        ("SCRAM-SHA-256", "scram-sha-256"),
        ("4096", "0"),
        ("4096", "4294967296"),
        ("4096", "2147483648"),
        ("4096", "+1"),
        ("MDEy", "MDE!"),
        ("MDEyMzQ1Njc4OWFiY2RlZg==", ""),
        ("==$", "=="),
        ("=:", "=:AAAA"),
        ("=:", "="),
    ] {
        let bad = made.replace(from, to);
        assert_ne!(bad, made);
        assert_eq!(Verifier::parse(&bad).unwrap_err(), ScramError::BadVerifier, "{bad}");
    }
    for bad in ["", "$", "$$", "$:$:", "SCRAM-SHA-256$4096:$:", "md5abc", &format!("{made}=")] {
        assert_eq!(Verifier::parse(bad).unwrap_err(), ScramError::BadVerifier, "{bad}");
    }
}

#[test]
fn verifiers_that_postgresql_made_are_matched() {
    // From pg_authid of a PostgreSQL 15: plain, prepared (`IXa`), and taken raw as its bidi text is prohibited.
    let cases = [
        (
            "pencil",
            "9s+M86B2+macliJ8qreT6g==$TWsPrW82BL6Ox79koNaqnzGGBsvsGpS9+/t9nh+r254=:\
             Xi3A+ITZURIr0ySGbPvUGpc0h960iGuUXn+INfHkBI8=",
        ),
        (
            "I\u{ad}X\u{aa}",
            "6atpzG5W8S6NFF38sRYGyg==$wpwYbf6iWyOWQ4qzPB+E7PTu4TkJRx83cF13aACN79k=:\
             ols0UFF5QHzSz9kTEstAbYe7jKgg2aicPIIRDX7Tiyo=",
        ),
        (
            "\u{627}1",
            "Ud/ooLibdPtUa84PWvcmtA==$CK91dqKgmIMuTFp++7law6fJ6rMYICISZcbYFZyaWM0=:\
             l7PO+o2JFEaKt1zpXy9ELS5MN10Jclc0izOl4sJ/qz0=",
        ),
    ];
    for (password, stored) in cases {
        let stored = format!("SCRAM-SHA-256$4096:{stored}");
        let verifier = Verifier::parse(&stored).unwrap();
        assert!(verifier.check_password(password.as_bytes()));
        let made = Verifier::from_password(password.as_bytes(), verifier.salt(), 4096);
        assert_eq!(made.to_pg_string(), stored);
    }
}

#[test]
fn passwords_are_prepared_as_postgresql_does() {
    // U+00AD is mapped to nothing, U+00AA normalizes to `a`, U+00A0 is a space (RFC 4013, section 3).
    assert_eq!(**normalize("I\u{ad}X".as_bytes()), *b"IX");
    assert_eq!(**normalize("\u{aa}\u{a0}b".as_bytes()), *b"a b");
    for raw in [&b"\x07"[..], b"\xff\xfe", "\u{627}1".as_bytes(), "\u{ad}".as_bytes(), b""] {
        assert_eq!(**normalize(raw), *raw);
    }
}

#[test]
fn nothing_secret_is_printed() {
    let secrets = [
        format!("{:?}", verifier()),
        format!("{:?}", ClientKey(Zeroizing::new([65; 32]))),
        format!("{:?}", password(b"pencil")),
        format!("{:?}", server(ChannelBinding::Unsupported)),
    ];
    let expected = ["Verifier { iterations: 16, .. }", "ClientKey(..)", "Password(..)", "ServerExchange(..)"];
    assert_eq!(secrets, expected);
}

#[test]
fn md5_is_that_of_postgresql() {
    let salt = [0x2a, 0x3d, 0x8f, 0xe0];
    let response = md5_password(b"md5_user", b"password", salt);
    assert_eq!(response, md5_hash(b"md5_user", b"password", salt));
    let stored = format!("md5{}", md5_hex(&[b"password", b"md5_user"]));
    assert_eq!(md5_from_stored(&stored, salt), Some(response.clone()));
    assert_eq!(md5_from_stored(&stored.to_uppercase().replace("MD5", "md5"), salt), Some(response));
    for bad in ["", "md5", &stored[1..], &stored[..34], &format!("{stored}0"), &stored.replace("md5", "md5g")[..35]] {
        assert_eq!(md5_from_stored(bad, salt), None, "{bad}");
    }
    assert!(same_secret(b"a", b"a") && !same_secret(b"a", b"b") && !same_secret(b"a", b"aa"));
}

#[test]
fn the_postgres_client_gets_in() {
    for word in ["pencil", "", "p\u{e4}ss\u{aa}\u{ad}w\u{f6}rd", "\u{7}bell", "a,b=c"] {
        let hash = vec![3; 48];
        for (binding, offered, mechanism) in [
            (sasl::ChannelBinding::unsupported(), ChannelBinding::Unsupported, sasl::SCRAM_SHA_256),
            (sasl::ChannelBinding::unrequested(), ChannelBinding::Unsupported, sasl::SCRAM_SHA_256),
            (
                sasl::ChannelBinding::tls_server_end_point(hash.clone()),
                ChannelBinding::Available(hash),
                sasl::SCRAM_SHA_256_PLUS,
            ),
        ] {
            let verifier = Verifier::from_password(word.as_bytes(), SALT, 16);
            let stored_key = verifier.stored_key;
            let mut client = sasl::ScramSha256::new(word.as_bytes(), binding);
            let mut server = ServerExchange::new(verifier, encode_nonce(&[5; 18]), offered);
            client.update(&server.first(mechanism, client.message()).unwrap()).unwrap();
            let proof = server.finish(client.message()).unwrap();
            client.finish(&proof.message).unwrap();
            assert_eq!(super::hash(&proof.client_key), stored_key);
        }
    }
}

#[test]
fn the_postgres_client_with_another_password_does_not() {
    let mut client = sasl::ScramSha256::new(b"pen", sasl::ChannelBinding::unsupported());
    let mut server = server(ChannelBinding::Unsupported);
    client.update(&server.first(SCRAM_SHA_256, client.message()).unwrap()).unwrap();
    assert_eq!(server.finish(client.message()).unwrap_err(), ScramError::WrongProof);
}
