//! Where archives lie: a directory, or S3 or what speaks like it. Files are found by numbers, never by a tenant's name.
//!
//! What always holds: in a directory, only Tenantry's own user can read an archive, and one that was stored is on the disk
//! with its directory, not only in memory; memory (tmpfs) takes archives only where the settings say so.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path as FilePath, PathBuf},
    sync::Arc,
};

use object_store::{ObjectStore, aws::AmazonS3Builder, local::LocalFileSystem, path::Path};
use tenantry_config::Admin;

use super::StepError;

/// Nobody else's business.
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// What a probe holds.
const PROBE: &[u8] = b"tenantry";

/// A place for one archive in the store that `admin.archives` names.
#[derive(Debug, Clone)]
pub struct Place {
    pub store: Arc<dyn ObjectStore>,
    pub path: Path,
    /// Of a store that is a directory.
    root: Option<PathBuf>,
}

impl Place {
    /// Of an archive that will be or was made: `<catalog>/<tenant>/<job>.dump`.
    pub fn of(admin: &Admin, catalog: &str, tenant: i64, job: i64) -> Result<Self, StepError> {
        let Self { store, path, root } = Self::open(&admin.archives)?;
        let path = path.child(catalog).child(tenant.to_string()).child(format!("{job}.dump"));
        Ok(Self { store, path, root })
    }

    /// Of one that the catalog knows.
    pub fn at(admin: &Admin, path: &str) -> Result<Self, StepError> {
        let path = Path::parse(path).map_err(|error| StepError::Refused(error.to_string()))?;
        Ok(Self { path, ..Self::open(&admin.archives)? })
    }

    /// Where all of them are.
    fn open(archives: &str) -> Result<Self, StepError> {
        if let Some(rest) = archives.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let store = AmazonS3Builder::from_env().with_bucket_name(bucket).build().map_err(refused)?;
            return Ok(Self { store: Arc::new(store), path: Path::from(prefix), root: None });
        }
        let root = PathBuf::from(archives);
        make_directory(&root)?;
        let store = LocalFileSystem::new_with_prefix(&root).map_err(refused)?.with_automatic_cleanup(true);
        Ok(Self { store: Arc::new(store), path: Path::default(), root: Some(root) })
    }

    /// Before anybody is kept waiting: it survives, and takes and gives and forgets.
    pub async fn probe(&self, is_volatile: bool) -> Result<(), StepError> {
        if let Some(root) = &self.root
            && !is_volatile
            && is_memory(root)
        {
            return Err(StepError::Refused(format!(
                "admin.archives: {} is in memory (tmpfs), and an archive there is gone with it; choose a disk or s3://, or \
                 set admin.archives_volatile = true",
                root.display()
            )));
        }
        self.prepare()?;
        let place = self.probe_path();
        let tried = async {
            self.store.put(&place, PROBE.into()).await?;
            let bytes = self.store.get(&place).await?.bytes().await?;
            self.store.delete(&place).await?;
            Ok(bytes == PROBE)
        };
        match tried.await {
            Ok(true) => Ok(()),
            Ok(false) => {
                Err(StepError::Refused("admin.archives: what is stored there comes back as another".to_owned()))
            }
            Err(error) => Err(refused(error)),
        }
    }

    fn probe_path(&self) -> Path {
        Path::from(format!("{}.probe", self.path))
    }

    /// Directories on the way, closed to others.
    pub fn prepare(&self) -> Result<(), StepError> {
        let Some(parent) = self.file().and_then(|file| file.parent().map(FilePath::to_owned)) else { return Ok(()) };
        make_directory(&parent)
    }

    /// Where it is, if it is a file.
    fn file(&self) -> Option<PathBuf> {
        Some(self.root.as_ref()?.join(self.path.as_ref()))
    }

    /// Away with what a crash left half done: a probe, and an upload, which a directory keeps beside the file, under its
    /// name and `#`. (S3 keeps it out of sight; a lifecycle rule of the bucket ends it.)
    pub fn sweep(&self) {
        let Some(whole) = self.file() else { return };
        let (Some(dir), Some(name)) = (whole.parent(), whole.file_name().and_then(|name| name.to_str())) else {
            return;
        };
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let is_ours = entry.file_name().to_str().is_some_and(|other| {
                other.strip_prefix(name).is_some_and(|rest| rest.starts_with('#') || rest.starts_with(".probe"))
            });
            if is_ours && let Err(error) = fs::remove_file(entry.path()) {
                tracing::warn!(%error, file = %entry.path().display(), "cannot be removed");
            }
        }
    }

    /// It was uploaded: now it is closed to others and on the disk, and so are the directories that lead there.
    pub async fn settle(&self) -> Result<(), StepError> {
        let (Some(file), Some(root)) = (self.file(), self.root.clone()) else { return Ok(()) };
        let settled = tokio::task::spawn_blocking(move || sync(&file, &root)).await;
        let settled = settled.map_err(|error| StepError::Away(error.to_string()))?;
        settled.map_err(|error| StepError::Refused(format!("the archive cannot be stored: {error}")))
    }

    /// Nothing is there afterwards.
    pub async fn forget(&self) -> Result<(), StepError> {
        self.sweep();
        match self.store.delete(&self.path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(refused(error)),
        }
    }
}

fn refused(error: object_store::Error) -> StepError {
    StepError::Refused(format!("admin.archives: {error}"))
}

/// One that was there keeps its mode.
fn make_directory(path: &FilePath) -> Result<(), StepError> {
    let made = DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path);
    made.map_err(|error| StepError::Refused(format!("admin.archives: {}: {error}", path.display())))
}

fn sync(file: &FilePath, root: &FilePath) -> io::Result<()> {
    fs::set_permissions(file, Permissions::from_mode(FILE_MODE))?;
    File::open(file)?.sync_all()?;
    for dir in file.ancestors().skip(1).take_while(|dir| dir.starts_with(root)) {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn is_memory(path: &FilePath) -> bool {
    use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
    /// Which nix has no name for.
    const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
    statfs(path).is_ok_and(|found| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&found.filesystem_type()))
}

#[cfg(not(target_os = "linux"))]
fn is_memory(_: &FilePath) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &FilePath) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn archives_are_for_their_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/archives");
        let admin = Admin { archives: root.display().to_string(), ..Admin::default() };
        let place = Place::of(&admin, "abc123", 5, 7).unwrap();
        place.prepare().unwrap();
        place.store.put(&place.path, PROBE.into()).await.unwrap();
        place.settle().await.unwrap();
        let file = root.join("abc123/5/7.dump");
        assert_eq!((mode(&root), mode(&root.join("abc123/5")), mode(&file)), (0o700, 0o700, 0o600));
        fs::write(root.join("abc123/5/7.dump#1"), "half").unwrap();
        place.forget().await.unwrap();
        assert!(!root.join("abc123/5").exists() || fs::read_dir(root.join("abc123/5")).unwrap().next().is_none());
        place.forget().await.unwrap();
    }

    #[tokio::test]
    async fn a_store_that_does_not_work_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let admin = Admin { archives: dir.path().join("file/archives").display().to_string(), ..Admin::default() };
        assert!(matches!(Place::of(&admin, "abc123", 5, 7), Err(StepError::Refused(_))));
        let admin = Admin { archives: dir.path().join("archives").display().to_string(), ..Admin::default() };
        let place = Place::of(&admin, "abc123", 5, 7).unwrap();
        place.probe(true).await.unwrap();
        let left: Vec<_> = walk(dir.path());
        assert_eq!(left, [dir.path().join("file")]);
    }

    fn walk(dir: &FilePath) -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path());
        entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn memory_takes_no_archive_unless_it_is_told_to() {
        if !is_memory(FilePath::new("/dev/shm")) {
            return;
        }
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let admin = Admin { archives: dir.path().display().to_string(), ..Admin::default() };
        let place = Place::of(&admin, "abc123", 5, 7).unwrap();
        let refused = place.probe(false).await.unwrap_err().to_string();
        assert!(refused.contains("admin.archives_volatile"), "{refused}");
        place.probe(true).await.unwrap();
    }
}
