//! `mp-train chat` from a pipe.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::setup::{GREEDY, Setup, ended, text};

const SHORT: [&str; 2] = ["--max-new-tokens", "10"];

/// What chat prints for these answers.
fn printed(answers: &[String]) -> String {
    answers.iter().map(|answer| format!("{answer}\n")).collect()
}

/// The greedy answer to a question after turns, by `generate`.
fn answer(setup: &Setup, prompt: &str, history: &[[String; 2]], flags: &[&str]) -> String {
    let row = json!({ "prompt": prompt, "history": history });
    text(&setup.answers(&[row], &[flags, &SHORT].concat())[0]).to_owned()
}

#[test]
fn each_question_is_asked_after_all_that_was_said() {
    let setup = Setup::new();
    for devices in ["cpu", "cpu,cpu,cpu"] {
        let flags = ["--devices", devices];
        let mut history: Vec<[String; 2]> = Vec::new();
        let mut expected = Vec::new();
        for question in ["who are you?", "why?", "really?"] {
            let answer = answer(&setup, question, &history, &flags);
            history.push([question.to_owned(), answer.clone()]);
            expected.push(answer);
        }
        // Forgotten, the first question is as new.
        expected.push(expected[0].clone());
        let lines = "who are you?\r\n\nwhy?\n  really?\n/clear\nwho are you?\n/quit\nnot asked\n";
        let ended = setup.chat(lines, &[&flags[..], &GREEDY, &SHORT].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert_eq!(ended.stdout, printed(&expected));
        assert_eq!(ended.stderr, "", "no prompts and notes in a pipe");
        assert_ne!(
            expected[1],
            answer(&setup, "why?", &[], &flags),
            "history changes nothing"
        );
    }
}

#[test]
fn the_oldest_turns_go_when_there_is_no_room() {
    // "[Round 1]\n问：fgh\n答：" and the turn before it are some 50 tokens.
    let limit = 70;
    let setup = Setup::with(200, |config| config["max_sequence_length"] = json!(limit));
    let tokens = |question: &str, history: &[[String; 2]]| {
        let turns = history.iter().enumerate();
        let turns = turns.map(|(n, [q, a])| format!("[Round {n}]\n问：{q}\n答：{a}\n"));
        let turns: String = turns.collect();
        let round = format!("{turns}[Round {}]\n问：{question}\n答：", history.len());
        setup
            .prompt_ids(if history.is_empty() { question } else { &round })
            .len()
    };
    let mut history: Vec<[String; 2]> = Vec::new();
    let mut expected = Vec::new();
    let mut forgotten = 0;
    let questions = ["abc", "fgh", "k", "lmnop", "q"];
    for question in questions {
        while tokens(question, &history) > limit - 10 {
            history.remove(0);
            forgotten += 1;
        }
        let answer = answer(&setup, question, &history, &[]);
        history.push([question.to_owned(), answer.clone()]);
        expected.push(answer);
    }
    assert!(
        (2..5).contains(&forgotten),
        "{forgotten} of 5 turns were forgotten"
    );
    let ended = setup.chat(&questions.join("\n"), &[GREEDY, SHORT].concat());
    assert_eq!((ended.code, ended.stdout), (Some(0), printed(&expected)));
}

#[test]
fn an_instruction_adapter_sees_each_question_alone_as_an_instruction() {
    let setup = Setup::new();
    let adapter = setup.adapter("adapter_lora_qkv", Some("[template]\nkind = \"alpaca\"\n"));
    let flags = ["--adapter", adapter.to_str().unwrap()];
    let rows: Vec<Value> = ["one", "two"]
        .map(|text| json!({ "instruction": text }))
        .to_vec();
    let expected = setup.answers(&rows, &[&flags[..], &SHORT].concat());
    let expected: Vec<String> = expected.iter().map(|row| text(row).to_owned()).collect();
    let ended = setup.chat("one\ntwo", &[&flags[..], &GREEDY, &SHORT].concat());
    assert_eq!((ended.code, ended.stdout), (Some(0), printed(&expected)));
}

#[test]
fn seeds_repeat_a_conversation_and_asking_again_is_another_draw() {
    let setup = Setup::new();
    let say = |lines: &str, flags: &[&str]| {
        let flags = [flags, &["--max-new-tokens", "30", "--no-stop-at-eop"]].concat();
        let ended = setup.chat(lines, &flags);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended.stdout
    };
    let twice = |flags: &[&str]| say("hi\n/clear\nhi\n", flags);
    // THUDM's narrow defaults on nearly flat logits, and wider.
    for wide in [
        &[][..],
        &["--temperature", "2", "--top-p", "1", "--top-k", "0"],
    ] {
        let both = twice(wide);
        assert_eq!(both, twice(wide));
        assert_eq!(both, twice(&[wide, &["--devices", "cpu,cpu,cpu"]].concat()));
        assert_ne!(both, twice(&[wide, &["--seed", "7"]].concat()));
        let first = say("hi\n", wide);
        let second = both.strip_prefix(&first).unwrap();
        assert_ne!(second, first);
    }
}

#[test]
fn an_answer_is_shown_while_it_grows_and_a_signal_stops_it() {
    let setup = Setup::new();
    let mut command = setup.command("chat");
    command.args([
        "--max-new-tokens",
        "2000",
        "--no-stop-at-eop",
        "--temperature",
        "3",
    ]);
    command.args(["--top-k", "0", "--top-p", "1"]);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // The pipe stays open: nothing but the question and the signal moves the program.
    stdin.write_all(b"hi\n").unwrap();
    let mut first = [0];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let watchdog = std::thread::spawn(move || {
        for _ in 0..600 {
            std::thread::sleep(Duration::from_millis(100));
            if rustix::process::test_kill_process(pid).is_err() {
                return;
            }
        }
        let _ = kill_process(pid, Signal::KILL);
    });
    let ended = ended(child.wait_with_output().unwrap());
    watchdog.join().unwrap();
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("interrupted: stopped at line 1"),
        "{}",
        ended.stderr
    );
    assert!(ended.stdout.ends_with('\n') && ended.stdout.chars().count() < 1999);
    drop(stdin);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let setup = Setup::new();
    let mut command = setup.command("chat");
    command
        .args(SHORT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"hi\nhi\nhi\n")
        .unwrap();
    let ended = ended(child.wait_with_output().unwrap());
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_chat_over_codes_answers_as_generate_does() {
    let setup = Setup::new();
    let plain = answer(&setup, "who are you?", &[], &[]);
    let mut answers = Vec::new();
    for quantization in ["int8", "int4"] {
        for devices in ["cpu", "cpu,cpu,cpu"] {
            let flags = ["--quantization", quantization, "--devices", devices];
            let expected = answer(&setup, "who are you?", &[], &flags);
            let ended = setup.chat("who are you?\n", &[&flags[..], &GREEDY, &SHORT].concat());
            assert_eq!(ended.code, Some(0), "{}", ended.stderr);
            assert_eq!(ended.stdout, printed(std::slice::from_ref(&expected)));
            answers.push(expected);
        }
    }
    assert_eq!((&answers[0], &answers[2]), (&answers[1], &answers[3]));
    assert!(
        answers.iter().any(|answer| *answer != plain),
        "codes change nothing"
    );
}
