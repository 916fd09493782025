//! Threads: the one pool that computes, and the few that take files side by side.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

/// Files that are worked on at a time. Each is computed by the whole pool, so more would only hold more files open.
const FILES_AT_A_TIME: usize = 4;

/// More threads than this only cost the time to start them.
const MOST_THREADS: usize = 256;

/// Sets the size of the computing pool; without a wish rayon makes it as wide as the machine, when it is first used.
pub(crate) fn configure(jobs: Option<NonZeroUsize>) {
    if let Some(jobs) = jobs {
        // Fails if the pool exists already (Python calls `run` several times in one process); the first wish stays.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(jobs.get().min(MOST_THREADS)).build_global();
    }
}

/// Calls `work` for every index on a few threads, and `done` on this thread with the results, in order.
pub(crate) fn in_order<T: Send>(
    count: usize,
    jobs: Option<NonZeroUsize>,
    work: impl Fn(usize) -> T + Sync,
    mut done: impl FnMut(usize, T),
) {
    let machine = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let threads = jobs.unwrap_or(machine).get().min(FILES_AT_A_TIME).min(count);
    if threads <= 1 {
        (0..count).for_each(|i| done(i, work(i)));
        return;
    }
    let next = AtomicUsize::new(0);
    // Bounded: whoever reads the answers may be slower than the work.
    let (sender, results) = mpsc::sync_channel(threads);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next, work) = (sender.clone(), &next, &work);
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count || sender.send((i, work(i))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let (mut waiting, mut expected) = (BTreeMap::new(), 0);
        for (i, result) in results {
            waiting.insert(i, result);
            while let Some(result) = waiting.remove(&expected) {
                done(expected, result);
                expected += 1;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order() {
        for jobs in [1, 3, 8] {
            let mut seen = Vec::new();
            let work = |i: usize| {
                std::thread::sleep(std::time::Duration::from_millis((i as u64 * 7) % 5));
                i * i
            };
            in_order(20, NonZeroUsize::new(jobs), work, |i, square| seen.push((i, square)));
            assert_eq!(seen, (0..20).map(|i| (i, i * i)).collect::<Vec<_>>());
        }
    }
}
