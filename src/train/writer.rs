//! Checkpoints are written by a thread of their own while training goes on.
//!
//! A state is copied at the end of its step; everything else (putting tensors together, files, checksums,
//! syncing, deleting old checkpoints) happens on the thread. One checkpoint is written at a time, so there
//! is never more than one copy beside the stages. It is reported when it is complete, and the run does not
//! end, however it ends, before it is.

use std::panic::resume_unwind;
use std::path::PathBuf;
use std::thread::{Scope, ScopedJoinHandle};

use crossbeam::channel::{Receiver, RecvError, Sender, TryRecvError, bounded};

use super::TrainError;
use super::checkpoint::TrainerState;
use crate::adapter::ParameterState;
use crate::report::Event;

/// A checkpoint that is complete.
pub(super) struct Saved {
    /// Its folder.
    pub path: PathBuf,
    /// What went wrong beside it: an old checkpoint that could not be deleted.
    pub warning: Option<String>,
}

type Job = (TrainerState, Vec<ParameterState>);

/// The thread that writes, and what it is at.
pub(super) struct Writer<'scope> {
    jobs: Sender<Job>,
    results: Receiver<Result<Saved, TrainError>>,
    thread: Option<ScopedJoinHandle<'scope, ()>>,
    /// The step whose checkpoint is being written.
    writing: Option<u64>,
    /// Whether the user was told that training waits for the disk.
    told: bool,
}

impl<'scope> Writer<'scope> {
    /// Starts the thread, which hands every state to `write`.
    pub fn start(
        scope: &'scope Scope<'scope, '_>,
        write: impl Fn(&TrainerState, Vec<ParameterState>) -> Result<Saved, TrainError> + Send + 'scope,
    ) -> Self {
        let (give, jobs) = bounded::<Job>(1);
        let (tell, results) = bounded(1);
        let thread = scope.spawn(move || {
            for (state, parameters) in jobs {
                // Nobody listens any more only where the one who waits has panicked.
                let _ = tell.send(write(&state, parameters));
            }
        });
        Writer {
            jobs: give,
            results,
            thread: Some(thread),
            writing: None,
            told: false,
        }
    }

    /// Takes a copy of the state from `snapshot` and gives it to the thread; where that is still writing,
    /// waits for it first, so that the second copy is not made beside the first.
    ///
    /// # Errors
    /// The checkpoint before could not be written, or that of `snapshot`.
    pub fn save(
        &mut self,
        state: &TrainerState,
        reporter: &mut dyn FnMut(Event),
        snapshot: impl FnOnce() -> Result<Vec<ParameterState>, TrainError>,
    ) -> Result<(), TrainError> {
        self.poll(reporter)?;
        if let Some(before) = self.writing {
            if !self.told {
                let step = state.step;
                reporter(Event::Warning(format!(
                    "step {step} waits until the checkpoint of step {before} is written; where that \
                     happens often, raise save_steps"
                )));
                self.told = true;
            }
            self.finish(reporter)?;
        }
        let job = (state.clone(), snapshot()?);
        if self.jobs.send(job).is_err() {
            self.pass_panic_on();
        }
        self.writing = Some(state.step);
        Ok(())
    }

    /// Reports the checkpoint that is being written, if it is complete by now.
    ///
    /// # Errors
    /// It could not be written.
    pub fn poll(&mut self, reporter: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let Some(step) = self.writing else {
            return Ok(());
        };
        match self.results.try_recv() {
            Ok(result) => self.report(step, result, reporter),
            Err(TryRecvError::Empty) => Ok(()),
            Err(TryRecvError::Disconnected) => {
                self.pass_panic_on();
                Ok(())
            }
        }
    }

    /// Waits until nothing is being written, and reports it.
    ///
    /// # Errors
    /// It could not be written.
    pub fn finish(&mut self, reporter: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let Some(step) = self.writing else {
            return Ok(());
        };
        match self.results.recv() {
            Ok(result) => self.report(step, result, reporter),
            Err(RecvError) => {
                self.pass_panic_on();
                Ok(())
            }
        }
    }

    /// As [`Writer::finish`] at the end of a run that came out as `trained`: whatever ended it counts, and
    /// a checkpoint that could not be written beside that is a warning.
    ///
    /// # Errors
    /// That of `trained`, or the checkpoint could not be written.
    pub fn close<T>(
        mut self,
        trained: Result<T, TrainError>,
        reporter: &mut dyn FnMut(Event),
    ) -> Result<T, TrainError> {
        match (trained, self.finish(reporter)) {
            (Err(error), Err(unsaved)) => {
                reporter(Event::Warning(unsaved.to_string()));
                Err(error)
            }
            (trained, finished) => trained.and_then(|trained| finished.map(|()| trained)),
        }
    }

    fn report(
        &mut self,
        step: u64,
        result: Result<Saved, TrainError>,
        reporter: &mut dyn FnMut(Event),
    ) -> Result<(), TrainError> {
        self.writing = None;
        let Saved { path, warning } = result?;
        if let Some(warning) = warning {
            reporter(Event::Warning(warning));
        }
        reporter(Event::CheckpointSaved { path, step });
        Ok(())
    }

    /// The thread ends before its channels only by a panic, which goes on here.
    fn pass_panic_on(&mut self) {
        if let Some(Err(panic)) = self.thread.take().map(ScopedJoinHandle::join) {
            resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::checkpoint::CheckpointError;
    use crate::data::rows::Rows;
    use crate::optim::loss_scale::LossScale;
    use crate::train::checkpoint::Fingerprint;

    fn state(step: u64) -> TrainerState {
        let fingerprint = Fingerprint::of(&Rows::default());
        TrainerState {
            step,
            ..TrainerState::new(LossScale::fixed(), fingerprint)
        }
    }

    fn nothing() -> Result<Vec<ParameterState>, TrainError> {
        Ok(Vec::new())
    }

    fn saved(state: &TrainerState) -> Saved {
        Saved {
            path: PathBuf::from(format!("checkpoint-{}", state.step)),
            warning: (state.step == 9).then(|| "an old one stays".to_owned()),
        }
    }

    fn refused() -> TrainError {
        CheckpointError::Unsavable {
            path: PathBuf::from("here"),
            reason: "no room".to_owned(),
        }
        .into()
    }

    /// What an event is, in a word and a step.
    fn word(event: &Event) -> String {
        match event {
            Event::CheckpointSaved { step, .. } => format!("saved {step}"),
            Event::Warning(text) => text.split(';').next().unwrap_or_default().to_owned(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn a_checkpoint_is_reported_when_it_is_complete_and_the_next_waits_for_it() {
        let (release, released) = bounded::<()>(9);
        let write = move |state: &TrainerState, _| {
            released.recv().unwrap();
            Ok(saved(state))
        };
        let mut said = Vec::new();
        let mut reporter = |event: Event| {
            // The one who is waited for goes on only now.
            if word(&event).contains("waits") {
                release.send(()).unwrap();
            }
            said.push(word(&event));
        };
        std::thread::scope(|scope| {
            let mut writer = Writer::start(scope, write);
            writer.save(&state(3), &mut reporter, nothing).unwrap();
            writer.poll(&mut reporter).unwrap();
            writer.save(&state(6), &mut reporter, nothing).unwrap();
            release.send(()).unwrap();
            writer.finish(&mut reporter).unwrap();
            writer.save(&state(9), &mut reporter, nothing).unwrap();
            release.send(()).unwrap();
            assert_eq!(writer.close(Ok(7), &mut reporter).unwrap(), 7);
        });
        assert_eq!(
            said,
            [
                "step 6 waits until the checkpoint of step 3 is written",
                "saved 3",
                "saved 6",
                "an old one stays",
                "saved 9",
            ]
        );
    }

    #[test]
    fn a_checkpoint_that_fails_ends_the_run_and_the_first_failure_counts() {
        let failing = |_: &TrainerState, _| Err(refused());
        std::thread::scope(|scope| {
            let mut ignore = |_: Event| {};
            let mut writer = Writer::start(scope, failing);
            writer.save(&state(1), &mut ignore, nothing).unwrap();
            let error = writer.save(&state(2), &mut ignore, || panic!("copied all the same"));
            assert!(error.unwrap_err().to_string().contains("no room"));
            writer.save(&state(3), &mut ignore, nothing).unwrap();
            assert!(writer.close(Ok(()), &mut ignore).is_err());

            let mut said = Vec::new();
            let mut reporter = |event: Event| said.push(word(&event));
            let mut writer = Writer::start(scope, failing);
            writer.save(&state(1), &mut reporter, nothing).unwrap();
            let nowhere = TrainError::NothingToResume {
                output: PathBuf::new(),
            };
            let error = writer.close::<()>(Err(nowhere), &mut reporter).unwrap_err();
            assert!(matches!(error, TrainError::NothingToResume { .. }));
            assert!(said.iter().any(|text| text.contains("no room")), "{said:?}");
        });
    }

    #[test]
    #[should_panic(expected = "a bug in the writer")]
    fn a_panic_of_the_thread_goes_on_where_it_is_waited_for() {
        std::thread::scope(|scope| {
            let mut writer = Writer::start(scope, |_, _| panic!("a bug in the writer"));
            writer.save(&state(1), &mut |_| {}, nothing).unwrap();
            let _ = writer.finish(&mut |_| {});
        });
    }
}
