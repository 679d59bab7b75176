//! Cases that users of such programs have reported elsewhere: cameras, brokers and consumers as they really behave.

mod brokers;
