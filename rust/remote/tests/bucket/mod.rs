//! A store that speaks as much of S3 as is needed here, one bucket in memory, and fails on demand.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use md5::{Digest, Md5};

/// What is stored, and what was asked.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) objects: BTreeMap<String, Vec<u8>>,
    /// Parts of uploads that are neither complete nor aborted.
    pub(crate) uploads: BTreeMap<String, BTreeMap<u32, Vec<u8>>>,
    /// `GET /bucket/key`, in order.
    pub(crate) asked: Vec<String>,
    /// Bytes of bodies that were sent.
    pub(crate) sent: usize,
    /// How often requests whose line contains the text fail, and how.
    pub(crate) faults: Vec<(&'static str, usize, Fault)>,
    /// ETags that are no MD5, as those of encrypted objects.
    pub(crate) encrypted: bool,
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Status(u16),
    /// Half of the body, then the end.
    CutOff,
    /// The whole body with one wrong byte.
    Damage,
    /// The end, before any answer.
    Hang,
}

pub(crate) struct Bucket {
    state: Arc<Mutex<State>>,
    pub(crate) url: String,
}

struct Request {
    method: String,
    path: String,
    query: String,
    range: Option<(usize, usize)>,
    body: Vec<u8>,
}

impl Bucket {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let state: Arc<Mutex<State>> = Arc::default();
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || serve(stream, &shared));
            }
        });
        Self { state, url }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }
}

fn serve(stream: TcpStream, shared: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().expect("a stream"));
    let mut out = stream;
    while let Some(request) = read(&mut reader) {
        let mut state = shared.lock().expect("nobody panics with it");
        let line = format!("{} {}?{}", request.method, request.path, request.query);
        state.asked.push(line.clone());
        let fault = state.faults.iter_mut().find(|(what, left, _)| *left > 0 && line.contains(what));
        let fault = fault.map(|(_, left, fault)| {
            *left -= 1;
            *fault
        });
        let (status, headers, mut body) = match fault {
            Some(Fault::Hang) => return,
            Some(Fault::Status(status)) => (status, String::new(), b"<Error><Code>SlowDown</Code></Error>".to_vec()),
            _ => answer(&mut state, &request),
        };
        let length = body.len();
        match fault {
            Some(Fault::CutOff) => body.truncate(length / 2),
            Some(Fault::Damage) => body[length / 2] ^= 1,
            _ => {}
        }
        let head = request.method == "HEAD";
        state.sent += if head { 0 } else { body.len() };
        drop(state);
        let text = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n{headers}\r\n");
        let sent = out.write_all(text.as_bytes()).and_then(|()| if head { Ok(()) } else { out.write_all(&body) });
        if sent.is_err() || fault == Some(Fault::CutOff) {
            return;
        }
    }
}

fn read(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&n| n > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let (mut length, mut range) = (0, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().ok()?,
            "range" => {
                let (start, end) = value.strip_prefix("bytes=")?.split_once('-')?;
                range = Some((start.parse().ok()?, end.parse().unwrap_or(usize::MAX)));
            }
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request { method, path: path.to_owned(), query: query.to_owned(), range, body })
}

fn answer(state: &mut State, request: &Request) -> (u16, String, Vec<u8>) {
    let key = request.path.trim_start_matches('/').split_once('/').map_or("", |(_, key)| key).to_owned();
    let upload = request.query.split('&').find_map(|q| q.strip_prefix("uploadId="));
    match (request.method.as_str(), upload) {
        ("GET", _) if request.query.contains("list-type=2") => (200, String::new(), listing(state, &request.query)),
        ("GET" | "HEAD", _) => object(state, &key, request.range),
        ("POST", None) => {
            let id = format!("u{}", state.uploads.len());
            state.uploads.insert(id.clone(), BTreeMap::new());
            let body = format!(
                "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>{key}</Key><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
            );
            (200, String::new(), body.into_bytes())
        }
        ("PUT", Some(id)) => {
            let number = request.query.split('&').find_map(|q| q.strip_prefix("partNumber=")?.parse().ok());
            let parts = state.uploads.get_mut(id).expect("an upload");
            parts.insert(number.expect("a number"), request.body.clone());
            (200, "ETag: \"part\"\r\n".to_owned(), vec![])
        }
        ("PUT", None) => {
            state.objects.insert(key, request.body.clone());
            (200, "ETag: \"whole\"\r\n".to_owned(), vec![])
        }
        ("POST", Some(id)) => {
            let parts = state.uploads.remove(id).expect("an upload");
            state.objects.insert(key, parts.into_values().flatten().collect());
            (
                200,
                String::new(),
                b"<CompleteMultipartUploadResult><ETag>\"x-1\"</ETag></CompleteMultipartUploadResult>".to_vec(),
            )
        }
        ("DELETE", Some(id)) => {
            state.uploads.remove(id);
            (204, String::new(), vec![])
        }
        _ => (405, String::new(), vec![]),
    }
}

fn object(state: &State, key: &str, range: Option<(usize, usize)>) -> (u16, String, Vec<u8>) {
    let Some(bytes) = state.objects.get(key) else {
        return (404, String::new(), b"<Error><Code>NoSuchKey</Code></Error>".to_vec());
    };
    let mut md5: Vec<u8> = Md5::digest(bytes).to_vec();
    if state.encrypted {
        md5.reverse();
    }
    let etag: String = md5.iter().map(|b| format!("{b:02x}")).collect();
    let common = format!("ETag: \"{etag}\"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n");
    match range {
        None => (200, common, bytes.clone()),
        Some((start, end)) => {
            let end = end.min(bytes.len() - 1);
            let all = bytes.len();
            (206, format!("{common}Content-Range: bytes {start}-{end}/{all}\r\n"), bytes[start..=end].to_vec())
        }
    }
}

fn listing(state: &State, query: &str) -> Vec<u8> {
    let prefix = query.split('&').find_map(|q| q.strip_prefix("prefix=")).unwrap_or("").replace("%2F", "/");
    let entry = |(key, bytes): (&String, &Vec<u8>)| {
        let size = bytes.len();
        format!(
            "<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>\"e\"</ETag></Contents>"
        )
    };
    let entries: String = state.objects.iter().filter(|(key, _)| key.starts_with(&prefix)).map(entry).collect();
    format!("<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>").into_bytes()
}
