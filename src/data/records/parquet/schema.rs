//! The shape of a column: where its values are, and at which levels something is there.

use parquet::basic::{ConvertedType, LogicalType, Repetition, Type as Physical};
use parquet::schema::types::Type;

/// A column, or a part of one. Levels are definition levels: a value has the level of all that is
/// there around it.
#[derive(Debug)]
pub(super) enum Node {
    /// Values.
    Leaf {
        /// Its place among all columns of values that are read.
        leaf: usize,
        /// The level at which there is a value.
        there: i16,
        /// Whether numbers are to be read as unsigned.
        unsigned: bool,
    },
    /// Named parts.
    Struct {
        /// The level at which it is there.
        there: i16,
        /// The parts.
        fields: Vec<(String, Node)>,
    },
    /// Elements.
    List {
        /// The level at which the list is there, perhaps empty.
        there: i16,
        /// The level at which an element is there.
        filled: i16,
        /// The repetition level of a second element.
        repeated: i16,
        /// The elements.
        element: Box<Node>,
    },
}

impl Node {
    /// The first of its columns of values.
    pub fn first_leaf(&self) -> Option<usize> {
        match self {
            Node::Leaf { leaf, .. } => Some(*leaf),
            Node::Struct { fields, .. } => fields.first().and_then(|(_, node)| node.first_leaf()),
            Node::List { element, .. } => element.first_leaf(),
        }
    }

    /// Calls `each` for its columns of values.
    pub fn leaves(&self, each: &mut impl FnMut(usize)) {
        match self {
            Node::Leaf { leaf, .. } => each(*leaf),
            Node::Struct { fields, .. } => fields.iter().for_each(|(_, node)| node.leaves(each)),
            Node::List { element, .. } => element.leaves(each),
        }
    }
}

/// Levels of what stands around a type.
#[derive(Clone, Copy, Default)]
struct Around {
    definition: i16,
    repetition: i16,
}

/// Columns of values are numbered in the order of the schema; those that are read again from 0.
#[derive(Default)]
pub(super) struct Shapes {
    /// The place in the file of every column of values that is read.
    pub leaves: Vec<usize>,
    seen: usize,
}

impl Shapes {
    /// The shape of a top-level column that is read; of one that is not, only its columns of values
    /// are passed over.
    ///
    /// # Errors
    /// A type that is no text and has no form as JSON.
    pub fn column(&mut self, column: &Type, read: bool) -> Result<Option<Node>, String> {
        if !read {
            self.seen += count_leaves(column);
            return Ok(None);
        }
        let node = self.node(column, Around::default());
        node.map(Some)
            .map_err(|found| format!("column `{}` holds {found}, expected text", column.name()))
    }

    fn node(&mut self, column: &Type, mut around: Around) -> Result<Node, String> {
        let info = column.get_basic_info();
        let repetition = match info.has_repetition() {
            true => info.repetition(),
            false => Repetition::REQUIRED,
        };
        match repetition {
            Repetition::REQUIRED => {}
            Repetition::OPTIONAL => around.definition += 1,
            Repetition::REPEATED => {
                // A list that nothing says is one: it is never null.
                let there = around.definition;
                around.definition += 1;
                around.repetition += 1;
                return Ok(Node::List {
                    there,
                    filled: around.definition,
                    repeated: around.repetition,
                    element: Box::new(self.inner(column, around)?),
                });
            }
        }
        if let Some(repeated) = repeated_child(column) {
            let there = around.definition;
            around.definition += 1;
            around.repetition += 1;
            let element = match repeated {
                Type::GroupType { fields, .. } if is_wrapper(column, repeated) => {
                    self.node(&fields[0], around)?
                }
                element => self.inner(element, around)?,
            };
            return Ok(Node::List {
                there,
                filled: around.definition,
                repeated: around.repetition,
                element: Box::new(element),
            });
        }
        self.inner(column, around)
    }

    /// A type without its own repetition.
    fn inner(&mut self, column: &Type, around: Around) -> Result<Node, String> {
        match column {
            Type::GroupType { fields, .. } => {
                let field = |field: &std::sync::Arc<Type>| {
                    Ok((field.name().to_owned(), self.node(field, around)?))
                };
                let fields: Vec<_> = fields.iter().map(field).collect::<Result<_, String>>()?;
                match fields.is_empty() {
                    true => Err("a group of nothing".to_owned()),
                    false => Ok(Node::Struct {
                        there: around.definition,
                        fields,
                    }),
                }
            }
            Type::PrimitiveType { physical_type, .. } => {
                let unsigned = check_type(column, *physical_type)?;
                self.leaves.push(self.seen);
                self.seen += 1;
                Ok(Node::Leaf {
                    leaf: self.leaves.len() - 1,
                    there: around.definition,
                    unsigned,
                })
            }
        }
    }
}

fn count_leaves(column: &Type) -> usize {
    match column {
        Type::GroupType { fields, .. } => fields.iter().map(|field| count_leaves(field)).sum(),
        Type::PrimitiveType { .. } => 1,
    }
}

/// The repeated part of a group that is marked as a list or a map.
fn repeated_child(column: &Type) -> Option<&Type> {
    let Type::GroupType { basic_info, fields } = column else {
        return None;
    };
    let logical = matches!(
        basic_info.logical_type_ref(),
        Some(LogicalType::List | LogicalType::Map)
    );
    let converted = matches!(
        basic_info.converted_type(),
        ConvertedType::LIST | ConvertedType::MAP | ConvertedType::MAP_KEY_VALUE
    );
    match fields.as_slice() {
        [child] if logical || converted => {
            let info = child.get_basic_info();
            let repeats = info.has_repetition() && info.repetition() == Repetition::REPEATED;
            repeats.then_some(&**child)
        }
        _ => None,
    }
}

/// Whether the repeated group of a list only wraps its element, by the rules of the format.
fn is_wrapper(list: &Type, repeated: &Type) -> bool {
    let one = repeated.is_group() && repeated.get_fields().len() == 1;
    let name = repeated.name();
    one && name != "array" && name != format!("{}_tuple", list.name())
}

/// Whether a number is unsigned, of a type that can be put into text.
fn check_type(column: &Type, physical: Physical) -> Result<bool, String> {
    let info = column.get_basic_info();
    let converted = info.converted_type();
    let logical = info.logical_type_ref();
    let is_text = || {
        let text = match logical {
            Some(logical) => {
                matches!(
                    logical,
                    LogicalType::String | LogicalType::Json | LogicalType::Enum
                )
            }
            None => true,
        };
        text && matches!(
            converted,
            ConvertedType::NONE | ConvertedType::UTF8 | ConvertedType::JSON | ConvertedType::ENUM
        )
    };
    let is_number = || {
        let number = matches!(logical, None | Some(LogicalType::Integer { .. }));
        number
            && !matches!(
                converted,
                ConvertedType::DECIMAL
                    | ConvertedType::DATE
                    | ConvertedType::TIME_MILLIS
                    | ConvertedType::TIME_MICROS
                    | ConvertedType::TIMESTAMP_MILLIS
                    | ConvertedType::TIMESTAMP_MICROS
            )
    };
    match physical {
        Physical::BYTE_ARRAY if is_text() => Ok(false),
        Physical::INT32 | Physical::INT64 if is_number() => Ok(matches!(
            converted,
            ConvertedType::UINT_8
                | ConvertedType::UINT_16
                | ConvertedType::UINT_32
                | ConvertedType::UINT_64
        )),
        Physical::BOOLEAN | Physical::FLOAT | Physical::DOUBLE => Ok(false),
        _ => Err(match logical {
            Some(logical) => format!("values of type {logical:?}"),
            None => format!("values of type {physical} ({converted})"),
        }),
    }
}
