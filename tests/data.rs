//! Reading rows, batching them, and the order in which they are seen.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;

use mp_train::config::model::ModelConfig;
use mp_train::config::run::Quantization;
use mp_train::data::batch::{MicroBatch, Sequence, Target};
use mp_train::data::pretokenised::{read_prompts, read_rows};
use mp_train::data::rows::{PromptRow, RawRow, Row, Rows};
use mp_train::data::sampler::{Batching, MicroBatchSize, Order, Sampler, SamplerState};
use mp_train::data::{DataError, RowProblem};
use mp_train::random;
use tempfile::NamedTempFile;

fn model() -> ModelConfig {
    ModelConfig {
        vocab_size: 200,
        hidden_size: 64,
        inner_hidden_size: 256,
        architecture: mp_train::config::architecture::Architecture::CHATGLM,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 16,
        num_layers: 4,
        norm_epsilon: 1e-5,
        max_sequence_length: 20,
        context_ids: Some(mp_train::config::model::ContextIds {
            bos_token_id: 194,
            mask_token_id: 190,
            gmask_token_id: 191,
        }),
        eos_token_ids: vec![195],
        pad_token_id: Some(3),
        tie_word_embeddings: false,
        pre_seq_len: None,
        prefix_projection: false,
        quantization: Quantization::None,
    }
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn read(text: &str) -> Rows {
    read_rows(file(text.as_bytes()).path(), &model()).unwrap()
}

fn positions(row: Row<'_>) -> Vec<(u32, u32)> {
    (0..row.input_ids.len())
        .map(|t| row.positions.at(t))
        .collect()
}

const GOOD: &str =
    r#"{"input_ids": [5, 6, 191, 194, 7, 195], "labels": [-100, -100, -100, 194, 7, 195]}"#;

#[test]
fn a_row_becomes_tokens_positions_and_targets() {
    let rows = read(GOOD);
    let row = rows.get(0).unwrap();
    assert_eq!(row.input_ids, [5, 6, 191, 194, 7, 195]);
    assert_eq!(row.context_length, 3);
    assert_eq!(
        positions(row),
        [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    );
    assert_eq!(
        row.targets().collect::<Vec<_>>(),
        [(2, 194), (3, 7), (4, 195)]
    );
    assert_eq!((rows.len(), rows.tokens(), rows.targets()), (1, 6, 3));
    assert_eq!(rows.target_share(), 0.5);
    assert!(rows.get(1).is_none());
}

/// The first [gMASK] wins over any [MASK], the first [MASK] over later ones; positions keep the
/// index of the mask token wherever it stands.
#[test]
fn the_mask_token_is_the_one_the_reference_takes() {
    let place = |ids: &str| {
        let text = format!(r#"{{"input_ids": {ids}, "labels": [-100,-100,-100,-100,1,1]}}"#);
        positions(read(&text).get(0).unwrap())[3]
    };
    assert_eq!(place("[190, 191, 191, 194, 1, 1]"), (1, 1));
    assert_eq!(place("[9, 190, 190, 194, 1, 1]"), (1, 1));
    assert_eq!(place("[190, 9, 9, 194, 1, 191]"), (5, 1));
    // The first sop counts.
    assert_eq!(place("[191, 194, 9, 194, 1, 1]"), (0, 3));
}

#[test]
fn rows_are_cut_after_the_last_target_but_not_inside_the_context() {
    let padded = read(
        r#"{"input_ids":[5,191,194,3,7,195,3,3],"labels":[-100,-100,194,-100,7,195,-100,-100]}"#,
    );
    let row = padded.get(0).unwrap();
    assert_eq!(row.input_ids, [5, 191, 194, 3, 7, 195]);
    assert_eq!(
        row.targets().collect::<Vec<_>>(),
        [(1, 194), (3, 7), (4, 195)]
    );
    assert_eq!((padded.tokens(), padded.targets()), (6, 3));

    let visible = read(
        r#"{"input_ids":[5,6,7,191,194,3],"labels":[-100,6,-100,-100,-100,-100],"context_length":4}"#,
    );
    let row = visible.get(0).unwrap();
    assert_eq!(row.input_ids, [5, 6, 7, 191]);
    assert_eq!(row.targets().collect::<Vec<_>>(), [(0, 6)]);

    // What is cut away may be longer than the model takes, but must be ids.
    let pads = [",3"; 40].concat();
    let ignored = [",-100"; 40].concat();
    let long = format!(r#"{{"input_ids":[191,194{pads}],"labels":[-100,194{ignored}]}}"#);
    assert_eq!(read(&long).tokens(), 2);
}

#[test]
fn a_label_on_the_first_token_is_no_target() {
    let rows = read(r#"{"input_ids":[191,194,7],"labels":[191,-100,7]}"#);
    assert_eq!(rows.get(0).unwrap().targets().collect::<Vec<_>>(), [(1, 7)]);
    assert_eq!(rows.targets(), 1);
}

#[test]
fn given_positions_and_context_are_taken_as_they_are() {
    let text = [
        GOOD,
        r#"{"input_ids":[1,2,3,4],"labels":[-100,-100,3,-100],"context_length":1,"position_ids":[[9,8,7,6],[1,2,3,4]]}"#,
        r#"{"input_ids":[1,194,3],"labels":[-100,-100,3],"position_ids":[[4,5,6],[0,1,0]]}"#,
    ]
    .join("\n");
    let rows = read(&text);
    let row = rows.get(1).unwrap();
    assert_eq!((row.context_length, row.input_ids.len()), (1, 3));
    assert_eq!(positions(row), [(9, 1), (8, 2), (7, 3)]);
    let row = rows.get(2).unwrap();
    assert_eq!(row.context_length, 1);
    assert_eq!(positions(row), [(4, 0), (5, 1), (6, 0)]);
}

#[test]
fn marks_carriage_returns_and_blank_ends_are_tolerated() {
    let text = format!("\u{feff}{GOOD}\r\n{GOOD}\r\n\r\n  \n\n");
    assert_eq!(read(&text).len(), 2);
    assert_eq!(read(GOOD).len(), 1);
}

/// Every way a file can be bad, on its second line after a good one: the message names file, line
/// and what to look at.
#[test]
fn bad_rows_are_named_by_file_line_and_reason() {
    let cases: &[(&[u8], &str)] = &[
        (b"{", "EOF while parsing"),
        (b"[1, 2]", "expected"),
        (br#"{"input_ids": [1]}"#, "missing field `labels`"),
        (br#"{"input_ids": [191,194,1], "label": [1]}"#, "unknown field `label`"),
        (br#"{"input_ids": [1], "input_ids": [1], "labels": [1]}"#, "duplicate field `input_ids`"),
        (br#"{"input_ids": [1.5], "labels": [1]}"#, "floating point"),
        (br#"{"input_ids": "text", "labels": [1]}"#, "expected a sequence"),
        (br#"{"input_ids": [99999999999999999999], "labels": [1]}"#, "column"),
        (br#"{"input_ids": [], "labels": []}"#, "`input_ids` is empty"),
        (br#"{"input_ids": [191,194,1], "labels": [1,1]}"#, "`labels` has 2 entries, `input_ids` has 3"),
        (br#"{"input_ids": [191,200,1], "labels": [1,1,1]}"#, "`input_ids[1]` is 200"),
        (br#"{"input_ids": [191,-1,1], "labels": [1,1,1]}"#, "`input_ids[1]` is -1"),
        (br#"{"input_ids": [191,4294967295,1], "labels": [1,1,1]}"#, "`input_ids[1]` is 4294967295"),
        (br#"{"input_ids": [191,194,1], "labels": [1,1,-101]}"#, "`labels[2]` is -101"),
        (br#"{"input_ids": [191,194,1], "labels": [1,1,200]}"#, "or -100 for no target"),
        (br#"{"input_ids": [191,194,1], "labels": [191,-100,-100]}"#, "no target"),
        (br#"{"input_ids": [191,9,1], "labels": [1,1,1]}"#, "no sop (id 194)"),
        (br#"{"input_ids": [9,194,1], "labels": [1,1,1]}"#, "neither [gMASK] (id 191) nor [MASK] (id 190)"),
        (br#"{"input_ids": [191,194,1], "labels": [1,1,1], "context_length": 4}"#, "`context_length` is 4, but the row has 3"),
        (br#"{"input_ids": [191,194,1], "labels": [1,1,1], "context_length": -1}"#, "invalid value"),
        (br#"{"input_ids": [1,194], "labels": [1,1], "position_ids": [[0],[0,1]]}"#, "`position_ids[0]` has 1 entries"),
        (br#"{"input_ids": [1,194], "labels": [1,1], "position_ids": [[0,1],[0,1,2]]}"#, "`position_ids[1]` has 3 entries"),
        (br#"{"input_ids": [1,194], "labels": [1,1], "position_ids": [[0,1]]}"#, "invalid length 1"),
        (br#"{"input_ids": [1,194], "labels": [1,1], "position_ids": [[0,1],[0,20]]}"#, "`position_ids[1][1]` is 20"),
        (br#"{"input_ids": [1,9], "labels": [1,1], "position_ids": [[0,1],[0,1]]}"#, "no sop"),
        (br#"{"input_ids": [191,194,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1], "labels": [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]}"#, "21 tokens; the model takes at most 20"),
        (b"{\"input_ids\": \"\xff\"}", "not UTF-8 at byte 15"),
        (b"\n{}", "blank line between rows"),
        (b"\xef\xbb\xbf{}", "expected value"),
    ];
    for (line, reason) in cases {
        let bytes = [GOOD.as_bytes(), b"\n", line, b"\n"].concat();
        let file = file(&bytes);
        let error = read_rows(file.path(), &model()).unwrap_err().to_string();
        let place = format!("{}:2: ", file.path().display());
        assert!(error.starts_with(&place), "{error}");
        assert!(error.contains(reason), "{error}\nshould say: {reason}");
        assert!(!error.contains("at line 1"), "{error}");
    }
}

#[test]
fn files_without_rows_or_breaks_and_no_files_are_refused() {
    for empty in ["", "\n\r\n", "\u{feff}", "\u{feff}\n"] {
        let file = file(empty.as_bytes());
        let error = read_rows(file.path(), &model()).unwrap_err();
        assert!(matches!(error, DataError::NoRows { .. }), "{error}");
    }
    let error = read_rows(Path::new("no/such/file.jsonl"), &model()).unwrap_err();
    assert!(
        error.to_string().starts_with("no/such/file.jsonl: "),
        "{error}"
    );
    let folder = tempfile::tempdir().unwrap();
    let error = read_rows(folder.path(), &model()).unwrap_err();
    assert!(matches!(error, DataError::Io { .. }), "{error}");
    let unbroken = file(&vec![b' '; (16 << 20) + 1]);
    let error = read_rows(unbroken.path(), &model()).unwrap_err();
    let too_long = matches!(
        error,
        DataError::Row {
            problem: RowProblem::LineTooLong { .. },
            ..
        }
    );
    assert!(too_long, "{error}");
}

#[test]
fn a_refused_row_leaves_nothing_behind() {
    let mut rows = Rows::default();
    let good = RawRow {
        input_ids: vec![191, 194, 7],
        labels: vec![-100, 194, 7],
        ..RawRow::default()
    };
    let mut bad = good.clone();
    bad.labels = vec![-100; 3];
    assert_eq!(rows.push(&bad, &model()), Err(RowProblem::NoTarget));
    assert!(rows.is_empty());
    rows.push(&good, &model()).unwrap();
    assert_eq!((rows.len(), rows.tokens(), rows.targets()), (1, 3, 2));
}

#[test]
fn a_micro_batch_is_flat_with_offsets() {
    let rows = read(&format!(
        "{GOOD}\n{}",
        r#"{"input_ids":[191,194,7],"labels":[-100,194,7]}"#
    ));
    let batch = MicroBatch::from_rows([1, 0, 1].map(|index| rows.get(index).unwrap()));
    assert_eq!(
        batch.input_ids,
        [191, 194, 7, 5, 6, 191, 194, 7, 195, 191, 194, 7]
    );
    assert_eq!(batch.position, [0, 0, 0, 0, 1, 2, 2, 2, 2, 0, 0, 0]);
    assert_eq!(batch.block_position, [0, 1, 2, 0, 0, 0, 1, 2, 3, 0, 1, 2]);
    let sequence = |start, len, context_length| Sequence {
        start,
        len,
        context_length,
    };
    assert_eq!(
        batch.sequences,
        [sequence(0, 3, 1), sequence(3, 6, 3), sequence(9, 3, 1)]
    );
    let target = |row, id| Target { row, id };
    let expected = [
        (0, 194),
        (1, 7),
        (5, 194),
        (6, 7),
        (7, 195),
        (9, 194),
        (10, 7),
    ];
    assert_eq!(batch.targets, expected.map(|(row, id)| target(row, id)));
    assert_eq!((batch.tokens(), batch.max_len()), (12, 6));
    assert_eq!(MicroBatch::default().max_len(), 0);
}

/// Written token by token an answer stands where it would stand if it were read as a whole.
#[test]
fn continued_positions_are_those_of_the_whole() {
    let whole = PromptRow::new(
        &RawRow {
            input_ids: vec![5, 191, 194, 8, 9, 195],
            ..RawRow::default()
        },
        &model(),
    )
    .unwrap();
    let text =
        "{\"input_ids\":[5,191,194]}\n{\"input_ids\":[190,194],\"position_ids\":[[0,0],[0,1]]}";
    let prompts = read_prompts(file(text.as_bytes()).path(), &model()).unwrap();
    let mut batch = MicroBatch::from_prompts(&prompts);
    assert_eq!(batch.input_ids, [5, 191, 194, 190, 194]);
    assert!(batch.targets.is_empty());
    for (t, id) in [8, 9, 195].into_iter().enumerate() {
        batch = batch.continued(&[id, 1]);
        assert_eq!(batch.input_ids, [id, 1]);
        assert_eq!(
            (batch.position[0], batch.block_position[0]),
            whole.positions[3 + t]
        );
        assert_eq!(
            (batch.position[1], batch.block_position[1]),
            (0, 2 + t as u32)
        );
        let lens: Vec<_> = batch
            .sequences
            .iter()
            .map(|s| (s.start, s.len, s.context_length))
            .collect();
        assert_eq!(lens, [(0, 1, 2), (1, 1, 1)]);
    }
}

#[test]
fn prompts_are_checked_like_rows() {
    for (line, reason) in [
        (
            r#"{"input_ids":[5,194],"labels":[5,194]}"#,
            "unknown field `labels`",
        ),
        (r#"{"input_ids":[5,194]}"#, "neither [gMASK]"),
        (r#"{"input_ids":[191,5]}"#, "no sop"),
        (r#"{"input_ids":[191,194,201]}"#, "`input_ids[2]` is 201"),
        (r#"{"input_ids":[]}"#, "is empty"),
    ] {
        let error = read_prompts(file(line.as_bytes()).path(), &model())
            .unwrap_err()
            .to_string();
        assert!(error.contains(":1: ") && error.contains(reason), "{error}");
    }
}

#[test]
fn the_reference_rows_read_as_ten_micro_batches_of_two() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden_lora_train.jsonl");
    let rows = read_rows(&path, &model()).unwrap();
    assert_eq!(rows.len(), 20);
    let mut sampler = Sampler::new(20, 2, Order::AsGiven, SamplerState::default()).unwrap();
    for pair in 0..10 {
        let indices = sampler.next_micro_batch();
        assert_eq!(indices, [2 * pair, 2 * pair + 1]);
        let batch = MicroBatch::from_rows(indices.iter().filter_map(|&i| rows.get(i)));
        assert_eq!(batch.sequences.len(), 2);
        for sequence in &batch.sequences {
            let end = sequence.start + sequence.len;
            assert_eq!(batch.input_ids[end - 1], 195, "cut after eop");
            assert_eq!(
                batch.input_ids[sequence.start + sequence.context_length],
                194
            );
        }
    }
}

#[test]
fn an_epoch_sees_every_row_once_and_never_mixes_with_the_next() {
    for order in [Order::AsGiven, Order::Shuffled { seed: 3 }] {
        let mut sampler = Sampler::new(10, 4, order, SamplerState::default()).unwrap();
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let groups: Vec<_> = (0..3).map(|_| sampler.next_micro_batch()).collect();
            assert_eq!(groups.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
            assert_eq!(sampler.state(), SamplerState { epoch, row: 10 });
            let mut seen = groups.concat();
            orders.push(seen.clone());
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        let shuffled = order != Order::AsGiven;
        assert_eq!(orders[0] != orders[1] && orders[1] != orders[2], shuffled);
    }
}

#[test]
fn a_resumed_sampler_goes_on_equally_from_everywhere() {
    for order in [Order::AsGiven, Order::Shuffled { seed: 17 }] {
        let mut whole = Sampler::new(7, 3, order, SamplerState::default()).unwrap();
        for _ in 0..12 {
            let saved = serde_json::to_string(&whole.state()).unwrap();
            let state = serde_json::from_str(&saved).unwrap();
            let mut resumed = Sampler::new(7, 3, order, state).unwrap();
            let mut original = whole.clone();
            for _ in 0..8 {
                assert_eq!(resumed.next_micro_batch(), original.next_micro_batch());
                assert_eq!(resumed.state(), original.state());
            }
            whole.next_micro_batch();
        }
    }
}

#[test]
fn a_position_the_data_does_not_have_is_refused() {
    let state = SamplerState { epoch: 0, row: 8 };
    let error = Sampler::new(7, 3, Order::AsGiven, state)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("row 8") && error.contains("7 rows"),
        "{error}"
    );
    assert!(Sampler::new(0, 3, Order::AsGiven, SamplerState::default()).is_err());
    assert!(serde_json::from_str::<SamplerState>(r#"{"epoch":0,"row":-1}"#).is_err());
}

/// Rows of the given lengths, each with all tokens from sop on as targets.
fn rows_of(lengths: &[usize]) -> Rows {
    let mut rows = Rows::default();
    for &len in lengths {
        let mut row = RawRow {
            input_ids: vec![9; len],
            labels: vec![9; len],
            ..RawRow::default()
        };
        (row.input_ids[0], row.input_ids[1]) = (191, 194);
        row.labels[0] = -100;
        rows.push(&row, &model()).unwrap();
    }
    rows
}

#[test]
fn no_micro_batch_is_larger_than_the_bound() {
    let lengths = [3, 9, 2, 12, 11, 2, 5];
    let rows = rows_of(&lengths);
    let bound = |order, size, row| {
        let state = SamplerState { epoch: 0, row };
        let sampler = Sampler::new(7, size, order, state).unwrap();
        (sampler.max_tokens(&rows), sampler.max_targets(&rows))
    };
    assert_eq!(bound(Order::AsGiven, 1, 0), (12, 11));
    assert_eq!(bound(Order::AsGiven, 2, 0), (14, 12));
    assert_eq!(bound(Order::AsGiven, usize::MAX, 0), (44, 37));
    assert_eq!(bound(Order::Shuffled { seed: 1 }, 2, 0), (23, 21));
    // Resumed where another micro-batch size left off: rows 3 and 4 meet.
    assert_eq!(bound(Order::AsGiven, 2, 3), (23, 21));
    for order in [Order::AsGiven, Order::Shuffled { seed: 5 }] {
        for size in 1..=8 {
            for row in 0..=7 {
                let (most, _) = bound(order, size, row);
                let state = SamplerState { epoch: 0, row };
                let mut sampler = Sampler::new(7, size, order, state).unwrap();
                for _ in 0..20 {
                    let group = sampler.next_micro_batch();
                    assert!(group.iter().map(|&i| lengths[i]).sum::<usize>() <= most);
                }
            }
        }
    }
}

// ---- budgets, buckets and epochs ---------------------------------------------------------------

const ORDERS: [Order; 2] = [Order::AsGiven, Order::Shuffled { seed: 23 }];

/// Lengths from 2 to 20 without an order.
fn lengths(rows: usize) -> Vec<usize> {
    let mut stream = random::Key::new(9, random::Domain::Sampling).stream();
    (0..rows).map(|_| 2 + stream.below(19) as usize).collect()
}

/// Every way to make micro-batches, over a number of rows that none of them divides.
fn samplers(rows: &Rows, state: SamplerState) -> Vec<(String, Sampler)> {
    let mut samplers = Vec::new();
    for order in ORDERS {
        for size in [
            MicroBatchSize::Rows(4),
            MicroBatchSize::Tokens(1),
            MicroBatchSize::Tokens(31),
            MicroBatchSize::Tokens(usize::MAX),
        ] {
            for bucket_window in [None, Some(1), Some(100), Some(10_000)] {
                let batching = Batching {
                    size,
                    bucket_window,
                };
                let sampler = Sampler::over(rows, batching, order, state).unwrap();
                samplers.push((format!("{order:?} {batching:?}"), sampler));
            }
        }
    }
    samplers
}

/// The micro-batches of the epoch that the sampler is at the start of.
fn epoch(sampler: &mut Sampler, rows: usize) -> Vec<Vec<usize>> {
    let mut groups = Vec::new();
    loop {
        groups.push(sampler.next_micro_batch());
        if sampler.state().row == rows {
            return groups;
        }
    }
}

#[test]
fn however_micro_batches_are_made_an_epoch_sees_every_row_once() {
    let lengths = lengths(333);
    let rows = rows_of(&lengths);
    for (name, mut sampler) in samplers(&rows, SamplerState::default()) {
        let (tokens, targets) = (sampler.max_tokens(&rows), sampler.max_targets(&rows));
        let sequences = sampler.max_sequences(&rows);
        let mut micro_batches = 0;
        for number in 0..3 {
            let groups = epoch(&mut sampler, 333);
            let expected = sampler.micro_batches_in_epoch(number);
            assert_eq!(groups.len() as u64, expected, "{name}");
            micro_batches += expected;
            assert_eq!(sampler.steps(number + 1, 1), micro_batches, "{name}");
            assert_eq!(sampler.steps(number + 1, 8), micro_batches.div_ceil(8));
            for group in &groups {
                let sum: usize = group.iter().map(|&row| lengths[row]).sum();
                assert!((1..=sequences).contains(&group.len()), "{name}: {group:?}");
                assert!(
                    sum <= tokens && sum - group.len() <= targets,
                    "{name}: {group:?}"
                );
            }
            let mut seen = groups.concat();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..333), "{name}");
        }
    }
}

#[test]
fn a_budget_is_filled_and_not_exceeded() {
    let lengths = lengths(333);
    let rows = rows_of(&lengths);
    let longest = lengths.iter().max().copied().unwrap();
    for order in ORDERS {
        for budget in [1, 5, longest, 31, 64, usize::MAX] {
            let batching = Batching {
                size: MicroBatchSize::Tokens(budget),
                bucket_window: None,
            };
            let mut sampler =
                Sampler::over(&rows, batching, order, SamplerState::default()).unwrap();
            assert_eq!(
                sampler.max_tokens(&rows),
                budget.min(rows.tokens()).max(longest)
            );
            let groups = epoch(&mut sampler, 333);
            let sum = |group: &[usize]| group.iter().map(|&row| lengths[row]).sum::<usize>();
            for pair in groups.windows(2) {
                assert!(sum(&pair[0]) <= budget || pair[0].len() == 1);
                assert!(
                    sum(&pair[0]) + lengths[pair[1][0]] > budget,
                    "the next row would fit"
                );
            }
            if order == Order::AsGiven {
                assert!(groups.concat().into_iter().eq(0..333));
            }
        }
    }
}

#[test]
fn resumed_from_anywhere_every_sampler_goes_on_equally() {
    let rows = rows_of(&lengths(150));
    for (index, (name, mut whole)) in samplers(&rows, SamplerState::default())
        .into_iter()
        .enumerate()
    {
        for step in 0..90 {
            if step % 7 == index % 7 {
                let saved = serde_json::to_string(&whole.state()).unwrap();
                let state = serde_json::from_str(&saved).unwrap();
                let (_, mut resumed) = samplers(&rows, state).swap_remove(index);
                let mut original = whole.clone();
                for _ in 0..60 {
                    assert_eq!(
                        resumed.next_micro_batch(),
                        original.next_micro_batch(),
                        "{name}"
                    );
                    assert_eq!(resumed.state(), original.state());
                }
            }
            whole.next_micro_batch();
        }
    }
}

/// What a position has in its file has not changed since there were neither budgets nor buckets.
#[test]
fn positions_saved_before_are_read_and_mean_the_same() {
    let state: SamplerState = serde_json::from_str(r#"{"epoch":2,"row":9}"#).unwrap();
    assert_eq!(state, SamplerState { epoch: 2, row: 9 });
    let rows = rows_of(&lengths(31));
    let order = Order::Shuffled { seed: 5 };
    let mut sampler = Sampler::over(&rows, Batching::rows(4), order, state).unwrap();
    assert_eq!(sampler.next_micro_batch(), random::shuffle(5, 2, 31)[9..13]);
}

#[test]
fn buckets_bring_rows_of_similar_length_together_within_their_window() {
    let lengths = lengths(2000);
    let rows = rows_of(&lengths);
    // Mean difference of length of the longest and the shortest row of a micro-batch.
    let spread = |groups: &[Vec<usize>]| {
        let of = |group: &Vec<usize>| {
            let lengths = || group.iter().map(|&row| lengths[row]);
            (lengths().max().unwrap() - lengths().min().unwrap()) as f64
        };
        groups.iter().map(of).sum::<f64>() / groups.len() as f64
    };
    for order in ORDERS {
        let groups = |bucket_window| {
            let batching = Batching {
                size: MicroBatchSize::Rows(8),
                bucket_window,
            };
            let mut sampler =
                Sampler::over(&rows, batching, order, SamplerState::default()).unwrap();
            epoch(&mut sampler, 2000)
        };
        let (plain, bucketed) = (groups(None), groups(Some(512)));
        assert!(spread(&plain) > 10.0 && spread(&bucketed) < 1.0);
        // A window holds the rows that it held before.
        let sorted = |groups: &[Vec<usize>]| {
            let mut rows = groups.concat();
            rows.sort_unstable();
            rows
        };
        for (before, after) in plain.chunks(64).zip(bucketed.chunks(64)) {
            assert_eq!(sorted(before), sorted(after));
        }
        // Shuffled rows do not go from short to long in every window.
        let lengths = bucketed[..64].concat().into_iter().map(|row| lengths[row]);
        assert_eq!(lengths.is_sorted(), order == Order::AsGiven);
    }
}

#[test]
fn rows_too_many_for_a_table_are_shuffled_too() {
    // More than are shuffled in a table; of a sampler over a number nothing else is held.
    let rows = (1 << 22) + 5;
    let order = Order::Shuffled { seed: 1 };
    let mut sampler = Sampler::new(rows, 1000, order, SamplerState::default()).unwrap();
    let mut seen = vec![false; rows];
    for _ in 0..200 {
        for row in sampler.next_micro_batch() {
            assert!(!std::mem::replace(&mut seen[row], true), "row {row} twice");
        }
    }
    let first = seen.iter().take(rows / 2).filter(|&&seen| seen).count();
    assert!(
        first.abs_diff(100_000) < 1500,
        "{first} of 200,000 in the first half"
    );
    let mut resumed = Sampler::new(rows, 1000, order, sampler.state()).unwrap();
    assert_eq!(resumed.next_micro_batch(), sampler.next_micro_batch());
}
