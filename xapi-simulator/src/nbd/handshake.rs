//! The handshake: fixed newstyle, and of its options only those to begin TLS, to end, and to take a disk by its name.
//!
//! | option | before TLS, where TLS is a must | after it | in cleartext |
//! |---|---|---|---|
//! | STARTTLS | ACK, then TLS | ERR_INVALID | ERR_POLICY |
//! | EXPORT_NAME | closed | the disk, or closed | the disk, or closed |
//! | ABORT | closed | ACK, closed | ACK, closed |
//! | LIST | ERR_TLS_REQD | ERR_POLICY | ERR_POLICY |
//! | any other | ERR_TLS_REQD | ERR_UNSUP | ERR_UNSUP |

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::{Connection, Export, Exports, Security};

const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054; // IHAVEOPT
const REPLY_MAGIC: u64 = 0x0003_E889_0455_65A9;
/// The only flag, of server and client: fixed newstyle.
const FIXED_NEWSTYLE: u16 = 1;
/// What clients send with an option at most, in bytes; who sends more is cut off.
const MAX_OPTION_BYTES: u32 = 64 << 10;
/// Flags of a disk: there are flags, and it is read-only.
const DISK_FLAGS: u16 = 3;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const STARTTLS: u32 = 5;

const ACK: u32 = 1;
const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_POLICY: u32 = 0x8000_0002;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_TLS_REQD: u32 = 0x8000_0005;

/// Returns the connection and the disk that the client took; `None` if it ended before.
pub(super) fn greet(stream: TcpStream, exports: &dyn Exports) -> io::Result<Option<(Connection, Export)>> {
    let mut tls = match exports.security() {
        Security::Tls(config) => Some(config),
        Security::Cleartext => None,
        Security::Refused => return Ok(None),
    };
    let is_cleartext = tls.is_none();
    let mut connection = Connection::Cleartext(stream);
    let mut greeting = Vec::from(b"NBDMAGIC");
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend(FIXED_NEWSTYLE.to_be_bytes());
    connection.write_all(&greeting)?;
    let flags = u32::from_be_bytes(read(&mut connection)?);
    let is_fixed = flags & u32::from(FIXED_NEWSTYLE) != 0;
    // What was not offered cannot be taken.
    if flags & !u32::from(FIXED_NEWSTYLE) != 0 || (tls.is_some() && !is_fixed) {
        return Ok(None);
    }
    loop {
        let (option, data) = read_option(&mut connection)?;
        match (option, tls.is_some()) {
            (STARTTLS, true) => {
                reply(&mut connection, option, ACK)?;
                let Some(config) = tls.take() else { return Ok(None) };
                connection = encrypt(connection, config)?;
            }
            (EXPORT_NAME | ABORT, true) => return Ok(None),
            (_, true) => reply(&mut connection, option, ERR_TLS_REQD)?,
            (EXPORT_NAME, false) => {
                let export = std::str::from_utf8(&data).ok().and_then(|name| exports.open(name));
                let Some(export) = export else { return Ok(None) };
                let mut answer = [0; 134];
                answer[..8].copy_from_slice(&export.content.size().to_be_bytes());
                answer[8..10].copy_from_slice(&DISK_FLAGS.to_be_bytes());
                connection.write_all(&answer)?;
                connection.flush()?;
                return Ok(Some((connection, export)));
            }
            (ABORT, false) => {
                reply(&mut connection, option, ACK)?;
                return Ok(None);
            }
            (LIST, false) => reply(&mut connection, option, ERR_POLICY)?,
            (STARTTLS, false) if is_cleartext => reply(&mut connection, option, ERR_POLICY)?,
            (STARTTLS, false) => reply(&mut connection, option, ERR_INVALID)?,
            (_, false) => reply(&mut connection, option, ERR_UNSUP)?,
        }
    }
}

fn encrypt(connection: Connection, config: Arc<ServerConfig>) -> io::Result<Connection> {
    let Connection::Cleartext(stream) = connection else {
        return Err(io::Error::other("a connection is encrypted once"));
    };
    let tls = ServerConnection::new(config).map_err(io::Error::other)?;
    Ok(Connection::Tls(Box::new(StreamOwned::new(tls, stream))))
}

fn read_option(connection: &mut Connection) -> io::Result<(u32, Vec<u8>)> {
    if u64::from_be_bytes(read(connection)?) != OPTION_MAGIC {
        return Err(io::Error::other("no option"));
    }
    let option = u32::from_be_bytes(read(connection)?);
    let length = u32::from_be_bytes(read(connection)?);
    if length > MAX_OPTION_BYTES {
        return Err(io::Error::other("an option of an absurd length"));
    }
    let mut data = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    connection.read_exact(&mut data)?;
    Ok((option, data))
}

fn reply(connection: &mut Connection, option: u32, kind: u32) -> io::Result<()> {
    let mut bytes = Vec::from(REPLY_MAGIC.to_be_bytes());
    bytes.extend([option, kind, 0].into_iter().flat_map(u32::to_be_bytes));
    connection.write_all(&bytes)?;
    connection.flush()
}

fn read<const N: usize>(connection: &mut Connection) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    connection.read_exact(&mut bytes)?;
    Ok(bytes)
}
