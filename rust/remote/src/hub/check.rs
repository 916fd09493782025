//! Whether what arrived is what was promised: its length, and the hash that its name is.

use lorafmt_core::{Code, Error, Result};
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// Adds up a hash while bytes arrive.
pub(super) struct Check {
    /// `None` where the name is no hash that is known.
    context: Option<Context>,
    expected: String,
    size: Option<u64>,
    length: u64,
}

impl Check {
    /// Names of blobs are the SHA-256 of large files, and git's hash of small ones, over a header and the content.
    pub(super) fn new(etag: &str, size: Option<u64>) -> Self {
        let hexadecimal = etag.bytes().all(|b| b.is_ascii_hexdigit());
        let context = match (etag.len(), size) {
            (64, _) if hexadecimal => Some(Context::new(&SHA256)),
            (40, Some(size)) if hexadecimal => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {size}\0").as_bytes());
                Some(context)
            }
            _ => None,
        };
        Self { context, expected: etag.to_ascii_lowercase(), size, length: 0 }
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        if let Some(context) = &mut self.context {
            context.update(bytes);
        }
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// An error if anything is not as promised.
    pub(super) fn finish(self) -> Result<()> {
        if let Some(size) = self.size.filter(|&size| size != self.length) {
            let message = format!("{} bytes arrived where {size} were promised", self.length);
            return Err(Error::new(Code::CorruptDownload, message));
        }
        let Some(context) = self.context else { return Ok(()) };
        let found: String = context.finish().as_ref().iter().map(|b| format!("{b:02x}")).collect();
        match found == self.expected {
            true => Ok(()),
            false => {
                let message = format!("its hash is {found} where {} was promised", self.expected);
                Err(Error::new(Code::CorruptDownload, message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(etag: &str, size: Option<u64>, bytes: &[u8]) -> bool {
        let mut check = Check::new(etag, size);
        bytes.chunks(2).for_each(|chunk| check.add(chunk));
        check.finish().is_ok()
    }

    #[test]
    fn names_are_hashes() {
        // `sha256sum` and `git hash-object` of the five bytes `hello`.
        let sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        let git = "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0";
        assert!(checked(sha256, Some(5), b"hello"));
        assert!(checked(sha256, None, b"hello"));
        assert!(checked(git, Some(5), b"hello"));
        assert!(checked("other-etag", Some(5), b"hallo"));
        assert!(!checked(sha256, Some(5), b"hallo"));
        assert!(!checked(git, Some(5), b"hallo"));
        assert!(!checked(sha256, Some(6), b"hello"));
        assert!(!checked("other-etag", Some(6), b"hello"));
    }
}
