//! The last known catalog on disk: enough to start and serve while the control database is away.
//!
//! What always holds: the file is whole or not there (written beside, synced, renamed); one that was damaged is refused,
//! never half believed; only we can read it, since it holds verifiers.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::model::Known;

const FILE: &str = "catalog.json";
const FORMAT: u32 = 1;

/// Why there is no catalog on disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
    #[error(
        "{0}: is damaged (its checksum does not fit); start once with the control database within reach, or remove it"
    )]
    Damaged(PathBuf),
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    format: u32,
    sha256: String,
    /// As text, so that the checksum is over what was written and not over what somebody parsed.
    catalog: String,
}

/// `None`: none was ever written.
pub fn load(dir: &Path) -> Result<Option<Known>, DiskError> {
    let path = dir.join(FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(DiskError::Io(path, error)),
    };
    let read = || {
        let envelope: Envelope = serde_json::from_str(&text).ok()?;
        let fits = envelope.format == FORMAT && envelope.sha256 == digest(&envelope.catalog);
        fits.then(|| serde_json::from_str(&envelope.catalog).ok())?
    };
    read().map(Some).ok_or(DiskError::Damaged(path))
}

pub fn save(dir: &Path, known: &Known) -> Result<(), DiskError> {
    let path = dir.join(FILE);
    let wrong = |error: io::Error| DiskError::Io(path.clone(), error);
    let catalog = serde_json::to_string(known).map_err(|error| wrong(error.into()))?;
    let envelope = Envelope { format: FORMAT, sha256: digest(&catalog), catalog };
    let text = serde_json::to_vec(&envelope).map_err(|error| wrong(error.into()))?;
    fs::create_dir_all(dir).map_err(wrong)?;
    let beside = dir.join(format!(".{FILE}.new"));
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside).map_err(wrong)?;
    file.write_all(&text).and_then(|()| file.sync_all()).map_err(wrong)?;
    fs::rename(&beside, &path).and_then(|()| fs::File::open(dir)?.sync_all()).map_err(wrong)
}

fn digest(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

/// Lower case.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_loaded_and_what_was_damaged_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path()).unwrap().is_none());
        let known = Known { catalog: "abc123".into(), revision: 7, ..Known::default() };
        save(dir.path(), &known).unwrap();
        assert_eq!(load(dir.path()).unwrap().unwrap(), known);
        let path = dir.path().join(FILE);
        let text = fs::read_to_string(&path).unwrap();
        for damaged in [text.replace(":7,", ":8,"), text[..text.len() / 2].to_owned(), String::new()] {
            fs::write(&path, damaged).unwrap();
            assert!(matches!(load(dir.path()), Err(DiskError::Damaged(_))));
        }
    }
}
