//! Which server is the one that is meant: by its certificate, since those of pools are self-signed.
//!
//! | trust         | who is accepted                                                        |
//! |---------------|------------------------------------------------------------------------|
//! | `Pinned`      | whose certificate has one of the fingerprints                          |
//! | `Certificate` | whose certificate is exactly the one given                             |
//! | `Authority`   | whose certificate is valid now, for the name, and signed by the ones given |
//! | `Unknown`     | nobody; the error tells the fingerprint, so that a human can compare it |
//!
//! In all cases the server must prove that it has the private key of the certificate. A fingerprint and an exact certificate
//! are trusted whatever is written in it (names, dates): a pool that is reached by an address has no name to compare.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};

/// Most certificates that are read of a file; the authorities of a whole system are some hundred.
const CERTIFICATES: usize = 4096;

/// The SHA-256 of a certificate (of its DER), shown as `AA:BB:...`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Returns that of a certificate in DER.
    #[must_use]
    pub fn of(certificate: &[u8]) -> Self {
        Self(digest(&SHA256, certificate).as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02X}", if index == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = Untrusted;

    /// Reads 64 hexadecimal digits, in any case, with colons between the bytes or without.
    fn from_str(text: &str) -> Result<Self, Untrusted> {
        let wrong = || {
            let expected = "64 hexadecimal digits, as AA:BB:...";
            Untrusted::new(None, format!("'{}' is no SHA-256 fingerprint: {expected}", text.escape_debug()))
        };
        let byte = |pair: &str| {
            let is_hexadecimal = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
            if is_hexadecimal { u8::from_str_radix(pair, 16).map_err(|_| wrong()) } else { Err(wrong()) }
        };
        let bytes: Vec<u8> = if text.contains(':') {
            text.split(':').take(33).map(byte).collect::<Result<_, _>>()?
        } else {
            let pairs = text.as_bytes().chunks(2).take(33).map(|pair| std::str::from_utf8(pair).map_err(|_| wrong()));
            pairs.map(|pair| byte(pair?)).collect::<Result<_, _>>()?
        };
        bytes.try_into().map(Self).map_err(|_| wrong())
    }
}

/// Whom to believe to be the server that is meant.
#[derive(Debug, Clone)]
pub enum Trust {
    /// Who has a certificate with one of these fingerprints.
    Pinned(Vec<Fingerprint>),
    /// Whose certificate is signed by one of these (PEM), is valid now, and names the host that is connected to.
    Authority(String),
    /// Who has exactly this certificate (PEM; of several the first).
    Certificate(String),
    /// Nobody yet.
    Unknown,
}

/// Why a server is not believed to be the one that is meant.
#[derive(Debug, Clone)]
pub struct Untrusted {
    seen: Option<Fingerprint>,
    reason: String,
}

impl Untrusted {
    fn new(seen: Option<Fingerprint>, reason: impl Into<String>) -> Self {
        Self { seen, reason: reason.into() }
    }

    /// About a host that no certificate can name.
    pub(crate) fn nameless(host: &str) -> Self {
        Self::new(
            None,
            format!("'{}' is neither a name nor an address that a certificate can have", host.escape_debug()),
        )
    }

    /// Returns the fingerprint of the certificate that the server showed, if it showed one.
    #[must_use]
    pub fn seen(&self) -> Option<Fingerprint> {
        self.seen
    }

    /// Returns the error inside of one of a [`crate::Tls`] connection; `None` if that is about something else.
    #[must_use]
    pub fn of(error: &std::io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Untrusted {}

impl Trust {
    /// Makes what verifies the certificate of a server.
    pub(crate) fn verifier(&self, provider: Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>, Untrusted> {
        let way = match self {
            Self::Pinned(fingerprints) => Way::Pinned(fingerprints.clone()),
            Self::Certificate(pem) => {
                let first = certificates(pem)?.into_iter().next();
                let first = first.ok_or_else(|| Untrusted::new(None, "the PEM text has no certificate"))?;
                Way::Pinned(vec![Fingerprint::of(&first)])
            }
            Self::Authority(pem) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(pem)? {
                    let seen = Fingerprint::of(&certificate);
                    roots.add(certificate).map_err(|error| {
                        Untrusted::new(None, format!("the certificate {seen} cannot be an authority: {error}"))
                    })?;
                }
                let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
                Way::Authority(verifier.map_err(|error| {
                    Untrusted::new(None, format!("the certificates of authorities cannot be used: {error}"))
                })?)
            }
            Self::Unknown => Way::Pinned(Vec::new()),
        };
        Ok(Arc::new(Verifier { way, provider }))
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, Untrusted> {
    let found = CertificateDer::pem_slice_iter(pem.as_bytes()).take(CERTIFICATES).collect::<Result<Vec<_>, _>>();
    found.map_err(|error| Untrusted::new(None, format!("the PEM text cannot be read as certificates: {error}")))
}

#[derive(Debug)]
enum Way {
    /// Empty: nobody is trusted.
    Pinned(Vec<Fingerprint>),
    Authority(Arc<WebPkiServerVerifier>),
}

#[derive(Debug)]
struct Verifier {
    way: Way,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let seen = Fingerprint::of(certificate);
        let reason = match &self.way {
            Way::Pinned(known) if known.contains(&seen) => return Ok(ServerCertVerified::assertion()),
            Way::Pinned(known) if known.is_empty() => {
                format!(
                    "the server has a certificate with the fingerprint {seen}, and none is trusted yet: compare it on the \
                     server, then trust it"
                )
            }
            Way::Pinned(known) => {
                let known: Vec<_> = known.iter().map(Fingerprint::to_string).collect();
                format!(
                    "the server has a certificate with the fingerprint {seen}, {} was expected: it is another server, or \
                     has a new certificate, which then must be trusted anew",
                    known.join(" or ")
                )
            }
            Way::Authority(verifier) => {
                match verifier.verify_server_cert(certificate, intermediates, name, ocsp_response, now) {
                    Ok(verified) => return Ok(verified),
                    Err(error) => format!(
                        "the certificate of the server, with the fingerprint {seen}, is not one of the given authority \
                         ({error}); one that is self-signed can only be trusted by its fingerprint"
                    ),
                }
            }
        };
        let untrusted = Untrusted::new(Some(seen), reason);
        Err(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(untrusted)))))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_read_as_it_is_shown() {
        // SHA-256 of "abc".
        let shown = "BA:78:16:BF:8F:01:CF:EA:41:41:40:DE:5D:AE:22:23:B0:03:61:A3:96:17:7A:9C:B4:10:FF:61:F2:00:15:AD";
        let fingerprint = Fingerprint::of(b"abc");
        assert_eq!(fingerprint.to_string(), shown);
        for text in [shown.to_owned(), shown.to_lowercase(), shown.replace(':', "")] {
            assert_eq!(text.parse::<Fingerprint>().unwrap(), fingerprint);
        }
        let bare = shown.replace(':', "");
        for text in
            ["", ":", "AA", &shown[3..], &bare[1..], &format!("{shown}:00"), &format!("{bare}00"), &"é".repeat(32)]
        {
            let error = text.parse::<Fingerprint>().unwrap_err();
            assert!(error.to_string().contains("64 hexadecimal digits"), "{error}");
        }
        assert!(shown.replacen("BA", "+A", 1).parse::<Fingerprint>().is_err());
    }

    #[test]
    fn texts_without_a_certificate_are_refused() {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let broken = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
        for pem in ["", "no PEM", broken] {
            for trust in [Trust::Authority(pem.to_owned()), Trust::Certificate(pem.to_owned())] {
                assert!(trust.verifier(provider.clone()).is_err(), "{pem}");
            }
        }
    }
}
