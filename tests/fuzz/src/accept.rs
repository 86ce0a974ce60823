//! A hostile client at the real door: what it is answered, and that it is let in only with a secret.

use std::{
    io::ErrorKind,
    path::PathBuf,
    sync::{
        Arc, Once,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use tempfile::TempDir;
use tenantry_config::Overrides;
use tenantry_proxy::Directory;
use tenantry_wire::{
    error::Fields,
    frame::{self, HEADER},
    sasl::Authentication,
    tag::backend,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    runtime::{Builder, Runtime},
};

const METHODS: [&str; 4] = ["scram-sha-256", "md5", "password", "trust"];
/// The secret of `plain`, and what those of `kept` and `old` were made of.
const SECRET: &[u8] = b"fuzzpw";
const SCRAM: &str = "SCRAM-SHA-256$1:MDEyMzQ1Njc4OWFiY2RlZg==$dbvcLNHJYFcMwpcrfny/hQfiGd5YJWu29QKl6QHcuAo=:+sXD6zd4TC2bBoQeojkP1zM/nJn1lbIhMIZi5pVWq9o=";
const MD5: &str = "md5661598ff504a0905b082f5727bc73037";
/// Longer than every deadline of the settings together.
const DEADLINE: Duration = Duration::from_secs(20);

/// One data plane for each method of authentication, all on one thread.
struct Stage {
    runtime: Runtime,
    sockets: Vec<PathBuf>,
    _directories: Vec<Arc<Directory>>,
    _dir: TempDir,
}

thread_local! {
    static STAGE: std::cell::OnceCell<Stage> = const { std::cell::OnceCell::new() };
}

static PANICKED: AtomicBool = AtomicBool::new(false);

/// The first byte of `data` chooses the method, the second where the rest is cut in two. `make` may change the runtime
/// that is made at the first call of a thread.
pub fn accept(data: &[u8], make: impl FnOnce(&mut Builder)) {
    let [method, cut, bytes @ ..] = data else { return };
    let method = usize::from(*method) % METHODS.len();
    let (head, tail) = bytes.split_at(usize::from(*cut).min(bytes.len()));
    STAGE.with(|stage| {
        let stage = stage.get_or_init(|| Stage::new(make));
        let talk = async { tokio::time::timeout(DEADLINE, talk(&stage.sockets[method], head, tail)).await };
        let answer = stage.runtime.block_on(talk).expect("the connection is closed in the end");
        assert!(!PANICKED.load(SeqCst), "a task panicked");
        check(METHODS[method], bytes, &answer);
    });
}

impl Stage {
    fn new(make: impl FnOnce(&mut Builder)) -> Self {
        // The runtime swallows the panics of tasks.
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                PANICKED.store(true, SeqCst);
                before(info);
            }));
        });
        let mut builder = Builder::new_current_thread();
        make(builder.enable_all());
        let runtime = builder.build().expect("a runtime");
        let dir = tempfile::Builder::new().prefix("tenantry-fuzz-").tempdir().expect("a directory");
        let mut sockets = Vec::new();
        let mut directories = Vec::new();
        for method in METHODS {
            let place = dir.path().join(method);
            std::fs::create_dir(&place).expect("a directory");
            let file = place.join("tenantry.toml");
            std::fs::write(&file, settings(&place.display().to_string(), method)).expect("a file");
            let settings = tenantry_config::load(Some(&file), &Overrides::default()).expect("good settings");
            let directory = runtime.block_on(Directory::start(settings)).expect("it starts");
            let port = directory.addresses().first().expect("an address").port();
            sockets.push(place.join(format!(".s.PGSQL.{port}")));
            directories.push(directory);
        }
        Self { runtime, sockets, _directories: directories, _dir: dir }
    }
}

/// Nothing listens on port 1.
fn settings(place: &str, method: &str) -> String {
    // Not over this Unix socket, but passwords in the clear are only taken where TLS is to be had.
    let tls = if method == "password" { "allow" } else { "disable" };
    let mut settings = format!(
        r#"
        [listen]
        addresses = ["127.0.0.1:0"]
        unix_socket_dir = "{place}"
        client_login_timeout = "1s"
        tls = {{ mode = "{tls}", state_dir = "{place}" }}
        [auth]
        auth_type = "{method}"
        scram_iterations = 1
        [pool]
        query_wait_timeout = "20ms"
        [admin]
        address = ""
        [servers.main]
        host = "127.0.0.1"
        port = 1
        "#
    );
    // No hash of one method serves the other.
    let roles = [("plain", "fuzzpw", true), ("kept", SCRAM, method != "md5"), ("old", MD5, method != "scram-sha-256")];
    for (name, password, _) in roles.into_iter().filter(|(_, _, fits)| *fits) {
        settings += &format!("[[tenants.alpha.roles]]\nname = \"{name}\"\npassword = \"{password}\"\n");
    }
    settings
}

/// Everything that is answered until the connection is closed.
async fn talk(socket: &PathBuf, head: &[u8], tail: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).await.expect("it listens");
    let mut answer = Vec::new();
    // A peer that was sent away already does not take the rest; what it said is still there to be read.
    let _ = stream.write_all(head).await;
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
    let _ = stream.write_all(tail).await;
    let _ = stream.shutdown().await;
    match stream.read_to_end(&mut answer).await {
        Ok(_) => {}
        Err(error) => assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}"),
    }
    answer
}

fn check(method: &str, sent: &[u8], answer: &[u8]) {
    // One byte each for a request of TLS and one of GSSAPI encryption. A NoticeResponse would begin alike; none is due.
    let refusals = answer.iter().take_while(|byte| **byte == b'N').count();
    assert!(refusals <= 2, "{answer:?}");
    let mut rest = &answer[refusals..];
    let (mut admitted, mut negotiated, mut keyed) = (false, false, false);
    while !rest.is_empty() {
        let header = frame::server_header(rest).expect("a message").expect("a whole header");
        let body = rest.get(HEADER..header.total()).expect("a whole message");
        rest = &rest[header.total()..];
        match header.tag {
            backend::ERROR_RESPONSE => {
                let fields = Fields::new(body);
                assert!(fields.code().is_some() && fields.message().is_some() && body.ends_with(b"\0\0"));
                assert!(fields.is_fatal(), "no session has begun: {:?}", fields.message());
                assert!(rest.is_empty(), "said after the end: {rest:?}");
            }
            backend::NEGOTIATE_PROTOCOL_VERSION => {
                assert!(!negotiated && !admitted);
                negotiated = true;
            }
            backend::AUTHENTICATION => match Authentication::read(body).expect("a request") {
                Authentication::Ok => {
                    assert!(!admitted);
                    admitted = true;
                }
                Authentication::Other(kind) => panic!("authentication {kind}"),
                _ => assert!(!admitted),
            },
            backend::BACKEND_KEY_DATA => {
                assert!(admitted && !keyed);
                keyed = true;
            }
            backend::PARAMETER_STATUS => assert!(admitted),
            backend::READY_FOR_QUERY => assert!(keyed),
            other => panic!("a message of type {other}"),
        }
    }
    if admitted {
        match method {
            "trust" => {}
            "password" => assert!(sent.windows(SECRET.len()).any(|w| w == SECRET), "let in without the password"),
            // No bytes that were written before the challenge can answer it.
            _ => panic!("let in by {method}"),
        }
    }
}
