//! Tests of `tls`.

use std::os::unix::fs::PermissionsExt as _;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tenantry_config::ClientTlsMode;

use super::*;

/// Made with OpenSSL for this test: X.509 v1, and its key.
const V1: [&str; 2] = [
    "-----BEGIN CERTIFICATE-----
MIIBFzCBvQIUKM0hMbhg5BVYEgR4fPVZOWI1kaIwCgYIKoZIzj0EAwIwDTELMAkG
A1UEAwwCZGIwIBcNMjYxMTIyMTkyODM1WhgPMjEyNjEwMjkxOTI4MzVaMA0xCzAJ
BgNVBAMMAmRiMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEZjKKZ1B2UOh5f6/D
2RgvAXtZqVdIfk6/lbRuc1bjkkzT+VBbYanE7mNcEHZwR3TBui8Ef9LgRnfMqBr0
SrT93zAKBggqhkjOPQQDAgNJADBGAiEA00RnUSeb6QYF1qLtMBLMvwnhgt4azz6H
EJaFeoT+D1UCIQD3LwQRDV0ijqkxUWxMfZC8wNTuOFIUUMXn16BSNYEd9Q==
-----END CERTIFICATE-----",
    "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgne5GpcARqSlGtVBH
D3gIL2pDjJgWecQEDlLeBSUCEkehRANCAARmMopnUHZQ6Hl/r8PZGC8Be1mpV0h+
Tr+VtG5zVuOSTNP5UFthqcTuY1wQdnBHdMG6LwR/0uBGd8yoGvRKtP3f
-----END PRIVATE KEY-----",
];
/// Made with OpenSSL: signed with RSA-PSS over SHA-384.
const PSS: &str = "-----BEGIN CERTIFICATE-----
MIICXjCCAZOgAwIBAgIUIQJGf3WRrz8OMIDNszqhHhuI44YwQQYJKoZIhvcNAQEK
MDSgDzANBglghkgBZQMEAgIFAKEcMBoGCSqGSIb3DQEBCDANBglghkgBZQMEAgIF
AKIDAgFOMAwxCjAIBgNVBAMMAXAwIBcNMjYxMTIyMTkyODM1WhgPMjEyNjEwMjkx
OTI4MzVaMAwxCjAIBgNVBAMMAXAwgZ8wDQYJKoZIhvcNAQEBBQADgY0AMIGJAoGB
AOWFEp614Q0AZxeP8b+qbRs5y8HS1akyep3dWAJ58PiMfdAderB7VRPPQn/xnPKZ
8TYsQZUzyfuLg/++n45OIZi+8q9ik+J5RBdL6a+PsfGc+oxPO3clgVWmBhKZdVdi
WBcULik0vLjfNdXo0oF8DuOhR3EuopzfqGtBrdOd5ezTAgMBAAGjUzBRMB0GA1Ud
DgQWBBTxjENg3UAxAw6fePQu3y+p5nJ9BDAfBgNVHSMEGDAWgBTxjENg3UAxAw6f
ePQu3y+p5nJ9BDAPBgNVHRMBAf8EBTADAQH/MEEGCSqGSIb3DQEBCjA0oA8wDQYJ
YIZIAWUDBAICBQChHDAaBgkqhkiG9w0BAQgwDQYJYIZIAWUDBAICBQCiAwIBTgOB
gQDBWkQcNhzz1x9n7PQYI5P/G6SXEM5irJH/m7Whd4LTAVCQaRviRYjFxt758N9t
39RH5fRWOpLjMsHZVYKSwJ6EhpkxYSP9X/6BMIGINJmXlsKlQF6mt5zq72ys/GSl
+azcHGQr23SZ4/hMXHhikNF6CmOkjIXfltDBCY2yuv52zw==
-----END CERTIFICATE-----";

fn settings(cert: Option<PathBuf>, key: Option<PathBuf>, state_dir: &Path) -> ClientTls {
    ClientTls { mode: ClientTlsMode::Allow, cert_file: cert, key_file: key, state_dir: state_dir.to_owned() }
}

fn files(dir: &Path, name: &str, cert: &str, key: &str) -> ClientTls {
    let (cert_file, key_file) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    fs::write(&cert_file, cert).unwrap();
    fs::write(&key_file, key).unwrap();
    settings(Some(cert_file), Some(key_file), dir)
}

fn server_tls(mode: ServerTlsMode, ca_file: Option<PathBuf>) -> ServerTls {
    ServerTls { mode, ca_file, direct: false }
}

/// A root with what it takes to issue server certificates.
struct Authority {
    file: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(dir: &Path, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let file = dir.join(format!("{name}.pem"));
        fs::write(&file, parameters.self_signed(&key).unwrap().pem()).unwrap();
        Self { file, issuer: Issuer::new(parameters, key) }
    }

    fn issue(&self, dir: &Path, host: &str, from: i64, to: i64) -> Acceptor {
        let key = KeyPair::generate().unwrap();
        let parameters = dated(host, from, to);
        let cert = parameters.signed_by(&key, &self.issuer).unwrap();
        Acceptor::load(&files(dir, "issued", &cert.pem(), &key.serialize_pem())).unwrap()
    }
}

/// Valid from and to so many days from now.
#[expect(clippy::disallowed_methods, reason = "a certificate's dates are wall-clock dates")]
fn dated(host: &str, from: i64, to: i64) -> CertificateParams {
    let at = |days: i64| {
        let distance = DAY * u32::try_from(days.abs()).unwrap();
        if days < 0 { SystemTime::now() - distance } else { SystemTime::now() + distance }
    };
    let mut parameters = CertificateParams::new(vec![host.to_owned()]).unwrap();
    parameters.not_before = at(from).into();
    parameters.not_after = at(to).into();
    parameters
}

/// A handshake over memory; gives both sides' channel binding hash.
async fn handshake(acceptor: &Acceptor, connector: &Connector) -> Result<[Option<Vec<u8>>; 2], TlsError> {
    let (client, server) = tokio::io::duplex(4096);
    let both = async { tokio::join!(acceptor.accept(server), connector.connect(client)) };
    let (server, client) = tokio::time::timeout(Duration::from_secs(20), both).await.unwrap();
    let client = client?;
    let (_, end_point) = server.unwrap();
    Ok([end_point.map(|hash| hash.to_vec()), peer_end_point(&client)])
}

async fn try_mode(
    acceptor: &Acceptor,
    mode: ServerTlsMode,
    ca_file: Option<&Path>,
    host: &str,
) -> Result<[Option<Vec<u8>>; 2], String> {
    let connector = Connector::load(&server_tls(mode, ca_file.map(Path::to_owned)), host).unwrap();
    handshake(acceptor, &connector).await.map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_self_signed_pair_is_made_once_and_used_again() {
    let dir = TempDir::new().unwrap();
    let state = dir.path().join("a/b");
    let first = Acceptor::load(&settings(None, None, &state)).unwrap();
    let key = fs::metadata(state.join(SELF_SIGNED_KEY)).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    let again = Acceptor::load(&settings(None, None, &state)).unwrap();
    assert!(first.end_point().is_some());
    assert_eq!(first.end_point(), again.end_point());
    // A client that has it as its root gets through the strictest check.
    let cert = state.join(SELF_SIGNED_CERT);
    for host in ["localhost", "127.0.0.1"] {
        try_mode(&again, ServerTlsMode::VerifyFull, Some(&cert), host).await.unwrap();
    }
    let error = try_mode(&again, ServerTlsMode::VerifyFull, Some(&cert), "other.test").await.unwrap_err();
    assert!(error.contains("other.test"), "{error}");
    let left: Vec<_> = fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn many_first_starts_at_once_end_with_one_pair() {
    let dir = TempDir::new().unwrap();
    let hashes: Vec<_> = std::thread::scope(|scope| {
        let start = || Acceptor::load(&settings(None, None, dir.path())).unwrap().end_point().unwrap();
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(hashes.iter().all(|hash| hash == &hashes[0]));
}

#[test]
fn what_a_crash_or_an_operator_left_is_handled() {
    let dir = TempDir::new().unwrap();
    let settings = settings(None, None, dir.path());
    let (cert, key) = (dir.path().join(SELF_SIGNED_CERT), dir.path().join(SELF_SIGNED_KEY));
    // A crash between the two renames.
    fs::write(&key, "old").unwrap();
    fs::write(dir.path().join("tenantry.key.tmp"), "half").unwrap();
    let made = Acceptor::load(&settings).unwrap();
    // A certificate whose key went away: nothing is overwritten.
    fs::remove_file(&key).unwrap();
    let error = made.reload(&settings).unwrap_err();
    assert!(matches!(error, TlsError::KeyGone { .. }), "{error}");
    assert!(cert.exists() && !key.exists());
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = Acceptor::load(&super::tests::settings(None, None, &file)).unwrap_err();
    assert!(matches!(error, TlsError::Write { .. } | TlsError::Read { .. }), "{error}");
}

#[test]
fn a_bad_file_names_itself_and_the_old_certificate_stays() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    let [one, two] = [(); 2].map(|()| generate().unwrap());
    let (cert, key) = (one.cert.pem(), one.signing_key.serialize_pem());
    let acceptor = Acceptor::load(&files(path, "good", &cert, &key)).unwrap();
    let clone = acceptor.clone();
    let before = acceptor.end_point();
    let broken = cert.replace("-----END", "-----EN");
    let missing = settings(Some(path.join("good.crt")), Some(path.join("none.key")), path);
    let half = settings(Some(path.join("good.crt")), None, path);
    let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    for (bad, part) in [
        (files(path, "a", "", &key), "a.crt holds no certificate"),
        (files(path, "b", &broken, &key), "b.crt is not a valid PEM file"),
        (files(path, "c", &cert, ""), "c.key holds no usable private key"),
        (files(path, "d", &cert, &encrypted), "d.key holds no usable private key"),
        (files(path, "e", &cert, &two.signing_key.serialize_pem()), "e.key is not the one of the first"),
        (files(path, "f", &key, &key), "f.crt holds no certificate"),
        (missing, "cannot read"),
        (half, "belong together"),
    ] {
        let error = acceptor.reload(&bad).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(!error.contains(key.lines().nth(1).unwrap()), "{error}");
        assert_eq!(acceptor.end_point(), before);
    }
    acceptor.reload(&files(path, "two", &two.cert.pem(), &two.signing_key.serialize_pem())).unwrap();
    assert_ne!(acceptor.end_point(), before);
    assert_eq!(clone.end_point(), acceptor.end_point());
}

#[tokio::test]
async fn each_mode_checks_what_it_says() {
    use ServerTlsMode::{Prefer, Require, VerifyCa, VerifyFull};
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    let (ours, other) = (Authority::new(path, "ours"), Authority::new(path, "other"));
    let (ca, wrong) = (Some(ours.file.as_path()), Some(other.file.as_path()));
    let good = ours.issue(path, "db.test", -1, 1);
    for (mode, roots, host, expected) in [
        (VerifyFull, ca, "db.test", ""),
        (VerifyFull, ca, "other.test", "not valid for name"),
        (VerifyFull, ca, "10.0.0.1", "not valid for name"),
        (VerifyFull, wrong, "db.test", "UnknownIssuer"),
        (VerifyFull, None, "db.test", "UnknownIssuer"),
        (VerifyCa, ca, "db.test", ""),
        (VerifyCa, ca, "other.test", ""),
        (VerifyCa, ca, "10.0.0.1", ""),
        (VerifyCa, ca, "not a name", ""),
        (VerifyCa, wrong, "db.test", "UnknownIssuer"),
        (Require, ca, "other.test", ""),
        (Require, wrong, "db.test", "UnknownIssuer"),
        (Prefer, wrong, "db.test", "UnknownIssuer"),
        (Require, None, "other.test", ""),
        (Prefer, None, "other.test", ""),
    ] {
        let what = format!("{mode:?} {roots:?} {host}");
        // A machine without system roots cannot do this one.
        if roots.is_none() && mode == VerifyFull && Connector::load(&server_tls(mode, None), host).is_err() {
            continue;
        }
        match try_mode(&good, mode, roots, host).await {
            Ok([server, client]) => {
                assert_eq!(expected, "", "{what}");
                assert!(server.is_some());
                assert_eq!(server, client);
            }
            Err(error) => assert!(!expected.is_empty() && error.contains(expected), "{what}: {error}"),
        }
    }
    let error = Connector::load(&server_tls(VerifyFull, None), "not a name").unwrap_err();
    assert!(matches!(error, TlsError::BadHost { .. }), "{error}");
}

#[tokio::test]
async fn dates_are_checked_wherever_the_chain_is() {
    use ServerTlsMode::{Require, VerifyCa, VerifyFull};
    let dir = TempDir::new().unwrap();
    let ours = Authority::new(dir.path(), "ours");
    for (from, to) in [(-3, -1), (1, 3)] {
        let acceptor = ours.issue(dir.path(), "db.test", from, to);
        let ca = Some(ours.file.as_path());
        for mode in [VerifyFull, VerifyCa, Require] {
            let error = try_mode(&acceptor, mode, ca, "db.test").await.unwrap_err();
            assert!(error.contains("expired") || error.contains("not valid yet"), "{error}");
        }
        try_mode(&acceptor, Require, None, "db.test").await.unwrap();
    }
}

#[tokio::test]
async fn a_server_certificate_can_be_its_own_root() {
    use ServerTlsMode::{VerifyCa, VerifyFull};
    let dir = TempDir::new().unwrap();
    // As `openssl req -x509` makes it: marked as a CA.
    let make = |to: i64| {
        let key = KeyPair::generate().unwrap();
        let mut parameters = dated("db.test", -3, to);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let cert = parameters.self_signed(&key).unwrap();
        let settings = files(dir.path(), "own", &cert.pem(), &key.serialize_pem());
        (Acceptor::load(&settings).unwrap(), settings.cert_file.unwrap())
    };
    let (acceptor, root) = make(3);
    try_mode(&acceptor, VerifyFull, Some(&root), "db.test").await.unwrap();
    try_mode(&acceptor, VerifyCa, Some(&root), "other.test").await.unwrap();
    let error = try_mode(&acceptor, VerifyFull, Some(&root), "other.test").await.unwrap_err();
    assert!(error.contains("not valid for name"), "{error}");
    let (expired, root) = make(-1);
    let error = try_mode(&expired, VerifyCa, Some(&root), "db.test").await.unwrap_err();
    assert!(error.contains("expired"), "{error}");
}

#[tokio::test]
async fn an_old_v1_certificate_still_encrypts() {
    let dir = TempDir::new().unwrap();
    let [cert, key] = V1;
    let acceptor = Acceptor::load(&files(dir.path(), "v1", cert, key)).unwrap();
    let [server, client] = try_mode(&acceptor, ServerTlsMode::Require, None, "db.test").await.unwrap();
    assert!(server.is_some());
    assert_eq!(server, client);
}

#[tokio::test]
async fn someone_elses_certificate_is_refused_even_unverified() {
    // Without the key's signature, a man in the middle could show the server's certificate and so pass the
    // channel binding check.
    let dir = TempDir::new().unwrap();
    for cert in [generate().unwrap().cert.pem(), V1[0].to_owned()] {
        let thief = generate().unwrap();
        let settings = files(dir.path(), "thief", &cert, &thief.signing_key.serialize_pem());
        let key = read_key(settings.key_file.as_deref().unwrap()).unwrap();
        let key = provider().key_provider.load_private_key(key).unwrap();
        let chain = read_certificates(settings.cert_file.as_deref().unwrap()).unwrap();
        let acceptor = Acceptor::load(&super::tests::settings(None, None, dir.path())).unwrap();
        let mut config = (*acceptor.config()).clone();
        config.cert_resolver = Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key)));
        acceptor.0.store(Arc::new(Identity { config: Arc::new(config), end_point: None }));
        let error = try_mode(&acceptor, ServerTlsMode::Require, None, "db.test").await.unwrap_err();
        assert!(error.contains("BadSignature"), "{error}");
    }
}

#[tokio::test]
async fn direct_tls_needs_the_protocol_name() {
    let dir = TempDir::new().unwrap();
    let acceptor = Acceptor::load(&settings(None, None, dir.path())).unwrap();
    for direct in [true, false] {
        let tls = ServerTls { mode: ServerTlsMode::Require, ca_file: None, direct };
        let connector = Connector::load(&tls, "localhost").unwrap();
        let (client, server) = tokio::io::duplex(4096);
        let (server, client) = tokio::join!(acceptor.accept(server), connector.connect(client));
        client.unwrap();
        assert_eq!(client_agreed_on_alpn(&server.unwrap().0), direct);
    }
    let mut config = (*acceptor.config()).clone();
    config.alpn_protocols.clear();
    acceptor.0.store(Arc::new(Identity { config: Arc::new(config), end_point: None }));
    let tls = ServerTls { mode: ServerTlsMode::Require, ca_file: None, direct: true };
    let error = handshake(&acceptor, &Connector::load(&tls, "localhost").unwrap()).await.unwrap_err();
    assert!(matches!(error, TlsError::NoAlpn { .. }), "{error}");
}

#[test]
fn the_end_point_hash_is_that_of_the_signature() {
    let hash = |algorithm| {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let cert = CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap();
        (cert.der().to_vec(), end_point_hash(cert.der()))
    };
    let (der, made) = hash(&rcgen::PKCS_ECDSA_P256_SHA256);
    assert_eq!(made, Some(Sha256::digest(der).to_vec()));
    let (der, made) = hash(&rcgen::PKCS_ECDSA_P384_SHA384);
    assert_eq!(made, Some(Sha384::digest(der).to_vec()));
    assert_eq!(hash(&rcgen::PKCS_ED25519).1, None);
    let pss = CertificateDer::from_pem_slice(PSS.as_bytes()).unwrap();
    assert_eq!(end_point_hash(&pss), Some(Sha384::digest(&pss).to_vec()));
    assert_eq!(end_point_hash(&CertificateDer::from(vec![1, 2, 3])), None);
}

#[test]
fn a_bad_root_file_names_itself() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("root.pem");
    let load = || Connector::load(&server_tls(ServerTlsMode::VerifyCa, Some(file.clone())), "h").unwrap_err();
    assert!(load().to_string().contains("root.pem"));
    fs::write(&file, "nothing").unwrap();
    assert!(matches!(load(), TlsError::NoCertificate { .. }));
    fs::write(&file, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    assert!(matches!(load(), TlsError::BadCertificate { .. }));
}
