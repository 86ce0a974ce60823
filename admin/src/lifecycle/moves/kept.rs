//! The copy that a move left behind, when nobody needs it any more.

use serde_json::{Value, json};

use super::{Site, StepError, at, roles};
use crate::{catalog::model::Entry, lifecycle::database};

/// Its database, if it is still that one, and the roles that no other tenant needs there. A server that is not in the settings
/// any more is left as it is, and told.
pub async fn drop(site: &mut Site, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let Some(kept) = &entry.kept else { return Ok(()) };
    if !site.plane.file().servers.contains_key(&kept.server) {
        result["left_at"] = json!(kept.server);
        return Ok(());
    }
    let place = at(entry, &kept.server);
    match database::look(site, &place.server, &kept.database).await? {
        Some(found) if found.oid == kept.oid => database::drop_named(site, &place.server, &kept.database).await?,
        _ => {}
    }
    let mut left = Vec::new();
    for (role, _) in roles::of_tenant(&place).into_iter().rev() {
        if !database::drop_role(site, &place, &role).await? {
            left.push(role);
        }
    }
    result["roles_left"] = json!(left);
    Ok(())
}
