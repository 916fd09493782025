//! Writing a file whole or not at all: header first, then tiles computed by a thread pool and written at their place.
//!
//! Positioned writes into a temporary file beside the target, then fsync, then rename. A shared writable mapping was
//! measured slower on every file system tried (a page fault for every 4 KiB).

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::cast::Loss;
use crate::error::{Code, Error, Result};
use crate::plan::{Digest, Output, Plan};
use crate::pool::Pool;

/// Bytes computed and written at a time by one thread. Fits the second-level cache and keeps private memory small.
const TILE: usize = 512 * 1024;

/// Bytes of a source that are worth a write of their own, without a copy in between.
const DIRECT: usize = 32 * 1024;

/// The smallest pages there are.
const PAGE: usize = 4096;

/// Shared with whoever watches a running operation: progress to read, and a flag to stop it.
#[derive(Debug, Default)]
pub struct Control {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Control {
    /// Asks the operation to stop; it ends with [`Code::Interrupted`] and leaves nothing behind.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Bytes written and bytes to write, so far as known.
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    /// An error if somebody asked to stop.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(Code::Interrupted, "interrupted"));
        }
        Ok(())
    }

    /// More bytes to write are known, or files to take.
    pub fn expect(&self, bytes: usize) {
        self.total.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Some of them are done.
    pub fn advance(&self, bytes: usize) {
        self.done.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// How a file is written.
#[derive(Debug, Clone, Copy, Default)]
pub struct WriteOptions {
    /// Replace an existing file.
    pub overwrite: bool,
}

/// The header of a file to be, and where each tensor goes.
pub struct Layout<'a> {
    header: Vec<u8>,
    /// Hashes that the header still lacks, with where they go.
    digests: Vec<(usize, &'a Digest)>,
    /// Tensors in file order with their start, counted from the start of the file.
    tensors: Vec<(&'a Output, usize)>,
    len: usize,
}

impl<'a> Layout<'a> {
    /// Orders tensors as the safetensors project does (alignment first, then name) and makes the header.
    pub fn new(outputs: &'a [Output], metadata: &[(String, String)]) -> Self {
        let mut order: Vec<&Output> = outputs.iter().collect();
        order.sort_by(|a, b| b.tensor.dtype().cmp(&a.tensor.dtype()).then_with(|| a.key.cmp(&b.key)));
        let mut json = serde_json::Map::new();
        if !metadata.is_empty() {
            let entries = metadata.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
            json.insert("__metadata__".into(), serde_json::Value::Object(entries));
        }
        let mut at = 0;
        let mut tensors = Vec::with_capacity(order.len());
        for output in order {
            let end = at + output.tensor.nbytes();
            let entry = serde_json::json!({
                "dtype": output.tensor.dtype().name(),
                "shape": output.tensor.shape(),
                "data_offsets": [at, end],
            });
            json.insert(output.key.clone(), entry);
            tensors.push((output, at));
            at = end;
        }
        let mut text = serde_json::Value::Object(json).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        for (_, start) in &mut tensors {
            *start += header.len();
        }
        let len = at + header.len();
        Self { header, digests: Vec::new(), tensors, len }
    }

    /// The file of a plan.
    pub fn of(plan: &'a Plan) -> Self {
        let mut layout = Self::new(&plan.outputs, &plan.metadata);
        for digest in &plan.digests {
            let wanted = digest.placeholder.as_bytes();
            let found = layout.header.windows(wanted.len()).position(|w| w == wanted);
            layout.digests.extend(found.map(|at| (at, digest)));
        }
        layout
    }

    /// The header with its hashes. Reads every byte of the inputs that it has hashes of.
    fn full_header(&self) -> Vec<u8> {
        let mut header = self.header.clone();
        let hashes: Vec<String> = self.digests.par_iter().map(|(_, d)| d.compute()).collect();
        for ((at, digest), hash) in self.digests.iter().zip(hashes) {
            header[*at..at + digest.placeholder.len()].copy_from_slice(hash.as_bytes());
        }
        header
    }

    /// Bytes of the whole file.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: there is always a header.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Cuts the body into tiles of about [`TILE`] bytes. Small tensors share a tile, large ones are cut by rows.
    fn tiles(&self) -> Vec<Tile<'a>> {
        let mut tiles: Vec<Tile<'a>> = Vec::new();
        for &(output, start) in &self.tensors {
            let (rows, row_bytes) = (output.tensor.rows(), output.tensor.cols() * output.tensor.dtype().size());
            let block = output.tensor.block();
            let step = (TILE / row_bytes.max(1) / block * block).max(block);
            let mut row = 0;
            while row < rows && row_bytes > 0 {
                let end = rows.min(row + step);
                let part = Part { output, rows: row..end, bytes: (end - row) * row_bytes };
                match tiles.last_mut() {
                    Some(tile) if tile.bytes + part.bytes <= TILE => tile.push(part),
                    _ => tiles.push(Tile { at: start + row * row_bytes, bytes: part.bytes, parts: vec![part] }),
                }
                row = end;
            }
        }
        tiles
    }
}

struct Part<'a> {
    output: &'a Output,
    rows: Range<usize>,
    bytes: usize,
}

struct Tile<'a> {
    at: usize,
    bytes: usize,
    parts: Vec<Part<'a>>,
}

impl<'a> Tile<'a> {
    fn push(&mut self, part: Part<'a>) {
        self.bytes += part.bytes;
        self.parts.push(part);
    }

    /// Passes the tile's bytes to `write`, with their place: those of a source as they lie there, all others computed
    /// into the buffer. Returns whether values left the range of their type.
    fn write(&self, buffer: &mut Vec<u8>, mut write: impl FnMut(usize, &[u8]) -> Result<()>) -> Result<Loss> {
        let (mut at, mut computed, mut loss) = (self.at, 0, Loss::default());
        for part in &self.parts {
            match part.output.tensor.stored(part.rows.clone()).filter(|bytes| bytes.len() >= DIRECT) {
                Some(bytes) => {
                    if computed > 0 {
                        write(at - computed, &buffer[..computed])?;
                        computed = 0;
                    }
                    // Brought into memory here: in the write, that would keep the file locked against other threads.
                    std::hint::black_box(bytes.iter().step_by(PAGE).fold(0, |all, byte| all | byte));
                    write(at, bytes)?;
                }
                None => {
                    let end = computed + part.bytes;
                    if buffer.len() < end {
                        buffer.resize(end, 0);
                    }
                    loss |= part.output.tensor.read(part.rows.clone(), &mut buffer[computed..end]);
                    computed = end;
                }
            }
            at += part.bytes;
        }
        if computed > 0 {
            write(at - computed, &buffer[..computed])?;
        }
        Ok(loss)
    }
}

/// Runs `write(tile start, bytes)` for every tile, on all threads of the current pool.
fn each_tile(
    layout: &Layout<'_>,
    control: &Control,
    write: impl Fn(usize, &[u8]) -> Result<()> + Sync,
) -> Result<Loss> {
    control.expect(layout.len);
    let total = Mutex::new(Loss::default());
    let buffers = Pool::default();
    layout.tiles().into_par_iter().with_max_len(1).try_for_each(|tile| {
        control.check()?;
        let loss = buffers.with(|buffer| tile.write(buffer, &write))?;
        if loss != Loss::default() {
            *total.lock().unwrap_or_else(PoisonError::into_inner) |= loss;
        }
        control.advance(tile.bytes);
        Ok(())
    })?;
    Ok(total.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// A file that is written whole but does not have its name yet. Dropping it removes it.
pub struct Pending {
    temp: tempfile::NamedTempFile,
    path: PathBuf,
}

impl Pending {
    /// Writes the tensors beside `path`. Also returns whether values left the range of their type.
    pub fn tensors(path: &Path, layout: &Layout<'_>, control: &Control) -> Result<(Self, Loss)> {
        let temp = temp_beside(path)?;
        let file = temp.as_file();
        let fail = |e| Error::io(path, "write the file", e);
        file.set_len(layout.len as u64).map_err(fail)?;
        let body = || each_tile(layout, control, |at, bytes| write_at(file, bytes, at as u64).map_err(fail));
        // Hashing reads all of the inputs, and so does writing: both at once.
        let (header, loss) = rayon::join(|| layout.full_header(), body);
        let loss = loss?;
        write_at(file, &header, 0).map_err(fail)?;
        file.sync_all().map_err(fail)?;
        control.check()?;
        Ok((Self { temp, path: path.to_path_buf() }, loss))
    }

    /// Lets `fill` write a file beside `path`, and returns what it returns.
    pub(crate) fn filled<T>(path: &Path, fill: impl FnOnce(&File) -> Result<T>) -> Result<(Self, T)> {
        let temp = temp_beside(path)?;
        let made = fill(temp.as_file())?;
        temp.as_file().sync_all().map_err(|e| Error::io(path, "write the file", e))?;
        Ok((Self { temp, path: path.to_path_buf() }, made))
    }

    /// Writes a text beside `path`.
    pub fn text(path: &Path, text: &str) -> Result<Self> {
        let temp = temp_beside(path)?;
        let mut file = temp.as_file();
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
        written.map_err(|e| Error::io(path, "write the file", e))?;
        Ok(Self { temp, path: path.to_path_buf() })
    }

    /// Gives it its name. Without `overwrite` an existing file is refused, also one that appeared meanwhile.
    pub fn commit(self, options: WriteOptions) -> Result<()> {
        let Self { temp, path } = self;
        let result = if options.overwrite { temp.persist(&path) } else { temp.persist_noclobber(&path) };
        result.map(drop).map_err(|e| Error::io(&path, "rename the finished file", e.error))
    }
}

/// Writes the tensors to `path`, atomically. Returns whether values left the range of their type.
pub fn write_file(path: &Path, layout: &Layout<'_>, options: WriteOptions, control: &Control) -> Result<Loss> {
    refuse_existing(path, options)?;
    let (pending, loss) = Pending::tensors(path, layout, control)?;
    pending.commit(options)?;
    Ok(loss)
}

/// Writes the tensors to a stream, in order. Returns whether values left the range of their type.
pub fn write_to(out: &mut dyn Write, layout: &Layout<'_>, control: &Control) -> Result<Loss> {
    let fail = |e| Error::io(Path::new("-"), "write the output", e);
    control.expect(layout.len);
    out.write_all(&layout.full_header()).map_err(fail)?;
    let (mut buffer, mut loss) = (Vec::new(), Loss::default());
    for tile in layout.tiles() {
        control.check()?;
        loss |= tile.write(&mut buffer, |_, bytes| out.write_all(bytes).map_err(fail))?;
        control.advance(tile.bytes);
    }
    out.flush().map_err(fail)?;
    Ok(loss)
}

/// An error if `path` exists and may not be replaced.
pub fn refuse_existing(path: &Path, options: WriteOptions) -> Result<()> {
    if path.is_dir() {
        return Err(Error::new(Code::IsADirectory, "the output is a folder")
            .at(path)
            .hint("name a file, or use `--out-dir`"));
    }
    if !options.overwrite && path.symlink_metadata().is_ok() {
        return Err(Error::new(Code::OutputExists, "the output exists already").at(path));
    }
    Ok(())
}

fn temp_beside(path: &Path) -> Result<tempfile::NamedTempFile> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".lorafmt-").suffix(".tmp");
    #[cfg(unix)]
    {
        // Reduced by the umask when the file is created, as for any other program's output.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(&folder).map_err(|e| Error::io(&folder, "create a file in the folder", e))
}

#[cfg(unix)]
pub(crate) fn write_at(file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

#[cfg(windows)]
pub(crate) fn write_at(file: &File, mut bytes: &[u8], mut at: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, at)?;
        bytes = &bytes[n..];
        at += n as u64;
    }
    Ok(())
}
