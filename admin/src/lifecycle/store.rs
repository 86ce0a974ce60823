//! Where archives lie: a directory, or S3 or what speaks like it. Files are found by numbers, never by a tenant's name.

use std::{path::Path as FilePath, sync::Arc};

use object_store::{ObjectStore, aws::AmazonS3Builder, local::LocalFileSystem, path::Path};

use super::StepError;

/// The store that `admin.archives` names; a directory is made if it is not there.
pub fn open(archives: &str) -> Result<(Arc<dyn ObjectStore>, Path), StepError> {
    if let Some(rest) = archives.strip_prefix("s3://") {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let store = AmazonS3Builder::from_env().with_bucket_name(bucket).build().map_err(refused)?;
        return Ok((Arc::new(store), Path::from(prefix)));
    }
    std::fs::create_dir_all(FilePath::new(archives))
        .map_err(|error| StepError::Away(format!("admin.archives: {archives}: {error}")))?;
    let store = LocalFileSystem::new_with_prefix(archives).map_err(refused)?;
    Ok((Arc::new(store.with_automatic_cleanup(true)), Path::default()))
}

fn refused(error: object_store::Error) -> StepError {
    StepError::Refused(format!("admin.archives: {error}"))
}

/// Away with an upload that a crash left half done: a directory keeps it beside the file, under its name and `#`. (S3 keeps
/// it out of sight; a lifecycle rule of the bucket ends it.)
pub fn sweep(archives: &str, path: &Path) {
    if archives.starts_with("s3://") {
        return;
    }
    let whole = FilePath::new(archives).join(path.as_ref());
    let (Some(dir), Some(name)) = (whole.parent(), whole.file_name().and_then(|name| name.to_str())) else { return };
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_ours = entry
            .file_name()
            .to_str()
            .is_some_and(|other| other.strip_prefix(name).is_some_and(|rest| rest.starts_with('#')));
        if is_ours {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// `<catalog>/<tenant>/<job>.dump`
pub fn place(prefix: &Path, catalog: &str, tenant: i64, job: i64) -> Path {
    prefix.clone().child(catalog).child(tenant.to_string()).child(format!("{job}.dump"))
}

/// Whether it takes an object, and gives it back.
pub async fn probe(archives: &str) -> Result<(), StepError> {
    let (store, prefix) = open(archives).map_err(|error| StepError::Refused(error.to_string()))?;
    let path = prefix.child("probe").child(format!("{:016x}", rand::random::<u64>()));
    let said = b"tenantry".as_slice();
    store.put(&path, said.into()).await.map_err(refused)?;
    let heard = store.get(&path).await.map_err(refused)?.bytes().await.map_err(refused)?;
    store.delete(&path).await.map_err(refused)?;
    if heard != said {
        return Err(StepError::Refused(format!("admin.archives: {archives} does not give back what it takes")));
    }
    Ok(())
}
