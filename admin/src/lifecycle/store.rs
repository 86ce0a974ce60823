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

/// `<catalog>/<tenant>/<job>.dump`
pub fn place(prefix: &Path, catalog: &str, tenant: i64, job: i64) -> Path {
    prefix.clone().child(catalog).child(tenant.to_string()).child(format!("{job}.dump"))
}
