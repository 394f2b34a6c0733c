//! NCCL between ranks that are threads: what is exchanged, in which order, and what hangs or is refused.

use std::sync::Barrier;

use cudarc::nccl::result::{self, NcclStatus};
use cudarc::nccl::sys::ncclResult_t;

use crate::gpu::{bench, bits, in_a_child};
use crate::ranks::{Answer, grouped, join, on_ranks, settle, state_of, stays_away, wait};
use crate::streams::Adder;

#[track_caller]
fn assert_refused(answer: Answer, expected: ncclResult_t) {
    assert_eq!(answer.err().map(|error| error.0), Some(expected));
}

#[test]
fn neighbours_exchange_both_ways_beside_kernels() {
    for streams in ["late", "early"] {
        for devices in [[0, 1], [0, 0]] {
            let Some(bench) = bench(&[
                ("EMULATOR_STREAMS", streams),
                ("EMULATOR_NCCL_MULTI_RANK", "1"),
            ]) else {
                return;
            };
            let seen = on_ranks(&bench, &devices, |rank| {
                let adder = Adder::new(rank.context.clone());
                let peer = 1 - rank.rank;
                let mut own = rank.floats(&[rank.rank as f32; 32]);
                let mut theirs = rank.floats(&[-1.0; 32]);
                for _ in 0..4 {
                    adder.add(&rank.compute, &mut own, 10.0);
                    rank.transfers.join(&rank.compute).unwrap();
                    grouped(|| {
                        rank.send(&own, peer).unwrap();
                        rank.receive(&mut theirs, peer).unwrap();
                    })
                    .unwrap();
                    let exchanged = rank.launched();
                    rank.compute.wait(&exchanged).unwrap();
                    adder.add(&rank.compute, &mut theirs, 0.5);
                    rank.transfers.join(&rank.compute).unwrap();
                }
                wait(&rank.transfers.record_event(None).unwrap());
                let seen = rank.read(&theirs);
                rank.leave();
                seen
            });
            assert_eq!(seen, [[41.5; 32], [40.5; 32]], "{streams} {devices:?}");
        }
    }
}

#[test]
fn values_travel_along_a_pipeline() {
    let Some(bench) = bench(&[("EMULATOR_DEVICES", "4")]) else {
        return;
    };
    let seen = on_ranks(&bench, &[3, 1, 0, 2], |rank| {
        let adder = Adder::new(rank.context.clone());
        let mut x = rank.floats(&[1.0; 32]);
        if rank.rank > 0 {
            rank.receive(&mut x, rank.rank - 1).unwrap();
            rank.compute.wait(&rank.launched()).unwrap();
        }
        adder.add(&rank.compute, &mut x, 1.0);
        rank.transfers.join(&rank.compute).unwrap();
        if rank.rank < 3 {
            rank.send(&x, rank.rank + 1).unwrap();
        }
        wait(&rank.launched());
        let seen = rank.read(&x)[0];
        rank.leave();
        seen
    });
    assert_eq!(seen, [2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn sums_are_those_in_rank_order_at_all_ranks() {
    let Some(bench) = bench(&[("EMULATOR_DEVICES", "3")]) else {
        return;
    };
    let value =
        |rank: usize, i: usize| (i as f32 * 0.7 + rank as f32).sin() * 10f32.powi(rank as i32);
    let seen = on_ranks(&bench, &[0, 1, 2], |rank| {
        let values: Vec<f32> = (0..100).map(|i| value(rank.rank, i)).collect();
        let mut x = rank.floats(&values);
        rank.all_reduce(&mut x).unwrap();
        wait(&rank.launched());
        let seen = bits(&rank.read(&x));
        rank.leave();
        seen
    });
    let expected: Vec<f32> = (0..100)
        .map(|i| value(0, i) + value(1, i) + value(2, i))
        .collect();
    for sums in seen {
        assert_eq!(sums, bits(&expected));
    }
}

#[test]
fn sends_towards_each_other_hang_until_aborted() {
    let said = in_a_child(
        "nccl::sends_towards_each_other_hang_until_aborted",
        &[],
        || {
            let bench = bench(&[("EMULATOR_QUIET", "0")]).unwrap();
            on_ranks(&bench, &[0, 1], |rank| {
                rank.greet(2);
                let x = rank.floats(&[1.0; 4]);
                rank.send(&x, 1 - rank.rank).unwrap();
                let sent = rank.launched();
                while bench.emulator.counter("nccl_deadlocks") == 0 {
                    assert!(!sent.is_complete());
                }
                assert!(stays_away(&sent));
                assert_eq!(state_of(rank.communicator), ncclResult_t::ncclSuccess);
                rank.abort();
                wait(&sent);
                assert_refused(rank.send(&x, 1 - rank.rank), ncclResult_t::ncclInvalidUsage);
            });
            assert_eq!(bench.emulator.counter("nccl_deadlocks"), 1);
        },
    );
    let Some(said) = said else { return };
    for rank in ["0", "1"] {
        let line = format!("waits in send of 4 float32 to rank {rank}");
        assert!(said.contains("deadlock") && said.contains(&line), "{said}");
    }
}

#[test]
fn to_synchronise_waits_for_what_another_thread_brings() {
    let Some(bench) = bench(&[]) else { return };
    let both = Barrier::new(2);
    let seen = on_ranks(&bench, &[0, 1], |rank| {
        rank.greet(2);
        let mut x = rank.floats(&[rank.rank as f32 + 1.0; 4]);
        if rank.rank == 0 {
            rank.receive(&mut x, 1).unwrap();
            settle(rank.communicator);
            both.wait();
            rank.transfers.synchronize().unwrap();
        } else {
            both.wait();
            std::thread::sleep(std::time::Duration::from_millis(20));
            rank.send(&x, 0).unwrap();
            rank.launched().synchronize().unwrap();
        }
        let seen = rank.read(&x);
        rank.leave();
        seen
    });
    assert_eq!(seen, [[2.0; 4], [2.0; 4]]);
}

#[test]
fn a_first_transfer_is_in_progress_until_its_partner_has_called() {
    for streams in ["late", "early"] {
        let Some(bench) = bench(&[("EMULATOR_STREAMS", streams)]) else {
            return;
        };
        let (asked, both) = (Barrier::new(2), Barrier::new(2));
        on_ranks(&bench, &[0, 1], |rank| {
            let mut x = rank.floats(&[rank.rank as f32; 4]);
            for round in 0..2 {
                if rank.rank == 0 {
                    rank.receive(&mut x, 1).unwrap();
                    // Connected, the call is done long before its partner's.
                    let expected = [ncclResult_t::ncclInProgress, ncclResult_t::ncclSuccess][round];
                    for _ in 0..30 {
                        state_of(rank.communicator);
                    }
                    assert_eq!(state_of(rank.communicator), expected);
                    asked.wait();
                } else {
                    asked.wait();
                    rank.send(&x, 0).unwrap();
                }
                wait(&rank.launched());
                both.wait();
            }
            assert_eq!(rank.read(&x), [1.0; 4]);
            rank.leave();
        });
    }
}

#[test]
fn a_silence_is_explained() {
    let said = in_a_child("nccl::a_silence_is_explained", &[], || {
        let bench = bench(&[("EMULATOR_QUIET", "0"), ("EMULATOR_SILENCE", "0.05")]).unwrap();
        let done = Barrier::new(2);
        on_ranks(&bench, &[0, 1], |rank| {
            rank.greet(2);
            let mut x = rank.floats(&[1.0; 4]);
            if rank.rank == 0 {
                rank.receive(&mut x, 1).unwrap();
                let received = rank.launched();
                for _ in 0..10 {
                    assert!(stays_away(&received));
                }
                rank.abort();
            }
            done.wait();
        });
    });
    let Some(said) = said else { return };
    assert!(said.contains("nothing has moved"), "{said}");
    assert!(
        said.contains("waits in receive of 4 float32 from rank 1"),
        "{said}"
    );
    assert!(
        said.contains("rank 1 of communicator 0 (device 1) has nothing queued"),
        "{said}"
    );
}

#[test]
fn what_is_in_progress_is_neither_launched_nor_usable() {
    let Some(bench) = bench(&[]) else { return };
    let both = Barrier::new(2);
    on_ranks(&bench, &[0, 1], |rank| {
        let mut x = rank.floats(&[rank.rank as f32; 4]);
        let answer = match rank.rank {
            0 => rank.send(&x, 1),
            _ => rank.receive(&mut x, 0),
        };
        assert!(matches!(answer, Ok(NcclStatus::InProgress)));
        // Nobody has asked yet: what is recorded now may come before the transfer.
        let too_early = rank.transfers.record_event(None).unwrap();
        wait(&too_early);
        assert_eq!(rank.read(&x), [rank.rank as f32; 4]);
        assert_refused(rank.send(&x, 1), ncclResult_t::ncclInvalidArgument);
        both.wait();
        wait(&rank.launched());
        assert_eq!(rank.read(&x), [0.0; 4]);
        rank.leave();
    });
}

#[test]
fn a_communicator_is_ready_when_all_ranks_are_there() {
    let Some(bench) = bench(&[("EMULATOR_DEVICES", "3")]) else {
        return;
    };
    let id = result::get_uniqueid().unwrap();
    let contexts = [0, 1, 2].map(|device| bench.device(device));
    let mut communicators = Vec::new();
    for (rank, context) in contexts.iter().enumerate() {
        context.bind_to_thread().unwrap();
        for &early in &communicators {
            assert_eq!(state_of(early), ncclResult_t::ncclInProgress);
        }
        let (communicator, answer) = join(id, rank, 3);
        assert!(matches!(answer, Ok(NcclStatus::InProgress)));
        communicators.push(communicator);
    }
    for communicator in communicators {
        assert_eq!(state_of(communicator), ncclResult_t::ncclSuccess);
        // SAFETY: made above, not used afterwards.
        unsafe { result::comm_abort(communicator) }.unwrap();
    }
}

#[test]
fn blocking_communicators_wait_for_each_other() {
    let Some(bench) = bench(&[]) else { return };
    let id = cudarc::nccl::safe::Id::new().unwrap();
    let sums = std::thread::scope(|scope| {
        [0, 1]
            .map(|rank| {
                let bench = &bench;
                scope.spawn(move || {
                    let stream = bench.device(rank).new_stream().unwrap();
                    let communicator =
                        cudarc::nccl::safe::Comm::from_rank(stream.clone(), rank, 2, id).unwrap();
                    let x = stream.clone_htod(&[rank as f32 + 1.0; 8]).unwrap();
                    let mut sum = stream.alloc_zeros::<f32>(8).unwrap();
                    communicator
                        .all_reduce(&x, &mut sum, &cudarc::nccl::safe::ReduceOp::Sum)
                        .unwrap();
                    stream.clone_dtoh(&sum).unwrap()
                })
            })
            .map(|thread| thread.join().unwrap())
    });
    assert_eq!(sums, [[3.0; 8], [3.0; 8]]);
}

#[test]
fn two_ranks_on_one_device_need_a_library_that_can() {
    for (version, asked) in [("2.26.2", "1"), ("2.30.3", "0"), ("2.30.3", "1")] {
        let name = "nccl::two_ranks_on_one_device_need_a_library_that_can";
        let variables = [("NCCL_MULTI_RANK_GPU_ENABLE", asked), ("VERSION", version)];
        in_a_child(name, &variables, || {
            let variable = |name| std::env::var(name).unwrap();
            let version = variable("VERSION");
            let bench = bench(&[("EMULATOR_NCCL_VERSION", &version)]).unwrap();
            bench.device(0).bind_to_thread().unwrap();
            let allowed = version == "2.30.3" && variable("NCCL_MULTI_RANK_GPU_ENABLE") == "1";
            let expected = match allowed {
                true => ncclResult_t::ncclSuccess,
                false => ncclResult_t::ncclInvalidUsage,
            };
            let id = result::get_uniqueid().unwrap();
            for (communicator, _) in [0, 1].map(|rank| join(id, rank, 2)) {
                assert_eq!(settle(communicator), expected);
            }
        });
    }
}

#[test]
fn what_does_not_fit_is_refused_at_all_ranks() {
    let Some(bench) = bench(&[("EMULATOR_DEVICES", "3")]) else {
        return;
    };
    on_ranks(&bench, &[0, 1, 2], |rank| {
        let mut x = rank.floats(&vec![0.0; 4 + rank.rank]);
        if rank.rank == 0 {
            rank.send(&x, 1).unwrap();
        } else if rank.rank == 1 {
            rank.receive(&mut x, 0).unwrap();
        }
        settle(rank.communicator);
        let moved = rank.transfers.record_event(None).unwrap();
        while state_of(rank.communicator) != ncclResult_t::ncclInvalidUsage {
            assert!(!moved.is_complete() || rank.rank == 2);
        }
        assert_refused(rank.send(&x, 1), ncclResult_t::ncclInvalidUsage);
        rank.abort();
    });
}

#[test]
fn a_communicator_keeps_its_order_across_streams() {
    let Some(bench) = bench(&[("EMULATOR_DEVICES", "3")]) else {
        return;
    };
    let (second_sent, first_may) = (Barrier::new(2), Barrier::new(2));
    on_ranks(&bench, &[0, 1, 2], |rank| {
        rank.greet(3);
        let mut x = rank.floats(&[rank.rank as f32; 4]);
        match rank.rank {
            0 => {
                let mut y = rank.floats(&[9.0; 4]);
                rank.receive_in(&rank.compute, &mut x, 1).unwrap();
                settle(rank.communicator);
                let first = rank.compute.record_event(None).unwrap();
                rank.receive(&mut y, 2).unwrap();
                let second = rank.launched();
                second_sent.wait();
                assert!(stays_away(&second));
                first_may.wait();
                wait(&second);
                wait(&first);
                assert_eq!((rank.read(&x), rank.read(&y)), (vec![1.0; 4], vec![2.0; 4]));
            }
            1 => {
                first_may.wait();
                rank.send(&x, 0).unwrap();
                wait(&rank.launched());
            }
            _ => {
                rank.send(&x, 0).unwrap();
                let sent = rank.launched();
                second_sent.wait();
                wait(&sent);
            }
        }
        rank.leave();
    });
}

#[test]
fn what_can_deadlock_beside_a_waiting_group_is_counted() {
    let Some(bench) = bench(&[]) else { return };
    let counter = |name: &str| bench.emulator.counter(name);
    let both = Barrier::new(2);
    on_ranks(&bench, &[0, 1], |rank| {
        rank.greet(2);
        let mut x = rank.floats(&[1.0; 4]);
        let mut kept = None;
        both.wait(); // nothing else happens on either device until the second meeting
        if rank.rank == 1 {
            both.wait();
            rank.send(&x, 0).unwrap();
        } else {
            bench.emulator.reset_counters();
            rank.receive(&mut x, 1).unwrap();
            let received = rank.launched();
            assert!(stays_away(&received));
            let _adder = Adder::new(rank.context.clone());
            let room = rank.transfers.alloc_zeros::<f32>(1).unwrap();
            kept = Some(room); // to free it would wait for the group
            assert_eq!(counter("allocations_beside_nccl:0"), 1);
            assert_eq!(counter("allocations_beside_nccl:1"), 0);
            assert!(counter("module_loads_beside_nccl:0") > 0);
            both.wait();
        }
        wait(&rank.launched());
        drop(kept);
        rank.leave();
    });
    for (name, expected) in [
        ("nccl_groups", 2),
        ("nccl_groups:0", 1),
        ("nccl_bytes", 16),
        ("nccl_bytes:1", 16),
    ] {
        assert_eq!(counter(name), expected, "{name}");
    }
}

#[test]
fn buffers_and_streams_of_other_devices_are_refused() {
    let Some(bench) = bench(&[]) else { return };
    let far = bench.device(1).new_stream().unwrap();
    let theirs = far.clone_htod(&[1.0f32; 4]).unwrap();
    on_ranks(&bench, &[0], |rank| {
        let own = rank.floats(&[1.0; 4]);
        for answer in [
            rank.send_in(&far, &own, 0),
            rank.send(&theirs, 0),
            rank.send(&own, 7),
        ] {
            assert_refused(answer, ncclResult_t::ncclInvalidArgument);
        }
        // To itself: only within a group.
        assert_refused(rank.send(&own, 0), ncclResult_t::ncclInvalidUsage);
        let mut copy = rank.floats(&[0.0; 4]);
        grouped(|| {
            rank.send(&own, 0).unwrap();
            rank.receive(&mut copy, 0).unwrap();
        })
        .unwrap();
        wait(&rank.launched());
        assert_eq!(rank.read(&copy), [1.0; 4]);
        rank.leave();
    });
}

#[test]
fn errors_have_texts() {
    let Some(bench) = bench(&[("EMULATOR_NCCL_VERSION", "2.27.5")]) else {
        return;
    };
    let _context = bench.device(0);
    assert_eq!(result::get_nccl_version().unwrap(), 22_705);
    // SAFETY: both answer with a text that lives as long as the process.
    let texts = unsafe {
        let text = |at| std::ffi::CStr::from_ptr(at).to_string_lossy().into_owned();
        assert!(result::group_end().is_err());
        [
            text(cudarc::nccl::sys::ncclGetErrorString(
                ncclResult_t::ncclRemoteError,
            )),
            text(cudarc::nccl::sys::ncclGetLastError(std::ptr::null_mut())),
        ]
    };
    assert!(texts[0].contains("remote process"), "{texts:?}");
    assert!(texts[1].contains("ncclGroupEnd"), "{texts:?}");
}
