//! Fetching one file: from where the last attempt broke off, until it is whole and its hash is right.

use futures_util::StreamExt;
use lorafmt_core::io::Control;
use lorafmt_core::{Code, Error, Result};
use reqwest::{Method, StatusCode};

use super::answer::refused;
use super::cache::Part;
use super::check::Check;
use super::{Hub, Pinned};
use crate::HubAddress;
use crate::http::{Request, content_range, is_partial, unreachable};
use crate::retry::Trouble;

/// How far a download is.
struct State<'a> {
    part: &'a mut Part,
    check: Check,
    /// The farthest that any attempt came. Coming farther is progress, coming as far again is none.
    farthest: u64,
    control: &'a Control,
}

impl Hub {
    /// Fetches a file into `part`. After an error `part` holds anything, and nobody must use it.
    pub(super) async fn download(&self, pinned: &Pinned, part: &mut Part, control: &Control) -> Result<()> {
        control.expect(pinned.size.unwrap_or(0) as usize);
        let check = Check::new(&pinned.etag, pinned.size);
        let mut state = State { part, check, farthest: 0, control };
        self.retries
            .run(async || {
                let before = state.farthest;
                let result = self.attempt(pinned, &mut state).await;
                match result {
                    Err(Trouble::Passing(error, _)) if state.farthest > before => Err(Trouble::Progress(error)),
                    other => other,
                }
            })
            .await
    }

    /// One request, and what can be read of its answer.
    async fn attempt(&self, pinned: &Pinned, state: &mut State<'_>) -> Result<(), Trouble> {
        let at = HubAddress { revision: Some(pinned.commit.clone()), ..pinned.at.clone() };
        let have = state.check.length();
        let range = (have > 0).then(|| format!("bytes={have}-"));
        let url = self.file_url(&at, at.revision())?;
        let patience = self.settings.patience;
        let request = Request { method: Method::GET, url, range, patience, abroad: true };
        // All is here, but for the proof.
        if have == 0 || pinned.size != Some(have) {
            let response = self.http.send(&request).await?;
            let status = response.status();
            if status == StatusCode::RANGE_NOT_SATISFIABLE {
                state.restart(pinned)?;
                return Err(passing(Code::Server, "the server does not go on where it broke off"));
            }
            if !status.is_success() {
                return Err(refused(&response, &at).into());
            }
            let start =
                if is_partial(status) { content_range(response.headers()).map(|(start, _)| start) } else { Some(0) };
            if start != Some(state.check.length()) {
                state.restart(pinned)?;
                if start != Some(0) {
                    return Err(passing(Code::Server, "the server does not go on where it broke off"));
                }
            }
            let promised = response.content_length().map(|n| n + state.check.length()).or(pinned.size);
            let mut stream = response.bytes_stream();
            while let Some(chunk) = stream.next().await {
                state.add(&chunk.map_err(|e| unreachable(&e, &request.url))?)?;
                if pinned.size.is_some_and(|size| state.check.length() > size) {
                    break;
                }
            }
            let arrived = state.check.length();
            if promised.is_some_and(|n| arrived < n) || pinned.size.is_some_and(|n| arrived < n) {
                let all = pinned.size.or(promised).unwrap_or_default();
                return Err(passing(Code::Network, format!("the connection ended after {arrived} of {all} bytes")));
            }
        }
        let check = std::mem::replace(&mut state.check, Check::new(&pinned.etag, pinned.size));
        check.finish().or_else(|error| {
            state.part.clear()?;
            Err(Trouble::passing(error))
        })
    }
}

impl State<'_> {
    fn add(&mut self, bytes: &[u8]) -> Result<()> {
        self.part.write(bytes)?;
        self.check.add(bytes);
        let length = self.check.length();
        if length > self.farthest {
            self.control.advance((length - self.farthest) as usize);
            self.farthest = length;
        }
        Ok(())
    }

    fn restart(&mut self, pinned: &Pinned) -> Result<()> {
        self.check = Check::new(&pinned.etag, pinned.size);
        self.part.clear()
    }
}

fn passing(code: Code, message: impl Into<String>) -> Trouble {
    Trouble::passing(Error::new(code, message))
}
