//! A minimal HTTP/1.1 client: one request per connection.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::process::command;
use crate::wait::TIMEOUT;

/// Status and body of a GET request on a new connection.
///
/// # Errors
/// Any error of the connection.
pub fn get(address: &str, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let status = response.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let body = response.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    Ok((status, body))
}

/// The response of a server.
pub struct HttpResponse {
    /// The status code.
    pub status: u16,
    /// The status line and the headers.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

impl HttpResponse {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let headers = self.head.lines().filter_map(|line| line.split_once(": "));
        headers.into_iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// A request, sent with TLS if an authority is given.
#[derive(Default)]
pub struct HttpRequest<'a> {
    /// Host and port of the server.
    pub address: &'a str,
    /// The certificate authority to trust; `None` is plain HTTP.
    pub ca: Option<&'a Path>,
    /// The method.
    pub method: &'a str,
    /// The path with the query.
    pub path: &'a str,
    /// Headers in addition to `Host`, `Connection` and `Content-Length`.
    pub headers: &'a [(&'a str, &'a str)],
    /// The body.
    pub body: &'a [u8],
}

impl HttpRequest<'_> {
    /// Sends the request on a new connection, and returns the response.
    ///
    /// # Panics
    /// If the server cannot be reached or does not respond.
    pub fn send(&self) -> HttpResponse {
        let Self { address, ca, method, path, headers, body } = self;
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        );
        let request = [head.as_bytes(), body].concat();
        let text = match ca {
            Some(ca) => {
                let mut client = command("openssl");
                client.args(["s_client", "-quiet", "-verify_return_error", "-connect", address, "-CAfile"]).arg(ca);
                run_command_with_input(&mut client, &request)
            }
            None => {
                let mut stream = TcpStream::connect(address).expect("the server listens");
                stream.set_read_timeout(Some(TIMEOUT)).expect("a socket accepts a timeout");
                stream.write_all(&request).expect("the server reads");
                let mut text = Vec::new();
                stream.read_to_end(&mut text).expect("the server answers");
                text
            }
        };
        let end = text.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("the server answers with HTTP");
        let head = String::from_utf8_lossy(&text[..end]).into_owned();
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        HttpResponse { status, head, body: text[end + 4..].to_vec() }
    }
}

/// Runs a command with this standard input and returns its standard output.
fn run_command_with_input(command: &mut Command, input: &[u8]) -> Vec<u8> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("setpriv is installed; it is part of util-linux");
    child.stdin.take().expect("stdin is piped").write_all(input).expect("the command reads");
    child.wait_with_output().expect("the command ends").stdout
}
