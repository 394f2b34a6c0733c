//! Rows in, rows with answers out.

use std::fs;

use serde_json::{Value, json};

use super::setup::{Setup, golden, golden_answers, ids, parse, text};

#[test]
fn greedy_ids_are_the_references() {
    let setup = Setup::new();
    for (kind, adapter) in [
        ("plain", None),
        ("ptuning", Some(golden("ptuning_checkpoint"))),
    ] {
        let cases = golden_answers(kind);
        let rows: Vec<Value> = cases
            .iter()
            .map(|(ids, _)| json!({ "input_ids": ids }))
            .collect();
        let new_tokens = cases[0].1.len().to_string();
        let mut flags = vec!["--no-stop-at-eop", "--max-new-tokens", &new_tokens];
        if let Some(adapter) = &adapter {
            flags.extend(["--adapter", adapter.to_str().unwrap()]);
        }
        for devices in ["cpu", "cpu,cpu,cpu"] {
            let found = setup.answers(&rows, &[&flags[..], &["--devices", devices]].concat());
            for ((row, found), (_, expected)) in rows.iter().zip(&found).zip(&cases) {
                assert_eq!(&ids(found), expected, "{kind} on {devices}");
                assert_eq!(found["input_ids"], row["input_ids"]);
                assert_eq!(found.get("answer"), None, "ids are answered by ids");
            }
        }
    }
}

#[test]
fn text_is_asked_by_its_ids_and_answered_in_order_from_file_to_file() {
    let setup = Setup::new();
    let tokenizer = setup.tokenizer();
    let history = json!([["one", "1"], ["two", "2"]]);
    let rounds = "[Round 0]\n问：one\n答：1\n[Round 1]\n问：two\n答：2\n[Round 2]\n问：three\n答：";
    let cases = [
        (json!({ "prompt": "who are you?", "id": 7 }), "who are you?"),
        (
            json!({ "instruction": "sum", "input": "1 2" }),
            "Instruction: sum\nInput: 1 2\nAnswer: ",
        ),
        (json!({ "prompt": "three", "history": history }), rounds),
        (
            json!({ "instruction": "sum", "output": "?" }),
            "Instruction: sum\nAnswer: ",
        ),
    ];
    let by_text: Vec<Value> = cases.iter().map(|(row, _)| row.clone()).collect();
    let by_ids: Vec<Value> = cases
        .iter()
        .map(|(_, text)| json!({ "input_ids": setup.prompt_ids(text) }))
        .collect();
    let adapters = [None, Some("adapter_lora_qkv"), Some("ptuning_checkpoint")];
    let mut seen = Vec::new();
    for adapter in adapters {
        let adapter = adapter.map(|name| golden(name).to_str().unwrap().to_owned());
        let mut flags = vec!["--max-new-tokens", "12", "--no-stop-at-eop"];
        if let Some(adapter) = &adapter {
            flags.extend(["--adapter", adapter]);
        }
        let expected = setup.answers(&by_ids, &flags);
        for devices in ["cpu", "cpu,cpu,cpu"] {
            let to = setup.folder.path().join(format!("{devices}.jsonl"));
            let place = ["--devices", devices, "--output", to.to_str().unwrap()];
            let ended = setup.generate(&by_text, &[&flags[..], &place].concat());
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""));
            assert_eq!(
                ended.stderr, "",
                "no template is known, so nothing contradicts it"
            );
            let found = parse(&fs::read_to_string(&to).unwrap());
            assert_eq!(found.len(), cases.len());
            for ((found, expected), row) in found.iter().zip(&expected).zip(&by_text) {
                assert_eq!(ids(found), ids(expected));
                assert_eq!(text(found), tokenizer.decode(&ids(found)).unwrap());
                for (column, value) in row.as_object().unwrap() {
                    assert_eq!(&found[column], value);
                }
                let keys: Vec<&String> = found.as_object().unwrap().keys().collect();
                assert_eq!(keys[keys.len() - 2..], ["answer", "new_tokens"]);
            }
        }
        seen.push(expected);
    }
    assert!(
        seen[0] != seen[1] && seen[0] != seen[2],
        "the adapters change nothing"
    );
}

#[test]
fn an_adapters_template_is_how_its_questions_are_asked() {
    let setup = Setup::new();
    let answer = |adapter: &str, row: Value, flags: &[&str]| {
        let flags = [&["--adapter", adapter, "--max-new-tokens", "8"][..], flags].concat();
        let ended = setup.generate(&[row], &flags);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        (ids(&parse(&ended.stdout)[0]), ended.stderr)
    };
    let adapter = |template: &str| {
        let folder = setup.adapter("adapter_lora_qkv", Some(template));
        folder.to_str().unwrap().to_owned()
    };
    let alpaca = adapter("source_prefix = \"P \"\n[template]\nkind = \"alpaca\"\n");
    let pair = adapter("[template]\nkind = \"prompt_response\"\nround_for_empty_history = true\n");
    let plain = adapter("[template]\nkind = \"plain_text\"\n");
    let bare = setup
        .adapter("adapter_lora_qkv", None)
        .to_str()
        .unwrap()
        .to_owned();
    let expected =
        |text: &str| answer(&bare, json!({ "input_ids": setup.prompt_ids(text) }), &[]).0;

    let question = || json!({ "prompt": "hi" });
    let instruction = || json!({ "instruction": "hi" });
    let turns = || json!({ "prompt": "hi", "history": [["a", "b"]] });
    let as_instruction = "Instruction: hi\nAnswer: ";
    let in_rounds = "[Round 0]\n问：a\n答：b\n[Round 1]\n问：hi\n答：";
    for (adapter, row, flags, asked, warning) in [
        (
            &alpaca,
            question(),
            &[][..],
            format!("P {as_instruction}"),
            "",
        ),
        (
            &alpaca,
            instruction(),
            &[],
            format!("P {as_instruction}"),
            "",
        ),
        (
            &alpaca,
            turns(),
            &[],
            format!("P {in_rounds}"),
            "have earlier turns",
        ),
        (
            &pair,
            question(),
            &[],
            "[Round 0]\n问：hi\n答：".to_owned(),
            "",
        ),
        (
            &pair,
            instruction(),
            &[],
            as_instruction.to_owned(),
            "are instructions",
        ),
        (
            &bare,
            question(),
            &["--template", "alpaca"],
            as_instruction.to_owned(),
            "",
        ),
        (&bare, instruction(), &[], as_instruction.to_owned(), ""),
        (
            &pair,
            question(),
            &["--template", "alpaca"],
            as_instruction.to_owned(),
            "training used the template prompt_response",
        ),
    ] {
        let (found, told) = answer(adapter, row.clone(), flags);
        assert_eq!(found, expected(&asked), "{adapter} {row} {flags:?}");
        match warning {
            "" => assert_eq!(told, "", "{row} {flags:?}"),
            _ => assert!(
                told.starts_with("warning: ") && told.contains(warning),
                "{told}"
            ),
        }
    }
    // Plain text is continued, not answered.
    let tokenizer = setup.tokenizer();
    let text_ids = tokenizer.encode("hi there");
    let input_ids = [&[191, 194][..], &text_ids].concat();
    let (expected, _) = answer(&bare, json!({ "input_ids": input_ids }), &[]);
    for column in ["prompt", "content", "text"] {
        let (found, told) = answer(&plain, json!({ column: "hi there" }), &[]);
        assert_eq!((found, told.as_str()), (expected.clone(), ""));
    }
}

#[test]
fn ids_and_text_can_stand_in_one_file() {
    let setup = Setup::new();
    let by_ids = json!({ "input_ids": setup.prompt_ids("hi") });
    let rows = [by_ids.clone(), json!({ "prompt": "hi" }), by_ids];
    let found = setup.answers(&rows, &["--max-new-tokens", "6"]);
    assert_eq!(ids(&found[0]), ids(&found[1]));
    assert_eq!(ids(&found[0]), ids(&found[2]));
    assert!(found[0].get("answer").is_none() && found[1].get("answer").is_some());
}
