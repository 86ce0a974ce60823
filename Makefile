# What can be run here. `make help` lists it, with the claim of README.md that each target stands for.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help demo demo-check test tools lint test-16 test-18 test-15 django django-migrate import live contract bench-import bench-move leaks sequences suites bench bench-budgets simulate move-crash soak fuzz
MAKEFLAGS += --no-print-directory

LOGS := target/test-logs
FUZZ_SECONDS ?= 600
BENCH ?=

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | awk -F'\t' '{ printf "  make %-14s %s\n", $$1, $$2 }'

demo: ## "one command shows it": PostgreSQL, three tenants, Tenantry in front; Ctrl-C ends and removes it
	cargo run --quiet --package tenantry -- demo

demo-check: ## "one command proves it": the same, queried over TLS through every tenant, then removed
	cargo run --quiet --package tenantry -- demo --check

# One stage after the other: they share the machine, and each stage's first failure is the one to read.
test: ## "every claim has a test": format, lints, all tests (fuzz corpus included) on PostgreSQL 16, what clients meet on 18, the control plane on 15, Django, its move from SQLite, the API's contract
	@rm -rf $(LOGS)
	for stage in tools lint test-16 test-18 test-15 django django-migrate import live contract; do
	  echo "=== $$stage"
	  $(MAKE) $$stage
	done
	total=0
	for counted in test-16 test-18 test-15 django live; do
	  n=$$(cat $(LOGS)/$$counted.count)
	  if [ "$$n" -eq 0 ]; then echo "$$counted: 0 tests ran"; exit 1; fi
	  printf '%-8s %6d passed\n' $$counted $$n
	  total=$$((total + n))
	done
	printf '%-8s %6d tenants migrated by Django\n' migrate $$(cat $(LOGS)/django-migrate.count)
	printf '%-8s %6d requests answered as the document says\n' contract $$(cat $(LOGS)/contract.count)
	echo "all passed: $$total tests"

tools: ## installs what the other targets need and this machine lacks
	@command -v cargo-nextest >/dev/null || cargo install --locked cargo-nextest

lint: ## "the lints are the style": rustfmt and clippy, warnings are errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

# $(1): stage, $(2): PostgreSQL, $(3): what to run.
define nextest
@mkdir -p $(LOGS)
cargo build --quiet --workspace --bin tenantry
# Many tests wait for something most of the time.
TENANTRY_TEST_PG=$(2) cargo nextest run $(3) --test-threads $$(( $$(nproc) * 3 / 2 )) --no-tests=fail --no-fail-fast 2>&1 | tee $(LOGS)/$(1).log
sed -nE 's/.* ([0-9]+) tests? run: .*/\1/p' $(LOGS)/$(1).log | tail -n 1 >$(LOGS)/$(1).count
test -s $(LOGS)/$(1).count
endef

test-16: ## "works with PostgreSQL 16": all tests of the workspace
	$(call nextest,test-16,16,--workspace)

test-18: ## "works with PostgreSQL 18": what clients meet, once more
	$(call nextest,test-18,18,--workspace -E 'package(tenantry-tests) and not binary(/^(api|archive|budgets|crash|exec|fuzz_replay|hostile|kit|migrations|moves|move_crash)$$/)')

test-15: ## "the control plane works with PostgreSQL 15": jobs and clients during them, with a role that is no superuser
	$(call nextest,test-15,15,--workspace -E 'binary(tenants) or binary(api) or binary(archive) or binary(fleet) or (binary(/^(migrations|exec|import)$$/) and not test(kill_9))')

django: ## "Django's habits work unchanged": its suite through Tenantry, both drivers, newest-first and round robin
	@mkdir -p $(LOGS)
	for order in "" --round-robin; do
	  tests/django/through-tenantry $$order 2>&1 | tee -a $(LOGS)/django.log
	done
	awk '$$1 ~ /^psycopg/ { n += $$4 } END { print n + 0 }' $(LOGS)/django.log >$(LOGS)/django.count
	test "$$(cat $(LOGS)/django.count)" -gt 0

django-migrate: ## "one change for many tenants": Django's migrate over 50 tenants in waves, one made to fail: stops, reports, resumes
	@mkdir -p $(LOGS)
	tests/django/migrate-many 2>&1 | tee $(LOGS)/django-migrate.log
	sed -nE 's/^([0-9]+) tenants migrated by Django.*/\1/p' $(LOGS)/django-migrate.log >$(LOGS)/django-migrate.count
	test -s $(LOGS)/django-migrate.count

import: ## "a project moves from SQLite in one command": the shop with 100,000 rows, a dirty file refused, then all of it compared, and its tests
	@mkdir -p $(LOGS)
	tests/django/import-sqlite --rows $${ROWS:-100000} 2>&1 | tee $(LOGS)/import.log
	grep -q 'are the same, value by value' $(LOGS)/import.log

live: ## "a rename is a pause": renames and pauses under pgbench and Django, no error; SECONDS_LIVE=120 for longer
	@mkdir -p $(LOGS)
	tests/renamed-while-it-runs --seconds $${SECONDS_LIVE:-20} 2>&1 | tee $(LOGS)/live.log
	sed -nE 's/^([0-9]+) renames .* 0 errors$$/\1/p' $(LOGS)/live.log >$(LOGS)/live.count
	test -s $(LOGS)/live.count

contract: ## "the API keeps to its document": schemathesis makes requests out of it; CONTRACT_SECONDS=300 for longer
	@mkdir -p $(LOGS)
	tests/api-contract --seconds $${CONTRACT_SECONDS:-40} 2>&1 | tee $(LOGS)/contract.log | tail -n 40
	sed -nE 's/^api-contract: ([0-9]+) calls/\1/p' $(LOGS)/contract.log >$(LOGS)/contract.count
	test -s $(LOGS)/contract.count

leaks: ## "no state reaches another client": the leak matrix, 1,032 cells, beside PgBouncer's
	cargo build --quiet --workspace --bin tenantry
	tests/suites/leaks --pgbouncer-too --tenantry target/debug/tenantry

sequences: ## "nobody can tell it from a direct connection": written and generated message sequences on both; SEQUENCES=20000 for more
	cargo build --quiet --workspace --bin tenantry
	tests/suites/sequences --generated $${SEQUENCES:-2000} --tenantry target/debug/tenantry

suites: ## the same, by others: Django's, asyncpg's and psycopg's own tests, PostgreSQL's regression files, beside PgBouncer; takes two hours
	cargo build --quiet --workspace --bin tenantry
	tests/suites/django --tenantry target/debug/tenantry
	tests/suites/regress --tenantry target/debug/tenantry
	tests/suites/drivers --tenantry target/debug/tenantry

bench: ## "what it costs": CPU per transaction and memory per idle client beside PgBouncer; BENCH="--only simple"
	bench/run $(BENCH)

bench-budgets: ## "no tenant can take another's connections": a noisy neighbour, 500 databases on 50 connections, weights, kills
	bench/budgets $(BENCH)

bench-move: ## "a move is a pause": clients' pauses at the cut-over of online moves and rollbacks, and of dumps by size
	bench/move $(BENCH)

bench-import: ## "how fast a file is imported": rows a second and CPU beside pgloader, in turns
	bench/import $(BENCH)

simulate: ## "whatever happens, the budgets hold": random worlds over the sharing core; SEEDS=0..100000 for more
	SIMULATION_SEEDS=$${SEEDS:-0..20000} cargo test --release --package tenantry-simulation -- --nocapture chosen

move-crash: ## "a move survives kill -9": at every effect of one, of Tenantry and of the servers; a quarter of an hour
	cargo build --quiet --workspace --bin tenantry
	TENANTRY_EVERY_EFFECT=1 cargo nextest run --package tenantry-tests --test move_crash --no-tests=fail

soak: ## "no row reaches another client": a million tagged rows under cancels, vanishing clients and killed servers
	cargo build --release
	SOAK_QUERIES=$${SOAK_QUERIES:-1000000} TENANTRY_BIN=$$PWD/target/release/tenantry \
	  cargo nextest run --package tenantry-tests --test soak --no-capture --no-tests=fail

fuzz: ## "hostile bytes do no harm": ten minutes of new ones for each target; FUZZ_SECONDS=60 for less
	@command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
	for target in $$(cargo fuzz list --fuzz-dir tests/fuzz); do
	  cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none $$target -- -max_total_time=$(FUZZ_SECONDS)
	done
