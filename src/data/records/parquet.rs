//! Parquet: tables by columns, compressed page by page.
//!
//! The `parquet` crate reads schema, levels and encodings; pages are fetched and decompressed here,
//! one per column at a time, so that what a header promises is checked before anything is reserved for
//! it. Only the columns that the template asks for are read. What the crate panics on is an error of
//! the file.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parquet::file::metadata::ParquetMetaData;

use super::{Columns, Content, Field, ReadError, Record};
use crate::data::{FileProblem, TextProblem};

mod codec;
mod column;
mod contained;
mod footer;
mod header;
mod levels;
mod pages;
mod schema;
mod source;
mod thrift;

use column::{Column, NoValue};
use contained::contained;
pub(in crate::data) use footer::MAGIC;
use pages::Pages;
use schema::{Node, Shapes};
use source::Source;

/// Most row groups' worth of columns is one: a row is read from all of its columns.
pub(super) struct Parquet {
    source: Arc<Source>,
    metadata: ParquetMetaData,
    names: Vec<String>,
    columns: Vec<(String, Node)>,
    /// Places in the file of the columns of values that are read.
    leaves: Vec<usize>,
    group: Option<Group>,
    next_group: usize,
    /// The row that is read next, from 1.
    row: usize,
}

/// The columns of a row group, and how many of its rows are left.
struct Group {
    columns: Vec<Column>,
    rows: u64,
}

/// What a row's value cannot be.
enum Unread {
    /// It is longer than a row may be.
    TooLong,
    /// It is no text.
    NotUtf8,
    /// The levels of its columns contradict each other.
    Damaged,
}

impl From<NoValue> for Unread {
    fn from(no_value: NoValue) -> Self {
        match no_value {
            NoValue::NotUtf8 => Unread::NotUtf8,
            NoValue::Missing => Unread::Damaged,
        }
    }
}

impl Parquet {
    /// Opens a file, of which the columns that `wanted` names are read.
    ///
    /// # Errors
    /// What is wrong with its footer, or with the type of one of these columns.
    pub fn open(
        path: &Path,
        wanted: impl Fn(&str) -> bool,
        bytes_read: &Arc<AtomicU64>,
    ) -> Result<Self, ReadError> {
        let source = Source::open(path, bytes_read)?;
        let opened = || {
            let metadata = footer::read(&source)?;
            let schema = metadata.file_metadata().schema();
            let (mut names, mut columns) = (Vec::new(), Vec::new());
            let mut shapes = Shapes::default();
            for column in schema.get_fields() {
                let name = column.name().to_owned();
                let node = shapes.column(column, wanted(&name))?;
                columns.extend(node.map(|node| (name.clone(), node)));
                names.push(name);
            }
            Ok((metadata, names, columns, shapes.leaves))
        };
        let (metadata, names, columns, leaves) = opened().map_err(|message| broken(1, message))?;
        Ok(Self {
            source: Arc::new(source),
            metadata,
            names,
            columns,
            leaves,
            group: None,
            next_group: 0,
            row: 1,
        })
    }

    /// The names of all columns.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    pub fn next(&mut self, limit: usize) -> Result<Option<Record>, ReadError> {
        let row = self.row;
        let group = loop {
            match &mut self.group {
                Some(group) if group.rows > 0 => break group,
                _ => match self.open_group().map_err(|message| broken(row, message))? {
                    Some(group) => self.group = Some(group),
                    None => return Ok(None),
                },
            }
        };
        self.row += 1;
        group.rows -= 1;
        let columns = &mut group.columns;
        contained(|| columns.iter_mut().try_for_each(Column::next_row))
            .map_err(|message| broken(row, message))?;
        let mut found = Columns::default();
        let mut left = limit;
        for (name, node) in &self.columns {
            let problem = match field(node, columns, &mut left) {
                Ok(field) => {
                    found.set(name.clone(), field);
                    continue;
                }
                Err(Unread::TooLong) => TextProblem::TooLong { limit },
                Err(Unread::NotUtf8) => TextProblem::NotUtf8 {
                    column: name.clone(),
                },
                Err(Unread::Damaged) => {
                    let what = "it is damaged (its columns do not fit together)";
                    return Err(broken(row, what.to_owned()));
                }
            };
            return Err(ReadError::Row {
                line: row,
                problem: problem.into(),
            });
        }
        if !columns.iter().all(Column::is_done) {
            let what = "it is damaged (its columns do not fit together)";
            return Err(broken(row, what.to_owned()));
        }
        Ok(Some(Record {
            line: row,
            content: Content::Columns(found),
        }))
    }

    /// The next row group, if there is one.
    fn open_group(&mut self) -> Result<Option<Group>, String> {
        let groups = self.metadata.num_row_groups();
        let done = self.next_group * 1000 / groups.max(1);
        self.source
            .progressed(if groups == 0 { 1000 } else { done as u64 });
        if self.next_group >= groups {
            return Ok(None);
        }
        let group = self.metadata.row_group(self.next_group);
        self.next_group += 1;
        let rows = u64::try_from(group.num_rows())
            .map_err(|_| "a row group of less than no rows".to_owned())?;
        let mut columns = Vec::with_capacity(self.leaves.len());
        for &leaf in self.leaves.iter().filter(|_| rows > 0) {
            let chunk = group.columns().get(leaf);
            let chunk = chunk.ok_or("a row group without some of its columns")?;
            let pages = Pages::of(&self.source, chunk)?;
            columns.push(contained(|| Column::new(chunk.column_descr_ptr(), pages))?);
        }
        Ok(Some(Group { columns, rows }))
    }
}

fn broken(row: usize, message: String) -> ReadError {
    ReadError::Broken {
        line: row,
        problem: FileProblem::Parquet { message },
    }
}

/// A column of the row, of which no more than `left` bytes are kept.
fn field(node: &Node, columns: &mut [Column], left: &mut usize) -> Result<Field, Unread> {
    let mut json = String::new();
    let field = match node {
        Node::Leaf {
            leaf,
            there,
            unsigned,
        } => match value(columns, *leaf, *there, *unsigned)? {
            Some((text, _)) => Field::Text(text),
            None => Field::Null,
        },
        _ => {
            write(node, columns, &mut json, *left)?;
            match json.as_str() {
                "null" => Field::Null,
                _ => Field::Nested(json),
            }
        }
    };
    if let Field::Text(text) | Field::Nested(text) = &field {
        *left = left.checked_sub(text.len()).ok_or(Unread::TooLong)?;
    }
    Ok(field)
}

/// The next value of a column and whether it is a string, if there is one.
fn value(
    columns: &mut [Column],
    leaf: usize,
    there: i16,
    unsigned: bool,
) -> Result<Option<(String, bool)>, Unread> {
    let column = columns.get_mut(leaf).ok_or(Unread::Damaged)?;
    match column.definition() {
        Some(level) if level == there => Ok(Some(column.take(unsigned)?)),
        Some(level) if level < there => {
            column.pass();
            Ok(None)
        }
        _ => Err(Unread::Damaged),
    }
}

/// Writes the next value of a column, or of a part of one, as JSON of no more than `limit` bytes.
fn write(
    node: &Node,
    columns: &mut [Column],
    json: &mut String,
    limit: usize,
) -> Result<(), Unread> {
    if json.len() > limit {
        return Err(Unread::TooLong);
    }
    let first = |columns: &[Column]| {
        let column = columns.get(node.first_leaf()?)?;
        Some((column.definition()?, column.repetition()))
    };
    let pass = |columns: &mut [Column]| {
        node.leaves(&mut |leaf| {
            if let Some(column) = columns.get_mut(leaf) {
                column.pass();
            }
        });
    };
    match node {
        Node::Leaf {
            leaf,
            there,
            unsigned,
        } => match value(columns, *leaf, *there, *unsigned)? {
            Some((text, true)) => json.push_str(&serde_json::Value::from(text).to_string()),
            Some((text, false)) => json.push_str(&text),
            None => json.push_str("null"),
        },
        Node::Struct { there, fields } => {
            let (level, _) = first(columns).ok_or(Unread::Damaged)?;
            if level < *there {
                pass(columns);
                json.push_str("null");
                return Ok(());
            }
            for (index, (name, node)) in fields.iter().enumerate() {
                json.push(if index == 0 { '{' } else { ',' });
                json.push_str(&serde_json::Value::from(name.as_str()).to_string());
                json.push(':');
                write(node, columns, json, limit)?;
            }
            json.push('}');
        }
        Node::List {
            there,
            filled,
            repeated,
            element,
        } => {
            let (level, _) = first(columns).ok_or(Unread::Damaged)?;
            if level < *filled {
                pass(columns);
                json.push_str(if level < *there { "null" } else { "[]" });
                return Ok(());
            }
            json.push('[');
            loop {
                write(element, columns, json, limit)?;
                let next = node.first_leaf().and_then(|leaf| columns.get(leaf));
                match next.and_then(Column::repetition) {
                    Some(level) if level >= *repeated => json.push(','),
                    _ => break,
                }
            }
            json.push(']');
        }
    }
    Ok(())
}
