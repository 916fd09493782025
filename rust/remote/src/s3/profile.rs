//! The files of the AWS command line: `~/.aws/credentials` and `~/.aws/config`.

use std::collections::HashMap;
use std::path::PathBuf;

use lorafmt_core::{Code, Error, Result};

use crate::Env;
use crate::hub::expanded;

/// Ways to get credentials that a profile may name and that need the AWS command line.
const FOREIGN: [&str; 4] = ["sso_session", "sso_start_url", "credential_process", "role_arn"];

/// What a profile says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Profile {
    /// Identifier, secret, and the token of a session.
    pub(super) keys: Option<(String, String, Option<String>)>,
    pub(super) region: Option<String>,
    pub(super) endpoint: Option<String>,
}

type Section = HashMap<String, String>;

/// The profile that `AWS_PROFILE` names, or the default one, which may be missing.
pub(super) fn profile(env: &Env) -> Result<Profile> {
    let named = env.get("AWS_PROFILE").or_else(|| env.get("AWS_DEFAULT_PROFILE"));
    let name = named.as_deref().unwrap_or("default");
    let heading = if name == "default" { "default".to_owned() } else { format!("profile {name}") };
    let secret = section(env, "AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name)?;
    let config = section(env, "AWS_CONFIG_FILE", "~/.aws/config", &heading)?;
    if named.is_some() && secret.is_none() && config.is_none() {
        return Err(Error::new(Code::Unauthorized, format!("there is no AWS profile `{name}`"))
            .hint("`aws configure list-profiles` lists them; check `AWS_PROFILE`"));
    }
    let (secret, config) = (secret.unwrap_or_default(), config.unwrap_or_default());
    let get = |key: &str| secret.get(key).or_else(|| config.get(key)).filter(|v| !v.is_empty()).cloned();
    let keys = get("aws_access_key_id").zip(get("aws_secret_access_key"));
    let keys = keys.map(|(id, secret)| (id, secret, get("aws_session_token")));
    let stated = env.get("AWS_ACCESS_KEY_ID").is_some() || env.is_true("AWS_SKIP_SIGNATURE");
    if let (None, Some(way), false) = (&keys, FOREIGN.iter().find(|way| get(way).is_some()), stated) {
        return Err(Error::new(
            Code::Unauthorized,
            format!("the AWS profile `{name}` uses {way}, which lorafmt cannot"),
        )
        .hint(format!(
            "hand over its keys: `eval \"$(aws configure export-credentials --profile {name} --format env)\"`"
        )));
    }
    Ok(Profile { keys, region: get("region"), endpoint: get("endpoint_url") })
}

/// A section of a file; `None` if there is no such file or section.
fn section(env: &Env, variable: &str, default: &str, heading: &str) -> Result<Option<Section>> {
    let path: PathBuf = expanded(env, &env.get(variable).unwrap_or_else(|| default.to_owned()));
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(parsed(&text, heading)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(&path, "read the AWS profile", e)),
    }
}

/// Lines `key = value` under `[heading]`. Indented ones belong to a value before them and are none of ours.
fn parsed(text: &str, heading: &str) -> Option<Section> {
    let mut found: Option<Section> = None;
    let mut inside = false;
    for line in text.lines() {
        if let Some(title) = line.trim().strip_prefix('[').and_then(|l| l.split_once(']')) {
            inside = title.0.split_whitespace().eq(heading.split_whitespace());
            if inside {
                found.get_or_insert_default();
            }
        } else if inside
            && !line.starts_with([' ', '\t', '#', ';'])
            && let (Some(section), Some((key, value))) = (&mut found, line.split_once('='))
        {
            section.insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn read(folder: &std::path::Path, pairs: &[(&str, &str)]) -> Result<Profile> {
        let mut all: Vec<(String, String)> = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        for (name, file) in [("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config")] {
            all.push((name.into(), folder.join(file).to_str().expect("plain").into()));
        }
        profile(&Env(Arc::new(move |name| all.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))))
    }

    #[test]
    fn both_files_make_a_profile() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("written");
        assert_eq!(read(folder.path(), &[]).expect("none is fine"), Profile::default());
        write(
            "credentials",
            "[default]\naws_access_key_id = A\naws_secret_access_key=S=1\n\n# x\n[other]\naws_access_key_id=B\naws_secret_access_key=T\naws_session_token=K\n",
        );
        write(
            "config",
            "[default]\nregion = eu-west-1\ns3 =\n  endpoint_url = no\n[profile other]\nendpoint_url = http://localhost:9000\n[profile sso]\nsso_session = work\n",
        );
        let one = read(folder.path(), &[]).expect("valid");
        assert_eq!(one.keys, Some(("A".into(), "S=1".into(), None)));
        assert_eq!((one.region.as_deref(), one.endpoint), (Some("eu-west-1"), None));
        let other = read(folder.path(), &[("AWS_PROFILE", "other")]).expect("valid");
        assert_eq!(other.keys, Some(("B".into(), "T".into(), Some("K".into()))));
        assert_eq!(other.endpoint.as_deref(), Some("http://localhost:9000"));
        for name in ["sso", "missing"] {
            assert_eq!(read(folder.path(), &[("AWS_PROFILE", name)]).expect_err("wrong").code(), Code::Unauthorized);
        }
        read(folder.path(), &[("AWS_PROFILE", "sso"), ("AWS_ACCESS_KEY_ID", "A")]).expect("the keys are stated");
    }
}
