//! `mp-train chat`: questions from a terminal or a pipe, answers as they are generated.

use std::io::{self, BufRead, ErrorKind, IsTerminal, Write};

use super::args::ChatArgs;
use super::failure::{Failure, FailureClass};
use super::generate::{options, sampling, warn};
use super::prompts::read_line;
use super::signals::AnswerStop;
use crate::chat::{Chat, Reply};
use crate::config::generate::Sampling;
use crate::generate::{End, GenerateError};

pub(super) fn run(args: &ChatArgs) -> Result<(), Failure> {
    let options = options(&args.model, sampling(&args.sampling, Sampling::chat())?)?;
    let new_tokens = args.max_new_tokens.map(|n| n as usize);
    let mut chat = Chat::open(&options, new_tokens, &mut warn)?;
    let stop =
        AnswerStop::register().map_err(|error| Failure::new(FailureClass::Machine, &error))?;
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let mut terminal = Terminal {
        asks: stdin.is_terminal() && stdout.is_terminal(),
        plain: !stdout.is_terminal(),
        out: stdout.lock(),
    };
    terminal.greet(&chat);
    match converse(&mut chat, stdin.lock(), &mut terminal, &stop) {
        // A reader that has seen enough (`| head`) is no error.
        Err(Ending::Output(error)) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        Err(Ending::Output(error)) => Err(Failure::new(FailureClass::Machine, &error)),
        Err(Ending::Failed(failure)) => Err(failure),
        Ok(()) => Ok(()),
    }
}

/// Why a conversation ends early.
enum Ending {
    /// Nothing can be shown any more.
    Output(io::Error),
    /// Anything else.
    Failed(Failure),
}

impl From<io::Error> for Ending {
    fn from(error: io::Error) -> Self {
        Ending::Output(error)
    }
}

fn converse(
    chat: &mut Chat,
    mut input: impl BufRead,
    terminal: &mut Terminal<impl Write>,
    stop: &AnswerStop,
) -> Result<(), Ending> {
    let mut bytes = Vec::new();
    for line in 1.. {
        let at_line = |what: &dyn std::fmt::Display| {
            Ending::Failed(Failure::user(format!("standard input:{line}: {what}")))
        };
        terminal.prompt()?;
        if read_line(&mut input, &mut bytes).map_err(|error| at_line(&error))? == 0 {
            return terminal.leave();
        }
        let question = match std::str::from_utf8(&bytes) {
            Ok(question) => question.trim(),
            Err(_) if terminal.asks => {
                terminal.note("that was not UTF-8; set the terminal to it");
                continue;
            }
            Err(_) => return Err(at_line(&"not UTF-8; save the questions as UTF-8")),
        };
        match question {
            "" => continue,
            "/quit" => return Ok(()),
            "/clear" => {
                chat.clear();
                terminal.note("forgotten");
                continue;
            }
            _ => {}
        }
        let mut shown = Ok(());
        let (reply, interrupted) = stop.during(|stop| {
            let mut show = |text: &str| {
                if shown.is_ok() {
                    shown = terminal.show(text);
                }
                if shown.is_err() {
                    stop.store(true, std::sync::atomic::Ordering::Relaxed);
                }
            };
            chat.ask(question, &mut show, stop)
        });
        shown?;
        match reply {
            Ok(reply) => terminal.end_of_answer(&reply)?,
            // What the next question can do better.
            Err(error @ (GenerateError::TooLong { .. } | GenerateError::Prompt { .. })) => {
                match terminal.asks {
                    true => terminal.note(&error.to_string()),
                    false => return Err(at_line(&error)),
                }
            }
            Err(error) => return Err(Ending::Failed(error.into())),
        }
        // Nobody is there to go on.
        if interrupted && !terminal.asks {
            let told = format!("stopped at line {line} of standard input");
            return Err(Ending::Failed(Failure::interrupted(told)));
        }
    }
    Ok(())
}

/// Where answers appear.
struct Terminal<W: Write> {
    /// Whether a person types the questions.
    asks: bool,
    /// Whether answers go to a file or a pipe, as they are.
    plain: bool,
    out: W,
}

impl<W: Write> Terminal<W> {
    fn greet(&self, chat: &Chat) {
        self.note("/clear forgets what was said, /quit or Ctrl-D ends, Ctrl-C stops an answer");
        if !chat.has_history() {
            let template = chat.template();
            self.note(&format!(
                "by its template, {template}, this model sees each question alone"
            ));
        }
    }

    /// A word beside the conversation, for a person only.
    fn note(&self, text: &str) {
        if self.asks {
            eprintln!("({text})");
        }
    }

    fn prompt(&mut self) -> io::Result<()> {
        if self.asks {
            self.out.write_all(b"> ")?;
            self.out.flush()?;
        }
        Ok(())
    }

    /// A piece of an answer. A terminal is not to be steered by it.
    fn show(&mut self, text: &str) -> io::Result<()> {
        let is_steering = |c: char| c.is_control() && c != '\n' && c != '\t';
        match self.plain {
            true => self.out.write_all(text.as_bytes())?,
            false => {
                let harmless = text.replace(is_steering, "\u{FFFD}");
                self.out.write_all(harmless.as_bytes())?;
            }
        }
        self.out.flush()
    }

    fn end_of_answer(&mut self, reply: &Reply) -> io::Result<()> {
        self.out.write_all(b"\n")?;
        self.out.flush()?;
        match reply.end {
            End::Complete => {}
            End::Length => self.note("cut off; --max-new-tokens allows longer answers"),
            End::Stopped => self.note("stopped"),
        }
        match reply.forgotten {
            0 => {}
            1 => self.note("the oldest turn had no place any more and is forgotten"),
            turns => self.note(&format!(
                "the oldest {turns} turns had no place any more and are forgotten"
            )),
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<(), Ending> {
        if self.asks {
            self.out.write_all(b"\n")?;
        }
        Ok(())
    }
}
