//! The certificate authorities that the system trusts, for TLS to cameras and brokers. The only door to `rustls_native_certs`.
//!
//! This file has no unit tests: the suite connects to servers with certificates of the system and of a file.

use rustls::RootCertStore;

/// The authorities of the system. Certificates that cannot be used are skipped; the store is empty where there are none.
pub fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}
