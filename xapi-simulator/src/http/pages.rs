//! Answers in HTML: what a server says where it cannot, or does not, answer in the protocol that is spoken.

use std::io::{self, Write};

/// Writes a whole answer with a page.
pub fn send(to: &mut impl Write, status: u16, reason: &str, text: &str) -> io::Result<()> {
    send_with(to, status, reason, &[], text)
}

/// Writes a whole answer with a page and more header fields.
pub fn send_with(
    to: &mut impl Write,
    status: u16,
    reason: &str,
    fields: &[(&str, &str)],
    text: &str,
) -> io::Result<()> {
    let mut body = format!("<html><body><h1>HTTP {status} {}</h1>", reason.to_lowercase());
    for character in text.chars() {
        match character {
            '<' => body.push_str("&lt;"),
            '>' => body.push_str("&gt;"),
            '&' => body.push_str("&amp;"),
            other => body.push(other),
        }
    }
    body.push_str("</body></html>");
    let mut head = format!("HTTP/1.1 {status} {reason}\r\nconnection: close\r\ncache-control: no-cache, no-store\r\n");
    for (name, value) in fields {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("content-type: text/html\r\ncontent-length: {}\r\n\r\n", body.len()));
    to.write_all(head.as_bytes())?;
    to.write_all(body.as_bytes())?;
    to.flush()
}

/// Writes the page of an error that nobody foresaw, which the server also writes into what it has begun to send.
pub fn send_error(to: &mut impl Write, error: &str) -> io::Result<()> {
    let text = format!(
        "The server met an error that it did not expect, and could not finish what it was asked for. If this happens again, \
         look into the log of the host for what went wrong there, and tell who looks after the pool. The error was: {error}"
    );
    send(to, 500, "Internal Error", &text)
}
