//! Buckets: ranged reads, checked downloads into temporary files, uploads that are whole or not there.

mod failure;
mod profile;
mod settings;

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt, TryStreamExt};
use lorafmt_core::io::{Control, Local, Object};
use lorafmt_core::{Code, Error, Result};
use md5::{Digest, Md5};
use object_store::aws::AmazonS3;
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload};

use crate::retry::{Retries, Trouble};
use crate::{Env, S3Address};
use failure::explained;
use settings::Settings;

/// Files up to this size are put by one request, in bytes; larger ones in parts of at least this size.
const PART: u64 = 16 << 20;

/// More parts than this no store takes.
const MOST_PARTS: u64 = 10_000;

/// Parts that travel at a time.
const PARTS_AT_A_TIME: usize = 4;

/// Buckets by name, each set up when it is first used.
pub(crate) struct Buckets {
    env: Env,
    known: Mutex<HashMap<String, Arc<Bucket>>>,
    /// Whether an ETag turned out to be no MD5, as those of encrypted objects are none.
    other_etags: AtomicBool,
}

pub(super) struct Bucket {
    store: AmazonS3,
    retries: Retries,
    /// Whether anything says who asks.
    anonymous: bool,
}

/// What a download brought.
struct Fetched {
    temp: tempfile::NamedTempFile,
    md5: [u8; 16],
    etag: Option<String>,
}

impl Buckets {
    pub(crate) fn new(env: Env) -> Self {
        Self { env, known: Mutex::default(), other_etags: AtomicBool::new(false) }
    }

    async fn bucket(&self, at: &S3Address) -> Result<Arc<Bucket>> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = known().get(&at.bucket) {
            return Ok(Arc::clone(bucket));
        }
        let settings = Settings::from_env(&self.env)?;
        let anonymous = settings.anonymous;
        let retries = settings.retries;
        let store = settings.connect(at).await?;
        let made = Arc::new(Bucket { store, retries, anonymous });
        Ok(Arc::clone(known().entry(at.bucket.clone()).or_insert(made)))
    }

    /// Calls `each` for every object under an address: of that key, or below it as a folder.
    pub(crate) async fn list(&self, at: &S3Address, each: &mut dyn FnMut(Object) -> Result<()>) -> Result<()> {
        if !at.key.is_empty()
            && !at.key.ends_with('/')
            && let Some(object) = self.stat(at).await?
        {
            return each(object);
        }
        let bucket = self.bucket(at).await?;
        let prefix = (!at.key.is_empty()).then(|| key(at)).transpose()?;
        let mut found = bucket.store.list(prefix.as_ref());
        while let Some(meta) = found.try_next().await.map_err(|e| bucket.explained(&e, at))? {
            each(described(at, &meta))?;
        }
        Ok(())
    }

    pub(crate) async fn stat(&self, at: &S3Address) -> Result<Option<Object>> {
        if at.key.is_empty() || at.key.ends_with('/') {
            return Ok(None);
        }
        let bucket = self.bucket(at).await?;
        match bucket.store.head(&key(at)?).await {
            Ok(meta) => Ok(Some(described(at, &meta))),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(bucket.explained(&e, at)),
        }
    }

    /// An object as a temporary file, of the length that the store says and, where its ETag is an MD5, of that hash.
    pub(crate) async fn fetch(&self, at: &S3Address, control: &Control) -> Result<Local> {
        let bucket = self.bucket(at).await?;
        let location = key(at)?;
        let mut before: Option<Fetched> = None;
        let fetched = bucket
            .retries
            .run(async || {
                let fetched = bucket.fetch(at, &location, control).await?;
                let promised = fetched.etag.as_deref().and_then(md5_of_etag);
                let right = promised.is_none_or(|md5| md5 == fetched.md5);
                if right || self.other_etags.load(Ordering::Relaxed) {
                    return Ok(fetched);
                }
                // Damage on the way does not come twice alike: what arrives twice is what is there.
                if before.as_ref().is_some_and(|b| b.md5 == fetched.md5 && b.etag == fetched.etag) {
                    self.other_etags.store(true, Ordering::Relaxed);
                    return Ok(fetched);
                }
                before = Some(fetched);
                let error = Error::new(Code::CorruptDownload, "its MD5 is not the one that the store promised");
                Err(Trouble::passing(error))
            })
            .await?;
        Ok(Local::Temporary(fetched.temp.into_temp_path()))
    }

    /// Some bytes of an object, which has to be the one of that ETag.
    pub(crate) async fn part(&self, at: &S3Address, etag: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let bucket = self.bucket(at).await?;
        let location = key(at)?;
        let options = GetOptions {
            range: Some(GetRange::Bounded(range.clone())),
            if_match: (!etag.is_empty()).then(|| etag.to_owned()),
            ..GetOptions::default()
        };
        let work = async || {
            let result = bucket.store.get_opts(&location, options.clone()).await;
            let bytes = result.map_err(|e| bucket.explained(&e, at))?.bytes().await;
            let bytes = bytes.map_err(|e| Trouble::passing(bucket.explained(&e, at)))?;
            if bytes.len() as u64 != range.end - range.start {
                let error = Error::new(Code::Network, format!("{} bytes of {range:?} arrived", bytes.len()));
                return Err(Trouble::passing(error));
            }
            Ok(bytes.to_vec())
        };
        bucket.retries.run(work).await
    }

    /// Puts a file under a key. Nothing is there before all of it has arrived.
    pub(crate) async fn put(&self, file: &Path, at: &S3Address) -> Result<()> {
        if at.key.is_empty() || at.key.ends_with('/') {
            return Err(Error::new(Code::InvalidAddress, "this is a prefix and names no object"));
        }
        let fail = |e| Error::io(file, "read the file", e);
        let bucket = self.bucket(at).await?;
        let location = key(at)?;
        let mut source = File::open(file).map_err(fail)?;
        let size = source.metadata().map_err(fail)?.len();
        if size <= PART {
            let mut bytes = Vec::new();
            source.read_to_end(&mut bytes).map_err(fail)?;
            let put = bucket.store.put(&location, PutPayload::from(bytes)).await;
            return put.map(drop).map_err(|e| bucket.explained(&e, at));
        }
        let mut upload = bucket.store.put_multipart(&location).await.map_err(|e| bucket.explained(&e, at))?;
        let sent = bucket.send_parts(&mut source, size, upload.as_mut(), file, at).await;
        let done = match sent {
            Ok(()) => upload.complete().await.map(drop).map_err(|e| bucket.explained(&e, at)),
            Err(error) => Err(error),
        };
        if done.is_err() {
            // The first error is the one to tell. Parts that stay cost money, but are no object.
            let _ = upload.abort().await;
        }
        done
    }
}

impl Bucket {
    fn explained(&self, error: &object_store::Error, at: &S3Address) -> Error {
        explained(error, at, self.anonymous)
    }

    async fn fetch(&self, at: &S3Address, location: &Key, control: &Control) -> Result<Fetched, Trouble> {
        let result = self.store.get(location).await.map_err(|e| self.explained(&e, at))?;
        let (size, etag) = (result.meta.size, result.meta.e_tag.clone());
        let mut temp = tempfile::Builder::new()
            .prefix("lorafmt-")
            .suffix(".safetensors")
            .tempfile()
            .map_err(|e| Error::io(&std::env::temp_dir(), "create a temporary file", e))?;
        let path = temp.path().to_path_buf();
        control.expect(size as usize);
        let (mut stream, mut md5, mut length) = (result.into_stream(), Md5::new(), 0);
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|e| Trouble::passing(self.explained(&e, at)))?;
            temp.write_all(&chunk).map_err(|e| Error::io(&path, "write a temporary file", e))?;
            md5.update(&chunk);
            length += chunk.len() as u64;
            control.advance(chunk.len());
        }
        if length != size {
            let error = Error::new(Code::Network, format!("{length} of {size} bytes arrived"));
            return Err(Trouble::passing(error));
        }
        Ok(Fetched { temp, md5: md5.finalize().into(), etag })
    }

    async fn send_parts(
        &self,
        source: &mut File,
        size: u64,
        upload: &mut dyn MultipartUpload,
        file: &Path,
        at: &S3Address,
    ) -> Result<()> {
        let fail = |e| Error::io(file, "read the file", e);
        let step = PART.max(size.div_ceil(MOST_PARTS));
        source.rewind().map_err(fail)?;
        let mut running = futures_util::stream::FuturesUnordered::new();
        let mut left = size;
        while left > 0 || !running.is_empty() {
            if left > 0 && running.len() < PARTS_AT_A_TIME {
                let mut bytes = vec![0; left.min(step) as usize];
                source.read_exact(&mut bytes).map_err(fail)?;
                left -= bytes.len() as u64;
                running.push(upload.put_part(PutPayload::from(bytes)));
            } else if let Some(sent) = running.next().await {
                sent.map_err(|e| self.explained(&e, at))?;
            }
        }
        Ok(())
    }
}

fn key(at: &S3Address) -> Result<Key> {
    Key::parse(at.key.trim_end_matches('/')).map_err(|e| Error::new(Code::InvalidAddress, format!("not a key: {e}")))
}

fn described(at: &S3Address, meta: &ObjectMeta) -> Object {
    let url = S3Address { bucket: at.bucket.clone(), key: meta.location.to_string() }.to_string();
    let version = meta.e_tag.clone().unwrap_or_else(|| meta.last_modified.to_rfc3339());
    Object { url, size: meta.size, version }
}

/// The MD5 that an ETag is, if it can be one: those of multipart uploads have a dash.
fn md5_of_etag(etag: &str) -> Option<[u8; 16]> {
    let text = etag.trim_matches('"');
    let mut md5 = [0; 16];
    if text.len() != 32 {
        return None;
    }
    for (byte, digits) in md5.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(md5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_that_are_hashes() {
        let hello: [u8; 16] = Md5::digest(b"hello").into();
        assert_eq!(md5_of_etag("\"5d41402abc4b2a76b9719d911017c592\""), Some(hello));
        assert_eq!(md5_of_etag("\"5d41402abc4b2a76b9719d911017c592-3\""), None);
        assert_eq!(md5_of_etag("\"zz41402abc4b2a76b9719d911017c592\""), None);
    }
}
