//! What a store's errors mean.

use std::error::Error as StdError;

use lorafmt_core::{Code, Error};
use object_store::client::HttpError;

use crate::S3Address;
use crate::http::causes;

/// Codes of the S3 protocol that mean wrong credentials rather than missing rights.
const CREDENTIALS: [&str; 7] = [
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "RequestTimeTooSkewed",
    "AuthorizationHeaderMalformed",
];

/// The error in our words. `anonymous` is whether nothing said who asks.
pub(super) fn explained(error: &object_store::Error, at: &S3Address, anonymous: bool) -> Error {
    use object_store::Error as E;
    let text = error.to_string();
    let said = element(&text, "Code").unwrap_or_default();
    let bucket = &at.bucket;
    if said == "NoSuchBucket" || text.contains("Bucket '") && text.contains("not found") {
        return Error::new(Code::BucketNotFound, format!("there is no bucket `{bucket}`"));
    }
    if CREDENTIALS.contains(&said) {
        let message = element(&text, "Message").unwrap_or(said).trim_end_matches('.');
        return Error::new(Code::Unauthorized, format!("the store does not accept the credentials: {message}"))
            .hint("check `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` or `AWS_PROFILE`");
    }
    match error {
        E::NotFound { .. } => Error::new(Code::NotFound, format!("bucket `{bucket}` has no object of this key"))
            .hint("check the key; a prefix ends with `/`"),
        E::PermissionDenied { .. } | E::Unauthenticated { .. } if anonymous => {
            Error::new(Code::Unauthorized, format!("bucket `{bucket}` is not public, and no credentials were found"))
                .hint("set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or `AWS_PROFILE`, or run `aws configure`")
        }
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
            Error::new(Code::Forbidden, format!("bucket `{bucket}` refuses this to the account"))
                .hint("without the right to list a bucket, a missing object is refused as well; check the key, too")
        }
        E::Precondition { .. } => Error::new(Code::Network, "the object was changed while it was read"),
        E::InvalidPath { .. } => Error::new(Code::InvalidAddress, text),
        _ if text.contains("redirect without LOCATION") || said == "PermanentRedirect" => {
            Error::new(Code::Server, format!("bucket `{bucket}` is in another region"))
                .hint("set `AWS_REGION` to the region of the bucket")
        }
        _ if connection(error) => Error::new(Code::Network, format!("cannot reach the store: {}", causes(error))),
        _ => {
            let message = element(&text, "Message").map_or_else(|| causes(error), |m| format!("{said}: {m}"));
            Error::new(Code::Server, format!("the store failed: {message}"))
        }
    }
}

/// Whether the failure is one of the connection and not an answer.
fn connection(error: &object_store::Error) -> bool {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(inner) = cause {
        if inner.is::<HttpError>() {
            return true;
        }
        cause = inner.source();
    }
    false
}

/// The text of `<name>...</name>`.
fn element<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let rest = text.split_once(&format!("<{name}>"))?.1;
    Some(rest.split_once("</")?.0)
}
