//! What the environment says of the hub; the same variables as for `huggingface_hub`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lorafmt_core::{Code, Error, Result};
use reqwest::Url;

use crate::Env;
use crate::retry::whole_number;

const ENDPOINT: &str = "https://huggingface.co";

/// For how long a server may send nothing, in seconds.
const PATIENCE: u64 = 10;

/// Where the hub is, who asks, and where its files are kept.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) endpoint: Url,
    pub(super) token: Option<String>,
    pub(super) cache: PathBuf,
    pub(super) offline: bool,
    pub(super) symlinks: bool,
    /// While a body arrives.
    pub(super) patience: Duration,
    /// While nothing but headers is asked for.
    pub(super) etag_patience: Duration,
}

impl Settings {
    pub(super) fn from_env(env: &Env) -> Result<Self> {
        let endpoint = env.get("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = Url::parse(&endpoint).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        let endpoint = endpoint.ok_or_else(|| {
            Error::new(Code::InvalidArgument, "the variable HF_ENDPOINT is no address of a server")
                .hint("write it as `https://huggingface.co`, or unset it")
        })?;
        let home = home(env);
        let cache = env.get("HF_HUB_CACHE").or_else(|| env.get("HUGGINGFACE_HUB_CACHE"));
        let seconds =
            |name| whole_number(env, name).map(|n| Duration::from_secs(n.filter(|&n| n > 0).unwrap_or(PATIENCE)));
        Ok(Self {
            endpoint,
            token: token(env, &home)?,
            cache: cache.map_or_else(|| home.join("hub"), |path| expanded(env, &path)),
            offline: env.is_true("HF_HUB_OFFLINE") || env.is_true("TRANSFORMERS_OFFLINE"),
            symlinks: !env.is_true("HF_HUB_DISABLE_SYMLINKS"),
            patience: seconds("HF_HUB_DOWNLOAD_TIMEOUT")?,
            etag_patience: seconds("HF_HUB_ETAG_TIMEOUT")?,
        })
    }
}

/// The folder of everything that has to do with the hub.
fn home(env: &Env) -> PathBuf {
    if let Some(home) = env.get("HF_HOME") {
        return expanded(env, &home);
    }
    let caches = env.get("XDG_CACHE_HOME").map(|path| expanded(env, &path));
    caches.unwrap_or_else(|| user(env).join(".cache")).join("huggingface")
}

fn user(env: &Env) -> PathBuf {
    let name = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
    env.get(name).map(PathBuf::from).or_else(std::env::home_dir).unwrap_or_default()
}

/// `~` is the user's folder.
pub(crate) fn expanded(env: &Env, path: &str) -> PathBuf {
    match path.strip_prefix('~') {
        Some("") => user(env),
        Some(rest) if rest.starts_with(['/', '\\']) => user(env).join(&rest[1..]),
        _ => PathBuf::from(path),
    }
}

/// The variable first, then the file that `hf auth login` writes.
fn token(env: &Env, home: &Path) -> Result<Option<String>> {
    let stated = env.get("HF_TOKEN").or_else(|| env.get("HUGGING_FACE_HUB_TOKEN"));
    let found = match stated {
        Some(token) => Some(token),
        None if env.is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") => None,
        None => {
            let file = env.get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), |path| expanded(env, &path));
            match std::fs::read_to_string(&file) {
                Ok(text) => Some(text.trim().to_owned()).filter(|t| !t.is_empty()),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
                Err(e) => return Err(Error::io(&file, "read the token", e)),
            }
        }
    };
    match found {
        Some(token) if !token.bytes().all(|b| b.is_ascii_graphic()) => {
            Err(Error::new(Code::Unauthorized, "the token of the hub has characters that no token has")
                .hint("set `HF_TOKEN` to the token alone, or run `hf auth login`"))
        }
        found => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Result<Settings> {
        let pairs: Vec<(String, String)> = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let get = move |name: &str| pairs.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone());
        Settings::from_env(&Env(Arc::new(get)))
    }

    #[test]
    fn folders_are_those_of_the_python_library() {
        let cache = |pairs: &[(&str, &str)]| settings(pairs).expect("valid").cache;
        let user = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
        assert_eq!(cache(&[(user, "/u")]), Path::new("/u/.cache/huggingface/hub"));
        assert_eq!(cache(&[(user, "/u"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/h/hub"));
        assert_eq!(cache(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert_eq!(cache(&[(user, "/u"), ("HF_HOME", "~/h")]), Path::new("/u/h/hub"));
    }

    #[test]
    fn tokens_come_from_the_variable_then_from_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let home = folder.path().to_str().expect("plain");
        let token = |pairs: &[(&str, &str)]| settings(&[pairs, &[("HF_HOME", home)]].concat()).expect("valid").token;
        assert_eq!(token(&[]), None);
        std::fs::write(folder.path().join("token"), "hf_file\n").expect("written");
        assert_eq!(token(&[]).as_deref(), Some("hf_file"));
        assert_eq!(token(&[("HF_TOKEN", " hf_env\n")]).as_deref(), Some("hf_env"));
        assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        std::fs::write(folder.path().join("other"), "hf_other").expect("written");
        let other = folder.path().join("other");
        assert_eq!(token(&[("HF_TOKEN_PATH", other.to_str().expect("plain"))]).as_deref(), Some("hf_other"));
    }

    #[test]
    fn nonsense_is_an_error() {
        let code = |pairs: &[(&str, &str)]| settings(pairs).expect_err("wrong").code();
        assert_eq!(code(&[("HF_ENDPOINT", "nowhere")]), Code::InvalidArgument);
        assert_eq!(code(&[("HF_TOKEN", "two words")]), Code::Unauthorized);
        assert_eq!(code(&[("HF_HUB_DOWNLOAD_TIMEOUT", "soon")]), Code::InvalidArgument);
    }
}
