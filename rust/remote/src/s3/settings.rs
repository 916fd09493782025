//! What the environment and the files of the AWS command line say of a bucket.

use std::time::Duration;

use lorafmt_core::{Code, Error, Result};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, resolve_bucket_region};
use object_store::{BackoffConfig, ClientOptions, HeaderValue, RetryConfig};

use super::failure::explained;
use super::profile::{Profile, profile};
use crate::http::{CONNECT_TIMEOUT, USER_AGENT, choose_tls};
use crate::retry::{Retries, pauses};
use crate::{Env, S3Address};

/// For how long a server may send nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// No request is begun again after this time.
const LONGEST: Duration = Duration::from_secs(180);

/// Variables that are passed on as they are, with what they set.
const PASSED: [(&str, AmazonS3ConfigKey); 12] = [
    ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", AmazonS3ConfigKey::ContainerCredentialsRelativeUri),
    ("AWS_CONTAINER_CREDENTIALS_FULL_URI", AmazonS3ConfigKey::ContainerCredentialsFullUri),
    ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", AmazonS3ConfigKey::ContainerAuthorizationTokenFile),
    ("AWS_WEB_IDENTITY_TOKEN_FILE", AmazonS3ConfigKey::WebIdentityTokenFile),
    ("AWS_ROLE_ARN", AmazonS3ConfigKey::RoleArn),
    ("AWS_ROLE_SESSION_NAME", AmazonS3ConfigKey::RoleSessionName),
    ("AWS_ENDPOINT_URL_STS", AmazonS3ConfigKey::StsEndpoint),
    ("AWS_METADATA_ENDPOINT", AmazonS3ConfigKey::MetadataEndpoint),
    ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", AmazonS3ConfigKey::VirtualHostedStyleRequest),
    ("AWS_REQUEST_PAYER", AmazonS3ConfigKey::RequestPayer),
    ("AWS_S3_EXPRESS", AmazonS3ConfigKey::S3Express),
    ("AWS_SKIP_SIGNATURE", AmazonS3ConfigKey::SkipSignature),
];

/// Of these, those that say who asks.
const CREDENTIALS: usize = 4;

/// How buckets are reached.
pub(super) struct Settings {
    builder: AmazonS3Builder,
    client: ClientOptions,
    region: Option<String>,
    has_endpoint: bool,
    pub(super) anonymous: bool,
    pub(super) retries: Retries,
}

impl Settings {
    pub(super) fn from_env(env: &Env) -> Result<Self> {
        choose_tls();
        let profile = profile(env)?;
        let retries = Retries::from_env(env)?;
        let endpoint =
            env.get("AWS_ENDPOINT_URL_S3").or_else(|| env.get("AWS_ENDPOINT_URL")).or(profile.endpoint.clone());
        let region = env.get("AWS_REGION").or_else(|| env.get("AWS_DEFAULT_REGION")).or(profile.region.clone());
        let plain = endpoint.as_deref().is_some_and(|url| url.starts_with("http://"));
        let client = ClientOptions::new()
            .with_user_agent(HeaderValue::from_static(USER_AGENT))
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_read_timeout(PATIENCE)
            // A large file takes as long as it takes; only silence is an error.
            .with_timeout_disabled()
            .with_allow_http(plain);
        let (init_backoff, max_backoff) = pauses();
        let retry = RetryConfig {
            backoff: BackoffConfig { init_backoff, max_backoff, base: 2.0 },
            max_retries: retries.0 as usize,
            retry_timeout: LONGEST,
        };
        let mut builder = AmazonS3Builder::new().with_client_options(client.clone()).with_retry(retry);
        for (name, key) in PASSED {
            if let Some(value) = env.get(name) {
                builder = builder.with_config(key, value);
            }
        }
        if let Some(endpoint) = &endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        let (builder, anonymous) = identified(env, builder, &profile)?;
        Ok(Self { builder, client, region, has_endpoint: endpoint.is_some(), anonymous, retries })
    }

    /// A bucket. Where no region is given, Amazon is asked for it.
    pub(super) async fn connect(self, at: &S3Address) -> Result<AmazonS3> {
        let region = match (self.region, self.has_endpoint) {
            (Some(region), _) => region,
            // Other stores than Amazon's care little.
            (None, true) => "us-east-1".to_owned(),
            (None, false) => resolve_bucket_region(&at.bucket, &self.client)
                .await
                .map_err(|e| explained(&e, at, self.anonymous).hint("check the bucket's name; `AWS_REGION` names its region, `AWS_ENDPOINT_URL` another store than Amazon's"))?,
        };
        let built = self.builder.with_bucket_name(&at.bucket).with_region(region).build();
        built.map_err(|e| {
            Error::new(Code::InvalidArgument, format!("the settings of the bucket make no sense: {e}"))
                .hint("check the variables that begin with `AWS_`")
        })
    }
}

/// Who asks: the variables, then the profile, then what the machine's surroundings offer; else nobody, which public
/// buckets allow.
fn identified(env: &Env, builder: AmazonS3Builder, profile: &Profile) -> Result<(AmazonS3Builder, bool)> {
    if env.is_true("AWS_SKIP_SIGNATURE") {
        return Ok((builder, true));
    }
    let stated = (env.get("AWS_ACCESS_KEY_ID"), env.get("AWS_SECRET_ACCESS_KEY"), env.get("AWS_SESSION_TOKEN"));
    let chosen = match (stated, &profile.keys) {
        ((Some(id), Some(secret), token), _) => Some((id, secret, token)),
        ((Some(_), None, _) | (None, Some(_), _), _) => {
            return Err(Error::new(
                Code::Unauthorized,
                "only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set",
            )
            .hint("set both, or neither to use a profile"));
        }
        (_, keys) => keys.clone(),
    };
    if let Some((id, secret, token)) = chosen {
        let builder = builder.with_access_key_id(id).with_secret_access_key(secret);
        return Ok((token.into_iter().fold(builder, AmazonS3Builder::with_token), false));
    }
    let offered = PASSED[..CREDENTIALS].iter().any(|(name, _)| env.get(name).is_some());
    if offered || env.get("AWS_METADATA_ENDPOINT").is_some() || on_ec2(env) {
        return Ok((builder, false));
    }
    Ok((builder.with_skip_signature(true), true))
}

/// Whether the machine has a metadata service that gives out credentials. Asking elsewhere would only cost time.
fn on_ec2(env: &Env) -> bool {
    let vendor = || std::fs::read_to_string("/sys/class/dmi/id/sys_vendor").unwrap_or_default();
    !env.is_true("AWS_EC2_METADATA_DISABLED") && vendor().contains("Amazon EC2")
}
