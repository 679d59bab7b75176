//! Inputs of kinds that users of such programs have reported as failing: pictures, models, cameras, brokers.

mod cameras;
mod jpegs;
