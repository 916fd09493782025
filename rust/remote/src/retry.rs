//! Trying again: what may pass is tried a few times, with pauses that double.

use std::time::Duration;

use lorafmt_core::{Code, Error, Result};

use crate::Env;

/// The first pause. The next ones double, up to [`LONGEST`].
const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(8);

/// Tries after the first one, unless `LORAFMT_RETRIES` says otherwise.
const RETRIES: u32 = 5;

/// A failure, and whether it may pass.
pub(crate) enum Trouble {
    /// It may; after the pause that the server asks for, if it asks for one.
    Passing(Box<Error>, Option<Duration>),
    /// As before, but there was progress since the last one: the count begins again.
    Progress(Box<Error>),
    /// It will not.
    Final(Box<Error>),
}

impl Trouble {
    /// It may pass, after the usual pause.
    pub(crate) fn passing(error: Error) -> Self {
        Trouble::Passing(Box::new(error), None)
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Trouble::Final(Box::new(error))
    }
}

/// How often something is tried again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retries(pub(crate) u32);

impl Retries {
    pub(crate) fn from_env(env: &Env) -> Result<Self> {
        Ok(Self(whole_number(env, "LORAFMT_RETRIES")?.map_or(RETRIES, |n| n.try_into().unwrap_or(u32::MAX))))
    }

    /// Runs `work` until it succeeds, fails for good, or has failed too often.
    pub(crate) async fn run<T>(self, mut work: impl AsyncFnMut() -> Result<T, Trouble>) -> Result<T> {
        let mut failed = 0;
        loop {
            let (error, asked) = match work().await {
                Ok(value) => return Ok(value),
                Err(Trouble::Final(error)) => return Err(*error),
                Err(Trouble::Passing(error, asked)) => (error, asked),
                Err(Trouble::Progress(error)) => {
                    failed = 0;
                    (error, None)
                }
            };
            if failed >= self.0 {
                return Err(*error);
            }
            tokio::time::sleep(asked.unwrap_or_else(|| pause(failed)).min(Duration::from_secs(60))).await;
            failed += 1;
        }
    }
}

/// The pause after failure number `failed`.
pub(crate) fn pause(failed: u32) -> Duration {
    FIRST.saturating_mul(2u32.saturating_pow(failed)).min(LONGEST)
}

/// The longest pauses of object_store's own retries.
pub(crate) fn pauses() -> (Duration, Duration) {
    (FIRST, LONGEST)
}

/// A variable that holds a whole number.
pub(crate) fn whole_number(env: &Env, name: &str) -> Result<Option<u64>> {
    let Some(text) = env.get(name) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        Error::new(Code::InvalidArgument, format!("the variable {name} is `{text}`, which is no whole number"))
            .hint(format!("unset {name}, or set it to a whole number"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(retries: u32, mut outcomes: Vec<Trouble>) -> (Result<()>, usize) {
        let mut tries = 0;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let result = runtime.block_on(Retries(retries).run(async || {
            tries += 1;
            if outcomes.is_empty() { Ok(()) } else { Err(outcomes.remove(0)) }
        }));
        (result, tries)
    }

    fn error() -> Error {
        Error::new(Code::Server, "no")
    }

    #[test]
    fn what_may_pass_is_tried_again_and_not_for_ever() {
        let passing = || Trouble::Passing(Box::new(error()), Some(Duration::ZERO));
        assert!(matches!(run(2, vec![passing(), passing()]), (Ok(()), 3)));
        assert!(matches!(run(1, vec![passing(), passing()]), (Err(_), 2)));
        assert!(matches!(run(0, vec![passing()]), (Err(_), 1)));
        assert!(matches!(run(5, vec![error().into()]), (Err(_), 1)));
        // After progress the count begins again.
        assert!(matches!(run(1, vec![passing(), Trouble::Progress(Box::new(error()))]), (Ok(()), 3)));
    }

    #[test]
    fn pauses_double_up_to_a_limit() {
        let millis: Vec<u128> = (0..8).map(|n| pause(n).as_millis()).collect();
        assert_eq!(millis, [250, 500, 1000, 2000, 4000, 8000, 8000, 8000]);
        assert_eq!(pause(4_000_000_000), LONGEST);
    }
}
