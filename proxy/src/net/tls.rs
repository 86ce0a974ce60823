//! TLS on both sides: what we show to clients ([`Acceptor`]) and how we look at PostgreSQL ([`Connector`]).
//!
//! What always holds: every configuration names its crypto provider (aws-lc-rs), never the process-wide one; TLS is 1.2
//! or newer; the other side's handshake signature is checked even where its certificate is not, so a channel binding
//! hash always belongs to the holder of the certificate's key; a failed reload changes nothing; a certificate and its
//! hash are swapped as one; no error holds key material.
//!
//! `load` and `reload` read files and may wait for a file lock: at start and on reload, or on a blocking thread.

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as RustlsError, RootCertStore, ServerConfig,
    SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
        verify_tls13_signature_with_raw_key,
    },
    server::{NoServerSessionStorage, ParsedCertificate},
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
    pem::{self, PemObject as _},
};
use sha2::{Digest as _, Sha224, Sha256, Sha384, Sha512};
use tenantry_config::{ClientTls, ServerTls, ServerTlsMode};
use tokio::io::{AsyncRead, AsyncWrite};
use x509_parser::{
    certificate::X509Certificate, prelude::FromDer as _, signature_algorithm::SignatureAlgorithm, time::ASN1Time,
};

/// The protocol name that direct TLS must agree on (PostgreSQL 17 and newer).
pub const ALPN: &[u8] = b"postgresql";
const SELF_SIGNED_CERT: &str = "tenantry.crt";
const SELF_SIGNED_KEY: &str = "tenantry.key";
const SELF_SIGNED_LOCK: &str = "tenantry.tls.lock";
const DAY: Duration = Duration::from_secs(86_400);
const TEN_YEARS: Duration = Duration::from_secs(86_400 * 3650);

/// What is wrong with the TLS setup or a handshake, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// Part of the self-signed pair that cannot be written.
    #[error(
        "cannot write {}: {source} (make the directory writable for the self-signed certificate, or set cert_file and \
         key_file)", path.display()
    )]
    Write { path: PathBuf, source: io::Error },
    /// A certificate file that is not PEM, or is damaged.
    #[error("{} is not a valid PEM file: {reason}", path.display())]
    BadPem { path: PathBuf, reason: String },
    /// A certificate that cannot be used.
    #[error("{} holds a certificate that cannot be used: {reason}", path.display())]
    BadCertificate { path: PathBuf, reason: String },
    /// A PEM file without a certificate.
    #[error("{} holds no certificate (expected PEM: BEGIN CERTIFICATE)", path.display())]
    NoCertificate { path: PathBuf },
    /// A key file without a usable key. The parser's own words are left out, as they could quote the file.
    #[error(
        "{} holds no usable private key (expected PEM: PKCS#8, PKCS#1 or SEC1, RSA, ECDSA or Ed25519, not encrypted)",
        path.display()
    )]
    BadKey { path: PathBuf },
    /// Certificate and key of two different pairs.
    #[error("the key in {} is not the one of the first certificate in {}", key.display(), cert.display())]
    KeyMismatch { cert: PathBuf, key: PathBuf },
    /// Only one of `cert_file` and `key_file`.
    #[error("cert_file and key_file belong together: set both, or neither for a self-signed certificate")]
    HalfPair,
    /// The self-signed certificate is there but its key is not; nothing is overwritten.
    #[error("{} is missing, but {} is there: put the key back, or remove the certificate to have a new pair made",
        key.display(), cert.display())]
    KeyGone { cert: PathBuf, key: PathBuf },
    /// Making the self-signed certificate failed.
    #[error("cannot make a self-signed certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// Verification is asked for but there is nothing to verify with.
    #[error("no root certificates: the system has none, set ca_file")]
    NoRoots,
    /// `verify-full` needs a name to look for.
    #[error("{host:?} is neither a DNS name nor an IP address: tls mode verify-full cannot check it")]
    BadHost { host: String },
    /// rustls refuses the configuration.
    #[error("TLS configuration: {0}")]
    Config(#[from] RustlsError),
    /// The handshake with a server failed.
    #[error("TLS handshake with {host} failed: {source}")]
    Handshake { host: String, source: io::Error },
    /// Direct TLS without ALPN could be anything but PostgreSQL.
    #[error("{host} did not agree on ALPN \"postgresql\": direct TLS needs PostgreSQL 17 or newer, set direct = false")]
    NoAlpn { host: String },
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// One certificate as clients see it. What belongs together is together: take both from one `Identity`.
pub struct Identity {
    /// For `tokio_rustls::TlsAcceptor`.
    pub config: Arc<ServerConfig>,
    /// The `tls-server-end-point` hash. `None` when RFC 5929 defines none for the certificate (Ed25519): then
    /// SCRAM-SHA-256-PLUS must not be offered.
    pub end_point: Option<Arc<[u8]>>,
}

/// What clients are shown. Clones share one identity: a reload is seen by all, from their next handshake on.
#[derive(Clone)]
pub struct Acceptor(Arc<ArcSwap<Identity>>);

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Acceptor(..)")
    }
}

impl Acceptor {
    /// Reads `cert_file` and `key_file`, or the self-signed pair in `state_dir`, which is made when it is not there.
    pub fn load(settings: &ClientTls) -> Result<Self, TlsError> {
        Ok(Self(Arc::new(ArcSwap::from_pointee(Identity::load(settings)?))))
    }

    /// Reads everything again. On an error the old certificate stays.
    pub fn reload(&self, settings: &ClientTls) -> Result<(), TlsError> {
        self.show(Identity::load(settings)?);
        Ok(())
    }

    /// From the next handshake on.
    pub fn show(&self, identity: Identity) {
        self.0.store(Arc::new(identity));
    }

    /// Certificate and hash of one moment.
    #[must_use]
    pub fn identity(&self) -> Arc<Identity> {
        self.0.load_full()
    }

    /// For one handshake. Together with a hash: [`Self::identity`].
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0.load().config)
    }

    /// The `tls-server-end-point` hash, see [`Identity::end_point`].
    #[must_use]
    pub fn end_point(&self) -> Option<Arc<[u8]>> {
        self.0.load().end_point.clone()
    }

    /// The server side of a handshake, and the hash of the very certificate that it showed. No time limit of its own.
    pub async fn accept<S>(&self, stream: S) -> io::Result<(tokio_rustls::server::TlsStream<S>, Option<Arc<[u8]>>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let identity = self.identity();
        let stream = tokio_rustls::TlsAcceptor::from(Arc::clone(&identity.config)).accept(stream).await?;
        Ok((stream, identity.end_point.clone()))
    }
}

/// Whether a client agreed on ALPN `postgresql`: a must for direct TLS.
#[must_use]
pub fn client_agreed_on_alpn<S>(stream: &tokio_rustls::server::TlsStream<S>) -> bool {
    stream.get_ref().1.alpn_protocol() == Some(ALPN)
}

impl Identity {
    /// Reads what the settings name; see [`Acceptor::load`].
    pub fn load(settings: &ClientTls) -> Result<Self, TlsError> {
        match (&settings.cert_file, &settings.key_file) {
            (Some(cert), Some(key)) => Self::read(cert, key),
            (None, None) => {
                let (cert, key) = self_signed(&settings.state_dir)?;
                Self::read(&cert, &key)
            }
            _ => Err(TlsError::HalfPair),
        }
    }

    fn read(cert_file: &Path, key_file: &Path) -> Result<Self, TlsError> {
        let chain = read_certificates(cert_file)?;
        let leaf = chain.first().ok_or_else(|| TlsError::NoCertificate { path: cert_file.into() })?;
        let (_, parsed) = X509Certificate::from_der(leaf)
            .map_err(|error| TlsError::BadCertificate { path: cert_file.into(), reason: error.to_string() })?;
        let provider = provider();
        let key = read_key(key_file)?;
        let key =
            provider.key_provider.load_private_key(key).map_err(|_| TlsError::BadKey { path: key_file.into() })?;
        // Not rustls' own check: that one refuses X.509 v1 certificates, which many PostgreSQL set-ups have.
        if key.public_key().is_some_and(|public| public.as_ref() != parsed.public_key().raw) {
            return Err(TlsError::KeyMismatch { cert: cert_file.into(), key: key_file.into() });
        }
        let end_point = end_point_hash(leaf).map(Arc::from);
        let resolver = SingleCertAndKey::from(CertifiedKey::new(chain, key));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(resolver));
        // A client that sends no ALPN (before PostgreSQL 17) is served all the same.
        config.alpn_protocols = vec![ALPN.to_vec()];
        // libpq never resumes a session, so tickets and a session store would only be memory per idle client.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config), end_point })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read { path: path.into(), source })
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let certificates =
        certificates.map_err(|error| TlsError::BadPem { path: path.into(), reason: error.to_string() })?;
    if certificates.is_empty() { Err(TlsError::NoCertificate { path: path.into() }) } else { Ok(certificates) }
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let text = zeroize::Zeroizing::new(read(path)?);
    PrivateKeyDer::from_pem_slice(&text).map_err(|_| TlsError::BadKey { path: path.into() })
}

/// Paths of the self-signed pair, made if it is not there.
fn self_signed(directory: &Path) -> Result<(PathBuf, PathBuf), TlsError> {
    let cert = directory.join(SELF_SIGNED_CERT);
    let key = directory.join(SELF_SIGNED_KEY);
    // The certificate is written last and never replaced: when it is there, so is its key, and no lock is needed (the
    // directory may be read-only).
    if !exists(&cert)? {
        make_self_signed(directory, &cert, &key)?;
    }
    if !exists(&key)? {
        return Err(TlsError::KeyGone { cert, key });
    }
    Ok((cert, key))
}

fn exists(path: &Path) -> Result<bool, TlsError> {
    path.try_exists().map_err(|source| TlsError::Read { path: path.into(), source })
}

fn make_self_signed(directory: &Path, cert: &Path, key: &Path) -> Result<(), TlsError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| TlsError::Write { path, source }
    };
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed(directory))?;
    let lock_path = directory.join(SELF_SIGNED_LOCK);
    let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
    let lock = lock.map_err(failed(&lock_path))?;
    // Held until `lock` is closed: of two processes that start at once, the second one finds the pair of the first.
    lock.lock().map_err(failed(&lock_path))?;
    if exists(cert)? {
        return Ok(());
    }
    let pair = generate()?;
    let key_text = zeroize::Zeroizing::new(pair.signing_key.serialize_pem());
    // The key first: a crash in between leaves a key without a certificate, which the next start replaces.
    write_atomically(key, key_text.as_bytes(), 0o600).map_err(failed(key))?;
    write_atomically(cert, pair.cert.pem().as_bytes(), 0o644).map_err(failed(cert))?;
    // Makes the two renames last over a power cut.
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed(directory))
}

/// Under the lock only: the temporary name is fixed.
fn write_atomically(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    // What a crash left behind could have other permissions.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().create_new(true).write(true).mode(mode).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

fn generate() -> Result<rcgen::CertifiedKey<rcgen::KeyPair>, TlsError> {
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    // A host name that is no DNS name cannot be in a certificate.
    let host = gethostname::gethostname().into_string().ok();
    let host = host.filter(|host| ServerName::try_from(host.as_str()).is_ok() && !names.contains(host));
    names.extend(host);
    let mut parameters = rcgen::CertificateParams::new(names)?;
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(rcgen::DnType::CommonName, "Tenantry self-signed");
    // No key usage: OpenSSL would not take it as its own issuer when a client has it as its root certificate.
    parameters.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    #[expect(clippy::disallowed_methods, reason = "a certificate's dates are wall-clock dates")]
    let now = SystemTime::now();
    // A day back, for clients whose clock is behind.
    parameters.not_before = now.checked_sub(DAY).unwrap_or(now).into();
    parameters.not_after = now.checked_add(TEN_YEARS).unwrap_or(now).into();
    let signing_key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let cert = parameters.self_signed(&signing_key)?;
    Ok(rcgen::CertifiedKey { cert, signing_key })
}

/// RFC 5929 `tls-server-end-point`: the certificate under the hash of its own signature, SHA-256 for MD5 and SHA-1.
/// `None` when that signature has no single hash, or one that we do not know.
#[must_use]
pub fn end_point_hash(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let algorithm = &parsed.signature_algorithm;
    let hash = match SignatureAlgorithm::try_from(algorithm) {
        // PSS names its hash in its parameters.
        Ok(SignatureAlgorithm::RSASSA_PSS(parameters)) => parameters.hash_algorithm_oid().to_id_string(),
        _ => algorithm.algorithm.to_id_string(),
    };
    match hash.as_str() {
        // RSA: md5, sha1, sha256; ECDSA: sha1, sha256; DSA: sha1, sha256; the hashes themselves: md5, sha1, sha256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2"
        | "1.2.840.10040.4.3"
        | "2.16.840.1.101.3.4.3.2"
        | "1.2.840.113549.2.5"
        | "1.3.14.3.2.26"
        | "2.16.840.1.101.3.4.2.1" => Some(Sha256::digest(certificate).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" | "2.16.840.1.101.3.4.2.2" => {
            Some(Sha384::digest(certificate).to_vec())
        }
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" | "2.16.840.1.101.3.4.2.3" => {
            Some(Sha512::digest(certificate).to_vec())
        }
        "1.2.840.113549.1.1.14" | "1.2.840.10045.4.3.1" | "2.16.840.1.101.3.4.3.1" | "2.16.840.1.101.3.4.2.4" => {
            Some(Sha224::digest(certificate).to_vec())
        }
        _ => None,
    }
}

/// How we look at one PostgreSQL server. Cheap to clone; the roots are read once, at `load`.
#[derive(Clone)]
pub struct Connector {
    connector: tokio_rustls::TlsConnector,
    name: ServerName<'static>,
    host: Arc<str>,
    direct: bool,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("host", &self.host).field("direct", &self.direct).finish_non_exhaustive()
    }
}

impl Connector {
    /// The same rules for a library that makes its own connections.
    #[must_use]
    pub fn client_config(&self) -> ClientConfig {
        ClientConfig::clone(self.connector.config())
    }

    /// As libpq's `sslmode`: with a `ca_file` even `require` and `prefer` check the chain (not the name). Whether TLS
    /// is tried at all, and what happens when it fails, is the caller's: `disable` here is like `prefer`.
    pub fn load(settings: &ServerTls, host: &str) -> Result<Self, TlsError> {
        let check_name = settings.mode == ServerTlsMode::VerifyFull;
        let name = match ServerName::try_from(host) {
            Ok(name) => name.to_owned(),
            Err(_) if check_name => return Err(TlsError::BadHost { host: host.to_owned() }),
            // The name is not looked at; an IP address is one that rustls does not send as SNI.
            Err(_) => ServerName::from(std::net::IpAddr::from([0, 0, 0, 0])),
        };
        let provider = provider();
        let algorithms = provider.signature_verification_algorithms;
        let verify = check_name || settings.mode == ServerTlsMode::VerifyCa || settings.ca_file.is_some();
        let roots = if verify { Some(Roots::load(settings.ca_file.as_deref(), &provider)?) } else { None };
        let verifier = Verifier { roots, check_name, algorithms };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        // PostgreSQL never resumes a session.
        config.resumption = Resumption::disabled();
        if settings.direct {
            config.alpn_protocols = vec![ALPN.to_vec()];
        }
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        Ok(Self { connector, name, host: host.into(), direct: settings.direct })
    }

    /// The client side of a handshake. No time limit of its own.
    pub async fn connect<S>(&self, stream: S) -> Result<tokio_rustls::client::TlsStream<S>, TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = self
            .connector
            .connect(self.name.clone(), stream)
            .await
            .map_err(|source| TlsError::Handshake { host: self.host.to_string(), source })?;
        if self.direct && stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            return Err(TlsError::NoAlpn { host: self.host.to_string() });
        }
        Ok(stream)
    }
}

/// The `tls-server-end-point` hash of the server's certificate, for SCRAM-SHA-256-PLUS. `None`: none is defined for it.
#[must_use]
pub fn peer_end_point<S>(stream: &tokio_rustls::client::TlsStream<S>) -> Option<Vec<u8>> {
    end_point_hash(stream.get_ref().1.peer_certificates()?.first()?)
}

/// Checks a server's certificate as far as the mode asks for, and its handshake signature always.
#[derive(Debug)]
struct Verifier {
    /// `None`: any certificate is taken.
    roots: Option<Roots>,
    check_name: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

#[derive(Debug)]
struct Roots {
    chain: Arc<WebPkiServerVerifier>,
    /// All of `ca_file`. A server certificate that is itself in it is trusted, as OpenSSL does: the self-signed
    /// `server.crt` that doubles as its own root, which webpki refuses (it is marked as a CA).
    pinned: Vec<CertificateDer<'static>>,
}

impl Roots {
    fn load(ca_file: Option<&Path>, provider: &Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let mut store = RootCertStore::empty();
        let mut pinned = Vec::new();
        if let Some(path) = ca_file {
            pinned = read_certificates(path)?;
            for certificate in &pinned {
                store
                    .add(certificate.clone())
                    .map_err(|error| TlsError::BadCertificate { path: path.into(), reason: error.to_string() })?;
            }
        } else {
            // One damaged file of the system's must not take the others with it.
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(provider));
        let chain = chain.build().map_err(|_| TlsError::NoRoots)?;
        Ok(Self { chain, pinned })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, RustlsError> {
        let Some(roots) = &self.roots else { return Ok(ServerCertVerified::assertion()) };
        if roots.pinned.contains(end_entity) {
            check_dates(end_entity, now)?;
            if self.check_name {
                rustls::client::verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        let result = roots.chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match result {
            // The name is the last thing that it checks: the chain is good.
            Err(RustlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name => Ok(ServerCertVerified::assertion()),
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        match bare_key(cert) {
            Some(key) => verify_tls13_signature_with_raw_key(message, &key, dss, &self.algorithms),
            None => verify_tls12_signature(message, cert, dss, &self.algorithms),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        match bare_key(cert) {
            Some(key) => verify_tls13_signature_with_raw_key(message, &key, dss, &self.algorithms),
            None => verify_tls13_signature(message, cert, dss, &self.algorithms),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The public key of a certificate that webpki cannot read (X.509 v1, as PostgreSQL's documentation long made them);
/// `None` for all others.
fn bare_key(certificate: &CertificateDer<'_>) -> Option<SubjectPublicKeyInfoDer<'static>> {
    if ParsedCertificate::try_from(certificate).is_ok() {
        return None;
    }
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(SubjectPublicKeyInfoDer::from(parsed.public_key().raw.to_vec()))
}

fn check_dates(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), RustlsError> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|_| RustlsError::InvalidCertificate(CertificateError::BadEncoding))?;
    // A date before 1970 counts as 1970: in the past either way.
    let at = |date: ASN1Time| {
        let seconds = u64::try_from(date.timestamp()).unwrap_or(0);
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    };
    let (not_before, not_after) = (at(parsed.validity().not_before), at(parsed.validity().not_after));
    if now < not_before {
        return Err(RustlsError::InvalidCertificate(CertificateError::NotValidYetContext { time: now, not_before }));
    }
    if now > not_after {
        return Err(RustlsError::InvalidCertificate(CertificateError::ExpiredContext { time: now, not_after }));
    }
    Ok(())
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
