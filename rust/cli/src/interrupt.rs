//! Ctrl-C. While something is being written the first one asks it to stop, which removes the temporary file; otherwise,
//! and the second time, the process ends at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError, Weak};

use lorafmt_core::io::Control;

use crate::ExitStatus;

static INSTALL: Once = Once::new();
static STOPPED: AtomicBool = AtomicBool::new(false);
static RUNNING: Mutex<Vec<Weak<Control>>> = Mutex::new(Vec::new());

/// Sets the handler of the process, once.
pub(crate) fn install() {
    // Fails only if somebody else in the process has one; then theirs decides.
    INSTALL.call_once(|| drop(ctrlc::set_handler(stop)));
}

/// A control that Ctrl-C cancels, for as long as it lives.
pub(crate) fn control() -> Arc<Control> {
    let control = Arc::new(Control::default());
    let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    running.retain(|c| c.strong_count() > 0);
    running.push(Arc::downgrade(&control));
    if STOPPED.load(Ordering::SeqCst) {
        control.cancel();
    }
    control
}

/// Whether the user has asked to stop.
pub(crate) fn stopped() -> bool {
    STOPPED.load(Ordering::SeqCst)
}

#[allow(clippy::exit, reason = "nothing is being written, or the user insists")]
fn stop() {
    let again = STOPPED.swap(true, Ordering::SeqCst);
    let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    let controls: Vec<Arc<Control>> = running.iter().filter_map(Weak::upgrade).collect();
    if again || controls.is_empty() {
        std::process::exit(ExitStatus::Interrupted as i32);
    }
    controls.iter().for_each(|c| c.cancel());
}
