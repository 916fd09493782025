//! Bars on standard error, drawn by a thread that looks at the operations' counters.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use lorafmt_core::io::Control;

/// Work that is done by then shows no bar.
const PATIENCE: Duration = Duration::from_millis(300);
const TICK: Duration = Duration::from_millis(100);

/// The bars of one command. Dropping it takes them off the screen.
pub(crate) struct Progress {
    shared: Option<Arc<Shared>>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    bars: MultiProgress,
    files: usize,
    done: AtomicUsize,
    running: Mutex<Vec<Running>>,
}

struct Running {
    name: String,
    control: Arc<Control>,
    since: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(super) fn new(shown: bool, files: usize) -> Self {
        if !shown {
            return Self { shared: None, stop: None, thread: None };
        }
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        let shared = Arc::new(Shared { bars, files, done: AtomicUsize::new(0), running: Mutex::default() });
        let (stop, stopped) = channel();
        let watched = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let started = Instant::now();
            let mut total = None;
            while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                if started.elapsed() > PATIENCE {
                    watched.draw(&mut total);
                }
            }
            let _ = watched.bars.clear();
        });
        Self { shared: Some(shared), stop: Some(stop), thread: Some(thread) }
    }

    /// A file is being worked on.
    pub(crate) fn begin(&self, name: &str, control: &Arc<Control>) {
        if let Some(shared) = &self.shared {
            let (name, control) = (super::text::clean(name).into_owned(), Arc::clone(control));
            shared.running().push(Running { name, control, since: Instant::now(), bar: None });
        }
    }

    /// It is done.
    pub(crate) fn end(&self, control: &Arc<Control>) {
        if let Some(shared) = &self.shared {
            shared.running().retain(|r| {
                let ended = Arc::ptr_eq(&r.control, control);
                if let Some(bar) = r.bar.as_ref().filter(|_| ended) {
                    bar.finish_and_clear();
                }
                !ended
            });
        }
    }

    /// Counts a file.
    pub(crate) fn count(&self) {
        if let Some(shared) = &self.shared {
            shared.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes the bars off the screen while something is printed.
    pub(crate) fn suspend(&self, print: impl FnOnce()) {
        match &self.shared {
            Some(shared) => shared.bars.suspend(print),
            None => print(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn running(&self) -> std::sync::MutexGuard<'_, Vec<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(&self, total: &mut Option<ProgressBar>) {
        if self.files > 1 {
            let style = "{prefix} {wide_bar} {pos}/{len} files";
            let bar = total.get_or_insert_with(|| self.bar("total", style, self.files as u64, PATIENCE));
            bar.set_position(self.done.load(Ordering::Relaxed) as u64);
        }
        for running in self.running().iter_mut() {
            let (done, all) = running.control.progress();
            let elapsed = running.since.elapsed();
            if all == 0 || elapsed < PATIENCE {
                continue;
            }
            let style = "{prefix} {wide_bar} {bytes}/{total_bytes}";
            let bar = running.bar.get_or_insert_with(|| self.bar(&running.name, style, all, elapsed));
            bar.set_length(all);
            bar.set_position(done);
        }
    }

    fn bar(&self, name: &str, style: &str, length: u64, elapsed: Duration) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::new(length).with_elapsed(elapsed));
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(super::text::shortened(name, 32));
        bar
    }
}
