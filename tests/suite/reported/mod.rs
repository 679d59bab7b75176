//! Inputs of kinds that users of such programs have reported as failing: pictures, cameras, brokers.

mod brokers;
mod cameras;
mod jpegs;
