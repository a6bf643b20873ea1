//! What hosts prove themselves with: an RSA key and a certificate signed by itself, and TLS as XAPI has it.
//!
//! TLS 1.2 alone, ECDHE-RSA with AES-GCM, curve secp384r1: xen-api `ocaml/xapi-consts/tls_policy.ml`.

use aws_lc_rs::digest::{self, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use rcgen::{CertificateParams, KeyPair, PKCS_RSA_SHA256};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs as tls;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// What a host proves itself with.
#[derive(Clone)]
pub struct Certificate {
    /// The certificate as PEM.
    pub pem: String,
    /// The SHA-256 of it, as `AA:BB:...`.
    pub sha256: String,
    /// The SHA-1 of it, as `AA:BB:...`.
    pub sha1: String,
    /// How the host speaks TLS.
    pub tls: Arc<ServerConfig>,
}

impl fmt::Debug for Certificate {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "Certificate({})", self.sha256)
    }
}

impl Certificate {
    /// Makes one for the host at `position` of a scene; its key is the same throughout the process, since making one takes long.
    ///
    /// # Errors
    /// If there is no randomness.
    pub fn new(position: usize, name: &str, address: IpAddr) -> io::Result<Certificate> {
        let key = key(position)?;
        let mut params =
            CertificateParams::new(vec![name.to_owned(), address.to_string()]).map_err(io::Error::other)?;
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = params.self_signed(&*key).map_err(io::Error::other)?;
        let der = CertificateDer::clone(certificate.der()).into_owned();
        let provider = rustls::crypto::CryptoProvider {
            cipher_suites: vec![
                tls::cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
                tls::cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
            ],
            kx_groups: vec![tls::kx_group::SECP384R1],
            ..tls::default_provider()
        };
        let tls = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS12])
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(vec![der.clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .map_err(io::Error::other)?;
        Ok(Certificate {
            pem: certificate.pem(),
            sha256: fingerprint(&SHA256, &der),
            sha1: fingerprint(&SHA1_FOR_LEGACY_USE_ONLY, &der),
            tls: Arc::new(tls),
        })
    }
}

fn fingerprint(algorithm: &'static digest::Algorithm, der: &[u8]) -> String {
    let pairs: Vec<String> = digest::digest(algorithm, der).as_ref().iter().map(|byte| format!("{byte:02X}")).collect();
    pairs.join(":")
}

fn key(position: usize) -> io::Result<Arc<KeyPair>> {
    static KEYS: Mutex<Vec<Arc<KeyPair>>> = Mutex::new(Vec::new());
    let mut keys = KEYS.lock().unwrap_or_else(PoisonError::into_inner);
    while keys.len() <= position {
        keys.push(Arc::new(KeyPair::generate_for(&PKCS_RSA_SHA256).map_err(io::Error::other)?));
    }
    Ok(Arc::clone(&keys[position]))
}
