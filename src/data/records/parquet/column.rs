//! The values of one column, row by row.

use std::fmt::Write;

use parquet::column::reader::{ColumnReader, ColumnReaderImpl, get_column_reader};
use parquet::data_type::{
    BoolType, ByteArray, ByteArrayType, DataType, DoubleType, FloatType, Int32Type, Int64Type,
};
use parquet::errors::{ParquetError, Result};
use parquet::schema::types::ColumnDescPtr;

use super::pages::Pages;

/// A column of values in one row group, at one of its rows.
pub(super) struct Column {
    reader: Values,
    max_def: i16,
    max_rep: i16,
    definition: Vec<i16>,
    repetition: Vec<i16>,
    entries: usize,
    /// The next entry, and the next value, which entries without one do not have.
    at: usize,
    value: usize,
}

enum Values {
    Bool(ColumnReaderImpl<BoolType>, Vec<bool>),
    Int32(ColumnReaderImpl<Int32Type>, Vec<i32>),
    Int64(ColumnReaderImpl<Int64Type>, Vec<i64>),
    Float(ColumnReaderImpl<FloatType>, Vec<f32>),
    Double(ColumnReaderImpl<DoubleType>, Vec<f64>),
    Bytes(ColumnReaderImpl<ByteArrayType>, Vec<ByteArray>),
}

/// Why a value cannot be put into text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoValue {
    /// The levels promise more values than there are.
    Missing,
    /// Bytes that are no text.
    NotUtf8,
}

impl Column {
    /// The column behind these pages.
    pub fn new(descriptor: ColumnDescPtr, pages: Pages) -> Result<Self> {
        let (max_def, max_rep) = (descriptor.max_def_level(), descriptor.max_rep_level());
        let reader = match get_column_reader(descriptor, Box::new(pages)) {
            ColumnReader::BoolColumnReader(reader) => Values::Bool(reader, Vec::new()),
            ColumnReader::Int32ColumnReader(reader) => Values::Int32(reader, Vec::new()),
            ColumnReader::Int64ColumnReader(reader) => Values::Int64(reader, Vec::new()),
            ColumnReader::FloatColumnReader(reader) => Values::Float(reader, Vec::new()),
            ColumnReader::DoubleColumnReader(reader) => Values::Double(reader, Vec::new()),
            ColumnReader::ByteArrayColumnReader(reader) => Values::Bytes(reader, Vec::new()),
            _ => return Err(ParquetError::NYI("values of this type".to_owned())),
        };
        Ok(Self {
            reader,
            max_def,
            max_rep,
            definition: Vec::new(),
            repetition: Vec::new(),
            entries: 0,
            at: 0,
            value: 0,
        })
    }

    /// Goes on to the next row.
    pub fn next_row(&mut self) -> Result<()> {
        let Self {
            definition,
            repetition,
            max_def,
            max_rep,
            ..
        } = self;
        definition.clear();
        repetition.clear();
        let (def, rep) = (
            (*max_def > 0).then_some(definition),
            (*max_rep > 0).then_some(repetition),
        );
        let (rows, entries) = match &mut self.reader {
            Values::Bool(reader, values) => read(reader, def, rep, values)?,
            Values::Int32(reader, values) => read(reader, def, rep, values)?,
            Values::Int64(reader, values) => read(reader, def, rep, values)?,
            Values::Float(reader, values) => read(reader, def, rep, values)?,
            Values::Double(reader, values) => read(reader, def, rep, values)?,
            Values::Bytes(reader, values) => read(reader, def, rep, values)?,
        };
        if rows != 1 || entries == 0 {
            let what = "a column with less rows than its row group";
            return Err(ParquetError::General(what.to_owned()));
        }
        (self.entries, self.at, self.value) = (entries, 0, 0);
        Ok(())
    }

    /// The definition level of the next entry of this row.
    pub fn definition(&self) -> Option<i16> {
        match self.max_def {
            0 => (self.at < self.entries).then_some(0),
            _ => self.definition.get(self.at).copied(),
        }
    }

    /// The repetition level of the next entry; `None` behind the last one of the row.
    pub fn repetition(&self) -> Option<i16> {
        match self.max_rep {
            0 => (self.at < self.entries).then_some(0),
            _ => self.repetition.get(self.at).copied(),
        }
    }

    /// Passes over an entry without a value.
    pub fn pass(&mut self) {
        self.at += 1;
    }

    /// Takes the value of the next entry, as text; whether it is a string.
    pub fn take(&mut self, unsigned: bool) -> std::result::Result<(String, bool), NoValue> {
        let index = self.value;
        self.at += 1;
        self.value += 1;
        let text = match &self.reader {
            Values::Bytes(_, values) => {
                let bytes = values.get(index).ok_or(NoValue::Missing)?;
                let text = std::str::from_utf8(bytes.data()).map_err(|_| NoValue::NotUtf8)?;
                return Ok((text.to_owned(), true));
            }
            Values::Bool(_, values) => values.get(index).map(bool::to_string),
            Values::Int32(_, values) => values.get(index).map(|&value| match unsigned {
                true => (value as u32).to_string(),
                false => value.to_string(),
            }),
            Values::Int64(_, values) => values.get(index).map(|&value| match unsigned {
                true => (value as u64).to_string(),
                false => value.to_string(),
            }),
            Values::Float(_, values) => values.get(index).map(|&value| number(value, value.into())),
            Values::Double(_, values) => values.get(index).map(|&value| number(value, value)),
        };
        Ok((text.ok_or(NoValue::Missing)?, false))
    }

    /// Whether all entries of the row were taken or passed over.
    pub fn is_done(&self) -> bool {
        self.at == self.entries
    }
}

/// A floating-point number as JSON has it; null for what JSON has no form for.
fn number(value: impl std::fmt::Debug, as_double: f64) -> String {
    let mut text = String::new();
    match as_double.is_finite() {
        // Writing to a String cannot fail.
        true => drop(write!(text, "{value:?}")),
        false => text.push_str("null"),
    }
    text
}

/// Reads one row; how many rows it were and how many entries it has.
fn read<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    definition: Option<&mut Vec<i16>>,
    repetition: Option<&mut Vec<i16>>,
    values: &mut Vec<T::T>,
) -> Result<(usize, usize)> {
    values.clear();
    let (rows, _, entries) = reader.read_records(1, definition, repetition, values)?;
    Ok((rows, entries))
}
