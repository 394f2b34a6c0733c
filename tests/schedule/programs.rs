//! Every generated schedule, validated, and its programs executed on mock transports.

use mp_train::config::run::ScheduleKind;
use mp_train::pipeline::schedule::{Action, Flow, Operation, Schedule};

use super::executor::{Order, Transport, World};
use super::{for_all_schedules, schedules};

#[test]
fn every_generated_schedule_validates_and_keeps_its_promises() {
    for_all_schedules(|schedule, what| {
        assert_eq!(schedule.validate(), Ok(()), "{what}");
        let (p, v, m) = (
            schedule.stages.len(),
            schedule.virtual_stages,
            schedule.micro_batches,
        );
        for rank in 0..p {
            let expected = match schedule.kind {
                ScheduleKind::Gpipe => m,
                ScheduleKind::Interleaved if v > 1 => {
                    (m * v).min(2 * (p - rank - 1) + (v - 1) * p + 1)
                }
                _ => m.min(p - rank),
            };
            assert_eq!(schedule.in_flight(rank), expected, "{what}, rank {rank}");
            let slots: Vec<usize> = (0..v).map(|chunk| schedule.slots(rank, chunk)).collect();
            assert!(
                slots.iter().all(|&slots| (1..=m).contains(&slots)),
                "{what}"
            );
            assert!(slots.iter().sum::<usize>() >= expected, "{what}");
            if v == 1 {
                assert_eq!(slots, [expected], "{what}, rank {rank}");
            }
            for (flow, chunk) in [Flow::Forward, Flow::Backward]
                .into_iter()
                .flat_map(|flow| (0..v).map(move |chunk| (flow, chunk)))
            {
                let actions = schedule.stages[rank].iter();
                let of_chunk = actions.filter(|a| a.flow == flow && a.chunk == chunk);
                assert!(of_chunk.map(|a| a.micro_batch).eq(0..m), "{what}");
            }
        }
    });
}

/// Carries out every program with tokens instead of activations, on both kinds of transport, with the
/// stages advanced in several orders.
#[test]
fn every_program_runs_on_mock_transports() {
    for_all_schedules(|schedule, what| {
        for transport in [Transport::Grouped, Transport::Mailbox] {
            for order in [
                Order::FirstStageFirst,
                Order::LastStageFirst,
                Order::Random(7),
            ] {
                World::new(schedule, transport)
                    .run(order)
                    .unwrap_or_else(|error| panic!("{what}, {transport:?}, {order:?}: {error}"));
            }
        }
    });
}

#[test]
fn interleaved_on_one_stage_or_with_one_chunk_is_1f1b() {
    for micro_batches in 1..=64 {
        let plain = Schedule::one_forward_one_backward(1, micro_batches);
        for chunks in 1..=28 {
            let interleaved = Schedule::interleaved(1, chunks, micro_batches).unwrap();
            assert_eq!(interleaved.virtual_stages, 1);
            assert_eq!(interleaved.stages, plain.stages);
        }
    }
    let plain = Schedule::one_forward_one_backward(4, 12);
    let interleaved = Schedule::interleaved(4, 1, 12).unwrap();
    assert_eq!(interleaved.stages, plain.stages);
}

/// The executor finds what it is there to find: programs in which a message is missing, goes astray,
/// or comes in the wrong order, and orders that cannot end.
#[test]
fn the_executor_finds_planted_faults() {
    let schedule = Schedule::interleaved(2, 2, 4).unwrap();
    let planted = |transport, plant: &dyn Fn(&mut Vec<Vec<Operation>>)| {
        let mut world = World::new(&schedule, transport);
        plant(&mut world.programs);
        world.run(Order::Random(3)).unwrap_err()
    };
    for transport in [Transport::Grouped, Transport::Mailbox] {
        let error = planted(transport, &|programs| {
            let of_first = |operation: &Operation| matches!(operation, Operation::Exchange { .. });
            let place = programs[1].iter().rposition(of_first).unwrap();
            programs[1].remove(place);
        });
        assert!(error.contains("stuck"), "{error}");

        let error = planted(transport, &|programs| {
            for program in programs {
                let swap = |action: &mut Action| {
                    if action.flow == Flow::Forward {
                        action.micro_batch ^= 1;
                    }
                };
                for operation in program {
                    match operation {
                        Operation::Run(action) => swap(action),
                        Operation::Exchange { receive, .. } => {
                            receive.iter_mut().for_each(|(_, action)| swap(action));
                        }
                    }
                }
            }
        });
        assert!(error.contains("out of order"), "{error}");

        let error = planted(transport, &|programs| {
            let first = programs[1]
                .iter()
                .position(|op| matches!(op, Operation::Run(_)));
            let Some(Operation::Run(action)) = first.map(|place| &mut programs[1][place]) else {
                panic!("a program without actions");
            };
            action.chunk = 1;
        });
        assert!(error.contains("gets"), "{error}");
    }
}

#[test]
fn an_exchange_names_what_it_sends_and_awaits() {
    let all = schedules(4, 8);
    let all = all.iter().flat_map(|s| (0..4).map(move |rank| (s, rank)));
    for (schedule, rank) in all {
        let (p, program) = (schedule.stages.len(), schedule.program(rank));
        let mut runs = Vec::new();
        for operation in &program {
            match *operation {
                Operation::Run(action) => runs.push(action),
                Operation::Exchange {
                    flow,
                    send,
                    receive,
                } => {
                    assert!(send.is_some() || receive.is_some());
                    let (ahead, behind) = match flow {
                        Flow::Forward => ((rank + 1) % p, (rank + p - 1) % p),
                        Flow::Backward => ((rank + p - 1) % p, (rank + 1) % p),
                    };
                    assert!(send.is_none_or(|to| to == ahead));
                    assert!(receive.is_none_or(|(from, _)| from == behind));
                    if send.is_some() {
                        assert_eq!(runs.last().map(|action| action.flow), Some(flow));
                    }
                    let rest = schedule.stages[rank][runs.len()..].iter();
                    let next = rest.copied().find(|action| action.flow == flow);
                    assert!(receive.is_none_or(|(_, action)| Some(action) == next));
                }
            }
        }
        assert_eq!(runs, schedule.stages[rank]);
    }
}
