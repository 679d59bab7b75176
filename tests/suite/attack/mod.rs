//! Cases from attacks on earlier builds: each one is a test with the right outcome.

mod http;
