//! The demo's directory, and the user that PostgreSQL runs as in it.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
};

use nix::unistd::{Uid, User};
use tempfile::TempDir;

use crate::failure::Failure;

/// Removed when dropped, unless it is to be kept.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    temporary: Option<TempDir>,
    /// Whom PostgreSQL runs as, if not as us: it refuses to run as root.
    pub user: Option<(u32, u32)>,
}

impl Place {
    pub fn make(keep: Option<PathBuf>) -> Result<Self, Failure> {
        let user = other_user()?;
        let (path, temporary) = match keep {
            Some(path) => (kept(path)?, None),
            None => {
                let made = tempfile::Builder::new().prefix("tenantry-demo-").tempdir();
                let made = made.map_err(Failure::internal("cannot make a temporary directory"))?;
                (made.path().to_owned(), Some(made))
            }
        };
        let place = Self { path, temporary, user };
        // The other user must be able to walk through; what is secret is in files of mode 600.
        fs::set_permissions(&place.path, fs::Permissions::from_mode(0o711)).map_err(place.failure())?;
        fs::create_dir(place.state()).map_err(place.failure())?;
        fs::create_dir(place.cluster()).map_err(place.failure())?;
        place.give(&place.cluster())?;
        Ok(place)
    }

    /// PostgreSQL's own directory: the data, its socket, its log.
    pub fn cluster(&self) -> PathBuf {
        self.path.join("postgres")
    }

    /// Where Tenantry keeps its certificate.
    pub fn state(&self) -> PathBuf {
        self.path.join("state")
    }

    /// The certificate that Tenantry made for itself.
    pub fn certificate(&self) -> PathBuf {
        self.state().join("tenantry.crt")
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hands a path to the user that PostgreSQL runs as.
    pub fn give(&self, path: &Path) -> Result<(), Failure> {
        match self.user {
            Some((user, group)) => chown(path, Some(user), Some(group)).map_err(self.failure()),
            None => Ok(()),
        }
    }

    /// A file that only we can read.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf, Failure> {
        let path = self.path.join(name);
        fs::write(&path, "").map_err(self.failure())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(self.failure())?;
        fs::write(&path, text).map_err(self.failure())?;
        Ok(path)
    }

    /// Removes what is not to be kept; what cannot be removed is told, not hidden.
    pub fn remove(self) {
        if let Some(Err(error)) = self.temporary.map(TempDir::close) {
            tracing::warn!(%error, "cannot remove {}", self.path.display());
        }
    }

    fn failure(&self) -> impl FnOnce(std::io::Error) -> Failure {
        Failure::internal(format!("cannot prepare {}", self.path.display()))
    }
}

fn kept(path: PathBuf) -> Result<PathBuf, Failure> {
    let failure = |error: std::io::Error| Failure::Usage(format!("--keep {}: {error}", path.display()));
    fs::create_dir_all(&path).map_err(failure)?;
    if fs::read_dir(&path).map_err(failure)?.next().is_some() {
        return Err(Failure::Usage(format!("--keep {}: is not empty; name a new directory", path.display())));
    }
    path.canonicalize().map_err(failure)
}

fn other_user() -> Result<Option<(u32, u32)>, Failure> {
    if !Uid::effective().is_root() {
        return Ok(None);
    }
    ["postgres", "nobody"]
        .iter()
        .find_map(|name| User::from_name(name).ok().flatten())
        .map(|user| Some((user.uid.as_raw(), user.gid.as_raw())))
        .ok_or_else(|| {
            Failure::Unavailable("root cannot run PostgreSQL, and there is no user postgres or nobody".to_owned())
        })
}
