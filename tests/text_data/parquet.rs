//! Parquet in every compression, page version and encoding, and files that are broken; the files were
//! written by make.py beside them.

use super::*;
use mp_train::data::template::{Messages, ShareGpt};

fn table(name: &str) -> PathBuf {
    stored("parquet").join(format!("{name}.parquet"))
}

fn messages() -> Template {
    Template::Messages(Messages::default())
}

/// The text of rows that are conversations, roles and all.
fn conversations(rows: &[TextRow]) -> Vec<(usize, Vec<(String, String)>)> {
    let row = |row: &TextRow| match &row.text {
        RowText::Conversation(conversation) => {
            let messages = conversation.messages.iter();
            let texts = messages.map(|m| (m.role.to_string(), m.content.clone()));
            (row.line, texts.collect())
        }
        RowText::Document { .. } => panic!("a document"),
    };
    rows.iter().map(row).collect()
}

#[test]
fn pairs_with_past_turns() {
    let (rows, report) = read(&[table("turns")], &skipping(pairs()));
    let found: Vec<_> = rows.iter().map(|row| row.line).zip(texts(&rows)).collect();
    let long = format!(
        "[Round 0]\n问：x\n答：\n[Round 1]\n问：{}\n答：",
        "long ".repeat(300)
    );
    let expected = [
        (
            1,
            "[Round 0]\n问：q\n答：a\n[Round 1]\n问：问\n答：答\n[Round 2]\n问：你好\n答：",
            "你好！",
        ),
        (2, "bare", "query"),
        (4, "2024", "3.5"),
        (5, long.as_str(), "answer"),
    ];
    let expected = expected.map(|(row, q, a)| (row, (q.to_owned(), a.to_owned())));
    assert_eq!(found, expected);
    assert_eq!(report.bad.count(), 1);
    let example = &report.bad.examples()[0];
    assert!(
        example.ends_with("turns.parquet, row 3: column `prompt` is empty"),
        "{example}"
    );
}

#[test]
fn numbers_are_text_as_in_json() {
    let template = Template::PromptResponse(PromptResponse {
        response: "prompt".to_owned(),
        prompt: "response".to_owned(),
        history: String::new(),
        ..PromptResponse::default()
    });
    let (rows, report) = read(&[table("turns_numbers")], &skipping(template));
    let pair = |q: &str, a: &str| (q.to_owned(), a.to_owned());
    assert_eq!(texts(&rows), [pair("0.5", "1"), pair("3.0", "-2")]);
    assert_eq!(report.bad.count(), 1);
    let (rows, _) = read(&[table("unsigned")], &settings(pairs()));
    let expected = [pair("18446744073709551615", "1.25"), pair("7", "0.1")];
    assert_eq!(texts(&rows), expected);
    let template = Template::PlainText(PlainText {
        columns: vec!["history".to_owned()],
        ..PlainText::default()
    });
    let (rows, _) = read(&[table("turns_numbers")], &skipping(template));
    assert_eq!(texts(&rows).len(), 2);
    assert_eq!(texts(&rows)[0].1, "true");
}

#[test]
fn conversations_are_the_same_however_they_are_stored() {
    let (rows, report) = read(&[table("chats")], &skipping(messages()));
    let found = conversations(&rows);
    let places: Vec<_> = found.iter().map(|(row, _)| *row).collect();
    assert_eq!(places, [1, 2, 3, 6, 7]);
    assert_eq!((report.bad.count(), report.unanswered), (2, 1));
    let message = |role: &str, text: &str| (role.to_owned(), text.to_owned());
    assert_eq!(
        found[1].1,
        [
            message("user", "\"quoted\" \\ 你😀\n"),
            message("assistant", "tab\there")
        ]
    );
    assert_eq!(found[0].1[0], message("system", "Be brief."));
    assert_eq!(found[3].1.len(), 40);
    assert_eq!(found[3].1[39], message("assistant", "answer 19"));
    for other in ["none", "gzip", "zstd", "lz4", "groups", "pages", "delta"] {
        let (rows, _) = read(&[table(&format!("chats_{other}"))], &skipping(messages()));
        assert_eq!(conversations(&rows), found, "{other}");
    }
    let share = Template::ShareGpt(ShareGpt::default());
    let (rows, _) = read(&[table("sharegpt")], &skipping(share));
    let share = conversations(&rows);
    assert_eq!(share[1].1[0], message("system", "Be kind."));
    assert_eq!(share[1].1[1..], found[1].1);
    assert_eq!(
        (share[0].clone(), &share[2..]),
        (found[0].clone(), &found[2..])
    );
}

#[test]
fn a_folder_may_hold_parquet_beside_other_files() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(table("turns"), folder.path().join("b.parquet")).unwrap();
    fs::copy(table("empty"), folder.path().join("c.PARQUET")).unwrap();
    fs::write(
        folder.path().join("a.jsonl"),
        "{\"prompt\": \"p\", \"response\": \"r\"}",
    )
    .unwrap();
    let error = first_error(&[folder.path().to_owned()], &skipping(pairs())).to_string();
    assert!(
        error.ends_with(
            "c.PARQUET: no column `prompt`, `response`; the columns are `messages`, `id`: rows like \
             these are read with template = \"messages\""
        ),
        "{error}"
    );
    fs::remove_file(folder.path().join("c.PARQUET")).unwrap();
    let (rows, _) = read(&[folder.path().to_owned()], &skipping(pairs()));
    assert_eq!(rows.len(), 5);
    let (_, report) = {
        let mut rows = TextRows::open(&[table("empty")], &settings(messages())).unwrap();
        assert!(rows.next().unwrap().is_err());
        assert!(rows.next().is_none());
        ((), rows.report().clone())
    };
    assert_eq!(report.empty_files, [table("empty")]);
}

#[test]
fn what_is_not_read_is_refused_by_name() {
    let error = |name: &str, template| {
        let error = first_error(&[table(name)], &skipping(template)).to_string();
        let folder = format!("{}/", stored("parquet").display());
        error.replace(&folder, "")
    };
    assert_eq!(
        error("chats_brotli", messages()),
        "chats_brotli.parquet, row 1: Parquet: it is damaged (Parquet error: it is compressed with \
         BROTLI(BrotliLevel(1)); write it again with snappy, zstd, gzip or lz4_raw)"
    );
    assert_eq!(
        error("chats_prefixes", messages()),
        "chats_prefixes.parquet, row 1: Parquet: it is damaged (Parquet error: a column has the \
         encoding 7 (DELTA_BYTE_ARRAY), which is not read; write it again without choosing an encoding)"
    );
    let dates = error("dates", pairs());
    assert!(
        dates.starts_with("dates.parquet: Parquet: column `prompt` holds values of"),
        "{dates}"
    );
    let (rows, report) = read(&[table("binary")], &skipping(pairs()));
    assert_eq!((rows.len(), report.bad.count()), (1, 1));
    assert!(report.bad.examples()[0].contains("row 2: column `prompt` is not UTF-8"));

    let bytes = fs::read(table("turns")).unwrap();
    for (name, bytes, told) in [
        (
            "a.jsonl",
            &bytes[..],
            "a.jsonl: a Parquet file by its contents; name it .parquet",
        ),
        (
            "a.parquet",
            b"{}",
            "a.parquet: named .parquet, but not Parquet as it is written",
        ),
        (
            "a.parquet",
            &gzip(&bytes)[..],
            "a.parquet: named .parquet, but not Parquet as it is",
        ),
        (
            "a.parquet.gz",
            &gzip(&bytes)[..],
            "a.parquet.gz: named .parquet, but not Parquet as it",
        ),
        ("a.parquet", b"PAR1", "a.parquet: Parquet: it is too short"),
        (
            "a.parquet",
            &bytes[..900],
            "a.parquet: Parquet: it does not end as a Parquet file does",
        ),
        (
            "a.parquet",
            b"PAR1....\xff\xff\xff\xffPAR1",
            "a.parquet: Parquet: its footer is said to",
        ),
        (
            "a.parquet",
            b"PAR1....\0\0\0\0PARE",
            "a.parquet: Parquet: it is encrypted",
        ),
        (
            "a.parquet",
            b"PAR1\x29\xfc\x01\0\0\0PAR1",
            "a.parquet: Parquet: its footer is",
        ),
    ] {
        let found = message(name, bytes, &settings(pairs()));
        assert!(found.starts_with(told), "{found}");
    }
}

#[test]
fn rows_longer_than_the_limit_are_bad_rows() {
    let settings = TextSettings {
        max_row_bytes: 600,
        ..skipping(messages())
    };
    let (rows, report) = read(&[table("chats")], &settings);
    assert_eq!((rows.len(), report.bad.count()), (4, 3));
    let settings = TextSettings {
        max_row_bytes: 100,
        ..skipping(pairs())
    };
    let (rows, report) = read(&[table("turns")], &settings);
    assert_eq!((rows.len(), report.bad.count()), (3, 2));
    assert!(report.bad.examples()[1].contains("row 5: the row is longer than 100 bytes"));
}

#[test]
fn a_page_of_hundreds_of_megabytes_is_refused_before_it_is_decompressed() {
    let found = first_error(&[table("bomb")], &skipping(pairs())).to_string();
    assert!(
        found.ends_with(
            "a page has 314572810 bytes; at most 268435456 are read: write it again with smaller \
             pages)"
        ),
        "{found}"
    );
}

#[test]
fn a_schema_without_end_is_refused_before_it_is_followed() {
    // FileMetaData: version 1, then a schema of many groups with one child each.
    let groups = 9_000_usize;
    let mut footer = vec![0x15, 2, 0x19, 0xfc];
    let mut count = groups;
    while count >= 0x80 {
        footer.push(count as u8 | 0x80);
        count >>= 7;
    }
    footer.push(count as u8);
    for _ in 0..groups {
        // Field 4, the name "a"; field 5, one child; the end of the element.
        footer.extend([0x48, 1, b'a', 0x15, 2, 0]);
    }
    footer.push(0);
    let length = (footer.len() as u32).to_le_bytes();
    let bytes = [&b"PAR1"[..], &footer, &length, b"PAR1"].concat();
    let found = message("a.parquet", &bytes, &settings(pairs()));
    assert_eq!(
        found,
        "a.parquet: Parquet: its footer is damaged (columns nested too deep)"
    );
}

#[test]
fn damaged_tables_never_panic_or_hang_and_need_little_memory() {
    let mut seed = 12_345_u64;
    let mut random = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as usize % below
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let share = Template::ShareGpt(ShareGpt::default());
    let mut broken = 0;
    for (name, template) in [
        ("turns", pairs()),
        ("turns_numbers", pairs()),
        ("chats", messages()),
        ("chats_none", messages()),
        ("chats_gzip", messages()),
        ("chats_zstd", messages()),
        ("chats_lz4", messages()),
        ("chats_groups", messages()),
        ("chats_pages", messages()),
        ("chats_delta", messages()),
        ("sharegpt", share),
    ] {
        let whole = fs::read(table(name)).unwrap();
        for round in 0..300 {
            let mut bytes = whole.clone();
            match round % 3 {
                0 => bytes.truncate(random(whole.len())),
                _ => {
                    for _ in 0..1 + random(4) {
                        let at = random(whole.len());
                        bytes[at] = match round % 2 {
                            0 => random(256) as u8,
                            _ => bytes[at] ^ 1 << random(8),
                        };
                    }
                }
            }
            fs::write(&path, &bytes).unwrap();
            let rows = TextRows::open(std::slice::from_ref(&path), &skipping(template.clone()));
            let Ok(rows) = rows else {
                continue;
            };
            broken += rows.take(10_000).filter(Result::is_err).count();
        }
    }
    assert!(broken > 500, "{broken}");
}
