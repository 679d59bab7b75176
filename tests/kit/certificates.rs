//! Certificates for MQTT over TLS, created with openssl, and laid out as Kubernetes mounts a Secret.
//!
//! Every set has its own certificate authority, so no set trusts another. Certificates are valid from one year ago, so
//! that a clock that is wrong by days does not matter, until a given number of days from now; a negative number gives
//! an expired certificate. Keys are EC P-256.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use crate::process::{command, output_text};

/// The validity of certificates that do not expire during a test.
const VALID_DAYS: i64 = 3650;
/// The configuration of `openssl ca`, with the extensions of the certificates that it signs.
const CONFIGURATION: &str = "
[ca]
default_ca = authority
[authority]
database = index.txt
new_certs_dir = .
rand_serial = yes
unique_subject = no
default_md = sha256
policy = policy
[policy]
commonName = supplied
[ca_extensions]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
[server_extensions]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = serverAuth
subjectAltName = IP:127.0.0.1, DNS:localhost
[client_extensions]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = clientAuth
";

/// A certificate authority, with certificates for localhost and for the kit's own clients. Clones share the files.
#[derive(Debug, Clone)]
pub struct Certificates {
    folder: Arc<TempDir>,
}

impl Certificates {
    /// Creates the authority and the certificates.
    ///
    /// # Panics
    /// If openssl is not installed.
    #[allow(clippy::new_without_default, reason = "a default would hide that it runs programs")]
    pub fn new() -> Self {
        let certificates = Self { folder: Arc::new(tempfile::tempdir().expect("a temporary folder")) };
        fs::write(certificates.path("openssl.cnf"), CONFIGURATION).expect("the folder is writable");
        fs::write(certificates.path("index.txt"), "").expect("the folder is writable");
        // The name is unique: authorities with the same name are only distinguished when a signature is verified.
        let name = certificates.folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        certificates.certify("ca", &name, VALID_DAYS);
        certificates.certify_server(VALID_DAYS);
        certificates.certify("client", "kit", VALID_DAYS);
        certificates
    }

    /// The certificate of the authority, which clients must trust.
    pub fn ca(&self) -> PathBuf {
        self.path("ca.crt")
    }

    /// The server's certificate.
    pub fn server_certificate(&self) -> PathBuf {
        self.path("server.crt")
    }

    /// The server's key.
    pub fn server_key(&self) -> PathBuf {
        self.path("server.key")
    }

    /// The certificate and key of the kit's own clients.
    pub fn client(&self) -> (PathBuf, PathBuf) {
        (self.path("client.crt"), self.path("client.key"))
    }

    /// Creates a new server certificate that expires in `days` days; a negative number gives an expired one. A broker
    /// reads it when it starts.
    ///
    /// # Panics
    /// If openssl fails.
    pub fn certify_server(&self, days: i64) {
        self.certify("server", "localhost", days);
    }

    /// Writes `ca.crt`, `tls.crt` and `tls.key` of a new client certificate that expires in `days` days; a negative
    /// number gives an expired one. As with the kubelet, the files are links into a folder that is replaced as a whole,
    /// so that no reader sees a certificate with the key of another.
    ///
    /// # Panics
    /// If openssl fails or the folder cannot be written.
    pub fn client_secret(&self, folder: &Path, days: i64) {
        let path = |name: &str| folder.join(name);
        fs::create_dir_all(folder).expect("a folder for the secret");
        let fresh = tempfile::Builder::new().prefix("..").tempdir_in(folder).expect("a folder for the secret").keep();
        let old = fs::read_link(path("..data"));
        self.certify("secret", "edge", days);
        for (from, to) in [("ca.crt", "ca.crt"), ("secret.crt", "tls.crt"), ("secret.key", "tls.key")] {
            fs::copy(self.path(from), fresh.join(to)).expect("the secret is written");
            if !path(to).is_symlink() {
                symlink(Path::new("..data").join(to), path(to)).expect("the secret is written");
            }
        }
        symlink(fresh.file_name().expect("a temporary folder has a name"), path("..new"))
            .expect("the secret is written");
        fs::rename(path("..new"), path("..data")).expect("the secret is exchanged");
        if let Ok(old) = old {
            fs::remove_dir_all(folder.join(old)).expect("the old secret is removed");
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Creates a key and a certificate, `<file>.key` and `<file>.crt`, signed by the authority. The authority signs
    /// itself.
    fn certify(&self, file: &str, name: &str, days: i64) {
        let (key, request, certificate) = (format!("{file}.key"), format!("{file}.csr"), format!("{file}.crt"));
        self.run(
            "openssl",
            &["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"],
            &["-subj", &format!("/CN={name}"), "-keyout", &key, "-out", &request],
        );
        let date = |days: i64| self.run("date", &["-u", "-d", &format!("{days} days")], &["+%Y%m%d%H%M%SZ"]);
        let extensions = match file {
            "ca" => "ca_extensions",
            "server" => "server_extensions",
            _ => "client_extensions",
        };
        let signer: &[&str] = if file == "ca" { &["-selfsign"] } else { &["-cert", "ca.crt"] };
        self.run(
            "openssl",
            &["ca", "-config", "openssl.cnf", "-batch", "-notext", "-in", &request, "-out", &certificate],
            &[
                &["-extensions", extensions, "-startdate", &date(-365), "-enddate", &date(days), "-keyfile", "ca.key"],
                signer,
            ]
            .concat(),
        );
    }

    /// Runs a program in the folder and returns its standard output.
    fn run(&self, program: &str, arguments: &[&str], more: &[&str]) -> String {
        let output = command(program)
            .args(arguments)
            .args(more)
            .current_dir(self.folder.path())
            .output()
            .expect("setpriv is installed; it is part of util-linux");
        assert!(output.status.success(), "{program} {arguments:?} {more:?} fails: {}", output_text(&output));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}
