//! One error type for the whole engine.
//!
//! A row of the table below is everything that is known of an error class: its stable code, what it derives from
//! for a caller (`Kind`), when it occurs and what helps. Exit codes, Python classes, `--json` and the documentation
//! are all read from it.

use std::fmt;
use std::path::{Path, PathBuf};

/// What class of problem a code belongs to; decides the exit status and the Python exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// A path that does not exist.
    NotFound,
    /// An output that exists already.
    Exists,
    /// The operating system refused to read or write.
    Io,
    /// A server refuses the file to whoever asks.
    Access,
    /// A server cannot be reached, or does not do what it should.
    Network,
    /// The bytes or names of an input are not what they should be.
    Format,
    /// Well formed, but no conversion exists for it.
    Unsupported,
    /// The call itself makes no sense.
    Usage,
    /// Stopped by the user.
    Interrupted,
}

macro_rules! codes {
    ($($variant:ident $code:literal $kind:ident $when:literal $help:literal;)*) => {
        /// The stable name of an error.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Code { $(#[doc = $when] $variant,)* }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];
            /// The kebab-case name, part of the public contract.
            pub fn as_str(self) -> &'static str { match self { $(Code::$variant => $code,)* } }
            /// The class of problem.
            pub fn kind(self) -> Kind { match self { $(Code::$variant => Kind::$kind,)* } }
            /// When it occurs, for the documentation.
            pub fn when(self) -> &'static str { match self { $(Code::$variant => $when,)* } }
            /// What helps in general, for the documentation; also the hint where the error carries none of its own.
            pub fn help(self) -> &'static str { match self { $(Code::$variant => $help,)* } }
        }
    };
}

codes! {
    NotFound "not-found" NotFound "The path does not exist." "check the spelling of the path";
    IsADirectory "is-a-directory" Usage "A folder was given where a file is needed." "add `--recursive` to take the adapter files inside the folder";
    OutputExists "output-exists" Exists "The output file exists already." "add `--force` to replace it, or name another output with `-o`";
    SameFile "same-file" Usage "Input and output are one file." "name another output with `-o`";
    Io "io" Io "The operating system could not read or write the file." "check permissions and free space";
    DiskFull "disk-full" Io "The device has no room for the output; nothing was left behind." "free some space, or name an output on another device";
    Pickle "pickle-file" Format "The file is a Python pickle (.pt, .ckpt, .bin); opening one can run any code it holds." "load it with torch in a sandbox and save it with `safetensors.torch.save_file`";
    NotSafetensors "not-safetensors" Format "The file is no safetensors file." "lorafmt reads .safetensors files";
    HeaderTooLarge "header-too-large" Format "The header is longer than the file, or than 100 MB." "the file is truncated or not a safetensors file; download it again";
    InvalidHeader "invalid-header" Format "The header is not the JSON that the format prescribes." "the file is damaged; download it again";
    DuplicateKey "duplicate-key" Format "The header names one tensor twice." "the file was written by a broken tool; save it again";
    InvalidOffsets "invalid-offsets" Format "Offsets overlap, leave a gap, or do not match dtype and shape." "the file is damaged; download it again";
    Truncated "truncated" Format "The file ends before its last tensor does." "the download or copy was cut off; fetch it again";
    UnknownKey "unknown-key" Format "No table knows the key." "add `--unknown keep` to carry such keys unchanged, or `--unknown drop` to leave them out";
    UnknownFamily "unknown-family" Format "No model family of the tables fits the file." "`lorafmt formats` lists the families; `--table FILE` adds one";
    AmbiguousFamily "ambiguous-family" Format "Several model families fit and would give different results." "add `--family NAME`";
    ShapeMismatch "shape-mismatch" Format "A tensor does not have the shape that its module needs." "the file belongs to another model, or is damaged; `lorafmt inspect` shows what it looks like";
    InvalidDtype "invalid-dtype" Format "A factor is stored as integers or booleans." "factors are floating point; save the file again with its trainer";
    NotAnAdapter "not-an-adapter" Format "The file holds whole weights, as a model does." "name an adapter file; a model is no adapter";
    UnpairedModule "unpaired-module" Format "A module lacks one of the tensors that belong together." "the file is incomplete; save it again with its trainer";
    RankMismatch "rank-mismatch" Format "Up and down factors of a module have different ranks." "the file is damaged, or two files were mixed";
    InvalidAlpha "invalid-alpha" Format "An alpha is NaN, infinite or no number." "repair the alpha with the trainer that wrote the file";
    NotFinite "not-finite" Format "A tensor holds NaN or infinite values." "the training diverged, or the file is damaged";
    SeveralAdapters "several-adapters" Unsupported "The file holds several named PEFT adapters." "save each adapter to a file of its own";
    DuplicateModule "duplicate-module" Unsupported "Two groups of tensors claim one module and cannot be added." "split the file; only plain LoRA contributions add";
    MixedKinds "mixed-kinds" Format "One module holds tensors of several kinds of adapter." "split the file";
    UnsupportedKind "unsupported-kind" Unsupported "The target dialect cannot hold this kind of adapter." "choose a target that can (`lorafmt formats`), or add `--lossy allow` to leave these modules out";
    UnsupportedModule "unsupported-module" Unsupported "The target dialect has no name for a module." "choose another target, or add `--lossy allow` to leave these modules out";
    UnsupportedTarget "unsupported-target" Unsupported "The dialect cannot be written, or not for this family." "`lorafmt formats` lists what can be written";
    UnsupportedStrength "unsupported-strength" Unsupported "The kind of adapter is not linear in a strength." "leave `--strength` at 1";
    FamilyMismatch "family-mismatch" Unsupported "Adapters to different models were to be composed." "compose adapters of one family only";
    IncompatibleModules "incompatible-modules" Unsupported "Several adapters have a module whose kinds do not add." "compose without one of them, or add `--lossy allow` to leave the module out";
    BaseNeeded "base-needed" Usage "A native adapter was to be written or taken apart, and no base checkpoint was named." "add `--base FILE`: the quantized checkpoint (.safetensors) that the adapter is for";
    WeightsNeeded "weights-needed" Unsupported "A kind of adapter says its difference only together with the weights of the model." "add `--base-weights FILE`: the checkpoint that the adapter was made for; `--lossy allow` leaves such modules out";
    MissingWeight "missing-weight" Unsupported "The base checkpoint lacks the weight of a module." "name the checkpoint of the model that the adapter is for; `--lossy allow` leaves such modules out";
    RankNeeded "rank-needed" Usage "A difference has full rank, and nothing says how much of it is enough." "add `--rank N`, `--energy E` or `--max-error E`";
    InvalidBase "invalid-base" Format "The base holds no quantized layers of the family, or damaged ones." "name the quantized checkpoint itself, such as `svdq-int4_r32-flux.1-dev.safetensors` or its `transformer_blocks.safetensors`";
    WrongBase "wrong-base" Unsupported "The base is another than the adapter was made for, or than was asked for." "a native file fits one checkpoint only: name that one, or convert the original adapter for this one";
    WrongUndo "wrong-undo" Unsupported "The undo file is of another checkpoint, or damaged." "name the undo file that was written when this very checkpoint was fused";
    InvalidIndex "invalid-index" Format "The index of a sharded checkpoint cannot be read, or does not fit its shards." "download the checkpoint again, all of its files";
    InvalidPacking "invalid-packing" Format "A packed factor has a size that cannot be packed." "the file is damaged; make it again from the original adapter";
    RankTooHigh "rank-too-high" Unsupported "The ranks of a layer exceed what the runtime's kernels can take." "compose fewer adapters, or reduce their ranks first";
    NoModules "no-modules" Format "Nothing would be written." "`lorafmt inspect` shows what the file holds";
    InvalidConfig "invalid-config" Format "An `adapter_config.json` or a metadata entry cannot be read." "repair or remove it";
    InvalidTable "invalid-table" Format "A table given by the user is not valid." "the documentation describes the format of tables under `Add a dialect`";
    InvalidRecipe "invalid-recipe" Format "A recipe cannot be read." "a recipe names its adapters under `loras`, each with a `path` and, if it is not 1, a `strength`";
    InvalidArgument "invalid-argument" Usage "An argument has a value that makes no sense." "see `--help`";
    InvalidAddress "invalid-address" Usage "The address of a remote file cannot be read." "write `hf://user/repo@revision/file.safetensors` or `s3://bucket/key`";
    AmbiguousAddress "ambiguous-address" Usage "An address stands for several files where one is needed." "name one of the files, or add `--recursive` to take all of them";
    RepoNotFound "repo-not-found" NotFound "The hub has no such repository, or hides it from whoever asks." "check the spelling; for a private repository set `HF_TOKEN` or run `hf auth login`";
    RevisionNotFound "revision-not-found" NotFound "The repository has no such branch, tag or commit." "name a branch, a tag or a whole commit hash after the `@`";
    BucketNotFound "bucket-not-found" NotFound "The object store has no such bucket." "check the spelling, and `AWS_ENDPOINT_URL` if the bucket is not at Amazon's";
    Gated "gated-repo" Access "The repository is gated: its owner decides who reads it." "accept its conditions on its web page, then set `HF_TOKEN` or run `hf auth login`";
    Unauthorized "unauthorized" Access "The server does not know who asks, or the credentials are wrong." "set `HF_TOKEN` or run `hf auth login`; for `s3://` set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or `AWS_PROFILE`";
    Forbidden "forbidden" Access "The server knows who asks and refuses." "use a token or credentials that may read the file";
    Offline "offline" Network "The file is not in the cache, and `HF_HUB_OFFLINE` forbids to fetch it." "unset `HF_HUB_OFFLINE`, or fetch the file first";
    Network "network" Network "The server could not be reached, or the connection broke again and again." "check the connection, the proxy and the endpoint, and run the command again";
    Server "server-error" Network "The server failed again and again, or gave an answer that makes no sense." "wait a little and run the command again";
    CorruptDownload "corrupt-download" Network "What arrived is not what the server says the file is; nothing was kept of it." "run the command again; if it stays so, a proxy or the server changes the file";
    RemoteReadOnly "remote-read-only" Unsupported "The place can be read and not written." "write to a local file; `hf upload` puts it on the hub";
    MissingPackage "missing-package" Unsupported "A Python package is needed for this and not installed." "install the package that the message names";
    Interrupted "interrupted" Interrupted "Stopped by the user; nothing was left behind." "run the command again";
}

/// A failure, with the file and the key it is about.
#[derive(Debug)]
pub struct Error {
    code: Code,
    message: String,
    path: Option<PathBuf>,
    key: Option<String>,
    hint: Option<String>,
    source: Option<std::io::Error>,
}

/// The result of everything that can fail here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of the given code; the message is lower case, without a full stop.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), path: None, key: None, hint: None, source: None }
    }

    /// An operating system error on `path`; missing files and full devices get their own code.
    pub fn io(path: &Path, doing: &str, source: std::io::Error) -> Self {
        use std::io::ErrorKind as E;
        let code = match source.kind() {
            E::NotFound => Code::NotFound,
            E::AlreadyExists => Code::OutputExists,
            E::IsADirectory => Code::IsADirectory,
            E::StorageFull | E::QuotaExceeded => Code::DiskFull,
            _ => Code::Io,
        };
        let mut error = Self::new(code, format!("cannot {doing}")).at(path);
        error.source = Some(source);
        error
    }

    /// Names the file, unless one is named already.
    #[must_use]
    pub fn at(mut self, path: &Path) -> Self {
        self.path.get_or_insert_with(|| path.to_path_buf());
        self
    }

    /// Names the key: always one that the file really has.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// A hint for this very case, instead of the general one of the code.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error once more, without its operating system cause.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self {
            code: self.code,
            message: self.message.clone(),
            path: self.path.clone(),
            key: self.key.clone(),
            hint: self.hint.clone(),
            source: None,
        }
    }

    /// The stable code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// What went wrong, without file and hint.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The file it is about.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The key it is about.
    pub fn key_name(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// The command or option that helps.
    pub fn hint_text(&self) -> &str {
        self.hint.as_deref().unwrap_or(self.code.help())
    }

    /// The `error` object of the public JSON.
    pub fn to_json(&self) -> serde_json::Value {
        let message = match &self.source {
            Some(source) => format!("{}: {source}", self.message),
            None => self.message.clone(),
        };
        serde_json::json!({
            "code": self.code.as_str(),
            "message": message,
            "path": self.path.as_ref().map(|p| p.to_string_lossy()),
            "key": self.key,
            "hint": self.hint_text(),
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", path.display())?;
        }
        f.write_str(&self.message)?;
        // Messages that quote the key themselves need no second mention.
        match &self.key {
            Some(key) if !self.message.contains(key.as_str()) => write!(f, " (key `{key}`)"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| e as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_kebab_case() {
        let mut seen = std::collections::BTreeSet::new();
        for code in Code::ALL {
            let text = code.as_str();
            assert!(text.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'), "{text}");
            assert!(seen.insert(text), "{text} twice");
            assert!(!code.when().is_empty() && !code.help().is_empty());
        }
    }
}
