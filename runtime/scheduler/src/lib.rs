//! Where cameras and the instances of a model meet.

pub mod frames;
pub mod slot;
