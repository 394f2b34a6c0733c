//! Lists and objects of JSON that end in an error, not in full memory, when they are too long.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// A list, or the members of an object as pairs, of at most `MOST` elements.
pub(super) struct AtMost<T, const MOST: usize>(pub Vec<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for AtMost<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Elements::<T, MOST>(PhantomData))
    }
}

/// As [`AtMost`], of an object.
pub(super) struct MembersAtMost<T, const MOST: usize>(pub Vec<(String, T)>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for MembersAtMost<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Members::<T, MOST>(PhantomData))
    }
}

struct Elements<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for Elements<T, MOST> {
    type Value = AtMost<T, MOST>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MOST} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = list.next_element()? {
            if elements.len() == MOST {
                return Err(Error::custom(format_args!(
                    "a list has more than {MOST} elements"
                )));
            }
            elements.push(element);
        }
        Ok(AtMost(elements))
    }
}

struct Members<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for Members<T, MOST> {
    type Value = MembersAtMost<T, MOST>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object of at most {MOST} members")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = object.next_entry()? {
            if members.len() == MOST {
                return Err(Error::custom(format_args!(
                    "an object has more than {MOST} members"
                )));
            }
            members.push(member);
        }
        Ok(MembersAtMost(members))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn too_long_is_an_error() {
        let list = |json| serde_json::from_str::<AtMost<u32, 2>>(json).map(|list| list.0);
        assert_eq!(list("[1, 2]").unwrap(), [1, 2]);
        let error = list("[1, 2, 3]").unwrap_err().to_string();
        assert!(error.contains("more than 2 elements"), "{error}");
        let members = |json| serde_json::from_str::<MembersAtMost<u32, 1>>(json).map(|m| m.0);
        assert_eq!(members("{\"a\": 1}").unwrap(), [("a".to_owned(), 1)]);
        let error = members("{\"a\": 1, \"b\": 2}").err().unwrap().to_string();
        assert!(error.contains("more than 1 members"), "{error}");
    }
}
