//! Where an uploaded file waits for its job: `admin.imports_dir`.
//!
//! What always holds: only Tenantry's own user can read it, and it is on the disk before the job is written down; a file is
//! locked while it is uploaded and until its job is known, and one that is neither locked nor some open job's is swept.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::{catalog::disk::hex, jobs::work::Work};

/// Nobody else's business.
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
const SUFFIX: &str = ".sqlite3";
/// Bytes of the number that is its name.
const NUMBER: usize = 12;
/// Of one read.
const CHUNK: usize = 256 << 10;

/// A file that is being uploaded; dropped before it is kept, it is gone.
#[derive(Debug)]
pub struct Upload {
    path: PathBuf,
    name: String,
    file: File,
    digest: Sha256,
    bytes: u64,
    is_kept: bool,
}

impl Upload {
    /// # Errors
    /// The directory takes no file.
    pub fn begin(dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(dir)?;
        let name = format!("{}{SUFFIX}", hex(&rand::random::<[u8; NUMBER]>()));
        let path = dir.join(&name);
        let file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(&path)?;
        let upload = Self { path, name, file, digest: Sha256::new(), bytes: 0, is_kept: false };
        upload.file.lock()?;
        Ok(upload)
    }

    /// # Errors
    /// The disk is full, or worse.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.digest.update(bytes);
        self.bytes += u64::try_from(bytes.len()).unwrap_or(0);
        Ok(())
    }

    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// On the disk: its name in the directory, and its checksum.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn settle(&mut self) -> io::Result<(String, String)> {
        self.file.sync_all()?;
        if let Some(dir) = self.path.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok((self.name.clone(), hex(&self.digest.clone().finalize())))
    }

    /// A job has it now.
    pub fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.is_kept {
            remove(&self.path);
        }
    }
}

/// Where a job's file is.
#[must_use]
pub fn place(dir: &Path, name: &str) -> PathBuf {
    dir.join(name)
}

/// Nothing is there afterwards.
pub fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, file = %path.display(), "an uploaded file cannot be removed");
        }
        _ => {}
    }
}

/// Whether it is what was uploaded.
///
/// # Errors
/// In words, for whoever began the job.
pub fn verify(path: &Path, sha256: &str) -> Result<(), String> {
    let cannot = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => "the uploaded file is not here: admin.imports_dir must be one directory for all \
             processes that share the catalog; upload it again"
            .to_owned(),
        _ => format!("the uploaded file cannot be read: {error}"),
    };
    let mut file = File::open(path).map_err(cannot)?;
    let (mut digest, mut buffer) = (Sha256::new(), vec![0; CHUNK]);
    loop {
        match io::Read::read(&mut file, &mut buffer).map_err(cannot)? {
            0 => break,
            read => digest.update(buffer.get(..read).unwrap_or_default()),
        }
    }
    if hex(&digest.finalize()) == sha256 {
        Ok(())
    } else {
        Err("the uploaded file was changed since; upload it again".to_owned())
    }
}

/// Files that nobody is at work on, for `sweep` to remove unless an open job has them. Asked for before the jobs are.
#[must_use]
pub fn left(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_ours = |path: &PathBuf| path.file_name().is_some_and(|name| is_name_of_ours(&name.to_string_lossy()));
    entries.filter(is_ours).filter(|path| File::open(path).is_ok_and(|file| file.try_lock().is_ok())).collect()
}

/// As `Upload::begin` makes them: a directory may hold other files of that kind.
fn is_name_of_ours(name: &str) -> bool {
    let of_ours = name.strip_suffix(SUFFIX).filter(|number| number.len() == 2 * NUMBER);
    of_ours.is_some_and(|number| number.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

/// Removes those of `left` that are none of the jobs'.
pub fn sweep<'a>(left: &[PathBuf], jobs: impl Iterator<Item = &'a Work>) {
    let wanted: BTreeSet<&str> = jobs
        .filter_map(|work| match work {
            Work::Import { file, .. } => Some(file.as_str()),
            _ => None,
        })
        .collect();
    for path in left {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if !wanted.contains(name.as_str()) {
            tracing::info!(file = %path.display(), "an uploaded file that no job has is removed");
            remove(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn work(file: &str) -> Work {
        Work::Import { file: file.to_owned(), sha256: String::new(), bytes: 0, dry_run: false, replace: Vec::new() }
    }

    #[test]
    fn an_upload_is_its_owners_alone_and_gone_unless_it_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let spool = dir.path().join("a/imports");
        let mut upload = Upload::begin(&spool).unwrap();
        upload.write(b"abc").unwrap();
        let (name, sha256) = upload.settle().unwrap();
        assert_eq!(sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&spool), mode(&place(&spool, &name))), (0o700, 0o600));
        drop(upload);
        assert!(!place(&spool, &name).exists());
    }

    #[test]
    fn what_is_changed_or_gone_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut upload = Upload::begin(dir.path()).unwrap();
        upload.write(b"abc").unwrap();
        let (name, sha256) = upload.settle().unwrap();
        upload.keep();
        let path = place(dir.path(), &name);
        assert_eq!(verify(&path, &sha256), Ok(()));
        fs::write(&path, "abd").unwrap();
        assert!(verify(&path, &sha256).unwrap_err().contains("changed"));
        remove(&path);
        assert!(verify(&path, &sha256).unwrap_err().contains("imports_dir"));
    }

    #[test]
    fn a_sweep_leaves_uploads_under_way_and_files_of_open_jobs() {
        let dir = tempfile::tempdir().unwrap();
        let under_way = Upload::begin(dir.path()).unwrap();
        let mut of_job = Upload::begin(dir.path()).unwrap();
        let (of_job_name, _) = of_job.settle().unwrap();
        of_job.keep();
        fs::write(dir.path().join(format!("{}{SUFFIX}", "0a".repeat(NUMBER))), "").unwrap();
        fs::write(dir.path().join("db.sqlite3"), "").unwrap();
        sweep(&left(dir.path()), [work(&of_job_name)].iter());
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let mut wanted = vec![under_way.name.clone(), of_job_name, "db.sqlite3".to_owned()];
        wanted.sort();
        assert_eq!(names, wanted);
    }
}
