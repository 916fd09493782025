//! Requests over HTTP: one client, redirects that do not leak the token, and failures that say whether they may pass.

use std::sync::Once;
use std::time::Duration;

use lorafmt_core::{Code, Error};
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, LOCATION, RANGE, RETRY_AFTER};
use reqwest::{Client, Method, Response, StatusCode, Url};

use crate::retry::Trouble;

/// Redirects that are followed in a row.
const MOST_REDIRECTS: usize = 10;

/// Hosts of the public hub, to which mirrors redirect what they do not answer themselves.
const HUB_HOSTS: [&str; 2] = ["huggingface.co", "hf.co"];

/// How long a connection may take to come about.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What the server sees of who asks.
pub(crate) const USER_AGENT: &str = concat!("lorafmt/", env!("CARGO_PKG_VERSION"));

static PROVIDER: Once = Once::new();

/// Chooses the one implementation of TLS, once for the process; a choice that the host program made stays.
pub(crate) fn choose_tls() {
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
}

/// A client of one server, and of those that it redirects to.
pub(crate) struct Http {
    client: Client,
    token: Option<String>,
}

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) url: Url,
    /// The value of a `Range` header.
    pub(crate) range: Option<String>,
    /// For how long nothing may happen.
    pub(crate) patience: Duration,
    /// Whether redirects to other servers are followed. No other server than the first gets the token.
    pub(crate) abroad: bool,
}

impl Http {
    /// `patience` is for how long a server may send nothing.
    pub(crate) fn new(token: Option<String>, patience: Duration) -> Result<Self, Error> {
        choose_tls();
        let client = Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(patience)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| Error::new(Code::Network, format!("cannot set up connections: {}", causes(&e))))?;
        Ok(Self { client, token })
    }

    /// Sends it and follows redirects. Answers of every status are answers; those that may pass are not.
    pub(crate) async fn send(&self, request: &Request) -> Result<Response, Trouble> {
        let home = request.url.origin();
        let mut url = request.url.clone();
        for _ in 0..MOST_REDIRECTS {
            let mut builder = self.client.request(request.method.clone(), url.clone());
            // Compressed bodies have no length that could be checked.
            builder = builder.header(ACCEPT_ENCODING, "identity");
            if let Some(token) = self.token.as_ref().filter(|_| url.origin() == home) {
                builder = builder.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            if let Some(range) = &request.range {
                builder = builder.header(RANGE, range);
            }
            let sent = tokio::time::timeout(request.patience + CONNECT_TIMEOUT, builder.send()).await;
            let response = match sent {
                Ok(sent) => sent.map_err(|e| unreachable(&e, &url))?,
                Err(_) => return Err(silent(&url)),
            };
            let status = response.status();
            if status.is_server_error() || matches!(status.as_u16(), 408 | 429) {
                let error = Error::new(Code::Server, format!("{} answered {status}", place(&url)));
                return Err(Trouble::Passing(Box::new(error), retry_after(response.headers())));
            }
            let target = response.headers().get(LOCATION).filter(|_| status.is_redirection());
            let Some(target) = target.and_then(|t| t.to_str().ok()).and_then(|t| url.join(t).ok()) else {
                return Ok(response);
            };
            let hub = target.host_str().is_some_and(|host| HUB_HOSTS.contains(&host));
            if !(request.abroad || hub || target.origin() == home) {
                return Ok(response);
            }
            url = target;
        }
        let message = format!("{} redirects without end", place(&request.url));
        Err(Error::new(Code::Server, message).into())
    }
}

/// The pause that a server asks for, in seconds.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// A connection that failed before an answer came.
pub(crate) fn unreachable(error: &reqwest::Error, url: &Url) -> Trouble {
    if error.is_timeout() {
        return silent(url);
    }
    let what = if error.is_connect() { "cannot connect to" } else { "lost the connection to" };
    let message = format!("{what} {}: {}", place(url), causes(error));
    Trouble::passing(Error::new(Code::Network, message))
}

fn silent(url: &Url) -> Trouble {
    Trouble::passing(Error::new(Code::Network, format!("{} did not answer in time", place(url))))
}

/// The server of an address, without what could be secret in the rest.
pub(crate) fn place(url: &Url) -> String {
    url.origin().ascii_serialization()
}

/// The innermost cause: the outer ones only repeat what was being done.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

/// Whether a status is that of a part of a file.
pub(crate) fn is_partial(status: StatusCode) -> bool {
    status == StatusCode::PARTIAL_CONTENT
}

/// The first byte and the whole length of `Content-Range: bytes 5-9/10`.
pub(crate) fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let text = headers.get(reqwest::header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, all) = text.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, all.parse().ok()))
}
