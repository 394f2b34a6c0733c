//! Places in the work of a stage: what its worker marks and the watch reads.

use super::schedule::Operation;

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Everything before it is done; what it needs of other stages is awaited.
    Input,
    /// It computes.
    Work,
    /// It is done, and its output waits for the one before it to leave.
    Output,
}

/// A place in the work that one command is.
///
/// A step of n operations has the places of these and two more: `n`, where the gradients of the step are
/// completed (`Input` where stages share some, else `Work`), and `n + 1`, where all stages agree (`Input`)
/// and then update (`Work`). A pass without gradients has one operation per chunk and an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Which command, counted from 1; 0 while the stage is loaded.
    pub command: u32,
    /// Which operation of it.
    pub operation: usize,
    /// How far that is.
    pub phase: Phase,
}

impl Place {
    /// The number that a [`Pulse`](crate::backend::Pulse) keeps.
    pub fn pack(self) -> u64 {
        u64::from(self.command) << 32 | (self.operation as u64) << 2 | self.phase as u64
    }

    /// The place that a number stands for.
    pub fn unpack(number: u64) -> Self {
        Place {
            command: (number >> 32) as u32,
            operation: (number as u32 >> 2) as usize,
            phase: match number & 3 {
                0 => Phase::Input,
                1 => Phase::Work,
                _ => Phase::Output,
            },
        }
    }
}

/// What an operation of a program is called in messages: `F3`, `B0`, `exchange after F3`; what comes
/// behind the program is called `update`.
pub(super) fn action_name(program: &[Operation], operation: usize) -> String {
    let Some(found) = program.get(operation) else {
        return "update".to_owned();
    };
    let before = program[..operation].iter().rev();
    let last = before
        .filter_map(|operation| match operation {
            Operation::Run(action) => Some(action),
            Operation::Exchange { .. } => None,
        })
        .next();
    match (found, last) {
        (Operation::Run(action), _) => action.to_string(),
        (Operation::Exchange { .. }, Some(action)) => format!("exchange after {action}"),
        (Operation::Exchange { .. }, None) => "first exchange".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::schedule::Schedule;

    #[test]
    fn a_place_survives_its_packing() {
        for command in [0, 1, u32::MAX] {
            for operation in [0, 1, 70_000] {
                for phase in [Phase::Input, Phase::Work, Phase::Output] {
                    let place = Place {
                        command,
                        operation,
                        phase,
                    };
                    assert_eq!(Place::unpack(place.pack()), place);
                }
            }
        }
    }

    #[test]
    fn operations_have_names() {
        let program = Schedule::gpipe(2, 1).program(1);
        let names: Vec<String> = (0..=program.len())
            .map(|operation| action_name(&program, operation))
            .collect();
        let expected = ["first exchange", "F0", "B0", "exchange after B0", "update"];
        assert_eq!(names, expected);
    }
}
