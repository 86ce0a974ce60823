-- Tenantry's own role and its own database: once on each PostgreSQL server, by a superuser, or by what a cloud gives in
-- its place (RDS: the master user). May be run again; then it sets the password anew.
--
--   CONTROL_PASSWORD_FILE=control_password psql -f control-role.sql "host=db.internal user=postgres dbname=postgres"
--   psql -v password=... -f control-role.sql ...       where the list of processes may show it
--
-- In docker-entrypoint-initdb.d it runs as it is, with CONTROL_PASSWORD_FILE in the environment.
--
-- What differs between PostgreSQL 15 and 16:
--   15  CREATEROLE is nearly superuser: the role may alter, drop and join every role that is not one, also
--       pg_read_server_files and pg_execute_server_program. Whoever has its password has the server. Prefer 16.
--   16  The role rules only roles that it made itself, and may act for them only after GRANT ... WITH SET, INHERIT.
--       Tenantry makes that grant to itself with each role that it makes; there is nothing to do here.
-- On both, a role that was there before (`tenantry tenant adopt`) must be given by hand:
--   GRANT legacy TO tenantry_control WITH ADMIN OPTION

\set ON_ERROR_STOP on

\if :{?password}
\else
  \set password `cat "$CONTROL_PASSWORD_FILE"`
\endif
SELECT :'password' = '' AS no_password \gset
\if :no_password
  DO $$ BEGIN RAISE EXCEPTION 'no password: say -v password=..., or name its file in CONTROL_PASSWORD_FILE'; END $$;
\endif

-- LOGIN       it is a login of its own, and no client ever gets it
-- CREATEDB    create, rename and restore databases; the scratch database that proves an archive
-- CREATEROLE  a role for each tenant, and its new password on rotate
-- No SUPERUSER, REPLICATION or BYPASSRLS: they are not given, and not needed (but for moves between servers, see below).
SELECT 'CREATE ROLE tenantry_control' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'tenantry_control') \gexec
-- So that the server keeps a SCRAM verifier, whatever its default is.
SET password_encryption = 'scram-sha-256';
ALTER ROLE tenantry_control LOGIN CREATEDB CREATEROLE PASSWORD :'password';

-- Before a database is renamed, archived or dropped, sessions around Tenantry are ended, whoever's they are. It cannot end
-- a superuser's.
GRANT pg_signal_backend TO tenantry_control;

-- For `tenantry tenant move` by replication, and only with -v online_moves=1, at both servers: REPLICATION, so that the other
-- server can be sent what is written, and the right to let a role subscribe (PostgreSQL 16). REPLICATION reads every
-- database of the server, where pg_hba.conf lets it in for `replication`: leave such lines out for this role.
\if :{?online_moves}
  ALTER ROLE tenantry_control REPLICATION;
  SELECT 'GRANT pg_create_subscription TO tenantry_control WITH ADMIN OPTION'
    FROM pg_roles WHERE rolname = 'pg_create_subscription' \gexec
\endif

-- A superuser may make a database for anybody; others only for a role that they are in.
SELECT 'GRANT tenantry_control TO CURRENT_USER' FROM pg_roles WHERE rolname = current_user AND NOT rolsuper \gexec

-- The catalog: tenants with their verifiers, jobs, audit. Tenantry makes the tables in it, in the schema `tenantry`.
SELECT 'CREATE DATABASE tenantry_control OWNER tenantry_control'
  WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'tenantry_control') \gexec
-- Its owner keeps what it has; PUBLIC is every other role, those of tenants too.
REVOKE ALL ON DATABASE tenantry_control FROM PUBLIC;

-- With its own password a tenant's role could log in here, around Tenantry and its budgets. Whatever else needs one of
-- these two without being superuser (a monitor, for instance) needs a GRANT CONNECT of its own now. Where they belong to
-- the cloud this is a warning and changes nothing.
REVOKE CONNECT ON DATABASE postgres, template1 FROM PUBLIC;
