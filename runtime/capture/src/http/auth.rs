//! Credentials for cameras: HTTP Basic (RFC 7617) and Digest (RFC 7616), the factory default of many cameras.
//!
//! Of the challenges of a camera the strongest that is supported is answered: Digest with SHA-256, Digest with MD5 (each with or without
//! `-sess`), Basic. Challenges are parsed here and not by the crate `http_auth`, which refuses a header as a whole where one part
//! of it is malformed. The protection of the body (`auth-int`) is not supported, and nothing is sent before a camera asks for it.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use md5::Md5;
use sha2::{Digest as _, Sha256};

/// User and password.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    pub(super) user: String,
    pub(super) password: String,
}

/// Why a challenge cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum AuthError {
    /// The address has no user and password.
    #[error("the camera asks for {schemes}; put user and password into the address (http://user:password@host/)")]
    NoCredentials {
        /// What it offers.
        schemes: String,
    },
    /// User and password were refused.
    #[error("the camera refuses the user and password of the address")]
    Refused,
    /// None of the schemes is supported.
    #[error(
        "the camera offers only {schemes}, which is not supported; enable Digest or Basic authentication in its settings"
    )]
    Unsupported {
        /// What it offers.
        schemes: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Algorithm {
    Md5,
    Sha256,
}

impl Algorithm {
    fn hash(self, text: &str) -> String {
        let bytes = match self {
            Self::Md5 => Md5::digest(text).to_vec(),
            Self::Sha256 => Sha256::digest(text).to_vec(),
        };
        bytes.iter().fold(String::new(), |mut hex, byte| {
            // Writing to a string does not fail.
            write!(hex, "{byte:02x}").ok();
            hex
        })
    }
}

/// A challenge that can be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Challenge {
    Basic,
    Digest {
        algorithm: Algorithm,
        name: Option<String>,
        is_session: bool,
        realm: String,
        nonce: String,
        opaque: Option<String>,
        has_qop: bool,
    },
}

impl Challenge {
    /// The stronger one has the larger number.
    fn strength(&self) -> u8 {
        match self {
            Self::Basic => 0,
            Self::Digest { algorithm: Algorithm::Md5, .. } => 1,
            Self::Digest { algorithm: Algorithm::Sha256, .. } => 2,
        }
    }
}

/// Answers the challenges of one camera. A nonce is used until the camera sends another one.
#[derive(Default)]
pub(super) struct Authenticator {
    challenge: Option<Challenge>,
    count: u32,
}

impl Authenticator {
    /// Takes the challenges of a 401 response. `was_sent` states whether that request had an answer to a challenge.
    ///
    /// # Errors
    /// [`AuthError`] when there is nothing to try.
    pub(super) fn challenged<'a>(
        &mut self,
        values: impl Iterator<Item = &'a str>,
        credentials: Option<&Credentials>,
        was_sent: bool,
    ) -> Result<(), AuthError> {
        let challenges: Vec<(String, Vec<(String, String)>)> = values.flat_map(parse).collect();
        let names: Vec<String> = challenges.iter().map(|(scheme, parameters)| describe(scheme, parameters)).collect();
        let schemes = if names.is_empty() { "credentials".to_owned() } else { names.join(", ") };
        let is_stale = challenges
            .iter()
            .any(|(_, parameters)| value(parameters, "stale").is_some_and(|stale| stale.eq_ignore_ascii_case("true")));
        let best = challenges.iter().filter_map(|(scheme, parameters)| challenge(scheme, parameters));
        // Cameras that send no challenge take Basic.
        let best = best.max_by_key(Challenge::strength).or(names.is_empty().then_some(Challenge::Basic));
        let best = best.ok_or(AuthError::Unsupported { schemes: schemes.clone() })?;
        if credentials.is_none() {
            return Err(AuthError::NoCredentials { schemes });
        }
        // An answer with the same nonce was refused. Another nonce alone is a new session of the camera.
        if was_sent
            && !is_stale
            && self.challenge.as_ref().is_some_and(|known| known.strength() == best.strength())
            && self.count <= 1
        {
            return Err(AuthError::Refused);
        }
        (self.challenge, self.count) = (Some(best), 0);
        Ok(())
    }

    /// The value of `Authorization` for a GET request of this path and query. `None` before the first challenge.
    pub(super) fn authorization(&mut self, credentials: Option<&Credentials>, target: &str) -> Option<String> {
        let Credentials { user, password } = credentials?;
        self.count += 1;
        let count = self.count;
        match self.challenge.as_ref()? {
            Challenge::Basic => Some(format!("Basic {}", BASE64.encode(format!("{user}:{password}")))),
            digest @ Challenge::Digest { .. } => {
                let cnonce: String = std::iter::repeat_with(fastrand::alphanumeric).take(16).collect();
                Some(answer(digest, credentials?, target, count, &cnonce))
            }
        }
    }
}

/// The answer to a digest challenge (RFC 7616, section 3.4).
fn answer(challenge: &Challenge, credentials: &Credentials, target: &str, count: u32, cnonce: &str) -> String {
    let Challenge::Digest { algorithm, name, is_session, realm, nonce, opaque, has_qop } = challenge else {
        return String::new();
    };
    let Credentials { user, password } = credentials;
    let hash = |text: &str| algorithm.hash(text);
    let mut secret = hash(&format!("{user}:{realm}:{password}"));
    if *is_session {
        secret = hash(&format!("{secret}:{nonce}:{cnonce}"));
    }
    let request = hash(&format!("GET:{target}"));
    let response = match has_qop {
        true => hash(&format!("{secret}:{nonce}:{count:08x}:{cnonce}:auth:{request}")),
        false => hash(&format!("{secret}:{nonce}:{request}")),
    };
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    let mut value = format!(
        "Digest username=\"{}\", realm=\"{}\", nonce=\"{nonce}\", uri=\"{target}\", response=\"{response}\"",
        quoted(user),
        quoted(realm)
    );
    if let Some(name) = name {
        value += &format!(", algorithm={name}");
    }
    if let Some(opaque) = opaque {
        value += &format!(", opaque=\"{opaque}\"");
    }
    if *has_qop {
        value += &format!(", qop=auth, nc={count:08x}, cnonce=\"{cnonce}\"");
    } else if *is_session {
        value += &format!(", cnonce=\"{cnonce}\"");
    }
    value
}

/// A challenge that is supported.
fn challenge(scheme: &str, parameters: &[(String, String)]) -> Option<Challenge> {
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("digest") {
        return None;
    }
    let name = value(parameters, "algorithm");
    let lower = name.unwrap_or("MD5").to_ascii_lowercase();
    let (base, is_session) = lower.strip_suffix("-sess").map_or((lower.as_str(), false), |base| (base, true));
    let algorithm = match base {
        "md5" => Algorithm::Md5,
        "sha-256" => Algorithm::Sha256,
        _ => return None,
    };
    let qop = value(parameters, "qop").map(str::to_ascii_lowercase);
    let offers_auth = qop.as_deref().map(|qop| qop.split(',').any(|one| one.trim() == "auth"));
    if offers_auth == Some(false) {
        return None;
    }
    Some(Challenge::Digest {
        algorithm,
        name: name.map(str::to_owned),
        is_session,
        realm: value(parameters, "realm").unwrap_or_default().to_owned(),
        nonce: value(parameters, "nonce")?.to_owned(),
        opaque: value(parameters, "opaque").map(str::to_owned),
        has_qop: offers_auth.is_some(),
    })
}

fn value<'a>(parameters: &'a [(String, String)], name: &str) -> Option<&'a str> {
    parameters.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

/// A challenge in words.
fn describe(scheme: &str, parameters: &[(String, String)]) -> String {
    // What the camera writes is shown only as far as it can be a name: reasons leave the node.
    let plain = |text: &str| -> String {
        let is_plain = |character: &char| character.is_ascii_alphanumeric() || "-, ".contains(*character);
        text.chars().take_while(is_plain).take(24).collect()
    };
    let of = |name: &str| value(parameters, name).map(|text| format!(" {}", plain(text))).unwrap_or_default();
    if scheme.eq_ignore_ascii_case("digest") {
        format!("Digest{}{}", of("algorithm"), of("qop"))
    } else {
        plain(scheme)
    }
}

/// The challenges of one `WWW-Authenticate` value: schemes, each with its parameters.
fn parse(text: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut challenges: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for piece in pieces(text) {
        let piece = piece.trim();
        let (before, after) =
            piece.split_once('=').map_or((piece, None), |(before, after)| (before.trim(), Some(after)));
        // `Digest realm` begins a challenge, `nonce` belongs to the one before.
        let name = match before.rsplit_once(char::is_whitespace) {
            Some((scheme, name)) => {
                challenges.push((scheme.trim().to_owned(), Vec::new()));
                name
            }
            None if after.is_none() => {
                challenges.push((before.to_owned(), Vec::new()));
                continue;
            }
            None => before,
        };
        let value = after.unwrap_or_default().trim();
        let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value);
        if let Some((_, parameters)) = challenges.last_mut() {
            parameters.push((name.to_owned(), value.replace("\\\"", "\"")));
        }
    }
    challenges.retain(|(scheme, _)| !scheme.is_empty());
    challenges
}

/// The pieces between commas that are not in quotes.
fn pieces(text: &str) -> Vec<String> {
    let (mut pieces, mut is_quoted) = (vec![String::new()], false);
    for character in text.chars() {
        is_quoted ^= character == '"';
        match pieces.last_mut() {
            Some(_) if character == ',' && !is_quoted => pieces.push(String::new()),
            Some(last) => last.push(character),
            None => {}
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mufasa() -> Credentials {
        Credentials { user: "Mufasa".to_owned(), password: "Circle of Life".to_owned() }
    }

    /// The example of RFC 7616, section 3.9.1.
    #[test]
    fn the_example_of_the_rfc_is_reproduced() {
        let expected = [
            ("MD5", "8ca523f5e9506fed4657c9700eebdbec"),
            ("SHA-256", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
        ];
        for (algorithm, response) in expected {
            let text = format!(
                "Digest realm=\"http-auth@example.org\", qop=\"auth, auth-int\", algorithm={algorithm}, \
                 nonce=\"7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v\", opaque=\"FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS\""
            );
            let (scheme, parameters) = parse(&text).remove(0);
            let challenge = challenge(&scheme, &parameters).unwrap();
            let cnonce = "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ";
            let value = answer(&challenge, &mufasa(), "/dir/index.html", 1, cnonce);
            assert!(value.contains(&format!("response=\"{response}\"")), "{value}");
            assert!(value.contains("qop=auth, nc=00000001") && value.contains("opaque=\"FQhe"), "{value}");
        }
    }

    fn challenged(values: &[&str], credentials: Option<&Credentials>) -> Result<String, AuthError> {
        let mut authenticator = Authenticator::default();
        assert_eq!(authenticator.authorization(credentials, "/"), None, "nothing is sent before a challenge");
        authenticator.challenged(values.iter().copied(), credentials, false)?;
        Ok(authenticator.authorization(credentials, "/").unwrap())
    }

    #[test]
    fn the_strongest_supported_challenge_is_answered() {
        let mufasa = mufasa();
        let answer = |values: &[&str]| challenged(values, Some(&mufasa)).unwrap();
        assert_eq!(answer(&["Basic realm=\"a, b\""]), "Basic TXVmYXNhOkNpcmNsZSBvZiBMaWZl");
        assert_eq!(answer(&[]), "Basic TXVmYXNhOkNpcmNsZSBvZiBMaWZl");
        let md5 = "Digest realm=\"cam, 1\", nonce=\"n\"";
        assert!(
            answer(&["Basic realm=x", md5]).starts_with("Digest username=\"Mufasa\", realm=\"cam, 1\", nonce=\"n\"")
        );
        let both = format!("{md5}, Digest realm=r, nonce=m, algorithm=SHA-256-sess, qop=\"auth\", Basic realm=\"b\"");
        let value = answer(&[&both]);
        assert!(value.contains("algorithm=SHA-256-sess") && value.contains("nonce=\"m\""), "{value}");
        assert!(!answer(&[md5]).contains("qop"), "a camera of RFC 2069");
    }

    #[test]
    fn what_cannot_be_answered_says_why() {
        let mufasa = mufasa();
        let error = |values: &[&str], credentials| challenged(values, credentials).unwrap_err().to_string();
        let integrity = error(&["Digest realm=r, nonce=n, qop=\"auth-int\""], Some(&mufasa));
        assert!(integrity.contains("Digest auth-int") && integrity.contains("not supported"), "{integrity}");
        assert!(error(&["NTLM"], Some(&mufasa)).contains("NTLM"));
        let missing = error(&["Digest realm=r, nonce=n"], None);
        assert!(missing.contains("put user and password into the address"), "{missing}");
    }

    #[test]
    fn refused_credentials_are_not_tried_for_ever_and_a_stale_nonce_is_renewed() {
        let (mufasa, mut authenticator) = (mufasa(), Authenticator::default());
        let challenge = |nonce: &str, stale: bool| format!("Digest realm=r, nonce={nonce}, qop=auth, stale={stale}");
        authenticator.challenged([challenge("1", false).as_str()].into_iter(), Some(&mufasa), false).unwrap();
        assert!(authenticator.authorization(Some(&mufasa), "/").unwrap().contains("nc=00000001"));
        assert!(authenticator.authorization(Some(&mufasa), "/").unwrap().contains("nc=00000002"));
        authenticator.challenged([challenge("2", true).as_str()].into_iter(), Some(&mufasa), true).unwrap();
        let renewed = authenticator.authorization(Some(&mufasa), "/").unwrap();
        assert!(renewed.contains("nonce=\"2\"") && renewed.contains("nc=00000001"), "{renewed}");
        let again = authenticator.challenged([challenge("3", false).as_str()].into_iter(), Some(&mufasa), true);
        assert_eq!(again, Err(AuthError::Refused));
    }
}
