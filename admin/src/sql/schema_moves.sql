-- The catalog's version with moves between servers.

-- The copy that a move left at the old server, until it is confirmed or rolled back: where it is, and how it stands to the
-- tenant's database (catalog::model::Kept). NULL: there is none.
ALTER TABLE tenantry.tenants ADD COLUMN kept jsonb;
