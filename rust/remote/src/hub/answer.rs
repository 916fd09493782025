//! Answers of a hub: what a refusal means, and bodies within bounds.

use std::ops::Range;

use futures_util::StreamExt;
use lorafmt_core::{Code, Error};
use reqwest::{Response, Url};

use crate::HubAddress;
use crate::http::unreachable;
use crate::retry::Trouble;

/// Longest page of a listing that is read, in bytes.
const MOST_TEXT: usize = 64 << 20;

/// The error of an answer that is none of those that were hoped for.
pub(super) fn refused(response: &Response, at: &HubAddress) -> Error {
    let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let (code, said) = (header("x-error-code"), header("x-error-message"));
    let (repo, revision, path) = (&at.repo, at.revision(), &at.path);
    let invalid_token = said.contains("Invalid credentials") || said.contains("Invalid user token");
    match (code, response.status().as_u16()) {
        ("GatedRepo", _) => Error::new(Code::Gated, format!("`{repo}` is gated, and this account has no access to it"))
            .hint(format!(
                "accept its conditions at {}{repo}, then set `HF_TOKEN` or run `hf auth login`",
                response.url().join("/").map(|u| u.to_string()).unwrap_or_default()
            )),
        ("RevisionNotFound", _) => {
            Error::new(Code::RevisionNotFound, format!("`{repo}` has no branch, tag or commit `{revision}`"))
        }
        ("EntryNotFound", _) => Error::new(Code::NotFound, format!("`{repo}` has no `{path}` at `{revision}`"))
            .hint("check the spelling of the path in the repository"),
        (_, 401) if invalid_token => Error::new(Code::Unauthorized, "the hub does not know the token")
            .hint("run `hf auth login`, or set another `HF_TOKEN`"),
        ("RepoNotFound", _) | (_, 404) if code != "EntryNotFound" => {
            Error::new(Code::RepoNotFound, format!("the hub shows no repository `{repo}`"))
        }
        (_, 401) => {
            Error::new(Code::Unauthorized, "the hub asks for a token").hint("set `HF_TOKEN` or run `hf auth login`")
        }
        (_, 403) => Error::new(Code::Forbidden, with(said, "the hub refuses the file to this account"))
            .hint("use a token that may read the repository"),
        (_, status) => Error::new(Code::Server, with(said, &format!("the hub answered {status}"))),
    }
}

fn with(said: &str, message: &str) -> String {
    if said.is_empty() { message.to_owned() } else { format!("{message}: {said}") }
}

/// The body as text.
pub(super) async fn text(response: Response, url: &Url) -> Result<String, Trouble> {
    let length = response.content_length();
    let mut bytes = Vec::new();
    let mut stream = response.bytes_stream();
    while let Some(chunk) = stream.next().await {
        bytes.extend_from_slice(&chunk.map_err(|e| unreachable(&e, url))?);
        if bytes.len() > MOST_TEXT {
            return Err(Error::new(Code::Server, "the hub's answer is too long").into());
        }
    }
    if length.is_some_and(|length| length != bytes.len() as u64) {
        return Err(Trouble::passing(Error::new(Code::Network, "the hub's answer was cut off")));
    }
    String::from_utf8(bytes).map_err(|_| Error::new(Code::Server, "the hub's answer is no text").into())
}

/// The bytes of a range out of a body that begins at `start` of the file; the rest is not waited for.
pub(super) async fn window(response: Response, url: &Url, start: u64, range: &Range<u64>) -> Result<Vec<u8>, Trouble> {
    let wanted = (range.end - range.start) as usize;
    let mut bytes = Vec::with_capacity(wanted.min(1 << 20));
    let mut at = start;
    let mut stream = response.bytes_stream();
    while bytes.len() < wanted {
        let Some(chunk) = stream.next().await else { break };
        let chunk = chunk.map_err(|e| unreachable(&e, url))?;
        let skip = (range.start + bytes.len() as u64).saturating_sub(at).min(chunk.len() as u64) as usize;
        at += chunk.len() as u64;
        bytes.extend(chunk.iter().skip(skip).take(wanted - bytes.len()));
    }
    if bytes.len() < wanted || start > range.start {
        let message = format!("{} of {wanted} bytes arrived", bytes.len());
        return Err(Trouble::passing(Error::new(Code::Network, message)));
    }
    Ok(bytes)
}
