//! Attacks on the isolation of the agent: what one manifest, rule, model, frame or neighbour must not do to the rest.

mod rules;
