-- Version 1 of the catalog. Every later version is a file of its own, applied in order, each in one transaction.
CREATE SCHEMA IF NOT EXISTS tenantry;

-- One row: which version of this schema, which installation, and how many changes there were.
CREATE TABLE tenantry.meta (
    one       boolean PRIMARY KEY DEFAULT true CHECK (one),
    version   integer NOT NULL,
    -- In the names of databases that are being made, so that two catalogs may share a server.
    catalog   text    NOT NULL CHECK (catalog ~ '^[a-z0-9]{6}$'),
    revision  bigint  NOT NULL DEFAULT 0,
    -- Grows with every process that takes the jobs over: whoever had them before writes nothing any more.
    leader    bigint  NOT NULL DEFAULT 0
);

CREATE TABLE tenantry.tenants (
    number      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name        text        NOT NULL CHECK (name ~ '^[a-z][a-z0-9_]{0,47}$'),
    state       text        NOT NULL,
    -- New transactions wait for a job, whatever the state.
    held        boolean     NOT NULL DEFAULT false,
    server      text        NOT NULL,
    database    text        NOT NULL,
    owner_role  text        NOT NULL,
    aliases     text[]      NOT NULL DEFAULT '{}',
    version     bigint      NOT NULL DEFAULT 1,
    spec        jsonb       NOT NULL,
    roles       jsonb       NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);
-- A tombstone keeps its row and gives its name back.
CREATE UNIQUE INDEX tenants_name ON tenantry.tenants (name) WHERE state <> 'dropped';
CREATE UNIQUE INDEX tenants_database ON tenantry.tenants (server, database) WHERE state <> 'dropped';

-- Every name that leads to a tenant, or will: of tenants and their aliases (space ''), of databases (space '@' and the
-- server). Written with what they belong to, in one transaction; a rename reserves the new ones before it begins.
CREATE TABLE tenantry.names (
    space     text    NOT NULL,
    name      text    NOT NULL,
    tenant    bigint  NOT NULL REFERENCES tenantry.tenants,
    reserved  boolean NOT NULL DEFAULT false,
    PRIMARY KEY (space, name)
);
CREATE INDEX names_tenant ON tenantry.names (tenant);

CREATE TABLE tenantry.jobs (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant      bigint      NOT NULL REFERENCES tenantry.tenants,
    name        text        NOT NULL,
    work        jsonb       NOT NULL,
    state       text        NOT NULL DEFAULT 'queued'
                CHECK (state IN ('queued', 'running', 'undoing', 'succeeded', 'failed', 'cancelled')),
    -- The step that runs or comes next; while undoing, of the way back.
    step        integer     NOT NULL DEFAULT 0,
    progress    text,
    result      jsonb       NOT NULL DEFAULT '{}',
    error       text,
    cancel      boolean     NOT NULL DEFAULT false,
    -- Who asked, from where, in which request: for the audit log, at the end.
    actor       text        NOT NULL,
    peer        text        NOT NULL DEFAULT '',
    request     text        NOT NULL DEFAULT '',
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);
-- One job at a time for a tenant.
CREATE UNIQUE INDEX jobs_busy ON tenantry.jobs (tenant) WHERE state IN ('queued', 'running', 'undoing');

CREATE TABLE tenantry.job_events (
    id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job   bigint      NOT NULL REFERENCES tenantry.jobs,
    at    timestamptz NOT NULL DEFAULT now(),
    text  text        NOT NULL
);
CREATE INDEX job_events_job ON tenantry.job_events (job, id);

CREATE TABLE tenantry.archives (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant      bigint      NOT NULL REFERENCES tenantry.tenants,
    path        text        NOT NULL,
    bytes       bigint      NOT NULL,
    sha256      text        NOT NULL,
    -- Rows and checksum of each table, of the source and of the proof alike.
    tables      jsonb       NOT NULL,
    -- What pg_dump leaves to whoever makes the database: encoding, locale, settings, rights, comment; and what was counted.
    facts       jsonb       NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tenantry.tokens (
    id          text PRIMARY KEY,
    label       text        NOT NULL,
    access      text        NOT NULL CHECK (access IN ('viewer', 'operator', 'admin')),
    -- SHA-256 of the secret, which is random.
    hash        bytea       NOT NULL,
    expires_at  timestamptz NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);

-- Only ever grows: what was wanted, and (of the same request) what came of it.
CREATE TABLE tenantry.audit (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at        timestamptz NOT NULL DEFAULT now(),
    request   text        NOT NULL,
    actor     text        NOT NULL,
    peer      text        NOT NULL,
    action    text        NOT NULL,
    tenant    text,
    outcome   text        NOT NULL,
    before    jsonb,
    after     jsonb,
    -- SHA-256 of the chain of the row before and the text of this one: a row that is changed or taken away shows.
    chain     bytea       NOT NULL
);

CREATE TABLE tenantry.idempotency (
    actor     text        NOT NULL,
    key       text        NOT NULL,
    hash      text        NOT NULL,
    job       bigint      REFERENCES tenantry.jobs,
    at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (actor, key)
);

-- The processes that serve this catalog, by their signs of life: each has a session of its own that ends with it.
-- `busy`: what it sees of tenants that a job may wait for.
CREATE TABLE tenantry.instances (
    id        text PRIMARY KEY,
    revision  bigint      NOT NULL,
    busy      jsonb       NOT NULL,
    pid       integer     NOT NULL,
    began     timestamptz NOT NULL,
    seen_at   timestamptz NOT NULL DEFAULT now()
);

-- What every process does to the sessions of a tenant that is drained, once its transactions had their time.
CREATE TABLE tenantry.orders (
    tenant    bigint PRIMARY KEY REFERENCES tenantry.tenants,
    what      text NOT NULL CHECK (what IN ('cancel', 'end'))
);
