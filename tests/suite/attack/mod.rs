//! Cases from attacks on earlier builds: what must not work, with the outcome that is right.

mod authority;
mod trust;
