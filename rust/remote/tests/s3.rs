//! Buckets: what is put is whole or not there, what is fetched is checked, and failures that pass are tried again.

mod bucket;

use std::path::Path;

use bucket::{Bucket, Fault};
use lorafmt_core::io::{Control, Store};
use lorafmt_core::{Code, Result};
use lorafmt_remote::Remote;

/// Two parts and a bit.
const LARGE: usize = (33 << 20) + 5;

fn remote(bucket: &Bucket) -> Remote {
    let url = bucket.url.clone();
    let env = move |name: &str| match name {
        "AWS_ENDPOINT_URL" => Some(url.clone()),
        "AWS_ACCESS_KEY_ID" | "AWS_SECRET_ACCESS_KEY" => Some("key".to_owned()),
        "LORAFMT_RETRIES" => Some("2".to_owned()),
        "AWS_SHARED_CREDENTIALS_FILE" | "AWS_CONFIG_FILE" => Some("/nowhere/at/all".to_owned()),
        _ => None,
    };
    Remote::with_env(env).expect("a runtime")
}

fn content(length: usize) -> Vec<u8> {
    (0..length as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn put(remote: &Remote, bytes: &[u8]) -> Result<()> {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), bytes).expect("written");
    remote.put(file.path(), "s3://bucket/a/file")
}

fn fetch(remote: &Remote) -> Result<Vec<u8>> {
    let local = remote.fetch("s3://bucket/a/file", &Control::default())?;
    Ok(std::fs::read(&local).expect("it is there"))
}

#[test]
fn what_is_put_is_what_is_there() {
    let bucket = Bucket::start();
    let remote = remote(&bucket);
    for length in [0, 5, LARGE] {
        let bytes = content(length);
        put(&remote, &bytes).expect("put");
        assert!(bucket.state().objects["a/file"] == bytes, "{length}");
        assert!(fetch(&remote).expect("fetched") == bytes, "{length}");
        let found = remote.stat("s3://bucket/a/file").expect("asked").expect("there");
        assert_eq!((found.url.as_str(), found.size), ("s3://bucket/a/file", length as u64));
    }
    assert!(bucket.state().uploads.is_empty());
    assert_eq!(remote.stat("s3://bucket/a").expect("asked"), None);
    let uploads = bucket.state().asked.iter().filter(|a| a.contains("partNumber")).count();
    assert_eq!(uploads, 3);
}

#[test]
fn an_upload_that_fails_leaves_nothing() {
    let faults = [
        ("partNumber=2", Fault::Status(403)),
        ("partNumber=3", Fault::Hang),
        ("POST /bucket/a/file?uploadId", Fault::Status(500)),
    ];
    for (what, fault) in faults {
        let bucket = Bucket::start();
        bucket.state().faults.push((what, 99, fault));
        let error = put(&remote(&bucket), &content(LARGE)).expect_err(what);
        assert!(matches!(error.code(), Code::Forbidden | Code::Network | Code::Server), "{error}");
        assert_eq!(error.path(), Some(Path::new("s3://bucket/a/file")));
        let state = bucket.state();
        assert!(state.objects.is_empty(), "{what}");
        assert!(state.uploads.is_empty(), "{what}: its parts are removed");
    }
    let bucket = Bucket::start();
    bucket.state().faults.push(("PUT", 99, Fault::Status(500)));
    assert_eq!(put(&remote(&bucket), &content(5)).expect_err("500").code(), Code::Server);
    assert!(bucket.state().objects.is_empty());
}

#[test]
fn what_passes_is_tried_again() {
    let bytes = content(300_000);
    for fault in [Fault::Status(503), Fault::CutOff, Fault::Hang, Fault::Damage] {
        let bucket = Bucket::start();
        bucket.state().objects.insert("a/file".into(), bytes.clone());
        bucket.state().faults.push(("GET", 1, fault));
        assert!(fetch(&remote(&bucket)).expect("fetched") == bytes);
    }
    let bucket = Bucket::start();
    bucket.state().faults.extend([("partNumber=1", 1, Fault::Status(500)), ("partNumber=2", 2, Fault::Hang)]);
    let large = content(LARGE);
    put(&remote(&bucket), &large).expect("put");
    assert!(bucket.state().objects["a/file"] == large);
}

#[test]
fn what_lasts_is_said() {
    let bucket = Bucket::start();
    let remote = remote(&bucket);
    assert_eq!(fetch(&remote).expect_err("none").code(), Code::NotFound);
    bucket.state().objects.insert("a/file".into(), content(300_000));
    for (fault, code) in
        [(Fault::Status(403), Code::Forbidden), (Fault::Status(500), Code::Server), (Fault::Hang, Code::Network)]
    {
        bucket.state().faults = vec![("GET", 99, fault)];
        assert_eq!(fetch(&remote).expect_err("it lasts").code(), code);
    }
}

#[test]
fn encrypted_objects_have_other_etags() {
    let bucket = Bucket::start();
    let remote = remote(&bucket);
    bucket.state().encrypted = true;
    bucket.state().objects.insert("a/file".into(), content(1000));
    // Twice, to tell it from damage; then the store is known.
    for times in [2, 3] {
        assert!(fetch(&remote).expect("fetched") == content(1000));
        assert_eq!(bucket.state().asked.len(), times);
    }
}

#[test]
fn listings_go_below_an_address() {
    let bucket = Bucket::start();
    let remote = remote(&bucket);
    for key in ["a/b", "a/c/d", "ab", "e"] {
        bucket.state().objects.insert(key.into(), content(3));
    }
    let list = |at: &str| {
        let mut found = Vec::new();
        remote.list(at, &mut |object| {
            found.push(object.url);
            Ok(())
        })?;
        Ok::<_, lorafmt_core::Error>(found)
    };
    assert_eq!(list("s3://bucket/a/").expect("listed"), ["s3://bucket/a/b", "s3://bucket/a/c/d"]);
    assert_eq!(list("s3://bucket/a").expect("listed"), ["s3://bucket/a/b", "s3://bucket/a/c/d"]);
    assert_eq!(list("s3://bucket/e").expect("listed"), ["s3://bucket/e"]);
    assert_eq!(list("s3://bucket").expect("listed").len(), 4);
    let stop = |_| Err(lorafmt_core::Error::new(Code::Interrupted, "enough"));
    assert_eq!(remote.list("s3://bucket", &mut { stop }).expect_err("stopped").code(), Code::Interrupted);
}

#[test]
fn a_cancelled_transfer_ends() {
    let bucket = Bucket::start();
    bucket.state().objects.insert("a/file".into(), content(1000));
    let control = Control::default();
    control.cancel();
    let error = remote(&bucket).fetch("s3://bucket/a/file", &control).expect_err("cancelled");
    assert_eq!(error.code(), Code::Interrupted);
}
