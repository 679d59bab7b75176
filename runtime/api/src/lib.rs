//! The public contract as types: manifests, status, states, messages and topics. JSON Schemas and custom resource
//! definitions are generated from these types, so their doc comments are public descriptions.

pub mod condition;
pub mod envelope;
pub mod kinds;
pub mod message;
pub mod names;
pub mod prediction;
pub mod spec;
pub mod state;
pub mod status;
pub mod tensor;
pub mod verdict;
