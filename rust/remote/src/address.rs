//! Addresses: `hf://user/repo@revision/path`, `user/repo/file.safetensors`, `s3://bucket/key`, and pages of the hub.

use std::fmt;
use std::path::Path;

use lorafmt_core::{Code, Error, Result};

/// Hosts whose pages are addresses of the hub.
const HUB_PAGES: [&str; 2] = ["https://huggingface.co/", "https://hf.co/"];

/// Parts of a page's address that a file or a folder follows.
const HUB_VIEWS: [&str; 4] = ["blob", "raw", "resolve", "tree"];

/// Kinds of repositories that hold no adapters.
const OTHER_KINDS: [&str; 4] = ["datasets", "spaces", "kernels", "buckets"];

/// Where a file or a folder of files is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// In a repository of a hub.
    Hub(HubAddress),
    /// In a bucket.
    S3(S3Address),
}

/// A place in a repository of models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubAddress {
    /// `user/name`.
    pub repo: String,
    /// A branch, a tag or a commit; `None` is the branch `main`.
    pub revision: Option<String>,
    /// A file, or a folder; empty for the whole repository.
    pub path: String,
}

/// A place in a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Address {
    /// The bucket.
    pub bucket: String,
    /// The key of an object, or a prefix; empty for the whole bucket.
    pub key: String,
}

/// Whether a text is an address and no path. A path that exists is never an address.
///
/// `user/repo/file.safetensors` is one only if there is no folder `user/repo` either.
pub fn is_remote(text: &str) -> bool {
    if Path::new(text).symlink_metadata().is_ok() {
        return false;
    }
    match text.split_once("://") {
        // One letter is a drive of Windows.
        Some((scheme, _)) => scheme.len() > 1 && scheme.bytes().all(|b| b.is_ascii_alphanumeric()),
        None => short_form(text).is_some_and(|at| !Path::new(&at.repo).exists()),
    }
}

impl Address {
    /// Reads an address; whether a path of that name exists is not looked at.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |message: String| Error::new(Code::InvalidAddress, message).at(Path::new(text));
        if let Some(rest) = text.strip_prefix("s3://") {
            return S3Address::parse(rest).map(Address::S3).map_err(wrong);
        }
        if let Some(rest) = text.strip_prefix("hf://") {
            return HubAddress::parse(rest).map(Address::Hub).map_err(wrong);
        }
        if let Some(rest) = HUB_PAGES.iter().find_map(|page| text.strip_prefix(page)) {
            return HubAddress::of_page(rest).map(Address::Hub).map_err(wrong);
        }
        match text.split_once("://") {
            Some(("http" | "https", _)) => Err(wrong("files of web servers are not read".to_owned())
                .hint("pipe it: `curl -L URL | lorafmt ... -`; or name it as `hf://` or `s3://`")),
            Some((scheme, _)) => Err(wrong(format!("`{scheme}://` is not known"))),
            None => short_form(text).map(Address::Hub).ok_or_else(|| wrong("this is no address".to_owned())),
        }
    }

    /// The file of another name in the same folder.
    pub(crate) fn sibling(&self, name: &str) -> Self {
        let beside = |path: &str| match path.rsplit_once('/') {
            Some((folder, _)) => format!("{folder}/{name}"),
            None => name.to_owned(),
        };
        match self {
            Address::Hub(at) => Address::Hub(HubAddress { path: beside(&at.path), ..at.clone() }),
            Address::S3(at) => Address::S3(S3Address { key: beside(&at.key), ..at.clone() }),
        }
    }

    /// What a file that is made from it is called, without ending: its own name, or that of its repository or bucket.
    pub fn stem(&self) -> &str {
        let (path, place) = match self {
            Address::Hub(at) => (&at.path, &at.repo),
            Address::S3(at) => (&at.key, &at.bucket),
        };
        match last_part(path) {
            "" => last_part(place),
            file => file.rsplit_once('.').map_or(file, |(stem, _)| if stem.is_empty() { file } else { stem }),
        }
    }
}

impl HubAddress {
    /// What follows `hf://`.
    fn parse(text: &str) -> Result<Self, String> {
        let text = text.strip_prefix("models/").unwrap_or(text);
        if let Some(kind) = OTHER_KINDS.iter().find(|kind| text.split('/').next() == Some(**kind)) {
            return Err(format!("adapters are in repositories of models, and this is one of {kind}"));
        }
        let Some((user, rest)) = text.split_once('/') else {
            return Err("a repository is called `user/name`".to_owned());
        };
        let end = rest.find(['/', '@']).unwrap_or(rest.len());
        let (name, rest) = rest.split_at(end);
        let (revision, path) = match rest.strip_prefix('@') {
            None => (None, rest.strip_prefix('/').unwrap_or("")),
            Some(rest) => {
                let end = special_revision(rest).or_else(|| rest.find('/')).unwrap_or(rest.len());
                (Some(unquoted(&rest[..end])), rest[end..].strip_prefix('/').unwrap_or(""))
            }
        };
        Self::checked(user, name, revision, path)
    }

    /// What follows the host of a page: `user/name/blob/main/path`.
    fn of_page(text: &str) -> Result<Self, String> {
        let text = text.split(['?', '#']).next().unwrap_or("");
        let mut parts = text.splitn(4, '/');
        let (user, name) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        let (view, rest) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        if OTHER_KINDS.contains(&user) || !(view.is_empty() || HUB_VIEWS.contains(&view)) {
            return Err("this page is no file of a model".to_owned());
        }
        let end = special_revision(rest).or_else(|| rest.find('/')).unwrap_or(rest.len());
        let revision = Some(unquoted(&rest[..end])).filter(|r| !r.is_empty());
        Self::checked(user, name, revision, &unquoted(rest[end..].trim_start_matches('/')))
    }

    fn checked(user: &str, name: &str, revision: Option<String>, path: &str) -> Result<Self, String> {
        for part in [user, name] {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
            if part.is_empty() || part.starts_with(['.', '-']) || !part.bytes().all(plain) || part.contains("--") {
                return Err(format!("`{user}/{name}` cannot be the name of a repository"));
            }
        }
        if let Some(revision) = revision.as_deref()
            && (revision.is_empty() || has_odd_parts(revision) || revision.contains(char::is_whitespace))
        {
            return Err(format!("`{revision}` cannot be a revision"));
        }
        let path = path.trim_end_matches('/');
        if !path.is_empty() && has_odd_parts(path) {
            return Err(format!("`{path}` cannot be a path in a repository"));
        }
        Ok(Self { repo: format!("{user}/{name}"), revision, path: path.to_owned() })
    }

    /// The revision, which is `main` unless another is named.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// Another place in the same repository.
    pub(crate) fn with_path(&self, path: impl Into<String>) -> Self {
        Self { path: path.into(), ..self.clone() }
    }
}

impl S3Address {
    /// What follows `s3://`.
    fn parse(text: &str) -> Result<Self, String> {
        let (bucket, key) = text.split_once('/').unwrap_or((text, ""));
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if bucket.len() < 3 || !bucket.bytes().all(plain) {
            return Err(format!("`{bucket}` cannot be the name of a bucket"));
        }
        if key.starts_with('/') || key.contains("//") || key.split('/').any(|part| part == "." || part == "..") {
            return Err(format!("`{key}` has an empty part, `.` or `..`"));
        }
        Ok(Self { bucket: bucket.to_owned(), key: key.to_owned() })
    }
}

/// `user/repo/file.safetensors`, which could be a path as well.
fn short_form(text: &str) -> Option<HubAddress> {
    let ends = Path::new(text).extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors"));
    // A drive of Windows has a colon, which no repository has.
    HubAddress::parse(text).ok().filter(|at| ends && !text.contains('\\') && !at.path.is_empty())
}

/// The length of a revision that contains slashes: `refs/pr/7`, `refs/convert/parquet`.
fn special_revision(text: &str) -> Option<usize> {
    let rest = text.strip_prefix("refs/pr/").or_else(|| text.strip_prefix("refs/convert/"))?;
    Some(text.len() - rest.len() + rest.find('/').unwrap_or(rest.len()))
}

fn last_part(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or("")
}

fn has_odd_parts(path: &str) -> bool {
    path.split('/').any(|part| part.is_empty() || part == "." || part == ".." || part.contains('\\'))
}

/// `%2F` and its like as the characters that they stand for; what is no valid sequence stays.
fn unquoted(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(&byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 3).and_then(|d| std::str::from_utf8(d).ok());
        match digits.filter(|_| byte == b'%').and_then(|d| u8::from_str_radix(d, 16).ok()) {
            Some(value) => {
                out.push(value);
                at += 3;
            }
            None => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8(out).unwrap_or_else(|_| text.to_owned())
}

impl fmt::Display for HubAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf://{}", self.repo)?;
        if let Some(revision) = &self.revision {
            let whole = special_revision(revision) == Some(revision.len());
            let text = if whole { revision.clone() } else { revision.replace('%', "%25").replace('/', "%2F") };
            write!(f, "@{text}")?;
        }
        if self.path.is_empty() { Ok(()) } else { write!(f, "/{}", self.path) }
    }
}

impl fmt::Display for S3Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.key)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Hub(at) => at.fmt(f),
            Address::S3(at) => at.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(repo: &str, revision: Option<&str>, path: &str) -> Address {
        Address::Hub(HubAddress { repo: repo.into(), revision: revision.map(Into::into), path: path.into() })
    }

    fn s3(bucket: &str, key: &str) -> Address {
        Address::S3(S3Address { bucket: bucket.into(), key: key.into() })
    }

    #[test]
    fn every_form_is_read() {
        let cases = [
            ("hf://user/repo", hub("user/repo", None, "")),
            ("hf://user/repo/", hub("user/repo", None, "")),
            ("hf://models/user/repo/a.safetensors", hub("user/repo", None, "a.safetensors")),
            ("hf://user/repo@v1.0/sub/a b.safetensors", hub("user/repo", Some("v1.0"), "sub/a b.safetensors")),
            ("hf://user/repo@refs/pr/7/a.safetensors", hub("user/repo", Some("refs/pr/7"), "a.safetensors")),
            ("hf://user/repo@feature%2Fx/sub/", hub("user/repo", Some("feature/x"), "sub")),
            ("hf://user/repo/a@b.safetensors", hub("user/repo", None, "a@b.safetensors")),
            ("user/repo/sub/a.safetensors", hub("user/repo", None, "sub/a.safetensors")),
            ("user/repo@main/a.SafeTensors", hub("user/repo", Some("main"), "a.SafeTensors")),
            (
                "https://huggingface.co/user/repo/blob/main/a.safetensors",
                hub("user/repo", Some("main"), "a.safetensors"),
            ),
            (
                "https://hf.co/user/repo/resolve/v1/s/a%20b.safetensors?download=true",
                hub("user/repo", Some("v1"), "s/a b.safetensors"),
            ),
            ("https://huggingface.co/user/repo", hub("user/repo", None, "")),
            ("s3://bucket/key/a.safetensors", s3("bucket", "key/a.safetensors")),
            ("s3://bucket/prefix/", s3("bucket", "prefix/")),
            ("s3://bucket", s3("bucket", "")),
        ];
        for (text, want) in cases {
            assert_eq!(Address::parse(text).expect(text), want, "{text}");
            let again = Address::parse(&want.to_string()).expect("its own form");
            assert_eq!(again, want, "{want}");
        }
    }

    #[test]
    fn wrong_ones_are_errors() {
        let wrong = [
            "hf://repo",
            "hf://",
            "hf://user/",
            "hf://user//a",
            "hf://us er/repo/a",
            "hf://user/repo/../a",
            "hf://user/repo@/a",
            "hf://datasets/user/repo/a",
            "hf://user/repo@a%2F..%2Fb/c",
            "hf://user/re--po/a",
            "s3://",
            "s3:///key",
            "s3://b/k",
            "s3://bucket//key",
            "s3://bucket/a/../b",
            "gs://bucket/key",
            "https://example.com/a.safetensors",
            "https://huggingface.co/user/repo/discussions/1",
            "user/repo",
            "user/repo/file.bin",
            "/user/repo/a.safetensors",
            "./repo/b/a.safetensors",
            "../a/b/c.safetensors",
            "C:/loras/a/b.safetensors",
            "a\\b/c/d.safetensors",
            "file.safetensors",
        ];
        for text in wrong {
            assert_eq!(Address::parse(text).expect_err(text).code(), Code::InvalidAddress, "{text}");
        }
    }

    #[test]
    fn paths_win() {
        assert!(is_remote("hf://user/repo/a.safetensors"));
        assert!(is_remote("nobody/nothing/a.safetensors"));
        assert!(!is_remote("nobody/nothing"));
        assert!(!is_remote("src/lib.rs"));
        assert!(!is_remote("src/hub/missing.safetensors"), "the folder is there, so this was meant as a path");
        assert!(!is_remote("C:\\loras\\a.safetensors"));
    }

    #[test]
    fn outputs_are_named_after_the_file() {
        let stem = |text: &str| Address::parse(text).expect(text).stem().to_owned();
        assert_eq!(stem("hf://user/repo/sub/style.v2.safetensors"), "style.v2");
        assert_eq!(stem("hf://user/repo@main"), "repo");
        assert_eq!(stem("hf://user/repo.v1"), "repo.v1");
        assert_eq!(stem("s3://bucket/a/b.safetensors"), "b");
        assert_eq!(stem("s3://bucket/a/"), "a");
        assert_eq!(stem("s3://bucket"), "bucket");
    }
}
