//! Durable administrative work: what is wanted (`work`), the steps that lead there and back (`work::plan`, pure), the journal in
//! the catalog, and whoever walks it (`runner`).
//!
//! What always holds: a step is idempotent, so that it may be done again after a crash at any instant; it is written down as
//! done only after it was, by the process that runs the jobs and from where the journal stood; before its step of no return a
//! job may turn back, which undoes what may have been done and nothing else, past it there is only the way forward; one job
//! at a time for a tenant.

pub mod rollouts;
pub mod runner;
pub mod work;
