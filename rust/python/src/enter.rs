//! The one way into the engine.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use lorafmt_core::error::{Error, Result};
use lorafmt_core::io::Control;
use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError};
use pyo3::prelude::*;

/// How often signals and progress are looked at.
const POLL: Duration = Duration::from_millis(50);

/// Runs `work` on another thread with the interpreter detached; meanwhile looks for Ctrl-C and reports progress.
/// Errors become the package's exceptions, panics a `RuntimeError`.
pub(crate) fn enter<T: Send>(
    py: Python<'_>,
    progress: Option<&Py<PyAny>>,
    work: impl FnOnce(&Control) -> Result<T> + Send,
) -> PyResult<T> {
    let control = Control::default();
    let mut signal: Option<PyErr> = None;
    let result = py.detach(|| {
        let (sender, receiver) = channel();
        let control = &control;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let outcome = catch_unwind(AssertUnwindSafe(|| work(control)));
                // The receiver only leaves once it has the outcome.
                let _ = sender.send(outcome);
            });
            loop {
                match receiver.recv_timeout(POLL) {
                    Ok(outcome) => return outcome,
                    Err(RecvTimeoutError::Disconnected) => unreachable!("the worker sends before it ends"),
                    Err(RecvTimeoutError::Timeout) if signal.is_none() => {
                        let tick = Python::attach(|py| {
                            py.check_signals()?;
                            if let Some(callback) = progress {
                                callback.call1(py, control.progress())?;
                            }
                            Ok(())
                        });
                        if let Err(error) = tick {
                            control.cancel();
                            signal = Some(error);
                        }
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                }
            }
        })
    });
    if let Some(error) = signal {
        return Err(error);
    }
    match result {
        Ok(Ok(value)) => {
            if let Some(callback) = progress {
                callback.call1(py, control.progress())?;
            }
            Ok(value)
        }
        Ok(Err(error)) => Err(exception(py, &error)),
        Err(panic) => {
            let text =
                panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            Err(PyRuntimeError::new_err(format!(
                "lorafmt panicked: {}; please report this",
                text.unwrap_or("no message")
            )))
        }
    }
}

/// The exception of an error, made by the package itself from the public error object.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    use lorafmt_core::error::Kind;
    if error.code().kind() == Kind::Interrupted {
        return PyKeyboardInterrupt::new_err(());
    }
    let kind = match error.code().kind() {
        Kind::NotFound => "NotFound",
        Kind::Exists => "Exists",
        Kind::Io => "Io",
        Kind::Access => "Access",
        Kind::Network => "Network",
        Kind::Unsupported => "Unsupported",
        Kind::Usage => "Usage",
        _ => "Format",
    };
    let make = || -> PyResult<PyErr> {
        let module = py.import("lorafmt.exceptions")?;
        let made = module.call_method1("_from_native", (kind, error.to_string(), error.to_json().to_string()))?;
        Ok(PyErr::from_value(made))
    };
    make().unwrap_or_else(|failure| failure)
}
