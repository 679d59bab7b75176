//! Attacks on the agent: for each of them a test with the correct outcome.

mod manifests;
