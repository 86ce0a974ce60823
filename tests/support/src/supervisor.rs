//! A child process that cannot outlive this one.
//!
//! A small shell sits between: it reads commands from a pipe and, when the pipe closes (this process ended, however),
//! kills its child by pid and removes the child's directory. Without `unsafe` there is no PR_SET_PDEATHSIG.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    ops::Deref,
    os::unix::{
        fs::{MetadataExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

const SCRIPT: &str = r#"
trap '' INT TERM HUP
pid=
while read -r word more; do
  case $word in
    start) (test -z "$KIT_FILES" || ulimit -n "$KIT_FILES"; exec "$@" $more) </dev/null >>"$KIT_DIR/log" 2>&1 & pid=$!; echo "$pid";;
    wait) wait "$pid"; echo "$?";;
  esac
done
test -z "$pid" || kill -"$KIT_SIGNAL" "$pid" 2>/dev/null
wait
test -n "$KIT_KEEP" || rm -rf "$KIT_DIR"
"#;

/// A supervised program; its output is in `dir/log`.
pub struct Supervised {
    dir: PathBuf,
    shell: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    pid: u32,
}

/// How a program is run.
pub struct Plan<'a> {
    /// Belongs to the program; removed at the end.
    pub dir: &'a Path,
    /// Program and arguments.
    pub command: Vec<String>,
    pub user: Option<User>,
    /// The signal that ends it when this process is gone.
    pub signal: &'a str,
    /// RLIMIT_NOFILE.
    pub max_files: Option<u32>,
}

impl Supervised {
    /// Starts the shell and the program.
    pub fn start(plan: Plan<'_>) -> Self {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(SCRIPT)
            .arg("supervisor")
            .args(&plan.command)
            .current_dir("/")
            .env("KIT_DIR", plan.dir)
            .env("KIT_SIGNAL", plan.signal)
            .env("KIT_FILES", plan.max_files.map(|n| n.to_string()).unwrap_or_default())
            .env("KIT_KEEP", std::env::var("TENANTRY_TEST_KEEP").unwrap_or_default())
            .env("LC_ALL", "C")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PG") || name.starts_with("TENANTRY__")) {
            command.env_remove(name);
        }
        if let Some(user) = plan.user {
            command.uid(user.uid).gid(user.gid);
        }
        let mut shell = command.spawn().expect("start sh");
        let commands = shell.stdin.take();
        let answers = BufReader::new(shell.stdout.take().expect("stdout is piped"));
        let mut supervised = Self { dir: plan.dir.to_owned(), shell, commands, answers, pid: 0 };
        supervised.again();
        supervised
    }

    /// Starts the program once more, after it ended.
    pub fn again(&mut self) {
        self.again_with(&[]);
    }

    /// The same, with more words on its command line; none of them has a space in it.
    pub fn again_with(&mut self, words: &[&str]) {
        self.pid = self.ask(&format!("start {}", words.join(" "))).parse().expect("a pid");
    }

    /// Of the program, not of the shell.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether the program still runs.
    pub fn runs(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        // A zombie is waited for by the shell later.
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
    }

    /// Waits for the program's end; blocks. 128 + n after signal n.
    pub fn wait(&mut self) -> i32 {
        self.ask("wait").parse().expect("an exit code")
    }

    /// Everything that the program printed.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("log")).unwrap_or_default()).into_owned()
    }

    pub fn signal(&self, name: &str) {
        signal(self.pid, name);
    }

    fn ask(&mut self, word: &str) -> String {
        let commands = self.commands.as_mut().expect("open until drop");
        writeln!(commands, "{word}").expect("the supervisor lives");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the supervisor answers");
        line.trim().to_owned()
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.commands = None;
        let _ = self.shell.wait();
    }
}

/// `kill -NAME PID`.
pub fn signal(pid: u32, name: &str) {
    let _ = Command::new("sh").arg("-c").arg(format!("kill -{name} {pid}")).stderr(Stdio::null()).status();
}

/// Who PostgreSQL runs as.
#[derive(Debug, Clone, Copy)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

impl User {
    /// `postgres` or `nobody` if we are root, which PostgreSQL refuses to be; else nobody in particular.
    pub fn unprivileged() -> Option<Self> {
        if uid() != 0 {
            return None;
        }
        let accounts = fs::read_to_string("/etc/passwd").expect("/etc/passwd");
        let find = |name: &str| {
            let mut fields = accounts.lines().find(|line| line.starts_with(&format!("{name}:")))?.split(':').skip(2);
            Some(Self { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
        };
        Some(find("postgres").or_else(|| find("nobody")).expect("root needs a user postgres or nobody"))
    }

    pub fn own(user: Option<Self>, path: &Path) {
        if let Some(user) = user {
            chown(path, Some(user.uid), Some(user.gid)).expect("chown");
        }
    }
}

/// A new directory below the temporary one, short enough for Unix sockets. Whoever makes it removes it.
pub fn scratch(kind: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("tenantry-{kind}-{}-{n}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("create a scratch directory");
    dir
}

/// A directory as `scratch` makes it, gone with this.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    #[must_use]
    pub fn new(kind: &str) -> Self {
        Self(scratch(kind))
    }
}

impl Deref for Scratch {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The user that runs the tests.
fn uid() -> u32 {
    fs::metadata("/proc/self").map_or(1, |m| m.uid())
}

/// The ports of this process, each with a lock that other test processes heed.
static PORTS: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// A TCP port that is free now, below the range that the kernel hands out by itself. No other test is given it before this
/// process has ended: a client must not meet another test's server where its own has not begun yet.
pub fn free_port() -> u16 {
    let locks = std::env::temp_dir().join(format!("tenantry-ports-{}", uid()));
    fs::create_dir_all(&locks).expect("a directory for the locks of ports");
    loop {
        let port = rand::random_range(10_000..32_000);
        let lock = File::create(locks.join(format!("{port}"))).expect("a lock file");
        if lock.try_lock().is_ok() && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            PORTS.lock().expect("not poisoned").push(lock);
            return port;
        }
    }
}
