//! The validator against planted faults, and refusals.

use mp_train::config::run::ScheduleKind;
use mp_train::pipeline::schedule::{Action, Flow, Schedule, ScheduleError, Transfers};

const ONE: ScheduleKind = ScheduleKind::OneForwardOneBackward;
const GPIPE: ScheduleKind = ScheduleKind::Gpipe;

fn f(micro_batch: usize) -> Action {
    Action::forward(micro_batch, 0)
}

fn b(micro_batch: usize) -> Action {
    Action::backward(micro_batch, 0)
}

fn planted(kind: ScheduleKind, stages: &[&[Action]]) -> Schedule {
    let actions = stages.iter().copied().flatten();
    Schedule {
        kind,
        micro_batches: actions.map(|a| a.micro_batch + 1).max().unwrap_or(0),
        virtual_stages: 1,
        stages: stages.iter().map(|s| s.to_vec()).collect(),
    }
}

fn found(kind: ScheduleKind, stages: &[&[Action]]) -> Result<(), ScheduleError> {
    planted(kind, stages).validate()
}

#[test]
fn an_action_that_is_absent_or_too_much_is_found() {
    assert_eq!(found(ONE, &[]), Err(ScheduleError::Empty));
    assert_eq!(found(ONE, &[&[], &[]]), Err(ScheduleError::Empty));
    let mut chunkless = Schedule::gpipe(2, 2);
    chunkless.virtual_stages = 0;
    assert_eq!(chunkless.validate(), Err(ScheduleError::Empty));

    for action in [f(2), Action::forward(1, 1)] {
        let mut beyond = Schedule::gpipe(2, 2);
        beyond.stages[1].push(action);
        let error = ScheduleError::OutOfRange {
            rank: 1,
            action,
            micro_batches: 2,
            virtual_stages: 1,
        };
        assert_eq!(beyond.validate(), Err(error));
    }

    let error = ScheduleError::Repeated {
        rank: 0,
        action: f(0),
    };
    assert_eq!(found(ONE, &[&[f(0), b(0), f(0)]]), Err(error));

    let error = ScheduleError::Missing {
        rank: 0,
        action: b(1),
    };
    assert_eq!(found(GPIPE, &[&[f(0), f(1), b(0)]]), Err(error));

    let error = ScheduleError::BackwardFirst {
        rank: 0,
        action: b(1),
    };
    assert_eq!(found(GPIPE, &[&[f(0), b(1), f(1), b(0)]]), Err(error));
}

#[test]
fn an_order_that_does_not_match_or_ascend_is_found() {
    let straight: &[_] = &[f(0), f(1), b(0), b(1)];
    let crossed: &[_] = &[f(1), f(0), b(0), b(1)];
    let error = ScheduleError::Unmatched {
        from: 0,
        to: 1,
        sent: f(0),
        awaited: f(1),
    };
    assert_eq!(found(GPIPE, &[straight, crossed]), Err(error));
    let crossed: &[_] = &[f(0), f(1), b(1), b(0)];
    let error = ScheduleError::Unmatched {
        from: 1,
        to: 0,
        sent: b(1),
        awaited: b(0),
    };
    assert_eq!(found(GPIPE, &[straight, crossed]), Err(error));

    // GPipe as the paper draws it, backwards in descending order: runs, but adds up differently.
    let descending: &[_] = &[f(0), f(1), b(1), b(0)];
    let error = ScheduleError::NotAscending {
        rank: 0,
        earlier: b(1),
        later: b(0),
    };
    assert_eq!(found(GPIPE, &[descending, descending]), Err(error));
}

/// Each of these is right in every other respect.
#[test]
fn faults_between_chunks_are_found() {
    let build = || Schedule::interleaved(2, 2, 4).unwrap();
    let place = |schedule: &Schedule, rank: usize, action: Action| {
        let mut actions = schedule.stages[rank].iter();
        actions.position(|&other| other == action).unwrap()
    };

    let mut lost = build();
    let at = place(&lost, 1, Action::backward(3, 1));
    lost.stages[1].remove(at);
    let error = ScheduleError::Missing {
        rank: 1,
        action: Action::backward(3, 1),
    };
    assert_eq!(lost.validate(), Err(error));

    let mut early = build();
    let at = place(&early, 1, Action::forward(0, 1));
    let next = place(&early, 1, Action::backward(0, 1));
    early.stages[1].swap(at, next);
    let error = ScheduleError::BackwardFirst {
        rank: 1,
        action: Action::backward(0, 1),
    };
    assert_eq!(early.validate(), Err(error));

    // Stage 1 hands out micro-batch 1 of its first chunk before micro-batch 0 of its second.
    let mut swapped = build();
    let first = place(&swapped, 1, Action::forward(1, 0));
    let second = place(&swapped, 1, Action::forward(0, 1));
    swapped.stages[1].swap(first, second);
    assert_eq!(
        swapped.validate(),
        Err(ScheduleError::Unmatched {
            from: 0,
            to: 1,
            sent: Action::forward(1, 0),
            awaited: Action::forward(0, 1),
        })
    );

    // The right micro-batch, but in another chunk: stage 0 swaps two of its own.
    for (first, second, sent) in [
        (
            Action::forward(0, 1),
            Action::forward(0, 2),
            Action::forward(0, 0),
        ),
        (
            Action::backward(0, 2),
            Action::backward(0, 1),
            Action::backward(0, 2),
        ),
    ] {
        let mut swapped = Schedule::interleaved(2, 3, 4).unwrap();
        let (at, next) = (place(&swapped, 0, first), place(&swapped, 0, second));
        swapped.stages[0].swap(at, next);
        assert_eq!(
            swapped.validate(),
            Err(ScheduleError::Unmatched {
                from: 1,
                to: 0,
                sent,
                awaited: second,
            })
        );
    }

    // The second chunks take micro-batches in another order than the first ones.
    let mut crossed = build();
    for action in crossed.stages.iter_mut().flatten() {
        if action.chunk == 1 {
            action.micro_batch ^= 1;
        }
    }
    assert_eq!(
        crossed.validate(),
        Err(ScheduleError::Unmatched {
            from: 1,
            to: 0,
            sent: Action::forward(0, 0),
            awaited: Action::forward(1, 1),
        })
    );

    // All chunks of all stages agree on an order that does not ascend.
    let mut agreed = build();
    for action in agreed.stages.iter_mut().flatten() {
        action.micro_batch ^= 1;
    }
    assert_eq!(
        agreed.validate(),
        Err(ScheduleError::NotAscending {
            rank: 0,
            earlier: Action::forward(1, 0),
            later: Action::forward(0, 0),
        })
    );

    // One micro-batch through all chunks before the next: runs, unless a stage also wants it back.
    let mut impatient = build();
    for actions in &mut impatient.stages {
        actions.sort_by_key(|action| (action.flow == Flow::Backward, action.micro_batch));
    }
    assert_eq!(impatient.simulate(Transfers::Buffered), Ok(()));
    impatient.stages[0].sort_by_key(|action| (action.micro_batch, action.flow == Flow::Backward));
    assert_eq!(
        impatient.validate(),
        Err(ScheduleError::Deadlock {
            transfers: Transfers::Buffered,
            rank: 0,
            action: Action::backward(0, 1),
        })
    );
}

#[test]
fn stages_that_wait_for_each_other_are_found() {
    // Stage 0 wants B0 back before it hands out F1, stage 1 wants F1 before it starts on B0.
    let straight: &[_] = &[f(0), f(1), b(0), b(1)];
    let impatient: &[_] = &[f(0), b(0), f(1), b(1)];
    let error = ScheduleError::Deadlock {
        transfers: Transfers::Buffered,
        rank: 0,
        action: b(0),
    };
    assert_eq!(found(GPIPE, &[impatient, straight]), Err(error));

    // Stage 0 does all its forwards first, stage 1 hands back B0, B1, .. from the start: fine while
    // sends are buffered. With a mailbox stage 1 stops at B1, which lies there until stage 0 is through
    // with its forwards; exchanges in pairs are one message more patient.
    let mixed = |micro_batches| {
        let busy = &Schedule::gpipe(1, micro_batches).stages[0];
        let alternating = &Schedule::one_forward_one_backward(1, micro_batches).stages[0];
        planted(GPIPE, &[busy, alternating])
    };
    let ends = |transfers| (1..=16).take_while(move |&m| mixed(m).simulate(transfers) == Ok(()));
    assert_eq!(ends(Transfers::Buffered).count(), 16);
    let (grouped, mailbox) = (
        ends(Transfers::Grouped).count(),
        ends(Transfers::Mailbox).count(),
    );
    assert!(
        0 < mailbox && mailbox < grouped && grouped < 16,
        "{mailbox} {grouped}"
    );
    for (micro_batches, transfers) in [
        (grouped, Transfers::Mailbox),
        (grouped + 1, Transfers::Grouped),
    ] {
        let schedule = mixed(micro_batches);
        assert!(matches!(
            schedule.validate(),
            Err(ScheduleError::Deadlock { transfers: found, .. }) if found == transfers
        ));
    }
}

/// Why a send and a receive are posted together, and each flow for itself: without that 1f1b stops for
/// ever as soon as two stages send to each other.
#[test]
fn programs_need_more_than_plain_transfers() {
    for schedule in [
        Schedule::one_forward_one_backward(2, 3),
        Schedule::interleaved(2, 2, 4).unwrap(),
    ] {
        for transfers in [Transfers::Buffered, Transfers::Grouped, Transfers::Mailbox] {
            assert_eq!(schedule.simulate(transfers), Ok(()));
        }
        assert!(matches!(
            schedule.simulate(Transfers::PlainRendezvous),
            Err(ScheduleError::Deadlock {
                transfers: Transfers::PlainRendezvous,
                ..
            })
        ));
    }
}

#[test]
fn more_in_flight_than_the_kind_allows_is_found() {
    let mut greedy = Schedule::gpipe(3, 4);
    greedy.kind = ONE;
    let error = ScheduleError::Slots {
        rank: 0,
        used: 4,
        allowed: 3,
    };
    assert_eq!(greedy.validate(), Err(error));
    // All forwards of both chunks before the first backward.
    let mut greedy = Schedule::interleaved(2, 2, 8).unwrap();
    for actions in &mut greedy.stages {
        actions.sort_by_key(|action| action.flow == Flow::Backward);
    }
    let error = ScheduleError::Slots {
        rank: 0,
        used: 16,
        allowed: 5,
    };
    assert_eq!(greedy.validate(), Err(error));
}

#[test]
fn the_interleaved_schedule_is_refused_with_the_nearest_choices() {
    for stages in 2..=28 {
        for micro_batches in 0..=64 {
            let built = Schedule::interleaved(stages, 1 + 28 / stages, micro_batches);
            let possible = micro_batches > 0 && micro_batches % stages == 0;
            assert_eq!(built.is_ok(), possible);
        }
    }
    let refused = |stages, micro_batches| {
        Schedule::build(ScheduleKind::Interleaved, stages, 2, micro_batches)
            .unwrap_err()
            .to_string()
    };
    let text = refused(4, 6);
    assert!(
        text.contains("over 4 stages with 6 micro-batches"),
        "{text}"
    );
    assert!(
        text.contains("set run.gradient_accumulation to 4 or 8"),
        "{text}"
    );
    let text = refused(4, 3);
    assert!(
        text.contains("set run.gradient_accumulation to 4, or"),
        "{text}"
    );
    assert!(refused(7, 64).contains("to 63 or 70"));
}
