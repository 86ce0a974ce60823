-- The catalog's version with rollouts: schema migrations and commands over many tenants, in waves.

-- Grows when a tenant's tables were changed around its clients: every process drops what is prepared on its connections.
ALTER TABLE tenantry.tenants ADD COLUMN plans bigint NOT NULL DEFAULT 0;

CREATE TABLE tenantry.rollouts (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind        text        NOT NULL CHECK (kind IN ('migrate', 'exec')),
    state       text        NOT NULL DEFAULT 'running'
                CHECK (state IN ('running', 'succeeded', 'failed', 'stopped', 'cancelled')),
    -- How it goes: parallel, stop_after, waits for locks.
    plan        jsonb       NOT NULL,
    -- Of exec: the words of the command.
    command     jsonb,
    -- Of migrate: the files. Read by the jobs, not by whoever looks.
    files       jsonb,
    -- Of exec, while it runs: what its logins prove themselves with.
    verifier    text,
    -- Of exec: when whoever runs the commands was last heard of.
    seen_at     timestamptz,
    error       text,
    actor       text        NOT NULL,
    peer        text        NOT NULL DEFAULT '',
    request     text        NOT NULL DEFAULT '',
    -- Idempotency-Key, and a hash of what was asked with it.
    key         text,
    hash        text,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX rollouts_key ON tenantry.rollouts (actor, key) WHERE key IS NOT NULL;
CREATE INDEX rollouts_open ON tenantry.rollouts (id) WHERE state = 'running';

CREATE TABLE tenantry.rollout_tenants (
    rollout     bigint      NOT NULL REFERENCES tenantry.rollouts,
    tenant      bigint      NOT NULL REFERENCES tenantry.tenants,
    -- As it was called when the rollout was begun.
    name        text        NOT NULL,
    -- Its turn: by wave (0 is the canary), then by place.
    wave        integer     NOT NULL,
    place       integer     NOT NULL,
    state       text        NOT NULL DEFAULT 'waiting'
                CHECK (state IN ('waiting', 'running', 'done', 'failed', 'skipped')),
    -- How often it was begun.
    attempts    integer     NOT NULL DEFAULT 0,
    job         bigint      REFERENCES tenantry.jobs,
    -- Of exec, while its command may run: the login.
    login       text,
    -- Of exec: how the command ended; an empty text is well.
    outcome     text,
    error       text,
    -- What the job found and did.
    result      jsonb,
    began_at    timestamptz,
    ended_at    timestamptz,
    PRIMARY KEY (rollout, tenant)
);
CREATE INDEX rollout_tenants_job ON tenantry.rollout_tenants (job);
CREATE INDEX rollout_tenants_running ON tenantry.rollout_tenants (rollout) WHERE state = 'running';

-- What the version tables of the tenants' own databases said last: for plans. They are the truth, this is a copy.
CREATE TABLE tenantry.migrations (
    tenant      bigint      NOT NULL REFERENCES tenantry.tenants,
    version     bigint      NOT NULL,
    name        text        NOT NULL,
    sha256      text        NOT NULL,
    applied_at  timestamptz NOT NULL,
    PRIMARY KEY (tenant, version)
);
