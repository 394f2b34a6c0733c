//! The walls of the house: which room may import which, in what order they are listed, how large a
//! file may be, and what must not stand outside of tests.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

/// What a room may import beside itself and `random`, which is open to all.
enum May {
    /// Every room of a later group.
    Below,
    /// These rooms.
    Only(&'static [&'static str]),
}
use May::{Below, Only};

/// The rooms in reading order, in groups that do not import each other; imports run down the list.
/// docs/ARCHITECTURE.md says what each is for.
const ROOMS: &[(&[&str], May)] = &[
    (&["main"], Below),
    (&["cli"], Below),
    // The demo trains and asks as a person would, with the commands below it.
    (&["demo"], Below),
    // A chat generates, turn after turn; an evaluation generates what it scores; a check asks what a run
    // would say.
    (&["chat", "check", "eval"], Below),
    (&["train", "generate", "plan", "bench", "export"], Below),
    (&["report"], Only(&[])),
    (
        &["pipeline"],
        Only(&[
            "optim",
            "model",
            "adapter",
            "comm",
            "data",
            "checkpoint",
            "backend",
            "config",
        ]),
    ),
    // config: the learning-rate curve reads the resolved `[optimizer]` section as it is.
    (&["optim"], Only(&["adapter", "backend", "config"])),
    (
        &["model"],
        Only(&["adapter", "checkpoint", "quant", "backend", "config"]),
    ),
    (&["adapter"], Only(&["checkpoint", "backend", "config"])),
    (&["comm"], Only(&["backend"])),
    (&["data"], Only(&["config"])),
    (&["checkpoint"], Only(&[])),
    (&["backend"], Only(&["quant"])),
    (&["quant"], Only(&[])),
    (&["config"], Only(&[])),
    (&["random"], Only(&[])),
];

/// Open to every room, because it imports nothing and holds nothing.
const OPEN: &str = "random";
const LARGEST_FILE: usize = 600;
const LARGEST_MEDIAN: usize = 220;

fn group_of(room: &str) -> Option<usize> {
    ROOMS.iter().position(|(rooms, _)| rooms.contains(&room))
}

fn may_import(from: &str, to: &str) -> bool {
    let (Some(from_group), Some(to_group)) = (group_of(from), group_of(to)) else {
        return false;
    };
    from == to
        || to == OPEN
        || match &ROOMS[from_group].1 {
            Below => from_group < to_group,
            Only(rooms) => rooms.contains(&to),
        }
}

// ---- reading Rust ------------------------------------------------------------------------------

/// A word, `::`, or any other single character, with its line from 1.
#[derive(Clone, Debug, PartialEq)]
struct Token {
    text: String,
    line: usize,
}

/// Source as tokens, without white space, comments and the insides of literals.
fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut i, mut found) = (0, Vec::new());
    let mut line_ends = 0;
    let mut counted_to = 0;
    while i < chars.len() {
        line_ends += chars[counted_to..i].iter().filter(|&&c| c == '\n').count();
        counted_to = i;
        let start = i;
        match at(i) {
            c if c.is_whitespace() => i += 1,
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 || i >= chars.len() {
                        break;
                    }
                }
            }
            '"' => i = end_of_string(&chars, i),
            '\'' if at(i + 1) == '\\' || at(i + 2) == '\'' => {
                i += if at(i + 1) == '\\' { 3 } else { 2 };
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            }
            c if is_word(c) => {
                while is_word(at(i)) {
                    i += 1;
                }
                let text: String = chars[start..i].iter().collect();
                let raw = matches!(text.as_str(), "r" | "br" | "cr");
                let hashes = chars[i..].iter().take_while(|&&c| c == '#').count();
                if raw && at(i + hashes) == '"' {
                    let end: Vec<char> = std::iter::once('"')
                        .chain(std::iter::repeat_n('#', hashes))
                        .collect();
                    i += hashes + 1;
                    while i < chars.len() && !chars[i..].starts_with(&end) {
                        i += 1;
                    }
                    i += end.len();
                } else if matches!(text.as_str(), "b" | "c") && at(i) == '"' {
                    i = end_of_string(&chars, i);
                } else if text == "r" && hashes == 1 && is_word(at(i + 1)) {
                    i += 1;
                } else {
                    found.push(Token {
                        text,
                        line: line_ends + 1,
                    });
                }
            }
            ':' if at(i + 1) == ':' => {
                i += 2;
                found.push(Token {
                    text: "::".to_owned(),
                    line: line_ends + 1,
                });
            }
            c => {
                i += 1;
                found.push(Token {
                    text: c.to_string(),
                    line: line_ends + 1,
                });
            }
        }
    }
    found
}

/// One past the closing quote of the string whose opening quote stands at `start`.
fn end_of_string(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn is(tokens: &[Token], start: usize, texts: &[&str]) -> bool {
    tokens.len() >= start + texts.len()
        && texts
            .iter()
            .zip(&tokens[start..])
            .all(|(text, token)| *text == token.text)
}

/// One past the bracket that closes the one at `open`.
fn past_bracket(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0_usize;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

/// The tokens that are compiled outside of tests, and the number of lines that are not.
fn without_tests(tokens: &[Token]) -> (Vec<Token>, usize) {
    let (mut kept, mut lines, mut i) = (Vec::new(), 0, 0);
    while i < tokens.len() {
        let test_only = is(tokens, i, &["#", "[", "cfg", "(", "test", ")", "]"])
            || is(tokens, i, &["#", "[", "cfg", "(", "all", "(", "test", ","]);
        if !test_only {
            kept.push(tokens[i].clone());
            i += 1;
            continue;
        }
        let first = tokens[i].line;
        // The item ends at the first semicolon or after the first braces outside of its brackets.
        while i < tokens.len() {
            match tokens[i].text.as_str() {
                "(" | "[" => i = past_bracket(tokens, i),
                "{" => {
                    i = past_bracket(tokens, i);
                    break;
                }
                ";" => {
                    i += 1;
                    break;
                }
                _ => i += 1,
            }
        }
        lines += tokens[i - 1].line - first + 1;
    }
    (kept, lines)
}

/// Names at the root of the crate that a file refers to, with their lines. `depth`: how far the
/// file's module is below the root.
fn root_names(tokens: &[Token], depth: usize) -> Vec<(String, usize)> {
    let mut names = Vec::new();
    // Of every open brace, whether it is that of an inline module.
    let mut braces = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        match tokens[i].text.as_str() {
            "{" => braces.push(i >= 2 && tokens[i - 2].text == "mod"),
            "}" => {
                braces.pop();
            }
            _ => {}
        }
        let inline = braces.iter().filter(|&&module| module).count();
        let mut supers = 0;
        while is(tokens, i + 2 * supers, &["super", "::"]) {
            supers += 1;
        }
        let root = match tokens[i].text.as_str() {
            "crate" | "mp_train" if is(tokens, i + 1, &["::"]) => Some(i + 2),
            // Under another name the crate could be reached unseen.
            "crate" if is(tokens, i + 1, &["as"]) => Some(i + 1),
            "super" if supers > 0 && supers >= depth + inline => Some(i + 2 * supers),
            _ => None,
        };
        match root {
            Some(next) if is(tokens, next, &["{"]) => {
                let end = past_bracket(tokens, next);
                let mut item = next + 1;
                while item < end - 1 {
                    names.push((tokens[item].text.clone(), tokens[item].line));
                    while item < end - 1 && tokens[item].text != "," {
                        item = if tokens[item].text == "{" {
                            past_bracket(tokens, item)
                        } else {
                            item + 1
                        };
                    }
                    item += 1;
                }
                i = next;
            }
            Some(next) if next < tokens.len() => {
                names.push((tokens[next].text.clone(), tokens[next].line));
                i = next;
            }
            _ => i += 1 + 2 * supers.saturating_sub(1),
        }
    }
    names
}

// ---- the rules ---------------------------------------------------------------------------------

/// Imports in `source` that the table does not allow; `path` is relative to `src/`.
fn forbidden_imports(path: &str, source: &str) -> Vec<String> {
    if path == "lib.rs" {
        return Vec::new();
    }
    let module = path.trim_end_matches(".rs").trim_end_matches("/mod");
    let room = module.split('/').next().unwrap();
    if group_of(room).is_none() {
        return vec![format!(
            "src/{path}: `{room}` is no room of the house; add it to the table"
        )];
    }
    let (tokens, _) = without_tests(&tokens(source));
    root_names(&tokens, module.split('/').count())
        .into_iter()
        .filter(|(name, _)| !may_import(room, name))
        .map(|(name, line)| format!("src/{path}:{line}: `{room}` must not import `{name}`"))
        .collect()
}

/// Calls in `source` that end the program where an error should be returned.
fn forbidden_calls(path: &str, source: &str) -> Vec<String> {
    let (tokens, _) = without_tests(&tokens(source));
    let mut found = Vec::new();
    for i in 0..tokens.len() {
        let call = [".", "unwrap", "("];
        let macros = ["panic", "todo", "unimplemented"];
        let makes_trouble =
            is(&tokens, i, &call) || macros.iter().any(|name| is(&tokens, i, &[name, "!"]));
        if makes_trouble {
            let name = tokens[i].text.replace('.', "unwrap");
            found.push(format!(
                "src/{path}:{}: `{name}` outside of tests",
                tokens[i].line
            ));
        }
    }
    found
}

/// Lines of a file, without its test modules.
fn code_lines(source: &str) -> usize {
    source.lines().count() - without_tests(&tokens(source)).1
}

/// Modules that `lib.rs` lists out of reading order, or that are no rooms.
fn misplaced_modules(lib: &str) -> Vec<String> {
    let (tokens, _) = without_tests(&tokens(lib));
    let order: Vec<&str> = ROOMS
        .iter()
        .flat_map(|(rooms, _)| rooms.iter().copied())
        .collect();
    let mut last = 0;
    let mut found = Vec::new();
    for pair in tokens.windows(2).filter(|pair| pair[0].text == "mod") {
        let name = &pair[1].text;
        match order.iter().position(|room| room == name) {
            None => found.push(format!("src/lib.rs: `{name}` is no room of the house")),
            Some(place) if place < last => {
                found.push(format!(
                    "src/lib.rs: `{name}` stands below `{}`",
                    order[last]
                ));
            }
            Some(place) => last = place,
        }
    }
    found
}

fn too_large(mut sizes: Vec<(String, usize)>) -> Vec<String> {
    sizes.sort_by_key(|&(_, lines)| lines);
    let mut found: Vec<String> = sizes
        .iter()
        .filter(|&&(_, lines)| lines > LARGEST_FILE)
        .map(|(path, lines)| format!("src/{path}: {lines} lines, {LARGEST_FILE} are allowed"))
        .collect();
    let median = sizes.get(sizes.len() / 2).map_or(0, |&(_, lines)| lines);
    if median > LARGEST_MEDIAN {
        found.push(format!(
            "the median file has {median} lines, {LARGEST_MEDIAN} are allowed"
        ));
    }
    found
}

/// Every file under `src/` that is not a test, as (path relative to `src/`, text).
fn sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, root: &Path, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().is_none_or(|name| name != "tests") {
                    walk(&path, root, found);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && path.file_name().is_none_or(|name| name != "tests.rs")
            {
                let relative = path.strip_prefix(root).unwrap().to_string_lossy();
                found.push((
                    relative.replace('\\', "/"),
                    fs::read_to_string(&path).unwrap(),
                ));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&root, &root, &mut found);
    assert!(found.iter().any(|(path, _)| path == "lib.rs"));
    found
}

fn report(violations: Vec<String>) {
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
}

#[test]
fn imports_run_down_the_house() {
    report(
        sources()
            .iter()
            .flat_map(|(path, text)| forbidden_imports(path, text))
            .collect(),
    );
}

#[test]
fn modules_are_listed_in_reading_order() {
    let files = sources();
    let (_, lib) = files.iter().find(|(path, _)| path == "lib.rs").unwrap();
    report(misplaced_modules(lib));
}

#[test]
fn files_are_small() {
    let sizes = sources()
        .into_iter()
        .map(|(path, text)| (path, code_lines(&text)));
    report(too_large(sizes.collect()));
}

#[test]
fn nothing_gives_up_outside_of_tests() {
    report(
        sources()
            .iter()
            .flat_map(|(path, text)| forbidden_calls(path, text))
            .collect(),
    );
}

// ---- the rules find what they look for ---------------------------------------------------------

#[test]
fn the_table_runs_one_way() {
    for (group, (rooms, may)) in ROOMS.iter().enumerate() {
        if let Only(allowed) = may {
            for room in *allowed {
                assert!(group_of(room).unwrap() > group, "{rooms:?} import {room}");
            }
        }
    }
    assert!(may_import("main", "cli") && may_import("train", "report"));
    assert!(!may_import("train", "generate") && !may_import("report", "config"));
    assert!(may_import("checkpoint", "random") && !may_import("checkpoint", "config"));
}

#[test]
fn a_forbidden_import_is_found_in_every_disguise() {
    for source in [
        "use crate::pipeline::schedule::Action;",
        "use crate::{config::run, pipeline};",
        "use crate::{\n    config::{run, model},\n    pipeline::{partition, schedule},\n};",
        "fn f() -> crate::pipeline::X { crate :: /* so */ pipeline::x() }",
        "use super::super::pipeline::schedule;",
        "use super::super::{config, pipeline as p};",
        "mod inner { use super::super::super::pipeline; }",
        "use crate::r#pipeline;",
        "const A: char = '\"'; use crate::pipeline; const B: char = '\"';",
        "fn f<'a>(x: &'a str) { crate::pipeline::f(x) }",
        "const A: &str = r#\"\"#; use crate::pipeline;",
        "#[cfg(test)]\nmod tests { fn f() {} }\nuse crate::pipeline;",
        "#[cfg(test)]\nuse std::{fs, io};\nuse crate::pipeline;",
        "#[cfg(not(test))]\nuse crate::pipeline;",
        "use mp_train::pipeline;",
    ] {
        let found = forbidden_imports("data/reader.rs", source);
        assert!(!found.is_empty(), "not found in {source}");
        assert!(
            found
                .iter()
                .all(|text| text.contains("`data` must not import `pipeline`")),
            "{found:?}"
        );
    }
    for (source, name) in [
        ("use crate as house;", "as"),
        ("use crate::*;", "*"),
        ("use crate::{self};", "self"),
        ("use crate::Reexported;", "Reexported"),
    ] {
        let found = forbidden_imports("data/reader.rs", source);
        assert_eq!(
            found,
            [format!(
                "src/data/reader.rs:1: `data` must not import `{name}`"
            )]
        );
    }
    let found = forbidden_imports("data/mod.rs", "\n\nuse super::pipeline;");
    assert_eq!(
        found,
        ["src/data/mod.rs:3: `data` must not import `pipeline`"]
    );
    assert_eq!(forbidden_imports("attic/mod.rs", "").len(), 1);
    assert_eq!(forbidden_imports("quant.rs", "use crate::config;").len(), 1);
}

#[test]
fn an_allowed_import_is_left_in_peace() {
    for source in [
        "use crate::config::run::RunConfig;",
        "use crate::{config, random::{Key, shuffle}};",
        "pub(crate) fn f() {} pub(in crate::data) fn g() {}",
        "use super::pipeline; use super::{rows, pipeline};",
        "mod inner { use super::super::rows; }",
        "// use crate::pipeline;\n/* crate::pipeline /* crate::model */ crate::comm */",
        "/// [`crate::pipeline`]\nconst A: &str = \"use crate::pipeline; \\\" crate::model\";",
        "const A: &[u8] = br##\"crate::pipeline \"# crate::model\"##;",
        "#[cfg(test)]\n#[allow(clippy::unwrap_used)]\nmod tests { use crate::pipeline; fn f() { {} } }",
        "#[cfg(test)]\nuse crate::{pipeline, model};",
        "#[cfg(all(test, unix))]\nfn f(x: [u8; 3]) { crate::pipeline::f(x) }",
    ] {
        let found = forbidden_imports("data/reader.rs", source);
        assert!(found.is_empty(), "{source}\n{found:?}");
    }
    assert!(forbidden_imports("main.rs", "use mp_train::{cli, config};").is_empty());
}

#[test]
fn a_call_that_gives_up_is_found() {
    for source in [
        "x.unwrap()",
        "x\n    .unwrap ()",
        "panic!(\"no\")",
        "todo!()",
        "unimplemented!()",
    ] {
        assert_eq!(forbidden_calls("a.rs", source).len(), 1, "{source}");
    }
    for source in [
        "x.unwrap_or(1)",
        "// x.unwrap()",
        "\"x.unwrap()\"",
        "std::panic::catch_unwind(f)",
        "#[cfg(test)] mod tests { fn f() { x.unwrap(); panic!() } }",
    ] {
        assert!(forbidden_calls("a.rs", source).is_empty(), "{source}");
    }
}

#[test]
fn modules_out_of_order_are_found() {
    assert!(
        misplaced_modules("pub mod cli;\n\n/// Data.\npub mod data;\n\npub mod config;").is_empty()
    );
    assert_eq!(misplaced_modules("pub mod config;\npub mod data;").len(), 1);
    assert_eq!(misplaced_modules("pub mod helpers;").len(), 1);
}

#[test]
fn large_files_are_found_and_tests_do_not_count() {
    let source = "fn f() {}\n\n#[cfg(test)]\nmod tests {\n    // a\n    fn g() {}\n}\n";
    assert_eq!(code_lines(source), 2);
    let sizes = |lines: &[usize]| lines.iter().map(|&n| (n.to_string(), n)).collect();
    assert!(too_large(sizes(&[600, 10, 220])).is_empty());
    assert_eq!(too_large(sizes(&[601, 10, 20])).len(), 1);
    assert_eq!(too_large(sizes(&[221, 10, 300])).len(), 1);
}
