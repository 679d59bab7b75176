//! Cases from attacks on earlier builds: each one stopped a line, or lost or exposed something.

mod data_folder;
