//! Durable administrative work: what is wanted (`work`), the steps that lead there and back (`work::plan`, pure), the journal in
//! the catalog, and whoever walks it (`runner`).
//!
//! What always holds: a step is idempotent, so that it may be done again after a crash at any instant; it is written down as
//! done only after it was; a job ends with everything done or everything undone; one job at a time for a tenant.

pub mod runner;
pub mod work;
