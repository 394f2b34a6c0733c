//! Conversations in every form and for every generation. `tests/data/text/conversations.json` was
//! written by conversations.py beside it.

use super::*;
use mp_train::data::byte_level::Tokens;
use mp_train::data::template::{Message, Messages, ShareGpt, TrainOnTurns};
use mp_train::data::tokenizer::ChatRole;

fn chatglm2() -> GlmTokenizer {
    let bytes = fs::read(tests_folder("tokenizer/v2.model")).unwrap();
    GlmTokenizer::chatglm2(ModelProto::parse(&bytes).unwrap()).unwrap()
}

fn chatglm3() -> GlmTokenizer {
    let bytes = fs::read(tests_folder("tokenizer/v2.model")).unwrap();
    GlmTokenizer::chatglm3(ModelProto::parse(&bytes).unwrap()).unwrap()
}

fn glm4() -> GlmTokenizer {
    let bytes = fs::read(tests_folder("tokenizer/glm4/tokenizer.model")).unwrap();
    GlmTokenizer::glm4(Tokens::from_ranks(&bytes).unwrap()).unwrap()
}

fn generations() -> Vec<(&'static str, GlmTokenizer)> {
    vec![
        ("chatglm", tokenizer()),
        ("chatglm2", chatglm2()),
        ("chatglm3", chatglm3()),
        ("glm4", glm4()),
    ]
}

fn messages() -> Template {
    Template::Messages(Messages::default())
}

fn sharegpt() -> Template {
    Template::ShareGpt(ShareGpt::default())
}

fn max_length(max_length: usize) -> Template {
    Template::Messages(Messages {
        max_length,
        ..Messages::default()
    })
}

fn training_on(turns: TrainOnTurns, template: Template) -> TextSettings {
    let mut settings = skipping(template);
    settings.template.train_on_turns = turns;
    settings
}

fn text(message: (ChatRole, &str)) -> Message {
    Message::new(message.0, message.1)
}

/// `turns` questions and answers, each of a few words.
fn conversation(system: &str, turns: usize) -> Conversation {
    let mut messages = Vec::new();
    if !system.is_empty() {
        messages.push(text((ChatRole::System, system)));
    }
    for turn in 0..turns {
        messages.push(text((ChatRole::User, &format!("question {turn}"))));
        messages.push(text((ChatRole::Assistant, &format!("answer {turn}"))));
    }
    Conversation::checked(messages).unwrap()
}

#[test]
fn every_form_is_written_as_each_generation_is_trained() {
    let bytes = fs::read(stored("conversations.json")).unwrap();
    let expected: HashMap<String, Vec<Ids>> = serde_json::from_slice(&bytes).unwrap();
    for (name, tokenizer) in generations() {
        for (form, file, template) in [
            ("messages", "chats.jsonl", messages()),
            ("sharegpt", "sharegpt.json", sharegpt()),
        ] {
            for (turns, trained) in [("last", TrainOnTurns::Last), ("all", TrainOnTurns::All)] {
                let settings = training_on(trained, template.clone());
                let (rows, _) = read(&[stored(file)], &settings);
                assert_eq!(rows.len(), 4);
                let encoder = RowEncoder::new(&tokenizer, &settings.template).unwrap();
                let encoded = rows.iter().filter_map(|row| encoder.encode(&row.text).ok());
                let encoded: Vec<_> = encoded.flat_map(|encoded| encoded.rows).collect();
                let case = format!("{name} {form} {turns}");
                assert_eq!(ids(&encoded), expected[&case], "{case}");
                let without_rules =
                    |row: &RawRow| row.context_length.is_none() && row.position_ids.is_none();
                assert!(encoded.iter().all(without_rules));
                if name == "chatglm" {
                    check_usable(&encoded);
                }
            }
        }
    }
}

#[test]
fn tools_need_a_generation_that_has_them() {
    let settings = training_on(TrainOnTurns::Last, messages());
    let (rows, _) = read(&[stored("chats.jsonl")], &settings);
    for (name, tokenizer) in &generations()[..2] {
        let encoder = RowEncoder::new(tokenizer, &settings.template).unwrap();
        let error = encoder.encode(&rows[3].text).unwrap_err().to_string();
        let name = if *name == "chatglm" {
            "ChatGLM-6B"
        } else {
            "ChatGLM2"
        };
        let told = format!("message 3 calls a tool, which {name} has no form for");
        assert_eq!(error, told);
    }
}

#[test]
fn every_turn_of_a_history_becomes_a_row_that_is_the_same_as_if_it_were_the_last() {
    let (rows, _) = read(&[stored("turns.jsonl")], &settings(pairs()));
    let tokenizer = tokenizer();
    let mut settings = settings(pairs()).template;
    let last = RowEncoder::new(&tokenizer, &settings).unwrap();
    let all = TemplateSettings {
        train_on_turns: TrainOnTurns::All,
        ..settings.clone()
    };
    let all = RowEncoder::new(&tokenizer, &all).unwrap();
    let mut most = 0;
    for row in &rows {
        let RowText::Conversation(conversation) = &row.text else {
            panic!("a document");
        };
        let found = all.encode(&row.text).unwrap().rows;
        most = most.max(found.len());
        let mut expected = Vec::new();
        for end in (2..=conversation.messages.len()).step_by(2) {
            let messages = conversation.messages[..end].to_vec();
            // Past turns without an answer teach nothing.
            if messages[end - 1].content.is_empty() {
                continue;
            }
            let part = Conversation::checked(messages).unwrap();
            expected.extend(last.encode(&RowText::Conversation(part)).unwrap().rows);
        }
        assert_eq!(found, expected);
    }
    assert_eq!(most, 3);

    // A round before a first question, where it is asked for.
    settings.template = Template::PromptResponse(PromptResponse {
        round_for_empty_history: true,
        ..PromptResponse::default()
    });
    let encoder = RowEncoder::new(&tokenizer, &settings).unwrap();
    let pair = RowText::Conversation(Conversation::pair("q", "a"));
    let prompt = tokenizer.encode("[Round 0]\n问：q\n答：");
    let row = &encoder.encode(&pair).unwrap().rows[0];
    assert_eq!(
        row.input_ids.len(),
        prompt.len() + 3 + tokenizer.encode("a").len()
    );
}

#[test]
fn conversations_that_are_too_long_lose_their_oldest_turns_and_then_text() {
    let system = "Be brief.";
    for (name, tokenizer) in generations() {
        let whole = TemplateSettings {
            template: max_length(100_000),
            ..TemplateSettings::default()
        };
        let encoder = RowEncoder::new(&tokenizer, &whole).unwrap();
        let length = |conversation: &Conversation| {
            let text = RowText::Conversation(conversation.clone());
            let encoded = encoder.encode(&text).unwrap();
            assert_eq!(encoded.cuts, Cuts::default());
            encoded.rows[0].clone()
        };
        let long = conversation(system, 9);
        let full = length(&long).input_ids.len();
        // Every length from one that takes all down to the shortest that is allowed.
        let mut turns_left = 9;
        for most in (1..=full).rev() {
            let short = TemplateSettings {
                template: max_length(most),
                ..TemplateSettings::default()
            };
            let encoder = match RowEncoder::new(&tokenizer, &short) {
                Ok(encoder) => encoder,
                Err(error) => {
                    let least = format!("max_length is {most}; it must be at least {}", most + 1);
                    assert_eq!(error.to_string(), least);
                    assert!((4..40).contains(&most), "{name} {most}");
                    break;
                }
            };
            let encoded = match encoder.encode(&RowText::Conversation(long.clone())) {
                Ok(encoded) => encoded,
                Err(error) => {
                    // The system message is kept, and may leave no room.
                    assert!(error.to_string().contains("there is no room"), "{error}");
                    assert!(most < 40, "{name} {most}");
                    continue;
                }
            };
            let row = &encoded.rows[0];
            assert!(row.input_ids.len() <= most, "{name} {most}");
            assert_eq!(
                encoded.cuts.turns,
                usize::from(most < full),
                "{name} {most}"
            );
            if encoded.cuts.prompts + encoded.cuts.answers > 0 {
                // Only the last turn is left, and it fills its place.
                turns_left = 1;
                let targets = row.labels.iter().filter(|&&label| label != -100);
                assert!(targets.count() >= 2, "{name} {most}");
                continue;
            }
            // Nothing else changed: it is the row of fewer turns.
            let kept = (1..=turns_left).rev().find(|&kept| {
                let mut messages = long.messages.clone();
                messages.drain(1..messages.len() - 2 * kept);
                let part = Conversation::checked(messages).unwrap();
                length(&part) == *row
            });
            turns_left = kept.unwrap_or_else(|| panic!("{name} {most}"));
        }
        assert_eq!(turns_left, 1, "{name}");
    }
}

#[test]
fn a_cut_question_keeps_the_words_that_ask_for_the_answer() {
    let question = "long ".repeat(400);
    let pair = RowText::Conversation(Conversation::pair(&question, "the answer"));
    for (name, tokenizer) in generations() {
        let settings = TemplateSettings {
            template: max_length(60),
            source_prefix: "In short: ".to_owned(),
            ..TemplateSettings::default()
        };
        let encoder = RowEncoder::new(&tokenizer, &settings).unwrap();
        let encoded = encoder.encode(&pair).unwrap();
        assert_eq!(
            (
                encoded.cuts.prompts,
                encoded.cuts.answers,
                encoded.cuts.turns
            ),
            (1, 0, 0)
        );
        let row = &encoded.rows[0];
        assert!((50..=60).contains(&row.input_ids.len()), "{name}");
        let ids: Vec<u32> = row.input_ids.iter().map(|&id| id as u32).collect();
        let text = tokenizer.decode(&ids).unwrap();
        assert!(text.contains("In short: "), "{name}: {text}");
        let ending = match name {
            "chatglm" => "the answer",
            "chatglm2" => "\n\n答：the answer",
            _ => "the answer",
        };
        let text = text.replace("答： ", "答：");
        assert!(text.ends_with(ending), "{name}: {text}");
    }
}

#[test]
fn pairs_have_a_limit_for_the_prompt_and_one_for_the_answer() {
    let pair = RowText::Conversation(Conversation::pair("a b ".repeat(100), "c d ".repeat(100)));
    for (name, tokenizer) in generations() {
        let settings = TemplateSettings {
            template: pairs(),
            max_source_length: 20,
            max_target_length: 12,
            ..TemplateSettings::default()
        };
        let encoder = RowEncoder::new(&tokenizer, &settings).unwrap();
        let encoded = encoder.encode(&pair).unwrap();
        assert_eq!(
            (encoded.cuts.prompts, encoded.cuts.answers),
            (1, 1),
            "{name}"
        );
        let row = &encoded.rows[0];
        let targets = row.labels.iter().filter(|&&label| label != -100).count();
        let (before, after) = (row.labels.len() - targets, targets);
        // ChatGLM2 as THUDM's code: what closes the answer comes on top.
        let expected = match name {
            "chatglm" => (20, 12),
            "chatglm2" => (20, 13),
            _ => (20, 12),
        };
        assert_eq!((before, after), expected, "{name}");
        for (source, target, told) in [
            (1, 12, "max_source_length is 1"),
            (20, 0, "max_target_length is 0"),
        ] {
            let settings = TemplateSettings {
                max_source_length: source,
                max_target_length: target,
                ..settings.clone()
            };
            let error = RowEncoder::new(&tokenizer, &settings).unwrap_err();
            assert!(error.to_string().starts_with(told), "{name}: {error}");
        }
    }
}

#[test]
fn documents_of_later_generations_are_closed_by_their_own_id() {
    let settings = settings(plain(Documents::File));
    let document = RowText::Document {
        text: "word ".repeat(60),
        begins: true,
        ends: true,
    };
    // GLM-4's is its padding too, and counts all the same.
    assert_eq!(glm4().special().pad, 2000);
    for (tokenizer, gmask, sop, end) in [
        (chatglm2(), 2001, 2003, 2),
        (chatglm3(), 2001, 2003, 2),
        (glm4(), 2002, 2004, 2000),
    ] {
        let encoder = RowEncoder::new(&tokenizer, &settings.template).unwrap();
        let rows = encoder.encode(&document).unwrap().rows;
        assert!(rows.len() > 1);
        let text = tokenizer.encode(&"word ".repeat(60));
        let mut found = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            assert_eq!(row.input_ids[..2], [gmask, sop]);
            assert_eq!(row.labels[..2], [-100, -100]);
            assert_eq!(row.labels[2..], row.input_ids[2..]);
            assert!(row.input_ids.len() <= 32);
            assert_eq!(row.input_ids.last() == Some(&end), index + 1 == rows.len());
            found.extend(row.input_ids[2..].iter().map(|&id| id as u32));
        }
        assert_eq!(found.pop(), Some(end as u32));
        assert_eq!(found, text);
    }
}

#[test]
fn keys_and_columns_may_have_other_names() {
    let row = r#"{"chat": [{"who": "human", "says": "q"}, {"who": "assistant", "says": "a"}]}"#;
    let (_folder, path) = file("rows.jsonl", row.as_bytes());
    let keys = ["chat", "who", "says"].map(str::to_owned);
    let [column, role, content] = keys.clone();
    let openai = Template::Messages(Messages {
        messages: column,
        role,
        content,
        ..Messages::default()
    });
    let [conversations, from, value] = keys;
    let share = Template::ShareGpt(ShareGpt {
        conversations,
        from,
        value,
        ..ShareGpt::default()
    });
    for template in [openai, share] {
        let (rows, _) = read(std::slice::from_ref(&path), &settings(template));
        assert_eq!(texts(&rows), [("q".to_owned(), "a".to_owned())]);
    }
    // In a table the list is JSON text.
    let table = "messages\n\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"q\"\"}, {\"\"role\"\": \
                 \"\"assistant\"\", \"\"content\"\": \"\"a\"\"}]\"\n";
    let (_folder, path) = file("rows.csv", table.as_bytes());
    let (rows, _) = read(&[path], &settings(messages()));
    assert_eq!(texts(&rows), [("q".to_owned(), "a".to_owned())]);
}

#[test]
fn what_nobody_answers_and_tools_that_are_not_shown_are_counted() {
    let rows = concat!(
        r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},"#,
        r#" {"role": "user", "content": "more?"}], "tools": [{"name": "f"}]}"#,
        "\n",
        r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],"#,
        r#" "tools": []}"#,
    );
    let (_folder, path) = file("rows.jsonl", rows.as_bytes());
    let (rows, report) = read(&[path], &settings(messages()));
    assert_eq!(texts(&rows)[0], texts(&rows)[1]);
    assert_eq!((report.unanswered, report.undefined_tools), (1, 1));
    let notices = report.notices().join("\n");
    for words in [
        "1 conversations end with",
        "1 conversations have a column `tools`",
    ] {
        assert!(notices.contains(words), "{notices}");
    }
    let report = RowReport {
        cuts: Cuts {
            prompts: 3,
            answers: 4,
            turns: 5,
        },
        ..RowReport::default()
    };
    let notices = report.notices().join("\n");
    for words in [
        "3 prompts are too long",
        "4 answers are too long",
        "5 conversations are too long",
    ] {
        assert!(notices.contains(words), "{notices}");
    }
}

#[test]
fn messages_that_cannot_be_used_are_named_with_what_to_do() {
    let user = r#"{"role": "user", "content": "q"}"#;
    let assistant = r#"{"role": "assistant", "content": "a"}"#;
    let cases = [
        ("[]".to_owned(), "column `messages` is empty"),
        ("null".to_owned(), "column `messages` is empty"),
        (
            "{}".to_owned(),
            "column `messages` is no list of messages: invalid type: map, expected a sequence",
        ),
        (
            "[1]".to_owned(),
            "column `messages`, message 1: a message must be an object, found a number",
        ),
        (
            r#"[{"from": "human", "value": "q"}]"#.to_owned(),
            "column `messages`, message 1: no key `role`; the keys are `from`, `value`: messages like \
             this are read with template = \"sharegpt\"",
        ),
        (
            r#"[{"role": "user", "text": "q"}]"#.to_owned(),
            "column `messages`, message 1: no key `content`; the keys are `role`, `text`: set role_key \
             and content_key accordingly",
        ),
        (
            format!(r#"[{user}, {{"role": "narrator", "content": "x"}}]"#),
            "column `messages`, message 2: unknown role `narrator`; known are `system`, `developer`, \
             `user`, `human`, `assistant`, `gpt`, `chatgpt`, `model`, `bot`, `function_call`, \
             `tool_call`, `observation`, `tool`, `function`, `function_response`",
        ),
        (
            r#"[{"role": 1, "content": "q"}]"#.to_owned(),
            "column `messages`, message 1: `role` holds a number, expected text",
        ),
        (
            format!(r#"[{user}, {{"role": "assistant", "content": " \n"}}]"#),
            "column `messages`, message 2: `content` is empty",
        ),
        (
            format!(r#"[{user}, {{"role": "assistant", "content": {{"a": 1}}}}]"#),
            "column `messages`, message 2: `content` holds an object, expected text",
        ),
        (
            r#"[{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}]}]"#
                .to_owned(),
            "column `messages`, message 1: it has a part of type `image_url`; only text can be trained on",
        ),
        (
            format!(r#"[{user}, {{"role": "assistant", "content": "a", "weight": 0.5}}]"#),
            "column `messages`, message 2: `weight` is 0.5; it may be 0 (no loss on this message) or 1",
        ),
        (
            format!(r#"[{user}, {{"role": "assistant", "content": null, "tool_calls": [{{}}]}}]"#),
            "column `messages`, message 2: a call of a tool must be an object with a `name` and \
             `arguments`",
        ),
        (
            format!(r#"[{user}, {{"role": "function_call", "content": "f(x)"}}]"#),
            "column `messages`, message 2: a call of a tool must be an object with a `name` and \
             `arguments`",
        ),
        (
            format!("[{user}, {user}, {assistant}]"),
            "column `messages`, message 2: it is the user's where the assistant's is due; questions and \
             answers must take turns, and a system message comes first",
        ),
        (
            format!("[{assistant}]"),
            "column `messages`, message 1: it is the assistant's where the user's is due; questions and \
             answers must take turns, and a system message comes first",
        ),
        (
            format!(r#"[{user}, {assistant}, {{"role": "system", "content": "x"}}]"#),
            "column `messages`, message 3: it is the system's where the user's is due; questions and \
             answers must take turns, and a system message comes first",
        ),
        (
            format!("[{user}]"),
            "column `messages`, message 1: it is the last one, and the assistant has said nothing: there \
             is nothing to learn",
        ),
    ];
    for (list, told) in cases {
        let row = format!("{{\"messages\": {list}}}\n");
        let found = message("rows.jsonl", row.as_bytes(), &settings(messages()));
        assert_eq!(found, format!("rows.jsonl:1: {told}"), "{list}");
    }
}

#[test]
fn rows_of_another_template_are_told_by_their_columns() {
    let told =
        |row: &str, template: Template| message("a.jsonl", row.as_bytes(), &settings(template));
    let share = r#"{"conversations": [], "id": 1}"#;
    assert_eq!(
        told(share, messages()),
        "a.jsonl:1: no column `messages`; the columns are `conversations`, `id`: rows like these are \
         read with template = \"sharegpt\""
    );
    for (row, template, name) in [
        (r#"{"messages": []}"#, sharegpt(), "messages"),
        (r#"{"messages": []}"#, alpaca(), "messages"),
        (r#"{"instruction": "a", "output": "b"}"#, pairs(), "alpaca"),
        (
            r#"{"prompt": "a", "response": "b"}"#,
            sharegpt(),
            "prompt_response",
        ),
    ] {
        let found = told(row, template);
        let expected = format!("rows like these are read with template = \"{name}\"");
        assert!(found.ends_with(&expected), "{found}");
    }
    let table = message("a.csv", b"prompt,response\nq,a\n", &settings(alpaca()));
    assert!(table.ends_with("template = \"prompt_response\""), "{table}");
    let unknown = told(r#"{"q": "a"}"#, messages());
    assert!(unknown.ends_with("set the template's column names accordingly"));
}

#[test]
fn a_conversation_of_which_nothing_is_trained_on_is_a_bad_row() {
    let row = concat!(
        r#"{"messages": [{"role": "user", "content": "q"},"#,
        r#" {"role": "assistant", "content": "a", "weight": 0}]}"#
    );
    let (_folder, path) = file("rows.jsonl", row.as_bytes());
    let settings = training_on(TrainOnTurns::All, messages());
    let (rows, _) = read(&[path], &settings);
    for (name, tokenizer) in generations() {
        let encoder = RowEncoder::new(&tokenizer, &settings.template).unwrap();
        let error = encoder.encode(&rows[0].text).unwrap_err();
        assert_eq!(error, TextProblem::NotTrained, "{name}");
    }
}
