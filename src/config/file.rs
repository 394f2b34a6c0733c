//! A TOML configuration file: its values, and where in the file each of them stands.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Key, Origin, Place};
use super::keys::SECTIONS;
use super::raw::RawConfig;
use super::spelling::nearest;

/// Longest configuration file that is read; a person writes some kilobytes.
const MAX_BYTES: u64 = 1 << 20;

/// A configuration file as typed.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    /// Its values.
    pub raw: RawConfig,
    path: PathBuf,
    entries: Vec<Entry>,
}

/// Where a key stands.
#[derive(Clone, Debug)]
struct Entry {
    key: Key,
    line: usize,
    /// Bytes of the value.
    span: Range<usize>,
    /// The value as written, on one line and not too long.
    found: String,
}

impl ConfigFile {
    /// Reads a TOML file of at most 1 MiB and checks its syntax, names and types.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = read_text(path, MAX_BYTES)?;
        Self::parse(path, &text)
    }

    /// The same for text that is already in memory; `path` is for messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let error_at = |offset: usize, message: String| ConfigError::Toml {
            path: path.to_owned(),
            line: line_of(text, offset),
            message,
        };
        let table = DeTable::parse(text).map_err(|error| {
            let offset = error.span().map_or(0, |span| span.start);
            error_at(offset, error.message().to_owned())
        })?;
        let entries = list_entries(text, table.get_ref())
            .map_err(|(offset, message)| error_at(offset, message))?;
        let raw = toml::from_str(text).map_err(|error: toml::de::Error| {
            let span = error.span().unwrap_or(0..0);
            let expected = plain_types(error.message());
            match entries.iter().find(|entry| entry.contains(&span)) {
                Some(Entry {
                    key, line, found, ..
                }) => ConfigError::Toml {
                    path: path.to_owned(),
                    line: *line,
                    message: format!("[{}] {} = {found}: {expected}", key.section, key.name),
                },
                None => error_at(span.start, expected),
            }
        })?;
        Ok(ConfigFile {
            raw,
            path: path.to_owned(),
            entries,
        })
    }

    /// Where `key` stands in this file, if it is there.
    pub(super) fn place(&self, key: Key) -> Option<Place> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        let origin = Origin::File {
            path: self.path.clone(),
            line: entry.line,
        };
        Some(Place {
            key,
            origin,
            found: entry.found.clone(),
        })
    }
}

impl Entry {
    fn contains(&self, span: &Range<usize>) -> bool {
        self.span.start <= span.start && span.end <= self.span.end
    }
}

/// Reads a text file of at most `max_bytes`.
pub(super) fn read_text(path: &Path, max_bytes: u64) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(max_bytes + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > max_bytes {
        let message = format!("longer than {max_bytes} bytes: not a configuration file");
        return Err(failed(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            message,
        )));
    }
    Ok(text)
}

/// All keys of all sections, or the offset and description of the first that is not known.
fn list_entries(text: &str, table: &DeTable<'_>) -> Result<Vec<Entry>, (usize, String)> {
    let mut entries = Vec::new();
    for (name, value) in table.iter() {
        let offset = name.span().start;
        let Some(&(section, keys)) = SECTIONS.iter().find(|(known, _)| known == name.get_ref())
        else {
            return Err((offset, unknown_section(name.get_ref())));
        };
        let DeValue::Table(table) = value.get_ref() else {
            let message = format!(
                "`{section}` is a section: write [{section}] on a line of its own, its keys below"
            );
            return Err((offset, message));
        };
        for (name, value) in table.iter() {
            let offset = name.span().start;
            let Some(&known) = keys.iter().find(|known| *known == name.get_ref()) else {
                return Err((offset, unknown_key(section, keys, name.get_ref())));
            };
            entries.push(Entry {
                key: Key {
                    section,
                    name: known,
                },
                line: line_of(text, offset),
                span: value.span(),
                found: on_one_line(text.get(value.span()).unwrap_or_default()),
            });
        }
    }
    Ok(entries)
}

fn unknown_section(name: &str) -> String {
    if let Some((section, _)) = SECTIONS.iter().find(|(_, keys)| keys.contains(&name)) {
        return format!("`{name}` belongs under [{section}]");
    }
    let sections = SECTIONS.iter().map(|(section, _)| *section);
    match nearest(name, sections.clone()) {
        Some(section) => format!("there is no section [{name}]; did you mean [{section}]?"),
        None => {
            let known: Vec<String> = sections.map(|section| format!("[{section}]")).collect();
            format!(
                "there is no section [{name}]; there are {}",
                known.join(" ")
            )
        }
    }
}

fn unknown_key(section: &str, keys: &[&str], name: &str) -> String {
    if let Some((home, _)) = SECTIONS.iter().find(|(_, keys)| keys.contains(&name)) {
        return format!("[{section}] has no key `{name}`; it belongs under [{home}]");
    }
    if let Some(near) = nearest(name, keys.iter().copied()) {
        return format!("[{section}] has no key `{name}`; did you mean `{near}`?");
    }
    let everywhere = SECTIONS
        .iter()
        .flat_map(|(section, keys)| keys.iter().map(move |k| (section, k)));
    if let Some(near) = nearest(name, everywhere.clone().map(|(_, key)| *key))
        && let Some((home, _)) = everywhere.clone().find(|(_, key)| **key == near)
    {
        return format!("[{section}] has no key `{name}`; did you mean `{near}` under [{home}]?");
    }
    format!(
        "[{section}] has no key `{name}`; it has {}",
        keys.join(", ")
    )
}

/// The line, from 1, of a byte offset.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text
        .bytes()
        .take(offset)
        .filter(|byte| *byte == b'\n')
        .count()
}

fn on_one_line(value: &str) -> String {
    const LONGEST: usize = 60;
    let words: Vec<&str> = value.split_whitespace().collect();
    let line = words.join(" ");
    if line.chars().count() <= LONGEST {
        return line;
    }
    line.chars().take(LONGEST).chain("..".chars()).collect()
}

/// The type names of Rust, in words: the reader writes TOML.
fn plain_types(message: &str) -> String {
    let Some((found, expected)) = message.rsplit_once(", expected ") else {
        return message.to_owned();
    };
    let expected = match expected {
        "u64" | "usize" | "u32" => "a whole number, 0 or more",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list such as [\"..\", \"..\"]",
        "path string" => "a path in quotes",
        "a string" => "text in quotes",
        other => other,
    };
    format!("{found}, expected {expected}")
}
