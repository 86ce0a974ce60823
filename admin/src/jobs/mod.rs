//! Durable administrative work. So far its states; the queue and the journal come with the control plane.

pub mod state;
